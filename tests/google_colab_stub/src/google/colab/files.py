"Files between the kernel and a browser, which here is `_stub.uploads`, `_stub.downloads` and `_stub.views`."
import os

from google.colab import _stub

__all__ = ["download", "upload", "upload_file", "view"]


def upload(target_dir=""):
    "Save what the user picked (`_stub.uploads`) into `target_dir`; returns saved path -> bytes."
    saved = {}
    for name, data in _picked().items():
        path = _unique(os.path.join(target_dir, name))
        print(f"Saving {name} to {path}")
        with open(path, "wb") as f: f.write(data)
        saved[path] = data
    return saved


def upload_file(filename):
    "Save the one file that the user picked as `filename`."
    picked = _picked()
    if not picked: raise ValueError("File has not been uploaded")
    if len(picked) > 1: raise ValueError("Multiple files received, please upload a single file")
    for name, data in picked.items():
        with open(filename, "wb") as f: f.write(data)
        print(f"Saved {name} to {os.path.join(os.getcwd(), filename)}")


def download(filename):
    "Note the file as downloaded; the real one returns before the transfer."
    _shown(filename, _stub.downloads)


def view(filepath):
    "Note the file as shown in the file viewer."
    _shown(filepath, _stub.views)


def _picked():
    from google.colab import _message
    script = {"script": "google.colab._files._uploadFiles()"}
    _message.blocking_request("cell_javascript_eval", request=script, timeout_sec=None)
    return dict(_stub.uploads)


def _shown(path, log):
    if not os.path.exists(path): raise FileNotFoundError(f"Cannot find file: {path}")
    import IPython
    IPython.get_ipython().kernel
    log.append(os.path.abspath(path))


def _unique(path):
    base, extension = os.path.splitext(path)
    counter = 0
    while os.path.lexists(path): path = f"{base} ({(counter := counter + 1)}){extension}"
    return path
