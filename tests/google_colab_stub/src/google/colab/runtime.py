"The machine under the notebook."
import os

from google.colab import _stub

__all__ = ["unassign"]


def unassign():
    "Give the runtime back: here only a request in `_stub.requests`."
    from google.colab import errors
    if not os.environ.get("TBE_RUNTIME_ADDR"):
        raise errors.RuntimeManagementError("Unable to find the runtime management service.")
    if _stub.faults.unassign_failed: raise errors.RuntimeManagementError("Unable to request VM unassignment.")
    _stub.requests.append(("unassign", ""))
