"""Errors that end a run with exit code 1."""


class RunError(Exception):
    """A run cannot continue, perhaps temporarily: the exit code is 1, not 2. The message is one line."""


class StartError(RunError):
    """The processes of a run did not come together."""
