"""Work in a process of its own that does not wait for its imports: it is forked from one that has them.

What depends on the start of a process (what a command loads, the environment at import, signals): see `shell`.
"""
import contextlib, gc, multiprocessing, os, pickle, subprocess, sys, tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2",
                              "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
                              "IPython.core.interactiveshell", "nbdev.test", "colab_gpt2.cli", "colab_gpt2.training"])


@contextlib.contextmanager
def launched(function, *args, cwd=None, env=None):
    """A forked process that calls `function(*args)`, for a caller who waits for it or ends it. Afterwards it is dead,
    and has a CompletedProcess as its `done`: text, and as `result` what the function gave."""
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        place, env = str(cwd or os.getcwd()), {**os.environ, **(env or {})}
        process = FORKS.Process(target=_child, args=(folder, function, args, place, env))
        process.start()
        try: yield process
        finally:
            if process.is_alive(): process.kill()
            process.join()
            out, err = (read(Path(folder)/name) for name in ("stdout", "stderr"))
            process.done = subprocess.CompletedProcess(args, process.exitcode, out, err)
            result = Path(folder)/"result"
            process.done.result = None if process.exitcode else read_result(result)


def forked(function, *args, cwd=None, env=None, timeout=300):
    "Call `function(*args)` in a forked process; -> CompletedProcess with text, and what it gave as its `result`."
    with launched(function, *args, cwd=cwd, env=env) as process:
        process.join(timeout)
        late = process.is_alive()
    done = process.done
    if late: raise subprocess.TimeoutExpired([function.__name__, *args], timeout, done.stdout, done.stderr)
    return done


def read_result(path): return pickle.loads(path.read_bytes()) if path.exists() else None


def read(path): return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


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
