"""The effect and the cost of --balance weights on imbalanced classes.

python benchmarks/balance.py --data fashion-mnist-3000-1000

A quarter of all images is held out, --splits times. The classes, in random order, keep ever fewer
training images: the first has --ratio times as many as the last. All held-out images have equally
frequent classes; the "uneven" ones are a part of them with the training images' class frequencies.
benchmarks/images.py makes the folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Run as a file, `import finetune` would find benchmarks/finetune.py.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import numpy.typing as npt

from benchmarks.calibration import extract
from finetune.evaluation.class_metrics import evaluate_classes
from finetune.evaluation.conformal import calibrate_probe
from finetune.probe.solve import solve_probe
from finetune.tasks.balance import class_weights
from models.scores import Floats, Labels
from models.sources import SplitName

COLUMNS = (
    "balanced accuracy",
    "recall of the 3 rarest",
    "accuracy, uneven",
    "error before temperature, uneven",
    "error, uneven",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--ratio", type=float, default=50)
    args = parser.parse_args()
    features, labels, _, names = extract(args.data)
    rows: dict[str, list[tuple[float, ...]]] = {"none": [], "weights": []}
    for seed in range(args.splits):
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(labels))
        held_out, rest = np.split(order, [len(labels) // 4])
        shares = args.ratio ** -np.linspace(0, 1, len(names))[generator.permutation(len(names))]
        train, uneven = (thin(indices, labels, shares) for indices in (rest, held_out))
        rarest = np.argsort(shares)[:3]
        for balance, found in rows.items():
            weights = class_weights(labels[train], len(names)) if balance == "weights" else None
            probe = solve_probe(
                features[train], labels[train], len(names), seed=seed, class_weights=weights
            )
            even, as_trained = (
                evaluate_classes(probe.logits(features[part]), labels[part])
                for part in (held_out, uneven)
            )
            logits: dict[SplitName, Floats] = {"val": probe.logits(features[uneven])}
            calibrated = calibrate_probe(
                probe.out_of_fold_logits,
                probe.temperature,
                labels[train],
                logits,
                {"val": labels[uneven]},
                0.95,
            )[1]["val"]
            recall = float(even.recall[rarest].mean())
            found.append(
                (
                    even.balanced_accuracy,
                    recall,
                    as_trained.accuracy,
                    calibrated.before.error,
                    calibrated.after.error,
                )
            )
    print(
        f"{len(train):,} training images of {len(names)} classes, {args.splits} random splits;\n"
        f"{len(held_out):,} held out, {len(uneven):,} of them as uneven as in training. "
        "Mean (least to most).\n"
    )
    print(f"| --balance | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for balance, found in rows.items():
        cells = [
            f"{column.mean():.3f} ({column.min():.3f} to {column.max():.3f})"
            for column in np.array(found).T
        ]
        print(f"| {balance} | {' | '.join(cells)} |")
    return 0


def thin(
    indices: npt.NDArray[np.int64], labels: Labels, shares: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """The part of each class in `indices` that `shares` `[C]` say, at least 2 images."""
    members = [indices[labels[indices] == label] for label in range(len(shares))]
    return np.concatenate(
        [own[: max(2, round(share * len(own)))] for own, share in zip(members, shares, strict=True)]
    )


if __name__ == "__main__":
    sys.exit(main())
