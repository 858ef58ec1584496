"""The batch of a broken loss, kept for a person to inspect: images, labels, losses."""

from __future__ import annotations

import contextlib
import csv
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from finetune.data.splits import Sample, Splits
from models.errors import GraftError, describe_error, join_first
from models.images import ImageError
from models.preprocess import Preprocess

FOLDER = "broken-batch"


class BrokenLossError(GraftError):
    """The loss, or its gradient, is NaN or infinite."""


def keep_broken_batch(
    run_dir: Path,
    samples: Sequence[Sample],
    splits: Splits,
    losses: Sequence[float],
    preprocess: Preprocess,
) -> str:
    """Write each image's plain crop as a PNG, and `batch.csv`; gives a sentence that says where."""
    folder = run_dir / FOLDER
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with (folder / "batch.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("file", "path", "label", "loss"))
            for index, (sample, loss) in enumerate(zip(samples, losses, strict=True)):
                name = f"{index:03d}.png"
                with contextlib.suppress(ImageError):
                    Image.fromarray(preprocess(sample.read())).save(folder / name)
                rows.writerow((name, sample.key, splits.describe(sample), loss))
    except OSError as error:
        return (
            f"the {len(samples)} images of the batch could not be written to {folder}: "
            f"{describe_error(error)}"
        )
    broken = [
        sample.key for sample, loss in zip(samples, losses, strict=True) if not math.isfinite(loss)
    ]
    which = f": NaN or infinite for {join_first(broken, 3)}" if broken else ""
    return (
        f"the {len(samples)} images of the batch are in {folder}, with each one's loss in "
        f"batch.csv{which}"
    )
