"""Checks before a training: does it learn, on what device, with disk enough, in what time."""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from finetune.training.state import random_states, set_random_states
from finetune.training.tensors import Tensors, copy_tensors
from models.engine.processor import cpu_name
from models.errors import GraftError

logger = logging.getLogger("graft.preflight")

_NUM_STEPS = 20
# Batches read to measure how fast they come; the first are late, while the decoding processes
# start.
_NUM_READ = 10
_NUM_LATE = 2
# The first head may fit the batch already: a loss as low as this need not fall.
_KNOWN_LOSS = 0.05
# Above this share of the time, a warning says how to shorten it.
_MAX_WAITING = 0.3
# A validation batch is twice as large and has no backward pass.
_VALIDATION_COST = 2 / 3


def check_disk(
    run_dir: Path, repository: Path, changing: Tensors, model_bytes: int, *, has_ema: bool
) -> None:
    """Raise GraftError where the run's folder or the repository has too little room."""
    # The state has the tensors, their best and perhaps their moving average, and the optimizer's
    # two moments, and is written beside the one before. A checkpoint has the network as tensors and
    # as the engine's backbone; so has the candidate that is not published.
    state_bytes = (
        2
        * (4 + has_ema)
        * sum(tensor.numel() * tensor.element_size() for tensor in changing.values())
    )
    for what, folder, num_bytes in (
        ("the state of the training", run_dir, state_bytes),
        ("the candidate that is not published", run_dir, 2 * model_bytes),
        ("the checkpoint", repository, 2 * model_bytes),
    ):
        free = shutil.disk_usage(folder).free
        if num_bytes > free:
            raise GraftError(
                f"--preflight: {what} takes {num_bytes / 1e6:,.0f} MB in {folder}, where "
                f"{free / 1e6:,.0f} MB are free; make room, or name another "
                f"{'--output' if folder == run_dir else '--repository'}"
            )
        logger.info(
            "preflight: disk: %s takes %.0f MB of %.0f MB free in %s",
            what,
            num_bytes / 1e6,
            free / 1e6,
            folder,
        )


def check_learning(
    learn: Callable[[], float], optimizer: torch.optim.Optimizer, changing: Tensors
) -> float:
    """Take `_NUM_STEPS` on one batch, whose loss must fall, and undo them; gives seconds per step.

    `learn` leaves gradients and gives the loss; the optimizer has the peak rates. Raises GraftError
    where the loss does not fall.
    """
    before, states = (
        {name: tensor.detach().clone() for name, tensor in changing.items()},
        random_states(),
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses, seconds = [], []
    for step in range(_NUM_STEPS):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, 2 * (step + 1) / _NUM_STEPS)
        started = time.perf_counter()
        losses.append(learn())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    copy_tensors(before, changing)
    set_random_states(*states)
    first, last = losses[0], float(np.median(losses[-3:]))
    outcome = f"the loss on one batch went from {first:.4f} to {last:.4f} in {_NUM_STEPS} steps"
    if not (last < first or last < _KNOWN_LOSS):
        raise GraftError(
            f"--preflight: {outcome}, and should have fallen: a network that cannot overfit one "
            "batch will not learn the others. Lower --lr and --backbone-lr, to a tenth for a "
            "start; if that does not help, look for labels or images that are mixed up"
        )
    logger.info("preflight: %s", outcome)
    return float(np.median(seconds[1:]))


def estimate_time(
    batches: Iterable[object],
    step_seconds: float,
    *,
    num_epochs: int,
    num_batches: int,
    num_val_batches: int,
    is_read_ahead: bool,
    device: torch.device,
) -> None:
    """Log the device, how long the training will take, and whether it will wait for data."""
    seconds, asked = [], time.perf_counter()
    for _ in itertools.islice(batches, _NUM_READ):
        seconds.append(time.perf_counter() - asked)
        asked = time.perf_counter()
    read_seconds = float(np.mean(seconds[_NUM_LATE:] or seconds))
    val_seconds = _VALIDATION_COST * step_seconds

    def together(compute: float, read: float) -> float:
        return max(compute, read) if is_read_ahead else compute + read

    batch_seconds = together(step_seconds, read_seconds)
    total = num_epochs * (
        num_batches * batch_seconds + num_val_batches * together(val_seconds, 2 * read_seconds)
    )
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads"
    )
    logger.info(
        "preflight: training will take about %s on %s: %d epochs of %d steps, %.3f s a step, "
        "%.3f s to read its images",
        _format_duration(total),
        name,
        num_epochs,
        num_batches,
        step_seconds,
        read_seconds,
    )
    warn_if_starved(1 - step_seconds / batch_seconds)


def warn_if_starved(waiting_fraction: float) -> None:
    """Warn, with remedies, where training waits for data more than `_MAX_WAITING` of its time."""
    if waiting_fraction > _MAX_WAITING:
        logger.warning(
            "the training waits for data: more --workers, smaller image files, or --views to "
            "decode them once would help"
        )


def _format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
