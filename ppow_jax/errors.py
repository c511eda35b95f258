"""The exceptions for mistakes that a user can mend, and what JAX says when memory runs out."""


class UserError(Exception):
    """What was found, what was expected, what to do: printed as one line, without a traceback."""


class UnfinishedError(UserError):
    """A training run is not at its last step yet."""


class ConfigError(UserError):
    """A `UserError` in the configuration: found before any model is loaded, exit status 2."""


def out_of_memory(error: Exception) -> bool:
    """Whether it is JAX's, of a device that has no more."""
    return "RESOURCE_EXHAUSTED" in str(error)
