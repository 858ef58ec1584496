"""The error that a user can act on, and the texts of errors."""

from collections.abc import Sequence


class GraftError(ValueError):
    """What was wrong, the value it got, what is allowed, and the way out; no traceback is shown."""


def describe_error(error: Exception) -> str:
    """The message of `error`; of the system's, its text and the file, without the number."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, OSError):  # urllib wraps it
        return describe_error(reason)
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"


def join_first(names: Sequence[str], most: int = 5) -> str:
    """The first `most` names, and how many more there are: `a, b and 7 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none (bare assertions)."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
