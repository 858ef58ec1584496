"""BentoML as in its guide to adaptive batching: one service, one batchable method.

bentoml serve benchmarks.peers.serve_bento:Classify --port 4100

In its favour: a latency goal of 10 s, because its dispatcher sheds requests that it expects to miss
a short one.
"""

from __future__ import annotations

from pathlib import Path

import bentoml

from benchmarks.peers.classifiers import (
    MAX_BATCH_SIZE,
    NUM_WORKERS,
    THREADS_PER_WORKER,
    Answer,
    load_classifier,
)


@bentoml.service(workers=NUM_WORKERS, traffic={"timeout": 60})
class Classify:
    def __init__(self) -> None:
        self._classifier = load_classifier(num_threads=THREADS_PER_WORKER)

    @bentoml.api(
        route="/predict", batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=10_000
    )  # type: ignore[untyped-decorator]
    def predict(self, images: list[Path]) -> list[Answer]:
        return self._classifier.predict(
            [self._classifier.decode(path.read_bytes()) for path in images]
        )
