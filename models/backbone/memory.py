"""Whether an error means that memory ran out."""

from __future__ import annotations

import torch

# Parts of plain RuntimeErrors: of torch's CPU allocator, the system behind it, oneDNN, OpenVINO,
# and CUDA's libraries.
_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "out of memory",
    "out_of_memory",
    "alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the CPU or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)
