"""What is wrong with labelled images, found from their files, features and out-of-fold predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from finetune.auditing.findings import WORDING, Audit, Finding, Kind
from finetune.auditing.mislabelled import confident_thresholds, judge_label_rows, judge_labels
from finetune.auditing.page import write_page
from finetune.data.duplicates import Duplicates
from finetune.data.splits import Sample, Splits, count_labels
from finetune.evaluation.metrics import evaluate
from finetune.probe.solve import Probe
from models.engine.engine import Features
from models.errors import GraftError, describe_error
from models.files import write_whole
from models.preprocess import ImageError, Preprocess, begins_as
from models.scores import Floats, sigmoid, softmax
from models.sources import SplitName

MIN_IMAGES = 10
# What a file of each format may be called, its usual name first.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
# Odd ones are far from the fifth nearest of so many reference images, drawn by chance: time grows with the images, not with their square.
_NUM_REFERENCES = 2000
_NUM_NEIGHBOURS = 5
# By so many robust standard deviations (1.4826 times the median absolute deviation), and never more than this share.
_MIN_ODDNESS = 3.5
_MAX_ODD_FRACTION = 0.01


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
    """All findings: `loaded` is what the source holds, `splits` its readable part with `features`, and `probe` was solved on train."""
    copies = list(_find_copies(splits, duplicates))
    leaked = {
        id(finding.sample) for finding in copies if finding.kind in ("exact_leak", "near_leak")
    }
    accuracy: dict[SplitName, tuple[float, float | None]] = {}
    for split, samples in splits.named():
        if split != "train" and samples:
            logits, labels = probe.logits(features[split]), splits.labels(samples)
            is_clean = np.array([id(sample) not in leaked for sample in samples])
            clean = (
                evaluate(logits[is_clean], labels[is_clean]).score
                if labels[is_clean].size
                else None
            )
            accuracy[split] = evaluate(logits, labels).score, clean
    findings = [
        *_find_unreadable(loaded, splits, preprocess),
        *_find_small_classes(splits, min_images),
        *_find_wrong_extensions(splits),
        *copies,
        *(_find_wrong_label_rows if splits.is_multi_label else _find_wrong_labels)(
            splits, features, probe
        ),
        *_find_odd(splits, features),
    ]
    order = list(WORDING)
    findings.sort(key=lambda finding: (order.index(finding.kind), -(finding.score or 0)))
    metric = "mean average precision" if splits.is_multi_label else "accuracy"
    return Audit(
        tuple(findings), accuracy, sum(len(samples) for _, samples in loaded.named()), metric
    )


def write_audit(found: Audit, folder: Path, stem: str, data: str) -> tuple[Path, Path]:
    """`<stem>.csv` and `<stem>.html` in `folder`; raises GraftError where they cannot be written."""
    paths = folder / f"{stem}.csv", folder / f"{stem}.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, (found.to_csv(), write_page(found, data)), strict=True):
            # A path may hold bytes that are no text.
            write_whole(path, text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise GraftError(
            f"--output {folder}: {describe_error(error)}; make room, or name a folder that you can write to"
        ) from error
    return paths


def _find_unreadable(loaded: Splits, splits: Splits, preprocess: Preprocess) -> Iterator[Finding]:
    read = {sample.key for _, samples in splits.named() for sample in samples}
    for split, samples in loaded.named():
        for sample in samples:
            if sample.key not in read:
                yield Finding(
                    "unreadable",
                    split,
                    loaded.describe(sample),
                    _why_unreadable(sample, preprocess),
                    sample=sample,
                )


def _why_unreadable(sample: Sample, preprocess: Preprocess) -> str:
    try:
        preprocess(sample.read())
    except ImageError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
    return "it could not be read when the audit began, and can now"


def _find_small_classes(splits: Splits, min_images: int) -> Iterator[Finding]:
    counts = {split: count_labels(samples) for split, samples in splits.named()}
    for label, name in enumerate(splits.label_names):
        for split, count in counts.items():
            if not count[label]:
                yield Finding(
                    "missing_class", split, name, f"class {name!r} has no image in {split}"
                )
        if 0 < (number := counts["train"][label]) < min_images:
            has = "1 image" if number == 1 else f"{number} images"
            yield Finding(
                "small_class",
                "train",
                name,
                f"class {name!r} has {has} in train, fewer than {min_images}",
            )


def _find_wrong_extensions(splits: Splits) -> Iterator[Finding]:
    for split, samples in splits.named():
        for sample in samples:
            if not isinstance(sample.image, Path) or not sample.image.suffix:
                continue
            start = b""
            with contextlib.suppress(OSError), sample.image.open("rb") as file:
                start = file.read(12)
            name = begins_as(start)
            if name is not None and sample.image.suffix.lower() not in _SUFFIXES[name]:
                detail = f"named {sample.image.suffix}, but its content is {name}; rename it to {_SUFFIXES[name][0]}"
                yield Finding(
                    "wrong_extension", split, splits.describe(sample), detail, sample=sample
                )


def _find_copies(splits: Splits, duplicates: Duplicates) -> Iterator[Finding]:
    """For each image with a copy before it: in an earlier split, which it leaks from, or else in its own."""
    order: list[SplitName] = [split for split, _ in splits.named()]
    split_of = {id(sample): split for split, samples in splits.named() for sample in samples}
    for group in duplicates.groups:
        members = sorted(
            (sample for sample in group if id(sample) in split_of),
            key=lambda sample: order.index(split_of[id(sample)]),
        )
        for at, sample in enumerate(members[1:], start=1):
            split = split_of[id(sample)]
            earlier = [other for other in members[:at] if split_of[id(other)] != split] or members[
                :at
            ]
            # An exact copy says more than a near one.
            other = max(
                earlier,
                key=lambda other: (
                    duplicates.is_exact(sample, other),
                    duplicates.similarity(sample, other),
                ),
            )
            is_exact, other_split = duplicates.is_exact(sample, other), split_of[id(other)]
            kind: Kind = "exact_duplicate" if is_exact else "near_duplicate"
            if other_split != split:
                kind = "exact_leak" if is_exact else "near_leak"
            label, other_label = splits.describe(sample), splits.describe(other)
            but = "" if label == other_label else f", but labelled {other_label!r} there"
            detail = (
                f"the same {'file' if is_exact else 'picture'} as {other.key} in {other_split}{but}"
            )
            similarity = duplicates.similarity(sample, other)
            yield Finding(
                kind, split, label, detail, similarity, sample, (other_split, other_label, other)
            )


def _find_wrong_labels(
    splits: Splits, features: Mapping[SplitName, Features], probe: Probe
) -> Iterator[Finding]:
    """By the probe's out-of-fold predictions on train, and by the probe itself on the splits that it did not see."""
    out_of_fold = softmax(probe.out_of_fold_logits / probe.temperature)
    thresholds = confident_thresholds(out_of_fold, splits.labels(splits.train))
    for split, samples in splits.named():
        if not samples:
            continue
        held_out = (
            out_of_fold
            if split == "train"
            else softmax(probe.logits(features[split]) / probe.temperature)
        )
        quality = judge_labels(held_out, splits.labels(samples), thresholds)
        for index in np.flatnonzero(quality.is_issue):
            sample, suggested = samples[index], quality.suggested[index]
            label, other = splits.label_names[sample.label], splits.label_names[suggested]
            shares = (
                f"{held_out[index, suggested]:.0%}, {label!r} {held_out[index, sample.label]:.0%}"
            )
            yield Finding(
                "wrong_label",
                split,
                label,
                f"rather {other!r} ({shares})",
                float(quality.score[index]),
                sample,
                suggested=other,
            )


