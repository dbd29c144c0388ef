"What the stub pretends, and which faults are on. The README lists the switches."
import atexit
import builtins
import contextlib
import dataclasses
import json
import os
import shutil
import tempfile

requests, downloads, views = [], [], []
uploads, javascript = {}, {}
secrets = json.loads(os.environ.get("COLAB_STUB_SECRETS") or "{}")


@dataclasses.dataclass
class Faults:
    "The switches; `with faults(full=4096): ...` turns some on for a while."
    authorization_denied: bool = False
    authorization_failed: bool = False
    mount_failed: "bool | str" = False
    mount_timeout: bool = False
    flush_failed: bool = False
    full: "int | None" = None
    quota: "int | None" = None
    over_quota: bool = False
    denied: bool = False
    read_only: bool = False
    io_error: "bool | int" = False
    disconnected: "bool | int" = False
    truncated: "int | None" = None
    corrupted: bool = False
    slow: float = 0.0
    bytes_per_second: "float | None" = None
    secret_timeout: bool = False
    unassign_failed: bool = False

    @contextlib.contextmanager
    def __call__(self, **switches):
        before = dataclasses.asdict(self)
        self.set(**switches)
        try: yield self
        finally: self.set(**before)

    def set(self, **switches):
        "Turn switches on or off until further notice."
        from google.colab import _faulty
        if unknown := set(switches) - set(dataclasses.asdict(self)):
            raise TypeError(f"no such fault: {', '.join(sorted(unknown))}")
        for name, value in switches.items(): setattr(self, name, value)
        _faulty.install_or_remove()


faults = Faults()


def secret(key):
    "The front end's answer for a secret; a value of None is one that the notebook may not read."
    return {"exists": key in secrets, "access": secrets.get(key) is not None, "payload": secrets.get(key) or ""}


def on_vm():
    "Whether this process believes it runs on a Colab VM (the real package looks for /var/colab/hostname)."
    return "COLAB_RELEASE_TAG" in os.environ


def drive_folder():
    "The folder behind the Drive, made when it is missing."
    folder = os.environ.get("COLAB_STUB_DRIVE")
    if not folder:
        folder = os.environ["COLAB_STUB_DRIVE"] = tempfile.mkdtemp(prefix="colab-stub-drive-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("MyDrive", "Shareddrives"): os.makedirs(os.path.join(folder, name), exist_ok=True)
    return os.path.abspath(folder)


@contextlib.contextmanager
def changed(mapping, new):
    "`mapping` with the items of `new`, as it was afterwards."
    before = {key: mapping[key] for key in new if key in mapping}
    mapping.update(new)
    try: yield
    finally:
        for key in new: mapping.pop(key, None)
        mapping.update(before)


@contextlib.contextmanager
def colab_shell():
    "Colab's shell where IPython, and code that runs in a cell, find it."
    from IPython.core.interactiveshell import InteractiveShell
    from google.colab._shell import Shell
    before, shell = InteractiveShell._instance, Shell()
    InteractiveShell._instance = shell
    try:
        with changed(vars(builtins), {"get_ipython": lambda: shell}): yield
    finally: InteractiveShell._instance = before


@contextlib.contextmanager
def pretend(kernel=True, drive=None):
    """Be on a Colab VM: in a cell, or in a subprocess of one (`kernel=False`). `drive` is the folder behind the Drive,
    which is unmounted at the end."""
    from google.colab import drive as drive_module
    address = "127.0.0.1:9"
    new = {"COLAB_RELEASE_TAG": "release-colab_stub", "TBE_EPHEM_CREDS_ADDR": address, "TBE_RUNTIME_ADDR": address}
    if drive is not None: new["COLAB_STUB_DRIVE"] = os.fspath(drive)
    with changed(os.environ, new), colab_shell() if kernel else contextlib.nullcontext():
        try: yield
        finally: drive_module._unmount()


faults_of_environment = json.loads(os.environ.get("COLAB_STUB_FAULTS") or "{}")
if faults_of_environment: faults.set(**faults_of_environment)
