"""BentoML in two services: one receives and decodes, the other, another process, predicts batches.

bentoml serve benchmarks.peers.serve_bento_depends:Classify --port 4100
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import numpy.typing as npt

from benchmarks.peers.classifiers import (
    MAX_BATCH_SIZE,
    NUM_WORKERS,
    THREADS_PER_WORKER,
    Answer,
    load_classifier,
)


@bentoml.service(workers=NUM_WORKERS, traffic={"timeout": 60})
class Predict:
    """Predicts decoded images, which arrive as arrays rather than as JSON."""

    def __init__(self) -> None:
        self._classifier = load_classifier(num_threads=THREADS_PER_WORKER)

    @bentoml.api(  # type: ignore[untyped-decorator]
        batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=10_000
    )
    def predict(self, inputs: npt.NDArray[Any]) -> list[Answer]:
        return self._classifier.predict(as_inputs(inputs))


@bentoml.service(workers=1, traffic={"timeout": 60})
class Classify:
    """What clients call."""

    runner = bentoml.depends(Predict)

    def __init__(self) -> None:
        # Only its transform is used, on one image at a time.
        self._classifier = load_classifier(num_threads=1)

    @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]
    async def predict(self, images: Path) -> Answer:
        decoded = await asyncio.to_thread(
            lambda: np.asarray(self._classifier.decode(images.read_bytes()))[None]
        )
        answers: list[Answer] = await self.runner.to_async.predict(decoded)
        return answers[0]


def as_inputs(inputs: npt.NDArray[Any]) -> list[Any]:
    """Pixels are taken as they are, floats become torch's."""
    if inputs.dtype == np.uint8:
        return list(inputs)
    import torch

    return list(torch.from_numpy(inputs.copy()))
