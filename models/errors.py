"""The one error that a person can mend: shown as a message without a traceback, never as a crash; and the system's, in words."""

from collections.abc import Sequence


class GraftError(ValueError):
    """What was wrong, the value it got, what is allowed, and the way out."""


def describe_error(error: Exception) -> str:
    """What went wrong, without the system's number for it, and with the file where the system names one."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, OSError):  # urllib's wrapping
        return describe_error(reason)
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"


def join_first(names: Sequence[str], most: int = 5) -> str:
    """The first of them, and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
