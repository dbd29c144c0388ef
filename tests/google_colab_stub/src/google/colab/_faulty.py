"Files that fail on demand: `open` and the file functions of `os`, replaced while a Drive is mounted or a fault is on."
import builtins
import contextlib
import errno
import io
import os
import pathlib
import time

from google.colab import _stub

real_open = io.open
LOOK, LIST = ["stat", "access"], ["listdir", "scandir"]
CHANGE = ["mkdir", "rmdir", "unlink", "remove", "truncate", "ftruncate", "chmod", "utime"]
BOTH = ["rename", "replace", "link"]  # of two paths
replaced = ["open", "close", "read", "write", "fsync", "sendfile", "statvfs", *LOOK, *LIST, *CHANGE, *BOTH]
real = {name: getattr(os, name) for name in replaced if hasattr(os, name)}
handles = {}  # descriptor -> (path on the Drive, (device, inode)), for files opened while the hooks are in
FILE_FAULTS = ("full", "quota", "over_quota", "denied", "read_only", "io_error", "disconnected", "truncated",
               "corrupted", "slow", "bytes_per_second")
state = {"suspended": False, "mountpoint": None, "readonly": False, "hooked": False}


@contextlib.contextmanager
def suspended():
    "The stub's own file work, which no fault hits."
    before, state["suspended"] = state["suspended"], True
    try: yield
    finally: state["suspended"] = before


def on_drive(path, dir_fd=None):
    "The absolute path of what `path` (a path or a descriptor) names, if that is on the Drive; else None."
    if state["suspended"]: return None
    if isinstance(path, int): return of_handle(path)
    if not isinstance(path, (str, bytes, os.PathLike)): return None
    path = os.fsdecode(path)
    if dir_fd is not None:
        folder = of_handle(dir_fd)
        return folder and os.path.join(folder, path)
    path = os.path.abspath(path)
    roots = [r for r in (state["mountpoint"], os.environ.get("COLAB_STUB_DRIVE")) if r]
    for spelling in (path, os.path.realpath(path)):  # realpath asks lstat and readlink, which are not replaced
        for root in roots:
            for r in (os.path.abspath(root), os.path.realpath(root)):
                if spelling == r or spelling.startswith(r + os.sep): return path
    return None


def identity(descriptor):
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def of_handle(descriptor):
    "The path behind a descriptor; None also for one that was closed behind our back and serves another file now."
    path, known = handles.get(descriptor, (None, None))
    return path if path and known == identity(descriptor) else None


def due(name, kind):
    "Whether the fault `name` hits an operation of this kind; a number counts the reads and writes that it still hits."
    value = getattr(_stub.faults, name)
    if value is True: return name == "disconnected" or kind in ("list", "read", "write")
    if not value or kind not in ("read", "write"): return False
    setattr(_stub.faults, name, value - 1)
    return True


def operation(path, kind):
    "Raise what the switches say for an operation on the Drive; kind is look, list, change, read or write."
    def fail(number): raise OSError(number, os.strerror(number), path)
    if _stub.faults.slow and kind in ("read", "write"): time.sleep(_stub.faults.slow)
    if due("disconnected", kind): fail(errno.ENOTCONN)
    if due("io_error", kind): fail(errno.EIO)
    if kind in ("change", "write") and (_stub.faults.read_only or state["readonly"]): fail(errno.EROFS)
    if kind in ("change", "write") and _stub.faults.denied: fail(errno.EACCES)
    if kind == "write" and _stub.faults.over_quota: fail(errno.EDQUOT)


def write_through(path, data, position, write):
    "Write `data` as far as the switches let it; the count that is returned may be a lie, as it is on the real Drive."
    operation(path, "write")
    faults, data = _stub.faults, bytes(data)
    if faults.bytes_per_second: time.sleep(len(data) / faults.bytes_per_second)
    if faults.corrupted: data = bytes([data[0] ^ 1]) + data[1:] if data else data
    if faults.truncated is not None:
        kept = data[:max(0, faults.truncated - position)]
        if kept: write(kept)
        return len(data)
    if faults.full is None: return write(data)
    if data and faults.full <= 0: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    written = write(data[:faults.full])
    faults.full -= written
    return written


