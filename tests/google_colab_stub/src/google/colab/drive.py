"A Drive that is a folder. Mounting puts links to it under the mountpoint; unmounting removes them, not the files."
import os

from google.colab import _faulty, _stub

__all__ = ["flush_and_unmount", "mount"]
LINKS = {"MyDrive": "MyDrive", "My Drive": "MyDrive", "Shareddrives": "Shareddrives"}


def mount(mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
    "Mount the Drive at `mountpoint`. The checks come in the order of the real one, and so do their messages."
    if not _stub.on_vm(): raise NotImplementedError("Mounting drive is unsupported in this environment.")
    if " " in mountpoint: raise ValueError("Mountpoint must not contain a space.")
    os.environ["TBE_EPHEM_CREDS_ADDR"]
    from google.colab import _message
    _message.blocking_request("request_auth", request={"authType": "dfs_ephemeral"}, timeout_sec=int(timeout_ms / 1000))
    mountpoint = os.path.expanduser(mountpoint)
    if not force_remount and os.path.isdir(os.path.join(mountpoint, "My Drive")):
        print(f"Drive already mounted at {mountpoint}; to attempt to forcibly remount, "
              f'call drive.mount("{mountpoint}", force_remount=True).')
        return
    with _faulty.suspended():
        _unmount()
        _check(mountpoint)
        if _stub.faults.mount_timeout:
            import pexpect
            raise pexpect.TIMEOUT("Timeout exceeded.")
        if reason := _stub.faults.mount_failed: raise ValueError("mount failed" + ("" if reason is True else reason))
        _link(mountpoint)
    _faulty.state.update(mountpoint=os.path.abspath(mountpoint), readonly=readonly)
    _stub.faults.set(disconnected=False)  # a stale mount is cleared by mounting anew
    print(f"Mounted at {mountpoint}")


def flush_and_unmount(timeout_ms=24 * 60 * 60 * 1000):
    "Unmount the Drive; its files stay in the folder behind it."
    if not _stub.on_vm(): raise NotImplementedError("Flushing and unmounting drive is unsupported in this environment.")
    os.environ["TBE_EPHEM_CREDS_ADDR"]
    if not _mounted_at():
        print("Drive not mounted, so nothing to flush and unmount.")
        return
    if _stub.faults.flush_failed: raise ValueError("flush_and_unmount failed")
    _unmount()


def _check(mountpoint):
    if os.path.islink(mountpoint): raise ValueError("Mountpoint must not be a symlink")
    if os.path.isdir(mountpoint) and os.listdir(mountpoint):
        raise ValueError("Mountpoint must not already contain files")
    if not os.path.isdir(mountpoint) and os.path.exists(mountpoint):
        raise ValueError("Mountpoint must either be a directory or not exist")
    normed = os.path.normpath(mountpoint)
    if "/" in normed and not os.path.exists(os.path.dirname(normed)):
        raise ValueError("Mountpoint must be in a directory that exists")


def _note():
    "The file that tells every process where this Drive is mounted; the real one asks /bin/mount."
    return os.path.join(_stub.drive_folder(), "mounted-at")


def _mounted_at():
    with _faulty.suspended():
        if "COLAB_STUB_DRIVE" not in os.environ or not os.path.exists(_note()): return None
        with open(_note()) as f: return f.read()


def _link(mountpoint):
    os.makedirs(mountpoint, exist_ok=True)
    for name, target in LINKS.items():
        os.symlink(os.path.join(_stub.drive_folder(), target), os.path.join(mountpoint, name))
    with open(_note(), "w") as f: f.write(os.path.abspath(mountpoint))


def _unmount():
    with _faulty.suspended():
        if mountpoint := _mounted_at():
            for name in LINKS:
                if os.path.islink(os.path.join(mountpoint, name)): os.unlink(os.path.join(mountpoint, name))
            os.unlink(_note())
    _faulty.state.update(mountpoint=None, readonly=False)
    _faulty.install_or_remove()
