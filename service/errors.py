"""What a request can be refused for: a code for programs, a message that says what to do for people."""

from __future__ import annotations

from collections.abc import Sequence

from models.errors import GraftError
from models.preprocess import ImageError, ImageTooLargeError


class RequestError(GraftError):
    """A request that gets no answer; `code` is one of the keys of `service.web.routes.STATUS_BY_CODE`."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retry_after_seconds: int | None = None,
        allowed_methods: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.allowed_methods = allowed_methods


def image_error_code(error: ImageError) -> str:
    """The code of an image that could not be read."""
    return "image_too_large" if isinstance(error, ImageTooLargeError) else "unreadable_image"
