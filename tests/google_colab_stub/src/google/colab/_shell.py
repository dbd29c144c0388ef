"The shell of a Colab kernel: its class is what `str(get_ipython())` shows."
from types import SimpleNamespace

from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.formatters import DisplayFormatter
from IPython.core.interactiveshell import InteractiveShell


class Shell(InteractiveShell):
    "Enough of a shell to be found, to have a kernel and to display; `display_pub.outputs` holds what was shown."

    def __init__(self):  # the parent's would open a history file and replace sys.excepthook
        ignore = lambda *args, **kwargs: None
        self.kernel = SimpleNamespace(comm_manager=SimpleNamespace(register_target=ignore, unregister_target=ignore))
        self.display_formatter, self.display_pub = DisplayFormatter(), CapturingDisplayPublisher()
