"""Compare backbones on your images: cross-validated accuracy of a probe against images/s here.

python finetune/compare.py --data photos/                          all whose weights are here
python finetune/compare.py --data photos/ --backbones resnet18,vit_tiny_patch16_224
"""

from __future__ import annotations

import logging
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.command_line import parse_options
from finetune.config import CompareOptions, name_of_data
from finetune.data.lasting_split import load_lasting_splits
from finetune.data.splits import Splits
from finetune.probe.features import extract_splits, open_engine, prepare
from finetune.probe.solve import solve_probe
from finetune.report.plots import MeasuredBackbone, draw_backbones
from finetune.terminal import run_program
from finetune.unused import warn_if_nothing_is_stretched, warn_if_unused
from models.errors import GraftError
from models.files import scratch_folder

logger = logging.getLogger("graft.compare")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    return run_program(
        lambda: compare(
            parse_options(CompareOptions, list(sys.argv[1:] if arguments is None else arguments))
        )
    )


@dataclass(frozen=True)
class Comparison:
    """MeasuredBackbones in order of accuracy, and the one to take."""

    candidates: tuple[MeasuredBackbone, ...]
    recommended: MeasuredBackbone


def compare(options: CompareOptions) -> Comparison:
    """Print a table and a recommendation, and write a plot.

    Backbones that cannot be had are logged and left out. Raises GraftError if none is left.
    """
    warn_if_unused(options)
    splits, _ = load_lasting_splits(
        options.data,
        data_root=options.data_root,
        val_fraction=options.val_fraction,
        seed=options.seed,
        runs_dir=None if options.new_split else options.output,
        cache_dir=options.enabled_cache_dir,
        num_workers=options.workers,
        strict=options.strict,
    )
    warn_if_nothing_is_stretched(options, splits)
    if splits.task.metric != "accuracy":
        raise GraftError(
            f"--data {options.data}: backbones are compared by the accuracy of single labels, and "
            "its images have several; try them with finetune/run.py --backbone NAME"
        )
    candidates = []
    for name in _names(options):
        try:
            candidates.append(_measure(name, splits, options))
        except GraftError as error:
            logger.warning("left out: %s", str(error).splitlines()[0])
    if not candidates:
        raise GraftError("--backbones: none of them could be measured; the lines above say why")
    candidates.sort(key=lambda candidate: -candidate.accuracy)
    comparison = Comparison(tuple(candidates), recommend(candidates))
    path = options.output / f"compare-{name_of_data(options.data)}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw_backbones(candidates, comparison.recommended).png)
    except OSError as error:
        raise GraftError(f"--output {options.output}: {error.strerror}") from error
    _print(comparison, options, path)
    return comparison


def recommend(candidates: Sequence[MeasuredBackbone]) -> MeasuredBackbone:
    """The fastest whose interval reaches the highest accuracy, so that it may be as accurate."""
    best = max(candidates, key=lambda candidate: candidate.accuracy)
    good = [candidate for candidate in candidates if candidate.high >= best.accuracy]
    return max(good, key=lambda candidate: candidate.images_per_second)


def wilson_interval(num_right: int, num_images: int) -> tuple[float, float]:
    """The 95 % interval of a fraction (Wilson, JASA 22, 1927)."""
    z = 1.959964
    fraction, inverse = num_right / num_images, z * z / num_images
    center = (fraction + inverse / 2) / (1 + inverse)
    variance = fraction * (1 - fraction) / num_images + inverse / (4 * num_images)
    half = z * math.sqrt(variance) / (1 + inverse)
    # The fraction lies within; rounding would end the interval of 24 of 24 at 0.9999999999999999.
    return max(0.0, min(center - half, fraction)), min(1.0, max(center + half, fraction))


def _names(options: CompareOptions) -> list[str]:
    if options.backbones != "installed":
        names = [name.strip() for name in options.backbones.split(",") if name.strip()]
        if not names:
            raise GraftError(
                f"--backbones {options.backbones}: name one or more, with commas between"
            )
        return names
    from models.backbone.build import installed_backbones

    names = installed_backbones()
    if not names:
        raise GraftError(
            "--backbones installed: no package and no cache of the hub has weights here; "
            "name some where there is a network"
        )
    return names


def _measure(name: str, splits: Splits, options: CompareOptions) -> MeasuredBackbone:
    with scratch_folder() as scratch:
        # What is computed here, a run on the chosen one finds in the cache.
        backbone = prepare(name, splits.train, options, scratch, all_levels=True)
        engine = open_engine(backbone, options.device, options.precision)
        splits, features = extract_splits(
            splits,
            backbone,
            engine,
            num_workers=options.workers,
            cache=options.feature_cache,
            only=("train",),
            unreadable="error" if options.strict else "warning",
        )
        engine.close()
    labels = splits.labels(splits.train)
    probe = solve_probe(
        features["train"][:, : backbone.num_features],
        labels,
        len(splits.label_names),
        task=splits.task,
        seed=options.seed,
    )
    num_right = int((probe.out_of_fold_logits.argmax(axis=1) == labels).sum())
    low, high = wilson_interval(num_right, len(labels))
    return MeasuredBackbone(
        name,
        num_right / len(labels),
        low,
        high,
        engine.info.images_per_second,
        engine.info.precision,
    )


def _print(comparison: Comparison, options: CompareOptions, path: Path) -> None:
    width = max(len("backbone"), *(len(candidate.name) for candidate in comparison.candidates))
    print(f"\n{'backbone':<{width}}  accuracy   95% interval      images/s  precision")
    for candidate in comparison.candidates:
        mark = "  <- recommended" if candidate is comparison.recommended else ""
        interval = f"{candidate.low:.4f} to {candidate.high:.4f}"
        speed = f"{candidate.images_per_second:>8.0f}"
        print(
            f"{candidate.name:<{width}}  {candidate.accuracy:.4f}     {interval}  {speed}  "
            f"{candidate.precision}{mark}"
        )
    data = shlex.quote(options.data)
    print(
        f"""
Accuracy is cross-validated on the training images; the recommended backbone is the fastest that may
be as accurate as the best.

  plot  {path}

Next:
  python finetune/run.py --data {data} --backbone {comparison.recommended.name}"""
    )


if __name__ == "__main__":
    sys.exit(main())
