"The three front ends that the tests open in a browser, and a server for each, in a folder of its own."
import contextlib, json, os, secrets, signal, socket, subprocess, time, urllib.request
from dataclasses import dataclass
from pathlib import Path

from jupyter_client.blocking import BlockingKernelClient

ROOT = Path(__file__).parents[2]
STUB = ROOT/"tests"/"google_colab_stub"/"src"


@dataclass(frozen=True)
class FrontEnd:
    name: str
    environment: str  # the folder of its virtual environment
    command: str  # of `jupyter`
    path: str  # between the server's address and the notebook's name

    @property
    def python(self): return ROOT/self.environment/"bin"/"python"


FRONT_ENDS = (FrontEnd("notebook-6", ".venv-colab", "notebook", "notebooks"),  # Colab's stack
              FrontEnd("lab", ".venv", "lab", "lab/tree"),
              FrontEnd("notebook-7", ".venv", "notebook", "notebooks"))


@dataclass
class Server:
    front_end: FrontEnd
    folder: Path  # of the notebooks
    mount: Path  # where its kernels mount their Drive
    runtime: Path  # where kernels leave their connection files
    address: str
    token: str
    log: Path

    def url(self, notebook): return f"{self.address}/{self.front_end.path}/{notebook}?token={self.token}"

    def ask(self, code, seconds=60) -> str:
        "What `code` prints in the only kernel, once that is idle: for what no user can do, and to look into a panel."
        printed = []
        def hear(message): printed.append(message["content"].get("text", ""))
        client = BlockingKernelClient(connection_file=str(next(self.runtime.glob("kernel-*.json"))))
        client.load_connection_file()
        client.start_channels()
        try: reply = client.execute_interactive(code, store_history=False, timeout=seconds, output_hook=hear)["content"]
        finally: client.stop_channels()
        if reply["status"] != "ok": raise RuntimeError(f"{reply['ename']}: {reply['evalue']}")
        return "".join(printed)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(folder, front_end):
    "Variables for a server that knows nothing of this user, whose kernels believe that they are Colab's, offline."
    own = ("PIP_", "JUPYTER", "IPYTHON", "COLAB", "HF_", "PYTEST")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    places = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="runtime",
                  IPYTHONDIR="ipython", JUPYTERLAB_SETTINGS_DIR="settings", JUPYTERLAB_WORKSPACES_DIR="workspaces",
                  XDG_CACHE_HOME="cache", COLAB_STUB_DRIVE="drive", JUPYTER_PATH="kernels")
    stub = dict(PYTHONPATH=f"{STUB}{os.pathsep}{ROOT}", COLAB_RELEASE_TAG="release-colab_stub",
                TBE_EPHEM_CREDS_ADDR="127.0.0.1:9")
    offline = dict(PIP_NO_INDEX="1", HF_HUB_OFFLINE="1")  # the install cell must be content with what is installed
    path = f"{front_end.python.parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, **{k: str(folder/v) for k, v in places.items()}, **stub, **offline, "PATH": path,
            "JUPYTER_TOKEN": secrets.token_hex(16)}


def write_kernel(folder, python):
    "The kernel `python3`, started by colab_kernel.py; `folder` is for JUPYTER_PATH."
    words = [str(python), str(Path(__file__).with_name("colab_kernel.py")), "-f", "{connection_file}"]
    spec = dict(argv=words, display_name="Python 3", language="python")
    place = folder/"kernels"/"python3"  # as Jupyter wants it below each folder of JUPYTER_PATH
    place.mkdir(parents=True)
    (place/"kernel.json").write_text(json.dumps(spec))


BEGIN = """
from dataclasses import replace
from pathlib import Path
from colab_gpt2 import runtime, tasks
runtime.MOUNT = Path({!r})
tasks.DEMO = replace(tasks.DEMO, max_steps=24)
"""


def write_beginning(folder, mount):
    """Kernels begin with a Drive of their own instead of /content/drive, which is the whole machine's, and a shorter
    demo than a reader's: 24 steps show what a hundred would."""
    startup = folder/"ipython"/"profile_default"/"startup"
    startup.mkdir(parents=True)
    mount.parent.mkdir()
    (startup/"begin.py").write_text(BEGIN.format(str(mount)))


def write_settings(folder, front_end):
    "No questions about news, which JupyterLab asks, and no praise of its successor by the classic notebook."
    places = {"lab": ("settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings",
                      dict(fetchNews="false", checkForUpdates=False)),
              "notebook-6": ("config/jupyter_notebook_config.json", dict(NotebookApp=dict(show_banner=False)))}
    if front_end.name not in places: return
    name, values = places[front_end.name]
    (folder/name).parent.mkdir(parents=True)
    (folder/name).write_text(json.dumps(values))


def wait_until_up(process, server, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None: break
        status = f"{server.address}/api/status?token={server.token}"
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(status, timeout=5).status == 200: return
        time.sleep(0.2)
    raise RuntimeError(f"The server of {server.front_end.name} did not come up:\n{server.log.read_text()[-3000:]}")


def end(process, seconds=30):
    "Ask the server to end, which ends its kernels too; insist after so many seconds."
    process.send_signal(signal.SIGTERM)
    try: process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(seconds)


@contextlib.contextmanager
def serving(front_end, folder):
    "A running Server for the notebooks in `folder`/notebooks."
    if not front_end.python.exists():
        raise RuntimeError(f"{front_end.python} is missing; `make test-browser` sets it up.")
    (folder/"notebooks").mkdir(parents=True, exist_ok=True)
    write_kernel(folder/"kernels", front_end.python)
    write_settings(folder, front_end)
    mount = folder/"content"/"drive"
    write_beginning(folder, mount)
    env, port = environment(folder, front_end), free_port()
    words = [front_end.python, "-m", "jupyter", front_end.command, "--no-browser", "--allow-root", "--ip=127.0.0.1",
             f"--port={port}"]
    address, token = f"http://127.0.0.1:{port}", env["JUPYTER_TOKEN"]
    server = Server(front_end, folder/"notebooks", mount, folder/"runtime", address, token, folder/"server.log")
    with open(server.log, "w") as log:
        process = subprocess.Popen(words, cwd=server.folder, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_up(process, server)
            yield server
        finally: end(process)
