"""A GPU that is not there, in a process of its own: see `device` for what it is, and what it cannot show.

A process must have it before it imports torch, so nothing here imports torch but `build`, which runs in the tests'.
"""
import contextlib, ctypes, gc, importlib, multiprocessing, platform, shutil, subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

COMPILER = shutil.which("g++")


def why_not():
    "Why this machine cannot pretend, or ''."
    if platform.system() != "Linux" or not COMPILER: return "the pretended GPU is built by g++ on Linux"
    import torch
    return "this build of torch has a CUDA of its own" if torch.version.cuda or torch.version.hip else ""


def build(folder):
    "Compile hooks.cpp; -> the library."
    import torch
    home, library = Path(torch.__file__).parent, Path(folder)/"libpretend.so"
    words = [COMPILER, "-shared", "-fPIC", "-O0", "-std=c++20", "-w", f"-I{home}/include", "-o", library,
             Path(__file__).with_name("hooks.cpp"), f"-L{home}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{home}/lib"]
    built = subprocess.run(words, capture_output=True, text=True)
    assert not built.returncode, built.stderr
    return library


def begin(library):
    "The first that the process does."
    ctypes.CDLL(str(library)).pretend()
    importlib.import_module("helpers.pretend_gpu.device")
    gc.freeze()  # the libraries are no garbage


@contextlib.contextmanager
def process(folder):
    "A function that calls another one, of a module's top level, with arguments in the process that has the GPU."
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawned, begin, (build(folder),)) as pool:
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(timeout=300)
