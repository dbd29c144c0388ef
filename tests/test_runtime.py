"The runtime on machines that are not at hand: a T4, an A100, a broken driver, a Colab machine outside its kernel."
import html, json, subprocess, sys, types

import pytest

from colab_gpt2 import RuntimePanel
from colab_gpt2.cli import app
from colab_gpt2.generation import resolve  # with transformers, before a test pretends a GPU
from colab_gpt2.runtime import check_runtime, in_colab, pick_precision


def fake_gpu(monkeypatch, name, memory, capability):
    properties = types.SimpleNamespace(name=name, total_memory=memory, major=capability[0], minor=capability[1])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device=None: properties)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)  # a T4 emulates it
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_70", "sm_75", "sm_80"])


def fake_gpus(monkeypatch, *names):
    "Several, with a T4's properties under these names."
    cards = [types.SimpleNamespace(name=name, total_memory=15_828_320_256, major=7, minor=5) for name in names]
    fake_gpu(monkeypatch, names[0], 15_828_320_256, (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device=0: cards[device])
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(cards))


def no_gpu(monkeypatch, answer=lambda: False):
    monkeypatch.setattr("torch.cuda.is_available", answer)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)


@pytest.mark.parametrize("name, memory, capability, dtype, scaler", [
    ("Tesla T4", 15_828_320_256, (7, 5), "fp16", True), ("Tesla V100-SXM2-16GB", 16_935_682_048, (7, 0), "fp16", True),
    ("NVIDIA A100-SXM4-40GB", 42_297_786_368, (8, 0), "bf16", False),
    ("NVIDIA L4", 23_573_757_952, (8, 9), "bf16", False)])
def test_gpus(monkeypatch, name, memory, capability, dtype, scaler):
    fake_gpu(monkeypatch, name, memory, capability)
    runtime = check_runtime()
    assert (runtime.device, runtime.device_name, runtime.device_memory, runtime.advice) == ("cuda", name, memory, "")
    assert (runtime.precision.dtype, runtime.precision.scaler) == (dtype, scaler)
    assert pick_precision("cuda") == runtime.precision
    assert name in runtime._repr_html_()


