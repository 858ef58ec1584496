"""Which labels are likely wrong: confident learning on held-out predictions.

Northcutt, Jiang & Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 70
(2021), arXiv 1911.00068. cleanlab, by the same authors, has more of it; the two steps needed here
are a few lines, and importing it (with pandas and scikit-learn) would take longer than a probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune.auditing.findings import Finding
from finetune.data.splits import Splits
from finetune.probe.solve import Probe
from models.engine.engine import Features
from models.scores import Floats, Labels
from models.sources import SplitName


@dataclass(frozen=True)
class LabelQuality:
    """Of each sample `[N]` its score, the likeliest other class, and whether its label is an issue.

    `score` is from 0 to 1, high where the label is likely wrong.
    """

    score: Floats
    suggested: Labels
    is_issue: npt.NDArray[np.bool_]


def find_wrong_labels(
    splits: Splits, features: Mapping[SplitName, Features], probe: Probe
) -> Iterator[Finding]:
    """Labels that the probe's held-out predictions contradict.

    Those are out-of-fold on "train", and the probe's own on the splits that it did not see. Each
    classification of the task is judged by itself.
    """
    task, temperature = splits.task, np.float32(probe.temperature)
    out_of_fold = probe.out_of_fold_logits
    train_parts = task.classifications(out_of_fold / temperature, splits.labels(splits.train))
    thresholds = [confident_thresholds(*part) for part in train_parts]
    for split, samples in splits.named():
        if not samples:
            continue
        logits = out_of_fold if split == "train" else probe.logits(features[split])
        parts = task.classifications(logits / temperature, splits.labels(samples))
        for place, (probabilities, labels) in enumerate(parts):
            quality = judge_labels(probabilities, labels, thresholds[place])
            for index in np.flatnonzero(quality.is_issue):
                sample = samples[index]
                correction = task.describe_correction(
                    sample.label,
                    place,
                    int(quality.suggested[index]),
                    probabilities[index],
                    splits.label_names,
                )
                yield Finding(
                    "wrong_label",
                    split,
                    splits.describe(sample),
                    correction.detail,
                    float(quality.score[index]),
                    sample,
                    suggested=correction.suggested,
                )


def confident_thresholds(probabilities: Floats, labels: Labels) -> Floats:
    """The mean probability that each class gets on samples of its own label (equation 2), `[C]`.

    1 for a class without samples; probabilities are `[N,C]`, labels `[N]`.
    """
    num_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=own, minlength=num_classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)


def judge_labels(probabilities: Floats, labels: Labels, thresholds: Floats) -> LabelQuality:
    """How many labels `[N]` are wrong by the confident joint, and which by self-confidence.

    The joint counts a sample under the class whose held-out probability `[N,C]` reaches what that
    class gets on its own samples; off the diagonal are the issues. As many samples are issues,
    those whose own label got the least of what its class gets.
    """
    rows = np.arange(len(labels))
    joint = np.where(probabilities >= thresholds, probabilities, -1).argmax(axis=1)
    num_issues = int(((probabilities[rows, joint] >= thresholds[joint]) & (joint != labels)).sum())
    score = 1 - np.minimum(1, probabilities[rows, labels] / np.maximum(thresholds[labels], 1e-12))
    others = probabilities.copy()
    others[rows, labels] = -1
    suggested = others.argmax(axis=1)
    is_likelier = others[rows, suggested] > probabilities[rows, labels]
    is_issue = np.zeros(len(labels), bool)
    is_issue[np.argsort(-np.where(is_likelier, score, -1), kind="stable")[:num_issues]] = True
    return LabelQuality(
        score.astype(np.float32), suggested.astype(np.int64), is_issue & is_likelier
    )
