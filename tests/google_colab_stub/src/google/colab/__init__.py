"A stand-in for google.colab; see the README beside pyproject.toml. `errors` and `userdata` are not imported here, as in the real package."
from google.colab import _stub, auth, drive, files, output, runtime

__all__ = ["auth", "drive", "files", "output", "runtime"]
__version__ = "0.0.1a2"
