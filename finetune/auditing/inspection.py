"""What is wrong with labelled images, by their files, features and out-of-fold predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from finetune.auditing.findings import LEAKS, WORDING, Audit, Finding, Kind
from finetune.auditing.mislabelled import find_wrong_labels
from finetune.auditing.outliers import find_outliers
from finetune.data.duplicates import Duplicates
from finetune.data.splits import Sample, Splits
from finetune.probe.solve import Probe
from models.engine.engine import Features
from models.images import NUM_MAGIC_BYTES, ImageError, begins_as, is_wide, open_image
from models.preprocess import Preprocess
from models.sources import SplitName

MIN_IMAGES = 10
# The highest value of 16 bits; data of up to 14 bits in such files uses a quarter of the range.
_MAX_WIDE = 2**16 - 1
_NARROW_FRACTION = 0.25
_MUCH_CUT_OFF = 0.2  # of a side
# What a file of each format may be called, its usual name first.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif", ".avifs"),
    "HEIC": (".heic", ".heif", ".hif"),
}


def inspect(
    loaded: Splits,
    splits: Splits,
    features: Mapping[SplitName, Features],
    probe: Probe,
    duplicates: Duplicates,
    preprocess: Preprocess,
    *,
    min_images: int = MIN_IMAGES,
) -> Audit:
    """All findings, and the score of the probe with and without leaks.

    `loaded` is what the source holds, `splits` its readable part, whose `features` `[N,F]` the
    probe was solved on ("train"). Classes with fewer than `min_images` to train on are small.
    """
    copies = list(_find_copies(splits, duplicates))
    findings = [
        *_find_unreadable(loaded, splits, preprocess),
        *_find_small_classes(splits, min_images),
        *_find_wrong_extensions(splits),
        *([] if preprocess.stretch else _find_narrow_ranges(splits)),
        *copies,
        *find_wrong_labels(splits, features, probe),
        *find_outliers(splits, features),
    ]
    order = list(WORDING)
    findings.sort(key=lambda finding: (order.index(finding.kind), -(finding.score or 0)))
    return Audit(
        findings=tuple(findings),
        scores=_score_without_leaks(splits, features, probe, copies),
        num_images=sum(len(samples) for _, samples in loaded.named()),
        metric=splits.task.metric_name,
        num_cropped=sum(
            preprocess.share_cut_off(*size) >= _MUCH_CUT_OFF for size in duplicates.sizes.values()
        ),
    )


def _score_without_leaks(
    splits: Splits,
    features: Mapping[SplitName, Features],
    probe: Probe,
    copies: list[Finding],
) -> dict[SplitName, tuple[float, float | None]]:
    """Of each split but train: the probe's score on all images, and on those that are no leaks."""
    leaked = {id(finding.sample) for finding in copies if finding.kind in LEAKS}
    scores: dict[SplitName, tuple[float, float | None]] = {}
    for split, samples in splits.named():
        if split == "train" or not samples:
            continue
        logits, labels = probe.logits(features[split]), splits.labels(samples)
        is_clean = np.array([id(sample) not in leaked for sample in samples])
        clean = (
            splits.task.evaluate(logits[is_clean], labels[is_clean]).score
            if is_clean.any()
            else None
        )
        scores[split] = splits.task.evaluate(logits, labels).score, clean
    return scores


def _find_unreadable(loaded: Splits, splits: Splits, preprocess: Preprocess) -> Iterator[Finding]:
    read = {sample.key for _, samples in splits.named() for sample in samples}
    for split, samples in loaded.named():
        for sample in samples:
            if sample.key not in read:
                label, why = loaded.describe(sample), _why_unreadable(sample, preprocess)
                yield Finding("unreadable", split, label, why, sample=sample)


def _why_unreadable(sample: Sample, preprocess: Preprocess) -> str:
    try:
        preprocess(sample.read())
    except ImageError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
    return "it could not be read when the audit began, and can now"


def _find_small_classes(splits: Splits, min_images: int) -> Iterator[Finding]:
    counts = {split: splits.count_labels(samples) for split, samples in splits.named()}
    for label, name in enumerate(splits.label_names):
        for split, count in counts.items():
            if not count[label]:
                detail = f"class {name!r} has no image in {split}"
                yield Finding("missing_class", split, name, detail)
        if 0 < (number := int(counts["train"][label])) < min_images:
            has = "1 image" if number == 1 else f"{number} images"
            detail = f"class {name!r} has {has} in train, fewer than {min_images}"
            yield Finding("small_class", "train", name, detail)


