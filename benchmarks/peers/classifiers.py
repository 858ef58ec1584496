"""The classifier that every peer of benchmarks/serve.py serves: in torch or on Graft's engine.

Which one the environment says, because frameworks start their workers as processes of their own:

GRAFT_PEER_CHECKPOINT   a checkpoint's folder, which is a model folder of timm's
GRAFT_PEER_ENGINE
    torch   timm's model and transform on Pillow's image in float32, one worker: as documented
    tuned   the same in bf16 and channels_last, a worker a core: an expert's choice on such a CPU
    graft   Graft's preprocess and OpenVINO engine: only the framework differs from Graft
GRAFT_PEER_WORKERS
    another number of predicting processes, if the framework has workers; they share the cores
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from models.engine.processor import num_cpus

TOP_K = 5
MAX_BATCH_SIZE = 16
NUM_WORKERS = int(
    os.environ.get(
        "GRAFT_PEER_WORKERS", 1 if os.environ["GRAFT_PEER_ENGINE"] == "torch" else num_cpus()
    )
)
THREADS_PER_WORKER = max(1, num_cpus() // NUM_WORKERS)

Input = Any  # what `decode` gives and `predict` takes: a tensor, or an array of pixels


class Answer(TypedDict):
    """A label, its score and the five best: as much as Graft answers by default."""

    label: str
    score: float
    top: list[dict[str, str | float]]


class Classifier(Protocol):
    """Two steps, so that a framework can batch between them."""

    def decode(self, data: bytes) -> Input: ...

    def predict(self, inputs: Sequence[Input]) -> list[Answer]: ...


class TorchClassifier:
    """timm's model as its documentation serves it."""

    def __init__(self, checkpoint: Path, *, tuned: bool, num_threads: int) -> None:
        import timm
        import torch
        from PIL import Image

        torch.set_num_threads(num_threads)
        self._torch, self._open = torch, Image.open
        self._model = timm.create_model(f"local-dir:{checkpoint}", pretrained=True).eval()
        self._memory_format = torch.channels_last if tuned else torch.contiguous_format
        self._dtype = torch.bfloat16 if tuned else torch.float32
        self._model = self._model.to(dtype=self._dtype, memory_format=self._memory_format)
        self._transform = timm.data.create_transform(
            **timm.data.resolve_model_data_config(self._model), is_training=False
        )
        self._label_names = _label_names(checkpoint)

    def decode(self, data: bytes) -> Input:
        return self._transform(self._open(io.BytesIO(data)).convert("RGB"))

    def predict(self, inputs: Sequence[Input]) -> list[Answer]:
        torch = self._torch
        with torch.inference_mode():
            batch = torch.stack(list(inputs)).to(
                dtype=self._dtype, memory_format=self._memory_format
            )
            scores = self._model(batch).float().softmax(1)
            best = scores.topk(min(TOP_K, scores.shape[1]))
        return [
            _answer(self._label_names, *row)
            for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


class EngineClassifier:
    """Graft's preprocess and engine with the checkpoint's batch and precision, without a queue."""

    def __init__(self, checkpoint: Path, *, num_streams: int) -> None:
        from models.checkpoint import load_checkpoint, logits
        from models.engine.engine import run
        from models.engine.openvino_engine import OpenVINOEngine

        loaded = load_checkpoint(checkpoint)
        found = {
            name: loaded.engine[name] for name in ("precision", "batch_size", "images_per_second")
        }
        self._engine = OpenVINOEngine(
            loaded.openvino_path, loaded.preprocess, num_streams=num_streams, **found
        )
        self._checkpoint, self._logits, self._run = loaded, logits, run

    def decode(self, data: bytes) -> Input:
        return self._checkpoint.preprocess(data)

    def predict(self, inputs: Sequence[Input]) -> list[Answer]:
        scaled = (
            self._logits(self._checkpoint, self._run(self._engine, np.stack(inputs)))
            / self._checkpoint.temperature
        )
        exponents = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        scores = exponents / exponents.sum(axis=1, keepdims=True)
        best = np.argsort(-scores, axis=1)[:, :TOP_K]
        names = self._checkpoint.label_names
        return [
            _answer(names, row[columns].tolist(), columns.tolist())
            for row, columns in zip(scores, best, strict=True)
        ]


def load_classifier(*, num_threads: int) -> Classifier:
    """The classifier that the environment names; `num_threads` of torch, or engine streams."""
    checkpoint = Path(os.environ["GRAFT_PEER_CHECKPOINT"])
    engine = os.environ["GRAFT_PEER_ENGINE"]
    if engine == "graft":
        return EngineClassifier(checkpoint, num_streams=num_threads)
    return TorchClassifier(checkpoint, tuned=engine == "tuned", num_threads=num_threads)


def _label_names(checkpoint: Path) -> list[str]:
    names: list[str] = json.loads((checkpoint / "config.json").read_text())["label_names"]
    return names


def _answer(names: Sequence[str], scores: Sequence[float], columns: Sequence[int]) -> Answer:
    top: list[dict[str, str | float]] = [
        {"label": names[column], "score": round(score, 6)}
        for score, column in zip(scores, columns, strict=True)
    ]
    return {"label": names[columns[0]], "score": round(scores[0], 6), "top": top}
