"""Features in the best precision: the one asked for, or, with `--precision auto`, the fastest that costs a probe no accuracy.

int8 is compared with the float engine on a sample of the training images before the pass over all of them, where that pass is long
enough to pay for it; bf16, and int8 once more, with fp32 on a few images after it. A verdict is remembered for a backbone on a source of
images, so that a second run, over a grown folder too, compares nothing and finds its features in the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.config import Options
from finetune.data.cache import FeatureCache, digest_image
from finetune.data.splits import Sample, Splits
from finetune.probe.features import extract_features, extract_splits, open_engine, prepare_int8
from finetune.probe.solve import solve_probe
from models.engine.engine import Engine, Features
from models.engine.processor import cpu_name, supports_vnni
from models.errors import GraftError
from models.files import write_whole
from models.prepared import PreparedBackbone, build_engine, resolve_device
from models.quantise import find_quantised
from models.scores import Labels
from models.sources import SplitName

logger = logging.getLogger("graft.precision")

# How much cross-validated accuracy may be lost: by int8 against the float engine, by whatever is chosen against fp32.
_INT8_TOLERANCE = 0.003
_FP32_TOLERANCE = 0.005
# Images to compare on. Below a hundred, one image more or less says nothing.
_MIN_IMAGES = 100
_MAX_IMAGES = 1000
# int8's sample is no more than this share of the training images: it is computed twice.
_MAX_COMPARED_FRACTION = 0.25
# int8 against bf16 before it is measured; measured were 1.4 (EfficientNet-Lite0) to 1.9 (ResNet-18).
_EXPECTED_SPEED_UP = 1.6
# Quantising with NNCF; and loading a second engine, its search and the cross-validation of both.
_QUANTISE_SECONDS = 10.0
_COMPARE_SECONDS = 5.0
# The fp32 pass takes a second, or this share of the time of the pass over all images where that is more.
_CHECK_SECONDS = 1.0
_MAX_CHECK_FRACTION = 0.05
# What fp32 takes for an image, in times of the other precision's.
_FP32_SLOWDOWN = {"bf16": 2, "fp16": 2, "int8": 4}
# Images looked up to tell how many are in the cache.
_NUM_LOOKED_UP = 50


@dataclass(frozen=True)
class Verdict:
    """Whether a probe on `candidate`'s features is as accurate as on `reference`'s, both precisions, and what was measured."""

    candidate: str
    reference: str
    holds: bool
    reason: str


@dataclass(frozen=True)
class Chosen:
    """The backbone to run, in int8 where that was chosen, its engine, and why."""

    backbone: PreparedBackbone
    engine: Engine
    reason: str


def choose_engine(
    backbone: PreparedBackbone, splits: Splits, options: Options, scratch: Path, *, num_views: int
) -> Chosen:
    """The engine for `backbone` in the precision asked for, or in the one that verdicts, remembered or reached now, speak for.

    Without `--cache` they are remembered in `scratch`, for this run alone.
    """
    if options.precision != "auto":
        return Chosen(backbone, open_engine(backbone, options), f"--precision {options.precision}")
    path = _verdicts_path(backbone, splits, options, scratch)
    obstacle = _why_not_int8(backbone, options)
    about_int8 = [verdict for verdict in _recall(path) if verdict.candidate == "int8"]
    if obstacle is None and about_int8 and all(verdict.holds for verdict in about_int8):
        quantised = prepare_int8(backbone, splits.train, options)
        return _say(
            Chosen(quantised, quantised.open_engine(options.device, "int8"), _join(about_int8))
        )
    about_float = [verdict for verdict in _recall(path) if verdict.candidate != "int8"]
    engine = backbone.open_engine(
        options.device, "auto" if all(verdict.holds for verdict in about_float) else "fp32"
    )
    if obstacle is None and not about_int8:
        int8 = _open_int8(backbone, engine, splits, options, num_views)
        if isinstance(int8, Chosen):
            verdict = _compare_int8(int8, backbone, engine, splits, options)
            _remember(path, verdict)
            if verdict.holds:
                engine.close()
                return _say(replace(int8, reason=verdict.reason))
            int8.engine.close()
            about_int8 = [verdict]
        else:
            obstacle = int8
    against = obstacle or _join([verdict for verdict in about_int8 if not verdict.holds])
    return _say(
        Chosen(backbone, engine, "; ".join((against, *(verdict.reason for verdict in about_float))))
    )


def compare_with_fp32(
    chosen: Chosen,
    backbone: PreparedBackbone,
    splits: Splits,
    features: Features,
    options: Options,
    scratch: Path,
) -> Verdict | None:
    """Whether a probe on the training images' `features` `[N,F]` (or `[V·N,F]`) of the chosen engine is as good as in fp32.

    `backbone` is the float one. None where there is nothing to compare: the precision was asked for, is fp32 or was compared before, or
    the time for it, about a second and three times that where it looks worse at first, would not do for a hundred images.
    """
    info = chosen.engine.info
    path = _verdicts_path(backbone, splits, options, scratch)
    was_compared = any(
        (verdict.candidate, verdict.reference) == (info.precision, "fp32")
        for verdict in _recall(path)
    )
    if options.precision != "auto" or info.precision == "fp32" or was_compared:
        return None
    fp32_speed = info.images_per_second / _FP32_SLOWDOWN[info.precision]
    num_images = len(features) + len(splits.val) + len(splits.test)
    seconds = max(_CHECK_SECONDS, _MAX_CHECK_FRACTION * num_images / info.images_per_second)
    order = _draw_order(splits, options)[:_MAX_IMAGES]
    num_compared = int(seconds * fp32_speed)
    if min(num_compared, len(order)) < _MIN_IMAGES:
        return None
    # Neither the batch nor the streams are searched for: that would take longer than the pass. A GPU's batch may be too much for fp32, and
    # on a CPU a batch of more than one image is compiled besides.
    fp32 = build_engine(
        backbone.folder,
        backbone.preprocess,
        backbone.config,
        device=options.device,
        precision="fp32",
        batch_size=1 if resolve_device(options.device) == "cpu" else min(info.batch_size, 64),
        num_streams=info.num_streams,
        images_per_second=fp32_speed,
    )
    reference = np.empty((0, features.shape[1]), np.float32)
    # Where few images speak against it, as many as there may be decide: how many there are at first depends on how fast the machine just
    # was, and of a few hundred chance alone would refuse it in one run and not in the next.
    for end in (num_compared, len(order)):
        samples = [splits.train[row] for row in order[:end]]
        new = samples[len(reference) :]
        readable, found = _extract(new, backbone, fp32, options, keep=False)
        _check_still_readable(new, readable)
        reference = np.concatenate((reference, found))
        pair = (features[order[:end]], reference)
        verdict = _judge(
            info.precision,
            "fp32",
            pair,
            samples,
            splits,
            options,
            _FP32_TOLERANCE,
            allow_chance=True,
        )
        if verdict.holds or len(samples) == len(order):
            break
    fp32.close()
    _remember(path, verdict)
    logger.info("%s", verdict.reason)
    return verdict


def extract_in_best_precision(
    backbone: PreparedBackbone, splits: Splits, options: Options, scratch: Path
) -> tuple[Chosen, Splits, dict[SplitName, Features], float]:
    """The engine, the readable part of `splits` and its features, and the seconds that they took; anew where they cost accuracy."""
    num_views = 1 if options.augment == "none" else options.views
    while True:
        chosen = choose_engine(backbone, splits, options, scratch, num_views=num_views)
        started = time.perf_counter()
        on = (chosen.backbone, chosen.engine, options)
        readable, features = extract_splits(
            splits, *on, num_views=num_views, augment=options.augment
        )
        seconds = time.perf_counter() - started
        verdict = compare_with_fp32(chosen, backbone, readable, features["train"], options, scratch)
        if verdict is None:
            return chosen, readable, features, seconds
        if verdict.holds:
            return (
                replace(chosen, reason=f"{chosen.reason}; {verdict.reason}"),
                readable,
                features,
                seconds,
            )
        # It is remembered, so the next choice is another one, fp32 in the end.
        chosen.engine.close()


def _open_int8(
    backbone: PreparedBackbone, engine: Engine, splits: Splits, options: Options, num_views: int
) -> Chosen | str:
    """int8 where the pass over all images is long enough to pay for comparing it with the float `engine`; else why it is not."""
    order = _draw_order(splits, options)
    num_compared = _num_compared(splits)
    num_images = num_views * len(splits.train) + len(splits.val) + len(splits.test)
    speed = engine.info.images_per_second

    def pays(
        num_missing: float, num_missing_in_int8: float, int8_speed: float, to_prepare: float
    ) -> bool:
        return (
            num_missing / speed
            > num_missing_in_int8 / int8_speed + num_compared / speed + to_prepare
        )

    expected_speed = speed * _EXPECTED_SPEED_UP
    reason = f"int8 would not pay for {num_images:,} images"
    if num_compared < _MIN_IMAGES or not pays(
        num_images, num_images, expected_speed, _COMPARE_SECONDS
    ):
        return reason
    quantised = find_quantised(backbone)
    to_prepare = _COMPARE_SECONDS if quantised is not None else _COMPARE_SECONDS + _QUANTISE_SECONDS
    if not pays(num_images, 0 if quantised is not None else num_images, expected_speed, to_prepare):
        return reason
    # Not those that are compared, which are in both caches once they were.
    looked_up = [splits.train[row] for row in order[num_compared : num_compared + _NUM_LOOKED_UP]]
    num_missing = num_images * _missing_fraction(looked_up, backbone, engine, options)
    if not pays(
        num_missing, 0 if quantised is not None else num_images, expected_speed, to_prepare
    ):
        return f"{reason}, about {num_images - num_missing:,.0f} of them in the cache"
    try:
        quantised = prepare_int8(backbone, splits.train, options)
        int8 = quantised.open_engine(options.device, "int8")
    except GraftError as error:
        return str(error)
    num_missing_in_int8 = num_images * _missing_fraction(looked_up, quantised, int8, options)
    if not pays(num_missing, num_missing_in_int8, int8.info.images_per_second, _COMPARE_SECONDS):
        int8.close()
        return f"{reason}: {int8.info.images_per_second:.0f} a second, {engine.info.precision} {speed:.0f}"
    return Chosen(quantised, int8, "")


def _compare_int8(
    int8: Chosen, backbone: PreparedBackbone, engine: Engine, splits: Splits, options: Options
) -> Verdict:
    """Both on a sample; what it computes stays in the cache for the pass over all images."""
    drawn = [splits.train[row] for row in _draw_order(splits, options)[: _num_compared(splits)]]
    samples, candidate = _extract(drawn, int8.backbone, int8.engine, options, keep=True)
    if len(samples) < _MIN_IMAGES:
        reason = (
            f"int8 is not compared: only {len(samples)} of {len(drawn)} training images can be read"
        )
        return Verdict("int8", engine.info.precision, False, reason)
    readable, reference = _extract(samples, backbone, engine, options, keep=True)
    _check_still_readable(samples, readable)
    return _judge(
        "int8",
        engine.info.precision,
        (candidate, reference),
        samples,
        splits,
        options,
        _INT8_TOLERANCE,
        allow_chance=False,
    )


def _judge(
    candidate: str,
    reference: str,
    features: tuple[Features, Features],
    samples: Sequence[Sample],
    splits: Splits,
    options: Options,
    tolerance: float,
    *,
    allow_chance: bool,
) -> Verdict:
    """By out-of-fold predictions of a probe on the `features` `[N,F]` of each, with the same folds."""
    labels = splits.labels(samples)
    right = [_is_right(found, labels, len(splits.label_names), options.seed) for found in features]
    num_lost = int(right[1].sum()) - int(right[0].sum())
    allowed = tolerance * len(labels)
    if allow_chance:
        # McNemar's test (Psychometrika 12, 1947), one-sided at 5 %: some images come out right in one of two equally good precisions
        # only, and of a few hundred that alone can be more than the tolerance.
        allowed = max(allowed, 1.645 * float(np.sqrt((right[0] != right[1]).sum())))
    if num_lost > allowed:
        effect = "costs accuracy"
    elif num_lost > tolerance * len(labels):
        effect = f"differs from {reference} by chance alone"
    elif num_lost > 0:
        effect = f"loses {100 * num_lost / len(labels):.1f} of the {100 * tolerance:.1f} points that it may"
    else:
        effect = "keeps accuracy"
    measured = f"cross-validated {right[0].mean():.4f}, {reference} {right[1].mean():.4f}, on {len(labels):,} training images"
    return Verdict(candidate, reference, num_lost <= allowed, f"{candidate} {effect} ({measured})")


def _is_right(
    features: Features, labels: Labels, num_classes: int, seed: int
) -> npt.NDArray[np.bool_]:
    if not np.isfinite(features).all():
        return np.zeros(len(labels), bool)
    logits = solve_probe(features, labels, num_classes, seed=seed).out_of_fold_logits
    if labels.ndim == 2:
        return np.asarray(((logits >= 0) == labels).all(axis=1))
    return np.asarray(logits.argmax(axis=1) == labels)


def _why_not_int8(backbone: PreparedBackbone, options: Options) -> str | None:
    if resolve_device(options.device) != "cpu":
        return "int8 is for CPUs"
    if not supports_vnni():
        return "this CPU has no VNNI, without which int8 gains little"
    if options.freeze != "backbone":
        return "int8 is for --freeze backbone"
    if not options.cache or not backbone.folder.is_relative_to(options.cache_dir):
        return "int8 is for backbones that are kept in the cache"
    if importlib.util.find_spec("nncf") is None:
        return "int8 needs nncf, which is not installed"
    return None


def _num_compared(splits: Splits) -> int:
    return min(_MAX_IMAGES, int(len(splits.train) * _MAX_COMPARED_FRACTION))


def _draw_order(splits: Splits, options: Options) -> npt.NDArray[np.int64]:
    """The training images in a seeded order of which any first part is stratified."""
    labels = splits.labels(splits.train)
    generator = np.random.default_rng(options.seed)
    if splits.is_multi_label:
        # By chance alone: of a hundred images and more, any first part is near enough.
        return generator.permutation(len(labels))
    places = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        places[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return np.argsort(places)


def _extract(
    samples: list[Sample],
    backbone: PreparedBackbone,
    engine: Engine,
    options: Options,
    *,
    keep: bool,
) -> tuple[list[Sample], Features]:
    """The readable samples, and their features through the cache or, not to be kept, without it."""
    with contextlib.ExitStack() as stack:
        cache = None
        if keep:
            cache = stack.enter_context(
                FeatureCache(
                    options.cache_dir, backbone.fingerprint, engine.info, engine.num_features
                )
            )
        extracted = extract_features(
            samples,
            backbone.preprocess,
            engine,
            num_workers=options.workers,
            description=f"comparing {engine.info.precision}",
            cache=cache,
        )
    return [
        sample for sample in samples if sample.key not in extracted.unreadable
    ], extracted.features


def _check_still_readable(samples: list[Sample], readable: list[Sample]) -> None:
    if len(readable) < len(samples):
        gone = next(sample.key for sample in samples if sample not in readable)
        raise GraftError(
            f"{gone}: gone or changed since the run began; put back what was there, and run again"
        )


def _missing_fraction(
    samples: list[Sample], backbone: PreparedBackbone, engine: Engine, options: Options
) -> float:
    """The share of some images whose features are not in the cache."""
    num_missing = 0
    with FeatureCache(
        options.cache_dir, backbone.fingerprint, engine.info, engine.num_features
    ) as cache:
        for sample in samples:
            with contextlib.suppress(
                OSError, ValueError
            ):  # what cannot be read is not computed, either
                num_missing += digest_image(sample.read()) not in cache
    return num_missing / len(samples)


def _verdicts_path(
    backbone: PreparedBackbone, splits: Splits, options: Options, scratch: Path
) -> Path:
    """Of a backbone, on this machine, for a source of images: by its place and classes, which stay as it grows."""
    device = (resolve_device(options.device), cpu_name())
    parts = [backbone.fingerprint, backbone.folder.name, device, options.source, splits.label_names]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    return (options.cache_dir if options.cache else scratch) / "precision" / f"{name}.json"


def _recall(path: Path) -> list[Verdict]:
    # A damaged file can be wrong in any of these ways; whatever it is, the comparison can be made again.
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [Verdict(**stored) for stored in json.loads(path.read_text())]
    return []


def _remember(path: Path, verdict: Verdict) -> None:
    verdicts = [asdict(each) for each in (*_recall(path), verdict)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(verdicts, indent=2) + "\n")
    except OSError as error:
        raise GraftError(
            f"--cache-dir: {path.parent} cannot be written: {error.strerror}; name another, or say --no-cache"
        ) from error


def _join(verdicts: Sequence[Verdict]) -> str:
    return "; ".join(verdict.reason for verdict in verdicts)


def _say(chosen: Chosen) -> Chosen:
    logger.info("precision %s: %s", chosen.engine.info.precision, chosen.reason)
    logger.info("engine: %s", chosen.engine.info)
    return chosen
