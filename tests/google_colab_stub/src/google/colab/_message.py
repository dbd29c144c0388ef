"Requests to the front end, which here is the stub itself."
import IPython

from google.colab import _stub, errors


class MessageError(errors.Error):
    "The front end answered with an error."


def blocking_request(request_type, request="", timeout_sec=5, parent=None):
    "The front end's answer to a request. Outside a kernel: AttributeError, as with the real one."
    IPython.get_ipython().kernel
    _stub.requests.append((request_type, request))
    if request_type == "request_auth" and _stub.faults.authorization_denied:
        raise MessageError("Error: credential propagation was unsuccessful")
    if request_type == "cell_javascript_eval": return _stub.javascript.get(request["script"])
    if request_type == "GetSecret": return _stub.secret(request["key"])
    return {}
