"""Checkpoints for load tests: real backbones with random heads.

Heads differ, so that the answers of any number of models and versions can be told apart.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models import checkpoint as checkpoints
from models.checkpoint import Golden
from models.engine.engine import EngineInfo, Features, Precision, run
from models.prepared import PreparedBackbone, prepare_backbone
from models.quantise import find_quantised, quantise

_NUM_GOLDEN = 3
# The spread of the logits of one image: scores differ visibly between heads and are not all 0 or 1.
_LOGIT_SPREAD = 4.0


@dataclass(frozen=True)
class Measured:
    """A backbone, its engine's settings, and the features `float32 [N,F]` of `images` by it."""

    backbone: PreparedBackbone
    engine: EngineInfo
    images: tuple[bytes, ...]
    features: Features


@dataclass(frozen=True)
class Head:
    """`weight [C,F]` and `bias [C]`, with labels that name the head."""

    label_names: tuple[str, ...]
    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes

    def scores(self, features: Features) -> npt.NDArray[np.float32]:
        """Features `[B,F]` → probabilities `[B,C]`, as the service computes them."""
        logits = features @ self.weight.T + self.bias
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(exponents / exponents.sum(axis=1, keepdims=True), np.float32)


def measure_backbone(
    name: str, images: Sequence[bytes], *, precision: Precision, cache_dir: Path
) -> Measured:
    """The pretrained backbone, converted once and kept in `cache_dir`, on `images`."""
    backbone = prepare_backbone(
        name,
        weights=None,
        pretrained=True,
        image_size=None,
        cache_dir=cache_dir,
        scratch_dir=cache_dir,
    )
    crops = np.stack([backbone.preprocess(image) for image in images])
    if precision == "int8":
        backbone = find_quantised(backbone) or quantise(backbone, crops)
    engine = backbone.open_engine("cpu", precision)
    try:
        return Measured(backbone, engine.info, tuple(images), run(engine, crops))
    finally:
        engine.close()


def draw_head(measured: Measured, *, num_classes: int, prefix: str, seed: int) -> Head:
    """A random head whose logits vary by `_LOGIT_SPREAD` over the images, with the same mean."""
    weight = (
        np.random.default_rng(seed)
        .normal(size=(num_classes, measured.features.shape[1]))
        .astype(np.float32)
    )
    weight *= _LOGIT_SPREAD / (measured.features @ weight.T).std(axis=0, keepdims=True).T
    bias = -(measured.features @ weight.T).mean(axis=0)
    return Head(
        tuple(f"{prefix}-{index}" for index in range(num_classes)), weight, bias.astype(np.float32)
    )


def recognising_head(measured: Measured, *, prefix: str) -> Head:
    """A head with a class for each image, which predicts the nearest image.

    A server with other weights or another preprocess gives other labels.
    """
    mean = measured.features.mean(axis=0)
    weight = 2 * (measured.features - mean)
    bias = np.square(mean).sum() - np.square(measured.features).sum(axis=1)
    scale = _LOGIT_SPREAD / (measured.features @ weight.T + bias).std()
    return Head(
        tuple(f"{prefix}-{index}" for index in range(len(weight))),
        (weight * scale).astype(np.float32),
        bias * scale,
    )


def publish(repository: Path, name: str, measured: Measured, head: Head) -> Path:
    """Publish the next version of `name`.

    Its IR is a hard link to the cache's, so that 64 models do not fill the disk with copies.
    """
    backbone = measured.backbone
    config: dict[str, Any] = {
        **backbone.config,
        "num_classes": len(head.label_names),
        "label_names": list(head.label_names),
    }
    config["graft"] = {
        "format_version": 1,
        "fingerprint": backbone.fingerprint,
        "freeze": "backbone",
        "temperature": 1.0,
        "metrics": {},
        "preprocess": backbone.preprocess.to_dict(),
        "engine": measured.engine.to_dict(),
        "head": backbone.classifier,
        "versions": {},
        "weights": backbone.weights,
        "license": backbone.license,
    }

    def link_engine(path: Path) -> None:
        for suffix in (".xml", ".bin"):
            os.link(backbone.openvino_path.with_suffix(suffix), path.with_suffix(suffix))

    golden = Golden(
        measured.images[:_NUM_GOLDEN], measured.features[:_NUM_GOLDEN] @ head.weight.T + head.bias
    )
    return checkpoints.publish(
        repository,
        name,
        state={
            **backbone.read_tensors(),
            f"{backbone.classifier}.weight": head.weight,
            f"{backbone.classifier}.bias": head.bias,
        },
        config=config,
        golden=golden,
        write_engine=link_engine,
        card=lambda version: f"# {name} {version}\n\nA random head, for a benchmark.\n",
    )
