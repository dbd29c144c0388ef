"The exceptions that Colab's modules share."


class Error(Exception):
    "Base class of Colab's errors."


class AuthorizationError(Error):
    "Authorization failed."


class RuntimeManagementError(Error):
    "The runtime could not be managed."
