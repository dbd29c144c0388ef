"A disk that notes what was synced, so that a test knows what a loss of power would leave."
import os, shutil
from pathlib import Path


def hidden(path): return any(part.endswith(".part") or part == ".running.json" for part in Path(path).parts)


class Disk:
    """Watches what is renamed into place in `folder`, and what is deleted: `faults` has what a loss of power would
    undo too late. `after(path)` is called when `path` was renamed, before its folder is synced."""
    def __init__(self, folder, monkeypatch, after=lambda path: None):
        self.folder, self.synced, self.pending, self.faults, self.after = Path(folder), {}, {}, [], after
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "truncate"):
            monkeypatch.setattr(os, name, self.watched(name, getattr(os, name)))

    def watched(self, name, real):
        def function(*args, **options):
            if name == "fsync": self.on_fsync(os.fstat(args[0]))
            elif name in ("rename", "replace") and self.ours(args[1]): self.on_rename(*args, real)
            elif name == "mkdir" and self.ours(args[0]): self.on_new(args[0], real(*args, **options))
            else:
                if name in ("unlink", "rmdir", "truncate"): self.on_delete(*args, **options)
                return real(*args, **options)
            if name == "fsync": real(*args)
        return function

    def ours(self, path): return self.folder in Path(path).absolute().parents and not hidden(path)

    def on_fsync(self, status):
        self.synced[status.st_dev, status.st_ino] = status.st_size, status.st_mtime_ns
        self.pending.pop((status.st_dev, status.st_ino), None)

    def is_synced(self, path):
        status = os.stat(path)
        return self.synced.get((status.st_dev, status.st_ino)) == (status.st_size, status.st_mtime_ns)

    def on_new(self, path, _):
        status = os.stat(Path(path).parent)
        self.pending[status.st_dev, status.st_ino] = str(path)

    def on_rename(self, source, path, real):
        for each in [Path(source), *Path(source).rglob("*")]:
            if not self.is_synced(each): self.faults.append(f"{each} was not synced before it became {path}")
        self.on_new(path, real(source, path))
        self.after(Path(path))

    def on_delete(self, path, *args, dir_fd=None):
        if dir_fd is not None: path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        if not self.ours(path): return
        self.faults += [f"{path} was deleted before {new} was sure to be there" for new in self.pending.values()]

    def left(self, target, without=None):
        "Copy what a loss of power leaves now: what was not synced is zeros; `without` a rename that was not."
        shutil.copytree(self.folder, target)
        for path in self.folder.rglob("*"):
            copy = target/path.relative_to(self.folder)
            if path.is_file() and not self.is_synced(path): copy.write_bytes(bytes(path.stat().st_size))
        if without: (shutil.rmtree if without.is_dir() else os.unlink)(target/without.relative_to(self.folder))
        return target
