"""Which sizes of images a network takes, tried without weights on torch's "meta" device.

What is found there is tried once more on the CPU: "meta" does not check the values of indices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

_SMALLEST, _LARGEST = 32, 1024  # what --image-size allows
# Patches are of 14 or of 16 pixels and their like, strides of powers of two.
_STEPS = (8, 14)
_SEARCH_SECONDS = 15.0


def find_sizes_near(
    asked: int, build: Callable[[int], nn.Module], *, is_fixed: bool
) -> tuple[int, ...]:
    """The next smaller and the next larger size that the network takes, of those that were found.

    `build` builds the network for a size; where the size is not fixed, one network is tried with
    all. A search of seconds: it may find nothing.
    """
    ends_at = time.monotonic() + _SEARCH_SECONDS
    any_size = None if is_fixed else _try_build(build, asked, "meta")
    any_real = None if is_fixed else _try_build(build, asked, "cpu")
    found = []
    for sizes in (range(asked - 1, _SMALLEST - 1, -1), range(asked + 1, _LARGEST + 1)):
        for size in _on_steps(sizes):
            if time.monotonic() > ends_at:
                break
            if _takes(any_size or _try_build(build, size, "meta"), size, "meta") and _takes(
                any_real or _try_build(build, size, "cpu"), size, "cpu"
            ):
                found.append(size)
                break
        # The other direction has as much time.
        ends_at = time.monotonic() + _SEARCH_SECONDS
    return tuple(found)


def _on_steps(sizes: range) -> Iterator[int]:
    return (size for size in sizes if any(size % step == 0 for step in _STEPS))


def _try_build(build: Callable[[int], nn.Module], size: int, device: str) -> nn.Module | None:
    try:
        with torch.device(device):
            return build(size).eval()
    # A size that the network cannot be built for.
    except Exception:
        return None


def _takes(model: nn.Module | None, size: int, device: str) -> bool:
    if model is None:
        return False
    try:
        with torch.inference_mode(), torch.device(device):
            model(torch.zeros(1, 3, size, size))
    # A size that the network does not take.
    except Exception:
        return False
    return True
