"Fine-tune GPT-2 on a free Colab GPU. Every public name can be imported from here; none is loaded before it is asked for."
__version__ = "0.1.0"

import importlib, sys, types

_MODULES = dict(
    runtime="Precision Runtime check_runtime pick_precision in_colab",
    data="Corpus load_corpus check_text",
    blocks="Blocks tokenize_file tokenize_corpus",
    model="MODELS ModelInfo load_model load_tokenizer model_context",
    loss="linear_cross_entropy",
    tune="tune_model",
    evaluate="Perplexity ReportCard perplexity report_card",
    generate="Sample generate stream",
    config="FinetuneConfig",
    forecast="DEVICES Recipe forecast_memory",
    plan="Plan TextSize named_runtime plan_run",
    archives="Archive archive_model extract_archive",
    drive="Copy mount_drive copy_verified save_to_drive restore_from_drive",
    finetune="FinetuneResult Interrupted finetune",
    steps="RunResult check fetch plan evaluate archive save restore ask_for_drive run demo bench",
    runtime_panel="RuntimePanel",
    data_panel="DataPanel",
    finetune_panel="FinetunePanel",
    generate_panel="GeneratePanel",
    drive_panel="DrivePanel",
    app="app",
)
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'colab_gpt2' has no attribute {name!r}")
    return getattr(importlib.import_module(f"colab_gpt2.{_HOME[name]}"), name)


def __dir__(): return __all__


class _Package(types.ModuleType):
    "Some functions bear the name of their module, as `finetune` does: the package's attribute is the function, however the module was imported."
    def __setattr__(self, name, value):
        if not (name in _HOME and isinstance(value, types.ModuleType)): super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
