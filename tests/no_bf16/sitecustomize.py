"""A CPU without bfloat16, rehearsed: `make test-no-bf16` puts this folder on PYTHONPATH, so that every Python of the suite,
those of subprocesses too, hides the instructions.

`pick_precision` asks torch.cpu.get_capabilities. oneDNN, which computes the products, is told by ONEDNN_MAX_CPU_ISA: its
verbose log names avx512_core_bf16 for a product as it is, gemm:jit (emulated) under AVX512_CORE, and nothing under AVX2.
"""
import importlib.abc, importlib.util, sys

HIDDEN = ("bf16", "amx")


class Hiding(importlib.abc.MetaPathFinder):
    "Loads torch.cpu as it is and takes the instructions out of what it says."
    def find_spec(self, name, path, target=None):
        if name != "torch.cpu": return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            ask = getattr(module, "get_capabilities", None)
            def rest(): return {n: has and not any(part in n for part in HIDDEN) for n, has in ask().items()}
            if ask: module.get_capabilities = rest
        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Hiding())