def _find_wrong_label_rows(
    splits: Splits, features: Mapping[SplitName, Features], probe: Probe
) -> Iterator[Finding]:
    """The same for images of any number of labels: each that looks wrong or missing is a finding of its own."""
    temperature = np.float32(probe.temperature)
    out_of_fold, train_rows = (
        sigmoid(probe.out_of_fold_logits / temperature),
        splits.labels(splits.train),
    )
    for split, samples in splits.named():
        if not samples:
            continue
        held_out = (
            out_of_fold
            if split == "train"
            else sigmoid(probe.logits(features[split]) / temperature)
        )
        for label, quality in judge_label_rows(
            held_out, splits.labels(samples), out_of_fold, train_rows
        ):
            for index in np.flatnonzero(quality.is_issue):
                sample = samples[index]
                is_there = label in sample.labels
                rather = splits.join(sorted({*sample.labels} ^ {label})) or "no label"
                detail = f"rather {'without' if is_there else 'with'} {splits.label_names[label]!r} ({held_out[index, label]:.0%})"
                yield Finding(
                    "wrong_label",
                    split,
                    splits.describe(sample),
                    detail,
                    float(quality.score[index]),
                    sample,
                    suggested=rather,
                )


def _find_odd(splits: Splits, features: Mapping[SplitName, Features]) -> Iterator[Finding]:
    """Far from the fifth nearest other image (Ramaswamy, Rastogi & Shim, SIGMOD 2000), by the cosine of centred features."""
    samples = [(split, sample) for split, of_split in splits.named() for sample in of_split]
    distances = _neighbour_distances(
        [features[split][: len(of_split)] for split, of_split in splits.named()]
    )
    center = float(np.median(distances))
    spread = 1.4826 * float(np.median(np.abs(distances - center)))
    most = max(1, int(len(samples) * _MAX_ODD_FRACTION))
    for index in np.argsort(-distances, kind="stable")[:most]:
        if distances[index] - center <= _MIN_ODDNESS * spread:
            break
        split, sample = samples[index]
        detail = f"at distance {distances[index]:.2f} from its neighbours, others at {center:.2f}"
        yield Finding(
            "odd", split, splits.describe(sample), detail, float(distances[index]), sample
        )


def _neighbour_distances(features: Sequence[Features]) -> Floats:
    """Of features `[N,F]` in parts, to reference images drawn by chance; an image is no neighbour of itself."""
    starts = np.cumsum([0, *(len(part) for part in features)])
    num_images = int(starts[-1])
    chosen = np.sort(
        np.random.default_rng(0).choice(num_images, min(num_images, _NUM_REFERENCES), replace=False)
    )
    drawn = [
        part[chosen[(chosen >= start) & (chosen < start + len(part))] - start]
        for part, start in zip(features, starts, strict=False)
    ]
    center = features[0].mean(axis=0)
    references = _unit(np.concatenate(drawn) - center)
    distances: list[Floats] = []
    start = 0
    for part in features:
        for block in (part[first : first + 1024] for first in range(0, len(part), 1024)):
            cosines = _unit(block - center) @ references.T
            itself = np.flatnonzero((chosen >= start) & (chosen < start + len(block)))
            cosines[chosen[itself] - start, itself] = -1
            nearest = min(_NUM_NEIGHBOURS, cosines.shape[1])
            distances.append(1 - np.partition(cosines, -nearest, axis=1)[:, -nearest])
            start += len(block)
    return np.concatenate(distances)


def _unit(vectors: Floats) -> Floats:
    return np.asarray(
        vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32
    )
