"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """What was found, what was expected, what to do: printed as one line, without a traceback."""


class ConfigError(UserError):
    """A `UserError` in the configuration: found before any model is loaded, exit status 2."""
