"The module that the command of 2020 is started by: `python -m colab_gpt2.run_language_modeling`."
import sys

from colab_gpt2.legacy.run_language_modeling import main
from colab_gpt2.ranks import leave

if __name__ == "__main__":
    leave(code=(code := main()))
    sys.exit(code)
