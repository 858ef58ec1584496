"""Which levels of a network the probe's head reads, chosen by out-of-fold log loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.probe.solve import L2_PATH, ROUGH_TOLERANCE, Probe, solve_on_best_views, solve_probe
from finetune.tasks.strata import NUM_FOLDS
from finetune.tasks.task import Task
from models.engine.engine import Features
from models.scores import Floats, Labels

logger = logging.getLogger("graft.probe")

# Sets of levels are compared on at most so many images: on 1,000, the loss of a set is known to a
# few percent.
_MAX_COMPARED = 1000


@dataclass(frozen=True)
class LevelProbes:
    """The probe on the chosen set of levels, and the one on the last level alone.

    `losses` are the out-of-fold log losses of each set, on the images that they were compared on.
    """

    chosen: str
    losses: Mapping[str, float]
    probe: Probe
    last: Probe

    def to_dict(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen,
            "num_features": int(self.probe.weight.shape[1]),
            "losses": dict(self.losses),
        }


def solve_on_best_levels(
    features: Features,
    labels: Labels,
    num_classes: int,
    level_sets: Mapping[str, int],
    *,
    task: Task,
    seed: int,
    class_weights: Floats | None = None,
) -> LevelProbes:
    """Probes on `features` `[V·N,F]`, of which each of `level_sets` is so many first columns.

    The smallest set is taken whose loss is within one standard error of the best one's, paired
    over the folds (Breiman et al., Classification and Regression Trees, 1984, 3.4.3).
    """
    order = task.draw_order(labels, seed)[:_MAX_COMPARED]
    compared = np.sort(order)
    compared_features, compared_labels = features[compared], labels[compared]
    probes = {
        name: solve_probe(
            compared_features[:, :width],
            compared_labels,
            num_classes,
            task=task,
            seed=seed,
            class_weights=class_weights,
            l2_path=L2_PATH[::2],
            tolerance=ROUGH_TOLERANCE,
        )
        for name, width in level_sets.items()
    }
    folds = task.assign_folds(compared_labels, NUM_FOLDS, seed)
    fold_losses = np.array(
        [
            [
                task.log_loss(
                    probe.out_of_fold_logits[folds == fold],
                    compared_labels[folds == fold],
                    class_weights,
                )
                for fold in np.unique(folds)
            ]
            for probe in probes.values()
        ]
    )
    names = list(level_sets)
    chosen = names[choose_set(fold_losses)]
    losses = dict(zip(names, map(float, fold_losses.mean(axis=1)), strict=True))
    logger.info(
        "levels: %s (%d features); out-of-fold log loss %s",
        chosen,
        level_sets[chosen],
        ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()),
    )

    def solve(name: str) -> Probe:
        return solve_on_best_views(
            features[:, : level_sets[name]],
            labels,
            num_classes,
            task=task,
            seed=seed,
            class_weights=class_weights,
            l2_path=_path_near(probes[name].l2, len(labels) / len(compared)),
        )

    probe = solve(chosen)
    return LevelProbes(chosen, losses, probe, probe if chosen == "last" else solve("last"))


def choose_set(fold_losses: Floats) -> int:
    """The first row of losses `[S,K]`, of nested sets over K folds, within noise of the best."""
    best = int(fold_losses.mean(axis=1).argmin())
    for row, losses in enumerate(fold_losses[:best]):
        excess = losses - fold_losses[best]
        standard_error = excess.std(ddof=1) / np.sqrt(len(excess))
        if excess.mean() <= standard_error:
            return row
    return best


def _path_near(l2: float, times_more: float) -> tuple[float, ...]:
    """The strengths around the best of a part of the images.

    The penalty is on the mean loss: of twice as many images it is half as strong.
    """
    place = min(L2_PATH.index(l2) + round(2 * np.log10(times_more)), len(L2_PATH) - 1)
    return L2_PATH[max(0, place - 1) : place + 2]
