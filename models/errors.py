"""The one error that a person can mend: shown as a message without a traceback, never as a crash."""


class GraftError(ValueError):
    """What was wrong, the value it got, what is allowed, and the way out."""