def test_two_gpus_alike_are_shared_and_every_door_says_how(monkeypatch, capsys):
    fake_gpus(monkeypatch, "Tesla T4", "Tesla T4")
    runtime = check_runtime()
    assert runtime.gpus == 2 and "GPU: 2 × Tesla T4, 15.8 GB" in runtime._repr_html_()
    assert runtime.advice.startswith("There are 2 GPUs of this kind: num_processes=2 trains on all of them")
    panel = RuntimePanel()
    assert panel.start().gpus == 2 and runtime.advice in panel.status.value and "GPU: 2 × Tesla T4" in panel.view.value
    with pytest.raises(SystemExit, match="^0$"): app(["check", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["gpus"] == 2 and "--num-processes 2 trains on all of them" in told["advice"]


def test_of_gpus_that_differ_one_is_chosen_and_said(monkeypatch):
    fake_gpus(monkeypatch, "NVIDIA L4", "Tesla T4")
    runtime = check_runtime()
    assert runtime.gpus == 1 and runtime.device_name == "NVIDIA L4" and "× NVIDIA L4" not in runtime._repr_html_()
    assert "differ: a run uses the first" in runtime.advice and "num_processes" not in runtime.advice


def test_no_gpu_in_colab_says_what_to_click(monkeypatch):
    no_gpu(monkeypatch)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260801")
    runtime = check_runtime()
    assert (runtime.colab, runtime.device, runtime.device_memory) == ("subprocess", "cpu", None)
    assert "Runtime → Change runtime type → T4 GPU → Save" in runtime.advice
    assert html.escape(runtime.advice) in runtime._repr_html_()


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("name", ["KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_URL_BASE", "KAGGLE_CONTAINER_NAME"])
def test_kaggle_is_not_colab(monkeypatch, name, kernel):
    "Its image is built on Colab's, whose front end may be connected to it."
    no_gpu(monkeypatch)
    if kernel: monkeypatch.setattr("IPython.get_ipython", type("Shell", (), {"__module__": "google.colab._shell"}))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260101")
    monkeypatch.setenv(name, "Interactive")
    runtime = check_runtime()
    assert runtime.colab == "" and "Settings → Accelerator → GPU T4 x2" in runtime.advice
    assert "Colab" not in runtime.advice


def test_credentials_for_kaggle_do_not_make_a_machine_of_kaggles(monkeypatch):
    for name in ("USERNAME", "KEY", "API_TOKEN", "CONFIG_DIR"): monkeypatch.setenv(f"KAGGLE_{name}", "x")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260101")
    assert in_colab() == "subprocess"


@pytest.mark.parametrize("name", ["SM_HOST", "PAPERSPACE_NOTEBOOK_REPO_ID", "BINDER_SERVICE_HOST", "VSCODE_PID"])
def test_other_hosts_of_notebooks_are_no_colab(monkeypatch, name):
    no_gpu(monkeypatch)
    monkeypatch.setenv(name, "x")
    runtime = check_runtime()
    assert runtime.colab == "" and "Runtime →" not in runtime.advice and "Settings →" not in runtime.advice


ARCHITECTURES = [  # what torch was built for, and a GPU; the other torch that has code for it, or ""
    ("sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", (6, 0), "cu126"),  # Kaggle's P100
    ("sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", (7, 5), ""), ("sm_70 sm_80 sm_90", (7, 5), ""),
    ("sm_75 sm_80 sm_86 sm_90", (7, 0), "cu126"),  # of one major version, but older
    ("sm_75 sm_80 sm_86 sm_90", (8, 9), ""), ("sm_80 sm_90", (12, 0), "newer"),
    ("sm_80 sm_90 compute_90", (12, 0), ""), ("sm_80 compute_80", (7, 5), "cu126"),
    ("sm_80 sm_90a", (9, 0), ""), ("sm_80 compute_90a", (10, 0), "newer"), ("gfx90a gfx942", (9, 0), ""),
    ("", (3, 5), "")]

@pytest.mark.parametrize("built, capability, other", ARCHITECTURES)
def test_a_gpu_that_torch_has_no_code_for_is_not_used(monkeypatch, built, capability, other):
    fake_gpu(monkeypatch, "Tesla P100-PCIE-16GB", 17_059_545_088, capability)
    monkeypatch.setattr("torch.cuda.get_arch_list", built.split)
    runtime = check_runtime()
    assert runtime.device == ("cpu" if other else "cuda") and other in runtime.advice
    number = "sm_{}{}".format(*capability)
    assert not other or f"no code for {number} (Tesla P100-PCIE-16GB): choose a T4" in runtime.advice


def test_a_text_is_generated_on_the_cpu_where_torch_has_no_code_for_the_gpu(monkeypatch):
    fake_gpu(monkeypatch, "Tesla P100-PCIE-16GB", 17_059_545_088, (6, 0))
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_70"])
    assert resolve("tiny", None, None)[0].device.type == "cpu"


def test_kernel_is_told_from_subprocess(monkeypatch):
    shell = type("Shell", (), {"__module__": "google.colab._shell"})()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260801")
    assert in_colab() == "kernel"


def test_broken_driver_goes_on_on_the_cpu(monkeypatch):
    def broken(): raise RuntimeError("CUDA unknown error - this may be due to an incorrect environment\nand more")
    no_gpu(monkeypatch, broken)
    runtime = check_runtime()
    assert (runtime.device, runtime.precision.scaler) == ("cpu", False) and runtime.precision.dtype in ("bf16", "fp32")
    assert "torch said: CUDA unknown error" in runtime.advice and "and more" not in runtime.advice


def test_gpu_that_cannot_be_asked_goes_on_on_the_cpu(monkeypatch):
    fake_gpu(monkeypatch, "Tesla T4", 1, (7, 5))
    def fails(device=None): raise RuntimeError("CUDA error: out of memory")
    monkeypatch.setattr("torch.cuda.get_device_properties", fails)
    assert check_runtime().device == "cpu"


@pytest.mark.parametrize("has, dtype", [(True, "bf16"), (False, "fp32")])
def test_a_cpu_is_asked_for_its_instructions(monkeypatch, has, dtype):
    "A CPU without bfloat16 is pretended so; `make test-no-bf16` does it for the whole suite, subprocesses included."
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": has, "amx_bf16": False}, raising=False)
    assert pick_precision("cpu").dtype == dtype


def test_older_torch_without_capabilities_reads_the_flags(monkeypatch):
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    monkeypatch.setattr("colab_gpt2.runtime.cpu_info", lambda name: "fpu avx512_bf16")
    assert pick_precision("cpu").dtype == "bf16"
    monkeypatch.setattr("colab_gpt2.runtime.cpu_info", lambda name: "")
    assert pick_precision("cpu").dtype == "fp32"


def test_to_dict_is_json_and_the_disk_is_that_of_the_path(tmp_path):
    runtime = check_runtime(tmp_path/"not"/"there")
    assert json.loads(json.dumps(runtime.to_dict()))["disk"] == runtime.disk > runtime.disk_free > 0
    assert {"python", "torch", "transformers", "colab-gpt2"} <= set(runtime.versions)


def test_module_imports_no_torch():
    code = "import sys, colab_gpt2.runtime; print({'torch', 'transformers', 'datasets', 'IPython'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