class FaultyFile(io.FileIO):
    "The raw file under every file that is opened on the Drive."

    def __init__(self, path, file, mode, closefd, opener):
        super().__init__(file, mode, closefd=closefd, opener=opener)
        self.path = path
        handles[self.fileno()] = path, identity(self.fileno())

    def close(self):  # its number, and after a deletion its inode too, may serve another file at once
        if not self.closed: handles.pop(self.fileno(), None)
        super().close()

    def write(self, data): return write_through(self.path, data, self.tell(), super().write)

    def readinto(self, buffer):
        operation(self.path, "read")
        return super().readinto(buffer)

    def read(self, size=-1):
        operation(self.path, "read")
        return super().read(size)

    def readall(self):
        operation(self.path, "read")
        return super().readall()

    def truncate(self, size=None):
        operation(self.path, "change")
        return super().truncate(size)


def faulty_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
    "`open`, with a FaultyFile at the bottom when the file is on the Drive."
    path = on_drive(file)
    if path is None: return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    writes = any(c in mode for c in "wax+")
    operation(path, "change" if writes else "look")
    raw = FaultyFile(path, file, mode.replace("b", "").replace("t", ""), closefd, opener)
    if buffering == 0: return raw
    kind = io.BufferedRandom if "+" in mode else io.BufferedWriter if writes else io.BufferedReader
    buffered = kind(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
    if "b" in mode: return buffered
    text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
    text.mode = mode
    return text


def hooked(name, kind, paths=1):
    "`os.name` that consults the switches for its first `paths` arguments."
    def function(*args, **kwargs):
        keywords = [kwargs.get(k) for k in (("src_dir_fd", "dst_dir_fd") if paths == 2 else ("dir_fd",))]
        for i, arg in enumerate(args[:paths] or ["."]):
            if path := on_drive(arg, keywords[i]): operation(path, kind)
        return real[name](*args, **kwargs)
    return function


def os_open(path, flags, mode=0o777, *, dir_fd=None):
    where = on_drive(path, dir_fd)
    if where: operation(where, "change" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) else "look")
    descriptor = real["open"](path, flags, mode, dir_fd=dir_fd)
    if where: handles[descriptor] = where, identity(descriptor)
    return descriptor


def os_close(descriptor):
    handles.pop(descriptor, None)
    real["close"](descriptor)


def os_write(descriptor, data):
    path = on_drive(descriptor)
    if not path: return real["write"](descriptor, data)
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    return write_through(path, data, position, lambda piece: real["write"](descriptor, piece))


def os_sendfile(out_fd, in_fd, *args, **kwargs):
    "Refused on the Drive with the error that makes shutil fall back on read and write."
    for descriptor in (out_fd, in_fd):
        if path := on_drive(descriptor): raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK), path)
    return real["sendfile"](out_fd, in_fd, *args, **kwargs)


def os_statvfs(path):
    answer, where = real["statvfs"](path), on_drive(path)
    if where: operation(where, "look")
    if not where or _stub.faults.quota is None: return answer
    blocks = _stub.faults.quota // answer.f_frsize
    return os.statvfs_result((*answer[:3], blocks, blocks, *answer[5:]))  # f_bfree, f_bavail


def hooks():
    kinds = {"look": LOOK, "list": LIST, "read": ["read"], "write": ["fsync"], "change": CHANGE}
    table = {name: hooked(name, kind) for kind, names in kinds.items() for name in names}
    table |= {name: hooked(name, "change", paths=2) for name in BOTH}
    table |= {"open": os_open, "close": os_close, "write": os_write, "sendfile": os_sendfile, "statvfs": os_statvfs}
    return {name: function for name, function in table.items() if name in real}


def put(name, function):
    "Put `function` in the place of `os.name`, also in the sets that say what it can do (shutil.copystat asks them)."
    for able in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks, os.supports_effective_ids):
        if real[name] in able: able.add(function)
    setattr(os, name, function)
    in_pathlib(name, function)


def in_pathlib(name, function):
    "Python 3.10's pathlib keeps references of its own to the functions of `os`, and to `open`."
    accessor = getattr(pathlib, "_NormalAccessor", None)
    if hasattr(accessor, name): setattr(accessor, name, staticmethod(function))


def install_or_remove():
    "Put the hooks in when a Drive is mounted or a file fault is on; take them out when neither is."
    default = _stub.Faults()
    faulty = any(getattr(_stub.faults, name) != getattr(default, name) for name in FILE_FAULTS)
    wanted = state["mountpoint"] is not None or faulty
    if wanted == state["hooked"]: return
    for name, function in (hooks() if wanted else real).items(): put(name, function)
    builtins.open = io.open = faulty_open if wanted else real_open
    in_pathlib("open", builtins.open)
    handles.clear()
    state["hooked"] = wanted
