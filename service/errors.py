"""Why a request is refused: a code for programs, and a message with the way out for people."""

from __future__ import annotations

from collections.abc import Sequence

from models.errors import GraftError
from models.images import ImageError, ImageTooLargeError


class RequestError(GraftError):
    """A request that gets an error; `code` is a key of `STATUS_BY_CODE`."""

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


STATUS_BY_CODE = {
    "bad_parameter": 400,
    "bad_request": 400,
    "bad_rollout": 400,
    "broken_encoding": 400,
    "broken_multipart": 400,
    "model_required": 400,
    "no_image": 400,
    "unknown_field": 400,
    "unreadable_image": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "no_such_model": 404,
    "no_such_version": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "body_timeout": 408,
    "header_timeout": 408,
    "body_too_large": 413,
    "image_too_large": 413,
    "too_many_images": 413,
    "unsupported_content_type": 415,
    "unsupported_encoding": 415,
    "overloaded": 429,
    "headers_too_large": 431,
    "internal": 500,
    "engine_failed": 500,
    "unsupported_transfer_encoding": 501,
    "no_model": 503,
    "not_ready": 503,
    "shutting_down": 503,
    "deadline_exceeded": 504,
}
