"""A small disk, or one that turns read-only, for a process that was forked for it: real errors in every layer, C++ and
Rust included. The mounts are that process's own, and end with it."""
import ctypes, os

NEW_MOUNTS, NEW_USER, REMOUNT, READ_ONLY, PRIVATE = 0x20000, 0x10000000, 0x20, 0x1, 0x44000
LIBC = ctypes.CDLL(None, use_errno=True)


def mount(folder, flags=0, options=""):
    if LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))


def small_disk(folder, size):
    "Put an empty disk of `size` bytes in the place of `folder`. Without root's rights a process is root of its own."
    ids = os.getuid(), os.getgid()
    if LIBC.unshare(NEW_MOUNTS):
        if LIBC.unshare(NEW_USER | NEW_MOUNTS): raise PermissionError(ctypes.get_errno(), "no mounts of one's own")
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
            with open(f"/proc/self/{name}", "w") as f: f.write(text)
    LIBC.mount(b"none", b"/", None, PRIVATE, None)
    mount(folder, options=f"size={size}")


def resize(folder, size): mount(folder, REMOUNT, f"size={size}")


def make_read_only(folder): mount(folder, REMOUNT | READ_ONLY)
