"""Validation images as points in TensorBoard's projector: features, labels, answers, thumbnails.

TensorBoard looks for `projector_config.pbtxt` beside a run's events, and reads the files it names.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from finetune.data.splits import Sample, Splits
from finetune.report.candidate import Candidate
from models.errors import GraftError
from models.files import write_whole
from models.images import ImageError, Pixels
from models.preprocess import Preprocess
from models.scores import Floats

# With more, a browser becomes slow.
_MAX_POINTS = 2000
# The projector reduces them further; all 1,280 of a backbone would take a second to write as text.
_NUM_COMPONENTS = 50
_SIDE = 48
_THUMBNAIL = Preprocess(height=_SIDE, width=_SIDE, crop_fraction=1.0)
_CONFIG = """\
embeddings {{
  tensor_name: "val"
  tensor_path: "projector/tensors.tsv"
  metadata_path: "projector/metadata.tsv"
{sprite}}}
"""
_SPRITE = f"""\
  sprite {{
    image_path: "projector/sprite.jpg"
    single_image_dim: {_SIDE}
    single_image_dim: {_SIDE}
  }}
"""


def write_projector(
    run_dir: Path,
    splits: Splits,
    candidate: Candidate,
    *,
    with_thumbnails: bool,
    num_workers: int,
) -> None:
    """Points of all validation images, or of 2,000 spread over them.

    Thumbnails are read by `num_workers` threads. Raises GraftError if a file cannot be written.
    """
    num_shown = min(len(splits.val), _MAX_POINTS)
    shown = np.unique(np.linspace(0, len(splits.val) - 1, num_shown).round().astype(int))
    points = _principal_components(candidate.features["val"][shown])
    folder = run_dir / "projector"
    try:
        folder.mkdir(exist_ok=True)
        numbers = ["\t".join(f"{value:.4g}" for value in row) for row in points.tolist()]
        _write(folder / "tensors.tsv", numbers)
        _write(folder / "metadata.tsv", _describe(splits, candidate, shown))
        if with_thumbnails:
            sprite = _draw_sprite([splits.val[index] for index in shown], num_workers)
            write_whole(
                folder / "sprite.jpg", lambda temporary: sprite.save(temporary, "JPEG", quality=85)
            )
        config = _CONFIG.format(sprite=_SPRITE if with_thumbnails else "")
        write_whole(run_dir / "projector_config.pbtxt", config)
    except OSError as error:
        raise GraftError(f"{folder}: it cannot be written: {error.strerror}") from error


def _principal_components(features: Floats) -> Floats:
    """Features `[N,F]` → `[N,K]`, by one step of a randomised decomposition.

    It takes milliseconds where an exact one takes seconds (Halko, Martinsson & Tropp 2011).
    """
    # Products of products of large features would be infinite in float32.
    scale = max(float(np.abs(features).max()), 1e-30)
    centred = features / scale
    centred -= centred.mean(axis=0)
    num_components = min(_NUM_COMPONENTS, *centred.shape)
    drawn = np.random.default_rng(0).standard_normal(
        (centred.shape[1], min(num_components + 8, *centred.shape)), np.float32
    )
    basis, _ = np.linalg.qr(centred @ (centred.T @ (centred @ drawn)))
    _, _, directions = np.linalg.svd(basis.T @ centred, full_matrices=False)
    return np.asarray(scale * (centred @ directions[:num_components].T), np.float32)


def _describe(splits: Splits, candidate: Candidate, shown: npt.NDArray[np.int_]) -> list[str]:
    """A heading, then a row for each image."""
    answers = candidate.calibrated["val"].answers
    samples = [splits.val[index] for index in shown]
    columns = splits.task.answer_columns(
        candidate.calibration.scores(candidate.logits["val"][shown]),
        None if answers is None else answers[shown],
        splits.labels(samples),
        splits.label_names,
    )
    columns["file"] = [sample.key for sample in samples]
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    return ["\t".join(" ".join(cell.split()) for cell in row) for row in rows]


def _draw_sprite(samples: list[Sample], num_workers: int) -> Image.Image:
    """All thumbnails in a square grid."""
    columns = int(np.ceil(np.sqrt(len(samples))))
    tiles = np.full((columns * columns, _SIDE, _SIDE, 3), 255, np.uint8)
    with ThreadPoolExecutor(num_workers) as pool:
        for index, thumbnail in enumerate(pool.map(_read_thumbnail, samples)):
            if thumbnail is not None:
                tiles[index] = thumbnail
    rows = tiles.reshape(columns, columns, _SIDE, _SIDE, 3).swapaxes(1, 2)
    return Image.fromarray(rows.reshape(columns * _SIDE, columns * _SIDE, 3))


def _read_thumbnail(sample: Sample) -> Pixels | None:
    """None if the file can no longer be read."""
    try:
        return _THUMBNAIL(sample.read())
    except (ImageError, OSError):
        return None


def _write(path: Path, lines: list[str]) -> None:
    # A path may hold bytes that are not text.
    text = "\n".join(lines) + "\n"
    write_whole(path, text.encode("utf-8", "replace"))
