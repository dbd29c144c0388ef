"The stub of google.colab: the contract of the real one, and every switch."
import errno, importlib, inspect, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

from helpers.colab_stub import SOURCE, STUB, colab, environment, stub

API = Path(__file__).parents[2]/"shared"/"colab"/"api.json"
needs_api = pytest.mark.skipif(not API.exists(), reason="shared/colab/api.json is not beside the checkout")
api = json.loads(API.read_text()) if API.exists() else {}
functions = [name for name, fact in api.items() if isinstance(fact, dict) and "params" in fact]


def named(name):
    module, name = name.rsplit(".", 1)
    return getattr(importlib.import_module(f"google.colab.{module}"), name)


def python(code, **env):
    "stdout of `code` in a process of its own that finds the stub."
    result = subprocess.run([sys.executable, "-c", code], env=environment(**env), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- the contract

@needs_api
@pytest.mark.parametrize("name", functions)
def test_signature(stub, name):
    found = {p.name: "REQUIRED" if p.default is p.empty else list(p.default) if p.default == () else p.default
             for p in inspect.signature(named(name)).parameters.values()}
    assert found == api[name]["params"]


@needs_api
def test_hierarchy(stub):
    stated = dict(api["hierarchy"])
    for fact in api.values():
        for line in fact.get("raises", []) if isinstance(fact, dict) else []:
            if found := re.match(r"(userdata\.\w+) \(([\w.]+)", line): stated[found[1]] = found[2]
    assert "userdata.TimeoutException" in stated
    for name, base in stated.items():
        assert named(name).__bases__ == (Exception if base == "Exception" else named(base),), name


@needs_api
def test_printed_lines(colab, capsys):
    from google.colab import drive
    at = str(colab.mountpoint)
    for _ in range(2): assert drive.mount(at) is None
    drive.flush_and_unmount()
    drive.flush_and_unmount()
    lines = [line.replace("{mountpoint}", at) for line in api["drive.mount"]["prints"]]
    assert capsys.readouterr().out.splitlines() == [*lines, api["drive.flush_and_unmount"]["prints_if_unmounted"]]


def test_what_the_package_imports():
    modules, file = python("""
import sys, google.colab
print(sorted(m for m in sys.modules if m.startswith('google')))
print(getattr(google, '__file__', None))""").splitlines()
    assert "google.colab.drive" in modules and "userdata" not in modules and "errors" not in modules
    assert file == "None"


def test_installed_it_shadows_nothing(tmp_path):
    "With another package of the namespace, in the same folder and in another one."
    unbuilt = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    copy = shutil.copytree(STUB, tmp_path/"copy", ignore=unbuilt)  # a build writes into its source
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", tmp_path/"site", copy], check=True)
    for place, name in (("site", "protobuf"), ("elsewhere", "auth")):
        (tmp_path/place/"google"/name).mkdir(parents=True)
        (tmp_path/place/"google"/name/"__init__.py").write_text(f"name = {name!r}")
    assert not (tmp_path/"site/google/__init__.py").exists()
    code = """
import google.protobuf, google.auth, google.colab
print(google.protobuf.name, google.auth.name, google.colab.__file__)"""
    expected = ["protobuf", "auth", str(tmp_path/"site/google/colab/__init__.py")]
    for places in (("site", "elsewhere"), ("elsewhere", "site")):
        assert python(code, PYTHONPATH=os.pathsep.join(str(tmp_path/p) for p in places)).split() == expected


# ---- being Colab

def test_pretending(stub):
    import IPython
    from colab_gpt2.runtime import in_colab
    assert in_colab() == ""
    with stub.pretend():
        assert "google.colab" in str(IPython.get_ipython()) and in_colab() == "kernel"
        IPython.display.display("shown")
        assert "shown" in str(IPython.get_ipython().display_pub.outputs)
    with stub.pretend(kernel=False): assert in_colab() == "subprocess"
    assert in_colab() == "" and "COLAB_RELEASE_TAG" not in os.environ


# ---- drive.mount

def test_mount_checks_in_order(stub, tmp_path, monkeypatch):
    from google.colab import _message, drive
    at = tmp_path/"a b"
    with pytest.raises(NotImplementedError): drive.mount(str(at))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    with pytest.raises(ValueError, match="must not contain a space"): drive.mount(str(at))
    at = tmp_path/"missing"/"drive"
    with pytest.raises(KeyError): drive.mount(str(at))
    monkeypatch.setenv("TBE_EPHEM_CREDS_ADDR", "x")
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'kernel'"): drive.mount(str(at))
    with stub.pretend():
        denied = "^Error: credential propagation was unsuccessful$"
        with stub.faults(authorization_denied=True), pytest.raises(_message.MessageError, match=denied):
            drive.mount(str(at))
        with pytest.raises(ValueError, match="in a directory that exists"): drive.mount(str(at))
        (tmp_path/"full").mkdir()
        (tmp_path/"full"/"file").touch()
        (tmp_path/"link").symlink_to(tmp_path)
        for name, message in (("link", "symlink"), ("full", "already contain files"), ("full/file", "be a directory")):
            with stub.faults(mount_failed=True), pytest.raises(ValueError, match=message):
                drive.mount(str(tmp_path/name))
        with stub.faults(mount_failed=": a reason"), pytest.raises(ValueError, match="^mount failed: a reason$"):
            drive.mount(str(tmp_path/"drive"))
        with stub.faults(mount_timeout=True), pytest.raises(Exception) as e: drive.mount(str(tmp_path/"drive"))
        assert f"{e.type.__module__}.{e.type.__name__}" == "pexpect.exceptions.TIMEOUT"
        assert not (tmp_path/"drive").exists()


def test_files_outlive_the_mount(colab):
    from google.colab import drive
    drive.mount(str(colab.mountpoint))
    (colab.mountpoint/"MyDrive"/"a.txt").write_text("kept")
    assert (colab.mountpoint/"My Drive"/"a.txt").read_text() == "kept" and (colab.mountpoint/"Shareddrives").is_dir()
    drive.flush_and_unmount()
    assert list(colab.mountpoint.iterdir()) == []
    drive.mount(str(colab.mountpoint))
    assert (colab.mountpoint/"MyDrive"/"a.txt").read_text() == "kept"
    asked = len(colab.stub.requests)
    drive.mount(str(colab.mountpoint))
    assert len(colab.stub.requests) == asked + 1  # it asks for authorisation even when mounted
    with colab.faults(flush_failed=True), pytest.raises(ValueError, match="^flush_and_unmount failed$"):
        drive.flush_and_unmount()


# ---- faults of files

@pytest.fixture
def my_drive(colab):
    from google.colab import drive
    drive.mount(str(colab.mountpoint))
    (colab.mountpoint/"MyDrive"/"old.txt").write_text("old")
    return colab.mountpoint/"MyDrive"


def number(error): return error.value.errno


def test_full(colab, my_drive):
    with colab.faults(full=10_000), pytest.raises(OSError) as e:
        with open(my_drive/"new", "wb") as f:
            for _ in range(100): f.write(b"x"*1000)
    assert number(e) == errno.ENOSPC and (my_drive/"new").stat().st_size == 10_000
    with colab.faults(full=5), pytest.raises(OSError) as e:
        handle = os.open(my_drive/"raw", os.O_WRONLY | os.O_CREAT)
        try:
            assert os.write(handle, b"123456789") == 5
            os.write(handle, b"6789")
        finally: os.close(handle)
    assert number(e) == errno.ENOSPC


def test_quota_is_what_disk_usage_says(colab, my_drive):
    with colab.faults(quota=8192):
        assert shutil.disk_usage(my_drive).free == 8192 and shutil.disk_usage("/").free != 8192
    assert shutil.disk_usage(my_drive).free != 8192


def read_only_actions(folder):
    new, old = folder/"new", folder/"old.txt"
    return [lambda: new.write_text("x"), lambda: new.mkdir(), lambda: old.unlink(), lambda: os.replace(old, new),
            lambda: os.truncate(old, 0), lambda: os.open(new, os.O_CREAT | os.O_RDWR),
            lambda: shutil.copyfile(__file__, new), lambda: shutil.rmtree(folder/"sub")]


@pytest.mark.parametrize("by", ["fault", "mount"])
def test_read_only(colab, my_drive, by):
    from google.colab import drive
    (my_drive/"sub").mkdir()
    if by == "mount": drive.mount(str(colab.mountpoint), force_remount=True, readonly=True)
    with colab.faults(read_only=by == "fault"):
        for action in read_only_actions(my_drive):
            with pytest.raises(OSError) as e: action()
            assert number(e) == errno.EROFS
        assert sorted(os.listdir(my_drive)) == ["old.txt", "sub"] and (my_drive/"old.txt").read_text() == "old"


@pytest.mark.parametrize("fault, code", [("io_error", errno.EIO), ("disconnected", errno.ENOTCONN)])
def test_errors_of_the_connection(colab, my_drive, fault, code):
    with colab.faults(**{fault: True}):
        for action in (lambda: (my_drive/"new").write_text("x"), lambda: (my_drive/"old.txt").read_text(),
                       lambda: os.listdir(my_drive)):
            with pytest.raises(OSError) as e: action()
            assert number(e) == code
    with colab.faults(**{fault: 2}):  # the next two reads and writes, then all is well
        for _ in range(2):
            with pytest.raises(OSError) as e: (my_drive/"old.txt").read_text()
            assert number(e) == code
        assert (my_drive/"old.txt").read_text() == "old"


def test_disconnected_until_the_next_mount(colab, my_drive):
    from google.colab import drive
    with colab.faults(disconnected=True):
        with pytest.raises(OSError) as e: os.stat(colab.mountpoint)
        assert number(e) == errno.ENOTCONN and not os.path.isdir(my_drive)
        drive.mount(str(colab.mountpoint))
        assert (my_drive/"old.txt").read_text() == "old"


def test_silent_truncation_and_corruption(colab, my_drive, tmp_path):
    source = tmp_path/"source"
    source.write_bytes(bytes(range(256))*1000)
    with colab.faults(truncated=1234): shutil.copyfile(source, my_drive/"short")  # shutil's fast paths go by sendfile
    assert (my_drive/"short").read_bytes() == source.read_bytes()[:1234]
    with colab.faults(corrupted=True): shutil.copyfile(source, my_drive/"wrong")
    wrong = (my_drive/"wrong").read_bytes()
    assert len(wrong) == 256_000 and wrong != source.read_bytes()


def test_slow(colab, my_drive):
    import time
    start = time.perf_counter()
    with colab.faults(slow=0.05): (my_drive/"new").write_text("x")
    assert time.perf_counter() - start >= 0.05


def test_only_the_drive_is_hit_and_nothing_stays_replaced(stub, colab, my_drive, tmp_path):
    from google.colab import drive
    link = tmp_path/"link"
    link.symlink_to(my_drive)
    everything = dict(full=0, read_only=True, io_error=True, disconnected=True, truncated=0, corrupted=True)
    with colab.faults(**everything):
        (tmp_path/"local").write_text("fine")
        shutil.copytree(SOURCE, tmp_path/"tree")
        assert (tmp_path/"local").read_text() == "fine"
        folders = link, colab.mountpoint/"My Drive", colab.backing/"MyDrive", os.path.relpath(my_drive)
        for folder in folders:
            with pytest.raises(OSError): open(os.path.join(folder, "old.txt"))
    assert open.__name__ == "faulty_open"
    drive.flush_and_unmount()
    assert open.__name__ == "open" and os.stat.__module__ == "posix" and os.replace.__module__ == "posix"
    with pytest.raises(TypeError, match="no such fault: wet"):
        with colab.faults(wet=True): raise AssertionError("it was accepted")


def test_switches_by_the_environment(tmp_path):
    code = """
import json
from google.colab import _stub, drive, userdata
with _stub.pretend():
    drive.mount("drive")
    try: open("drive/MyDrive/a", "wb").write(b"x" * 100_000)
    except OSError as e: print(e.errno)
    print(userdata.get("HF_TOKEN"))
"""
    env = environment(COLAB_STUB_DRIVE=str(tmp_path/"backing"), COLAB_STUB_FAULTS='{"full": 4096}',
                      COLAB_STUB_SECRETS='{"HF_TOKEN": "hf_x"}')
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert out.stdout.splitlines() == ["Mounted at drive", str(errno.ENOSPC), "hf_x"], out.stderr
    assert (tmp_path/"backing/MyDrive/a").stat().st_size == 4096


# ---- the other modules

def test_files(colab, tmp_path, monkeypatch, capsys):
    from google.colab import files
    monkeypatch.chdir(tmp_path)
    colab.stub.uploads.update({"a.txt": b"one"})
    for name in ("a.txt", "a (1).txt", "a (2).txt"): assert files.upload() == {name: b"one"}
    assert files.upload("content") == {"content/a.txt": b"one"}
    files.upload_file("b.txt")
    assert (tmp_path/"b.txt").read_bytes() == b"one"
    colab.stub.uploads.clear()
    with pytest.raises(ValueError, match="not been uploaded"): files.upload_file("c.txt")
    files.download("b.txt")
    files.view("b.txt")
    assert colab.stub.downloads == colab.stub.views == [str(tmp_path/"b.txt")]
    for function in (files.download, files.view):
        with pytest.raises(FileNotFoundError, match="^Cannot find file: none$"): function("none")


def test_without_a_kernel(stub, tmp_path):
    from google.colab import files, output, userdata
    calls = [files.upload, lambda: files.upload_file("a"), lambda: files.download(__file__),
             lambda: files.view(__file__), lambda: userdata.get("X"), lambda: output.eval_js("1"),
             output.enable_custom_widget_manager]
    for call in calls:
        with pytest.raises(AttributeError): call()
    output.clear()


def test_userdata(colab):
    from google.colab import errors, userdata
    colab.stub.secrets.update(HF_TOKEN="hf_x", hidden=None)
    assert userdata.get("HF_TOKEN") == "hf_x"
    for key in ("", None, "a b", 3):
        with pytest.raises(ValueError): userdata.get(key)
    with pytest.raises(userdata.NotebookAccessError, match="hidden"): userdata.get("hidden")
    with pytest.raises(userdata.SecretNotFoundError, match="Secret none does not exist."): userdata.get("none")
    with colab.faults(secret_timeout=True), pytest.raises(userdata.TimeoutException): userdata.get("HF_TOKEN")
    assert not issubclass(userdata.NotebookAccessError, errors.Error)


def test_auth_runtime_and_output(colab, monkeypatch):
    from google.colab import _message, auth, errors, output, runtime
    auth.authenticate_user()
    with colab.faults(authorization_failed=True), pytest.raises(errors.AuthorizationError): auth.authenticate_user()
    with colab.faults(authorization_denied=True), pytest.raises(_message.MessageError): auth.authenticate_user()
    runtime.unassign()
    with colab.faults(unassign_failed=True), pytest.raises(errors.RuntimeManagementError): runtime.unassign()
    colab.stub.javascript["1 + 1"] = 2
    assert output.eval_js("1 + 1") == 2 and output.eval_js("1 + 1", ignore_result=True) is None
    colab.stub.javascript["bad"] = ValueError("SyntaxError")
    with pytest.raises(_message.MessageError, match="SyntaxError"): output.eval_js("bad")
    with pytest.raises(ValueError): output.clear(wait=1)
    with pytest.raises(ValueError, match="Unknown widgets version: 9"): output.enable_custom_widget_manager("9")
    output.enable_custom_widget_manager()
    output.disable_custom_widget_manager()
    output.register_callback("f", print)
    output.unregister_callback("f")
    with pytest.raises(ValueError): output.unregister_callback("f")
    with monkeypatch.context() as patched:  # undone before the stub leaves, or it would come back after it
        patched.delenv("COLAB_RELEASE_TAG")
        with pytest.raises(NotImplementedError): auth.authenticate_user()
