"`python -m colab_gpt2 …` is `colab-gpt2 …`: what torchrun and accelerate launch start with -m."
from .cli import main

if __name__ == "__main__": main()