def _find_wrong_extensions(splits: Splits) -> Iterator[Finding]:
    for split, samples in splits.named():
        for sample in samples:
            if not isinstance(sample.image, Path) or not sample.image.suffix:
                continue
            start = b""
            with contextlib.suppress(OSError), sample.image.open("rb") as file:
                start = file.read(NUM_MAGIC_BYTES)
            name, suffix = begins_as(start), sample.image.suffix
            if name is not None and suffix.lower() not in _SUFFIXES[name]:
                rename = f"rename it to {_SUFFIXES[name][0]}"
                detail = f"named {suffix}, but its content is {name}; {rename}"
                label = splits.describe(sample)
                yield Finding("wrong_extension", split, label, detail, sample=sample)


def _find_narrow_ranges(splits: Splits) -> Iterator[Finding]:
    for split, samples in splits.named():
        for sample in samples:
            values = _wide_values(sample) if isinstance(sample.image, Path) else None
            if values is None or not 0 < values[1] <= _NARROW_FRACTION * _MAX_WIDE:
                continue
            low, high = values
            used = f"values {low:,} to {high:,} of {_MAX_WIDE:,}"
            detail = f"{used}: it uses {(high - low) / _MAX_WIDE:.1%} of its range; say --stretch"
            yield Finding("narrow_range", split, splits.describe(sample), detail, sample=sample)


def holds_wide_images(splits: Splits) -> bool:
    """Whether any image has more than 8 bits a channel; the files' headers are read."""
    return any(
        isinstance(sample.image, Path) and _wide_values(sample) is not None
        for _, samples in splits.named()
        for sample in samples
    )


def _wide_values(sample: Sample) -> tuple[int, int] | None:
    """The lowest and the highest value of an image of 16 bits a channel, None of others."""
    with contextlib.suppress(OSError, ImageError):
        assert isinstance(sample.image, Path)
        with sample.image.open("rb") as file:
            start = file.read(NUM_MAGIC_BYTES)
        name = begins_as(start)
        if name in ("PNG", "TIFF", "PPM"):
            data = start if name == "PNG" and not is_wide(start) else sample.read()
            return open_image(data).values if is_wide(data) else None
    return None


def _find_copies(splits: Splits, duplicates: Duplicates) -> Iterator[Finding]:
    """For each image a copy in an earlier split, from which it leaks, or else in its own split."""
    order: list[SplitName] = [split for split, _ in splits.named()]
    split_of = {id(sample): split for split, samples in splits.named() for sample in samples}
    for group in duplicates.groups:
        members = sorted(
            (sample for sample in group if id(sample) in split_of),
            key=lambda sample: order.index(split_of[id(sample)]),
        )
        for index, sample in enumerate(members[1:], start=1):
            split, before = split_of[id(sample)], members[:index]
            elsewhere = [other for other in before if split_of[id(other)] != split]
            other = _closest(sample, elsewhere or before, duplicates)
            yield _describe_copy(sample, split, other, split_of[id(other)], splits, duplicates)


def _closest(sample: Sample, others: list[Sample], duplicates: Duplicates) -> Sample:
    """An exact copy rather than a near one."""
    return max(
        others,
        key=lambda other: (
            duplicates.is_exact(sample, other),
            duplicates.similarity(sample, other),
        ),
    )


def _describe_copy(
    sample: Sample,
    split: SplitName,
    other: Sample,
    other_split: SplitName,
    splits: Splits,
    duplicates: Duplicates,
) -> Finding:
    is_exact = duplicates.is_exact(sample, other)
    kind: Kind = "exact_duplicate" if is_exact else "near_duplicate"
    if other_split != split:
        kind = "exact_leak" if is_exact else "near_leak"
    label, other_label = splits.describe(sample), splits.describe(other)
    but = "" if label == other_label else f", but labelled {other_label!r} there"
    same = "file" if is_exact else "picture"
    return Finding(
        kind,
        split,
        label,
        detail=f"the same {same} as {other.key} in {other_split}{but}",
        score=duplicates.similarity(sample, other),
        sample=sample,
        other=(other_split, other_label, other),
    )
