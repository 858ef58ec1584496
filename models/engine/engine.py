"""The interface of what runs a backbone for inference: OpenVINO on the CPU, torch on CUDA.

The same for a probe's features and the service's requests: crops `uint8 [B,H,W,3]` in, features
`float32 [B,F]` out, mean and std inside, several batches in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from models.images import Pixels

Features = npt.NDArray[np.float32]
# `uint8 [H,W,3]` each, or one array `[B,H,W,3]`.
Crops = Sequence[Pixels] | Pixels
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]

# How many batches more than streams an OpenVINO engine takes before `submit` blocks.
NUM_SPARE_SLOTS = 3


@dataclass(frozen=True)
class EngineInfo:
    """What an engine chose, for logs, the model card and `GET /v1/models`.

    `images_per_second` is measured on noise.
    """

    engine: str
    device: str
    precision: str
    batch_size: int
    num_streams: int
    images_per_second: float

    def __str__(self) -> str:
        return (
            f"{self.engine} on {self.device}, {self.precision}, batch {self.batch_size}, "
            f"{self.num_streams} streams, {self.images_per_second:.0f} images/s"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Engine(Protocol):
    """A backbone ready to run.

    `submit` may be called from any thread. An image's features do not depend on what else is in
    flight.
    """

    info: EngineInfo
    num_features: int

    @property
    def num_slots(self) -> int:
        """How many batches may be in flight before `submit` blocks."""

    def submit(self, crops: Crops) -> Future[Features]:
        """Start `uint8 [B,H,W,3]` → `float32 [B,F]`; blocks only while every slot is taken."""

    def run_here(self, crops: Crops, *, is_alone: bool = True) -> Features:
        """As `submit`, but wait for the features; more callers than slots wait for one another.

        `is_alone` says that nothing else needs the cores.
        """

    def close(self) -> None:
        """Wait for what is in flight, and free the memory."""


def run(engine: Engine, images: Pixels) -> Features:
    """Wait for the features of images: `uint8 [B,H,W,3]` → `float32 [B,F]`."""
    return engine.submit(images).result()
