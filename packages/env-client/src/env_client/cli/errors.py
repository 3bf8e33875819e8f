"""The one error of the command line."""

__all__ = ["CliError"]


class CliError(ValueError):
    """The command line or the config file is wrong; the message is one sentence for the user."""
