"""Core-milliseconds an image of the engine alone and the decoder alone.

Their sum is the least that extraction can take.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import cycle
from pathlib import Path

import numpy as np

from models.checkpoint import CONFIG_FILE, OPENVINO_FILE
from models.engine.engine import Features
from models.engine.openvino_engine import OpenVINOEngine
from models.engine.processor import num_cpus
from models.preprocess import Preprocess

_MEASURE_SECONDS = 4.0
_NUM_IN_MEMORY = 256


def core_ms_to_run(checkpoint: Path, photos: Sequence[Path]) -> float:
    """The checkpoint's engine with its run's settings, fed decoded photographs from memory.

    Every core counts, busy or not.
    """
    graft = json.loads((checkpoint / CONFIG_FILE).read_text())["graft"]
    preprocess, chosen = Preprocess.from_dict(graft["preprocess"]), graft["engine"]
    settings = {
        name: chosen[name]
        for name in ("precision", "batch_size", "num_streams", "images_per_second")
    }
    engine = OpenVINOEngine(checkpoint / OPENVINO_FILE, preprocess, **settings)
    crops = np.stack([preprocess(path.read_bytes()) for path in photos[:_NUM_IN_MEMORY]])
    size = engine.info.batch_size
    batches = [crops[start : start + size] for start in range(0, len(crops) - size + 1, size)]
    in_flight: deque[Future[Features]] = deque()
    num_done, started = 0, time.perf_counter()
    for batch in cycle(batches):
        in_flight.append(engine.submit(batch))
        if len(in_flight) > engine.num_slots:
            in_flight.popleft().result()
            num_done += size
            if time.perf_counter() - started > _MEASURE_SECONDS:
                break
    seconds = time.perf_counter() - started
    engine.close()
    return 1000 * num_cpus() * seconds / num_done


def core_ms_to_decode(checkpoint: Path, photos: Sequence[Path]) -> float:
    """Encoded bytes in memory → the crop, on one thread."""
    graft = json.loads((checkpoint / CONFIG_FILE).read_text())["graft"]
    preprocess = Preprocess.from_dict(graft["preprocess"])
    encoded = [path.read_bytes() for path in photos[:_NUM_IN_MEMORY]]
    num_done, started = 0, time.perf_counter()
    for data in cycle(encoded):
        preprocess(data)
        num_done += 1
        if time.perf_counter() - started > _MEASURE_SECONDS:
            break
    return 1000 * (time.perf_counter() - started) / num_done
