"Fine-tune GPT-2 on a free Colab GPU. Every public name can be imported from here; none is loaded before it is asked for."
__version__ = "0.1.0"

import importlib, logging

logging.getLogger("bitsandbytes.backends.cpu.ops").disabled = True  # it tells of a kernel that it could fetch

_MODULES = {
    "runtime": "Precision Runtime check_runtime pick_precision in_colab",
    "config": "FinetuneConfig",
    "text.reading": "check_text",
    "text.corpus": "Corpus load_corpus",
    "text.token_store": "Blocks tokenize_file",
    "text.chats": "Conversations encode_chat tokenize_chats tokenize_corpus",
    "model.known": "MODELS ModelInfo",
    "model.loading": "load_model load_tokenizer model_context",
    "model.loss": "linear_cross_entropy",
    "model.tune": "tune_model",
    "planning.memory": "Recipe forecast_memory",
    "planning.speed": "DEVICES",
    "planning.plan": "Plan TextSize named_runtime plan_run",
    "storage.archives": "Archive archive_model extract_archive",
    "storage.drive": "Copy mount_drive copy_verified save_to_drive restore_from_drive",
    "evaluation": "Perplexity ReportCard perplexity report_card",
    "generation": "Sample generate stream",
    "signals": "Interrupted",
    "training": "FinetuneResult finetune",
    "finding_rate": "RateCurve find_learning_rate",
    "tasks": "RunResult check fetch plan evaluate archive save restore ask_for_drive run demo bench",
    "two_runs": "Comparison compare",
    "your_runs": "KnownRun runs",
    "panels.runtime": "RuntimePanel",
    "panels.data": "DataPanel",
    "panels.finetune": "FinetunePanel",
    "panels.generate": "ChatPanel GeneratePanel",
    "panels.drive": "DrivePanel",
    "panels.compare": "ComparePanel",
    "panels.app": "app",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'colab_gpt2' has no attribute {name!r}")
    return getattr(importlib.import_module(f"colab_gpt2.{_HOME[name]}"), name)


def __dir__(): return __all__
