"""How a picture becomes a square, chosen by out-of-fold log loss on some of the training images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune.config import CacheSettings
from finetune.data.splits import Splits
from finetune.probe.features import extract_splits
from finetune.probe.solve import L2_PATH, solve_probe
from finetune.tasks.task import Task
from models.engine.engine import Precision
from models.prepared import Device, PreparedBackbone
from models.preprocess import FITS, Fit
from models.scores import Floats, Labels

logger = logging.getLogger("graft.probe")

# On 1,000 images the loss of a fit is known to a few percent.
_MAX_COMPARED = 1000
# Below this ratio of sides a picture is a square: squashed and padded it is what it is whole.
_SQUARE = 1.02
# How many standard errors, of the difference on the same images, are no chance.
_NUM_ERRORS = 2.0


@dataclass(frozen=True)
class FitChoice:
    """`losses` are the out-of-fold log losses of each fit that was tried."""

    chosen: Fit
    losses: Mapping[Fit, float]

    def to_dict(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "losses": dict(self.losses)}


def choose_fit(
    backbone: PreparedBackbone,
    splits: Splits,
    sizes: Mapping[str, tuple[int, int]],
    *,
    device: Device,
    precision: Precision,
    num_workers: int,
    cache: CacheSettings | None,
    seed: int,
) -> FitChoice:
    """The fit whose probe on the last level has the least out-of-fold log loss.

    The pretraining's stays unless another one is better by more than two standard errors of the
    difference on the same images. `sizes` are the images' width and height, by key.
    """
    order = splits.task.draw_order(splits.labels(splits.train), seed)[:_MAX_COMPARED]
    part = replace(splits, train=tuple(splits.train[index] for index in np.sort(order)))
    tried: dict[Fit, PreparedBackbone] = {}
    for fit in FITS:
        fitted = backbone.fitted(fit)
        is_other = all(fitted.preprocess != other.preprocess for other in tried.values())
        if is_other and (fit in ("crop", "whole") or _has_uneven_sides(part, sizes)):
            tried[fit] = fitted
    if len(tried) == 1:
        return FitChoice("crop", {})
    logger.info(
        "how pictures become squares: trying %s on %d images …", ", ".join(tried), len(part.train)
    )
    engine = backbone.open_engine(device, precision)
    losses: dict[Fit, Floats] = {}
    for fit, fitted in tried.items():
        readable, features = extract_splits(
            part,
            fitted,
            engine,
            num_workers=num_workers,
            cache=cache,
            only=("train",),
            unreadable="ignored",
        )
        labels = splits.labels(readable.train)
        probe = solve_probe(
            features["train"][:, : backbone.num_features],
            labels,
            len(splits.label_names),
            task=splits.task,
            seed=seed,
            l2_path=L2_PATH[::2],
        )
        losses[fit] = _losses(splits.task, probe.out_of_fold_logits, labels)
    engine.close()
    chosen = choose(losses)
    means = {fit: float(values.mean()) for fit, values in losses.items()}
    logger.info(
        "fit: %s; out-of-fold log loss %s",
        chosen,
        ", ".join(f"{fit} {loss:.4f}" for fit, loss in means.items()),
    )
    return FitChoice(chosen, means)


def choose(losses: Mapping[Fit, Floats]) -> Fit:
    """The best of losses `[N]` on the same images, if it is better than "crop" beyond chance."""
    better: dict[Fit, float] = {"crop": 0.0}
    for fit, values in losses.items():
        gains = losses["crop"] - values
        if fit != "crop" and gains.mean() > _NUM_ERRORS * gains.std(ddof=1) / np.sqrt(len(gains)):
            better[fit] = float(gains.mean())
    return max(better, key=lambda fit: better[fit])


def _losses(task: Task, logits: Floats, labels: Labels) -> Floats:
    """Of each image."""
    rows = range(len(labels))
    return np.array(
        [task.log_loss(logits[row : row + 1], labels[row : row + 1]) for row in rows], np.float32
    )


def _has_uneven_sides(splits: Splits, sizes: Mapping[str, tuple[int, int]]) -> bool:
    ratios = [
        max(size) / max(1, min(size))
        for size in (sizes.get(sample.key) for sample in splits.train)
        if size is not None
    ]
    return any(ratio > _SQUARE for ratio in ratios)
