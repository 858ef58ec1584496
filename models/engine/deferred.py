"""An engine that is loaded with its first batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from models.engine.engine import NUM_SPARE_SLOTS, Crops, Engine, EngineInfo, Features


class DeferredEngine:
    """Stands for an engine whose info is known, and opens it with the first batch.

    Where the feature cache has every image, OpenVINO (0.4 s) is not loaded at all. What
    `open_engine` raises, `submit` raises.
    """

    def __init__(
        self, info: EngineInfo, num_features: int, open_engine: Callable[[], Engine]
    ) -> None:
        self.info = info
        self.num_features = num_features
        self._open_engine = open_engine
        self._engine: Engine | None = None
        self._is_opening = threading.Lock()

    @property
    def num_slots(self) -> int:
        return self.info.num_streams + NUM_SPARE_SLOTS

    def submit(self, crops: Crops) -> Future[Features]:
        return self._opened().submit(crops)

    def run_here(self, crops: Crops, *, is_alone: bool = True) -> Features:
        return self._opened().run_here(crops, is_alone=is_alone)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _opened(self) -> Engine:
        with self._is_opening:
            if self._engine is None:
                self._engine = self._open_engine()
        return self._engine
