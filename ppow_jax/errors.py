"""The exceptions for mistakes that a user can mend, and what JAX says when memory runs out."""

_HEAD, _TAIL = 400, 290  # characters


class UserError(Exception):
    """What was found, what was expected, what to do: printed as one line, without a traceback.

    Names and texts in it may be a stranger's: control characters and halves of surrogate pairs are escaped,
    and of a very long message the middle is left out.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        if len(line) > _HEAD + _TAIL:
            line = f"{line[:_HEAD]} ... {line[-_TAIL:]}"
        super().__init__(line)


class UnfinishedError(UserError):
    """A training run is not at its last step yet."""


class ConfigError(UserError):
    """A `UserError` in the configuration: found before any model is loaded, exit status 2."""


def out_of_memory(error: Exception) -> bool:
    """Whether it is JAX's, of a device that has no more."""
    return "RESOURCE_EXHAUSTED" in str(error)
