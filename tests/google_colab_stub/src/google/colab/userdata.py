"The notebook's secrets: `_stub.secrets`."
from google.colab import _message, _stub, errors


class NotebookAccessError(Exception):
    "The notebook may not read the secret."

    def __init__(self, key): super().__init__(f"Notebook does not have access to secret {key}")


class SecretNotFoundError(errors.Error):
    "There is no such secret."

    def __init__(self, key): super().__init__(f"Secret {key} does not exist.")


class TimeoutException(errors.Error):
    "The front end did not answer within 10 seconds."

    def __init__(self, key):
        super().__init__(f"Requesting secret {key} timed out. "
                         "Secrets can only be fetched when running from the Colab UI.")


def get(key):
    "The secret `key`."
    if not isinstance(key, str) or not key or any(c.isspace() for c in key):
        raise ValueError(f"Invalid secret name: {key!r}")
    answer = _message.blocking_request("GetSecret", request={"key": key}, timeout_sec=10)
    if _stub.faults.secret_timeout: raise TimeoutException(key)
    if not answer["exists"]: raise SecretNotFoundError(key)
    if not answer["access"]: raise NotebookAccessError(key)
    return answer["payload"]
