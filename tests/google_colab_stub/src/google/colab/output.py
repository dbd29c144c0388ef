"A cell's output and the JavaScript in it."
from google.colab import _stub

_functions = {}
_installed_version = None


def clear(wait=False, output_tags=()):
    "Clear the output; nothing without a kernel."
    if not isinstance(wait, bool): raise ValueError("wait must be a bool")
    _stub.requests.append(("clear", {"wait": wait, "output_tags": output_tags}))


def eval_js(script, ignore_result=False, timeout_sec=None):
    "The answer of `_stub.javascript` to `script`."
    from google.colab import _message
    answer = _message.blocking_request("cell_javascript_eval", request={"script": script}, timeout_sec=timeout_sec)
    if isinstance(answer, Exception): raise _message.MessageError(str(answer))
    return None if ignore_result else answer


def enable_custom_widget_manager(version="5.0.0a"):
    "Note that custom widgets are allowed."
    if version != "5.0.0a": raise ValueError(f"Unknown widgets version: {version}")
    _install(version)


def disable_custom_widget_manager():
    "Note that custom widgets are not allowed."
    _install(None)


def register_callback(function_name, callback):
    "Let JavaScript call `callback` by this name."
    _functions[function_name] = callback


def unregister_callback(function_name):
    "Take the name back."
    if function_name not in _functions: raise ValueError(f"Function not found: {function_name}")
    del _functions[function_name]


def _install(version):
    "The real one hooks the display publisher of the shell, if this changes anything."
    global _installed_version
    if version != _installed_version:
        import IPython
        IPython.get_ipython().display_pub
    _installed_version = version
