"""Out of memory: fewer images go through the network at once, with the same result."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from models.backbone.memory import is_out_of_memory
from models.errors import GraftError, first_line

logger = logging.getLogger("graft.memory")

_Done = TypeVar("_Done")


def run_in_parts(
    images: torch.Tensor,
    targets: torch.Tensor,
    at_once: int,
    work: Callable[[torch.Tensor, torch.Tensor], _Done],
    undo: Callable[[], None] = lambda: None,
) -> tuple[list[_Done], int]:
    """Results of `work` on parts of `at_once` images; and that number, halved where memory ran out.

    `undo` reverts what `work` did before the batch starts again. Raises GraftError where a single
    image is too much.
    """
    while True:
        try:
            return [
                work(*part)
                for part in zip(
                    torch.split(images, at_once), torch.split(targets, at_once), strict=True
                )
            ], at_once
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)[:200]
        # Not in the except clause: while the error lives, so does what its traceback holds.
        undo()
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        if min(at_once, len(images)) == 1:
            raise GraftError(
                f"out of memory with a single image ({reason}); try a smaller --image-size or "
                "--backbone, --freeze until:NAME with a later module, or a machine with more "
                "memory"
            )
        at_once = (min(at_once, len(images)) + 1) // 2
        logger.warning(
            "out of memory (%s): from here on %d images at once; the result is that of the whole "
            "batch",
            reason,
            at_once,
        )
