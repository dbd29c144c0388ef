"Fixtures for tests/google_colab_stub. A test imports those it uses: `from helpers.colab_stub import colab, stub`."
import os, sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from colab_gpt2.core import drive_top

STUB = Path(__file__).parents[1]/"google_colab_stub"
SOURCE = STUB/"src"


def environment(**variables):
    "The variables for a subprocess that is to find the stub."
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **variables}


def watch_deletions(monkeypatch):
    "The list to which the size of each file of a Drive is added when it is deleted."
    sizes, unlink = [], os.unlink
    def unlinked(path, *, dir_fd=None):
        folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        size = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_size
        if drive_top(os.path.join(folder, path)): sizes.append(size)
        unlink(path, dir_fd=dir_fd)
    monkeypatch.setattr(os, "unlink", unlinked)
    return sizes


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """google.colab._stub, freshly imported, not on Colab. The folder `tmp_path/drive-backing` is behind the Drive,
    whose usual place is in `tmp_path/content`: what was left in this machine's own /content is not looked at."""
    for name in ("COLAB_RELEASE_TAG", "TBE_EPHEM_CREDS_ADDR", "TBE_RUNTIME_ADDR", "COLAB_STUB_FAULTS",
                 "COLAB_STUB_SECRETS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLAB_STUB_DRIVE", str(tmp_path/"drive-backing"))
    monkeypatch.setattr("colab_gpt2.runtime.MOUNT", tmp_path/"content"/"drive")
    monkeypatch.syspath_prepend(str(SOURCE))
    from google.colab import _stub, drive
    yield _stub
    drive._unmount()
    _stub.faults.set(**vars(_stub.Faults()))
    for name in [n for n in sys.modules if n == "google.colab" or n.startswith("google.colab.")]: del sys.modules[name]
    if "google" in sys.modules: vars(sys.modules["google"]).pop("colab", None)


@pytest.fixture
def colab(stub, tmp_path):
    "A cell of a Colab notebook: `.mountpoint` to mount at, `.backing` folder of the Drive, `.stub` with the switches."
    (tmp_path/"content").mkdir()
    mountpoint, backing = tmp_path/"content"/"drive", tmp_path/"drive-backing"
    with stub.pretend(): yield SimpleNamespace(stub=stub, faults=stub.faults, mountpoint=mountpoint, backing=backing)
