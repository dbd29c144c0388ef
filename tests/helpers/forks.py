"""Work in a process of its own that does not wait for its imports: it is forked from one that has them.

What depends on the start of a process (what a command loads, the environment at import, signals): see `shell`.
"""
import gc, multiprocessing, os, pickle, subprocess, sys, tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2",
                              "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
                              "IPython.core.interactiveshell", "nbdev.test", "typer", "rich.console"])


def forked(function, *args, cwd=None, env=None, timeout=300):
    "Call `function(*args)` in a forked process; -> CompletedProcess with text, and what it gave as its `result`."
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        place, env = str(cwd or os.getcwd()), {**os.environ, **(env or {})}
        process = FORKS.Process(target=_child, args=(folder, function, args, place, env))
        process.start()
        process.join(timeout)
        out, err = (read(Path(folder)/name) for name in ("stdout", "stderr"))
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([function.__name__, *args], timeout, out, err)
        done = subprocess.CompletedProcess(args, process.exitcode, out, err)
        done.result = pickle.loads((Path(folder)/"result").read_bytes()) if (Path(folder)/"result").exists() else None
    return done


def read(path): return path.read_text(encoding="utf-8") if path.exists() else ""


def _child(folder, function, args, cwd, env):
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(Path(folder)/name, os.O_WRONLY | os.O_CREAT), number)
    gc.freeze()  # the libraries are no garbage
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    result = function(*args)
    (Path(folder)/"result").write_bytes(pickle.dumps(result))


def command(*words):
    "`colab-gpt2` with these words."
    from colab_gpt2.cli import main
    sys.argv = ["colab-gpt2", *words]
    main()
