"A stand-in for google.colab; see README.md. As in the real package, `errors` and `userdata` are not imported here."
from google.colab import _stub, auth, drive, files, output, runtime

__all__ = ["auth", "drive", "files", "output", "runtime"]
__version__ = "0.0.1a2"
