"The user's credentials."
from google.colab import _stub

__all__ = ["authenticate_user"]


def authenticate_user(clear_output=True, project_id=None):
    "Ask the user; nothing is stored."
    from google.colab import _message, errors
    if not _stub.on_vm(): raise NotImplementedError("google.colab.auth is unsupported in this environment.")
    _message.blocking_request("request_auth", request={"authType": "auth_user_ephemeral"}, timeout_sec=None)
    if _stub.faults.authorization_failed: raise errors.AuthorizationError("Failed to fetch user credentials")
