"""Calibration error and coverage over random splits, and on images of none of the classes.

python benchmarks/calibration.py --data fashion-mnist-3000-1000 --others emoji

All images of --data are split --splits times, with as many to train on as the folder has. --others
are images of something else. benchmarks/images.py makes both.

What it should show: calibration error after temperature at most 0.03, held-out coverage within 2
points of --coverage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

# Run as a file, `import finetune` would find benchmarks/finetune.py.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from finetune.config import Options
from finetune.data.splits import Splits, load_splits
from finetune.evaluation.conformal import calibrate_probe
from finetune.probe.features import extract_splits, open_engine, prepare
from finetune.probe.solve import solve_probe
from models.scores import Floats, Labels, is_unsure, softmax
from models.sources import SplitName


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--others", required=True)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--coverage", type=float, nargs="+", default=[0.9, 0.95, 0.99])
    args = parser.parse_args()
    features, labels, num_train, names = extract(args.data)
    others, _, _, _ = extract(args.others)
    rows: dict[float, list[tuple[float, ...]]] = {coverage: [] for coverage in args.coverage}
    for seed in range(args.splits):
        order = np.random.default_rng(seed).permutation(len(labels))
        train, held_out = order[:num_train], order[num_train:]
        probe = solve_probe(features[train], labels[train], len(names), seed=seed)
        for coverage, found in rows.items():
            logits: dict[SplitName, Floats] = {"val": probe.logits(features[held_out])}
            calibration, calibrated = calibrate_probe(
                probe.out_of_fold_logits,
                probe.temperature,
                labels[train],
                logits,
                {"val": labels[held_out]},
                coverage,
            )
            unsure = is_unsure(
                softmax(probe.logits(others) / calibration.temperature), calibration.threshold
            )
            one = calibrated["val"]
            found.append(
                (
                    one.before.error,
                    one.after.error,
                    one.covered,
                    one.unsure,
                    one.sure_accuracy,
                    float(unsure.mean()),
                )
            )
    print(
        f"{len(labels):,} images of {len(names)} classes, {args.splits} random splits, "
        f"{len(labels) - num_train:,} held out in each;\n"
        f"{len(others):,} images of no class. Mean (least to most).\n"
    )
    print(
        "| coverage asked | error before | error | covered | unsure | right where sure "
        "| unsure of the images of no class |"
    )
    print("|---|---|---|---|---|---|---|")
    for coverage, found in rows.items():
        table = np.array(found)
        cells = [
            f"{column.mean():.3f} ({column.min():.3f} to {column.max():.3f})" for column in table.T
        ]
        print(f"| {coverage} | {' | '.join(cells)} |")
    return 0


def extract(data: str) -> tuple[Floats, Labels, int, tuple[str, ...]]:
    """Features, labels, the number of training images, which come first, and the label names."""
    options = Options(data=data)
    splits: Splits = load_splits(
        data, data_root=options.data_root, val_fraction=options.val_fraction, seed=0
    )
    with tempfile.TemporaryDirectory() as scratch:
        backbone = prepare(options.backbone, splits.train, options, Path(scratch))
        engine = open_engine(backbone, options.device, options.precision)
        splits, features = extract_splits(
            splits,
            backbone,
            engine,
            num_workers=options.workers,
            cache=options.feature_cache,
        )
        engine.close()
    labels = splits.labels([sample for _, samples in splits.named() for sample in samples])
    return np.concatenate(list(features.values())), labels, len(splits.train), splits.label_names


if __name__ == "__main__":
    sys.exit(main())
