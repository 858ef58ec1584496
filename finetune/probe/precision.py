"""The precision to compute features in: the one asked for, or the fastest that costs no accuracy.

With `--precision auto`, a probe on int8 features is compared with one on float features before the
images are computed, on a sample of them, where there are many to compute. bf16, and int8 once more,
are compared with fp32 afterwards, on a few images. The outcome is kept for a backbone on a source
of images: later runs on it, also with images added, compare nothing and find their features cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.config import CacheSettings, Options
from finetune.data.splits import Sample, Splits
from finetune.data.views import Views
from finetune.probe.features import (
    extract_features,
    extract_splits,
    open_cache,
    open_engine,
    prepare_int8,
)
from finetune.probe.solve import solve_probe
from finetune.tasks.task import Task
from models.engine.engine import Engine, Features, Precision
from models.engine.processor import cpu_name, supports_vnni
from models.errors import GraftError
from models.files import write_whole
from models.prepared import Device, PreparedBackbone, build_engine, resolve_device
from models.scores import Labels
from models.sources import SplitName

logger = logging.getLogger("graft.precision")

# int8 is tried where the features that are not in the cache take at least this long to compute.
# Quantising, loading and comparing take 15 to 25 s and int8 saves a third of the rest or more.
INT8_MIN_SECONDS = 60.0
# Cross-validated accuracy that int8 may lose against float, and that any precision may lose
# against fp32.
_INT8_TOLERANCE = 0.003
_FP32_TOLERANCE = 0.005
# Training images to compare on. Of fewer than a hundred, chance alone moves the accuracy by points.
_MIN_COMPARED = 100
_MAX_COMPARED = 1000
# int8 is compared on at most this part of the training images: they are computed twice.
_MAX_COMPARED_FRACTION = 0.25
# The fp32 pass takes a second, or this part of the pass over all images where that is more.
_CHECK_SECONDS = 1.0
_MAX_CHECK_FRACTION = 0.05
# Seconds per image in fp32, as a multiple of those in the other precision.
_FP32_SLOWDOWN = {"bf16": 2, "fp16": 2, "int8": 4}


@dataclass(frozen=True)
class PrecisionCheck:
    """Whether a probe in precision `candidate` is as accurate as one in `reference`, and why."""

    candidate: str
    reference: str
    holds: bool
    reason: str


@dataclass(frozen=True)
class Chosen:
    """The backbone to run (in int8 where that was chosen), its engine, and why."""

    backbone: PreparedBackbone
    engine: Engine
    reason: str


def extract_in_best_precision(
    backbone: PreparedBackbone,
    splits: Splits,
    options: Options,
    scratch: Path,
    *,
    digests: Mapping[str, bytes],
) -> tuple[Chosen, Splits, dict[SplitName, Features], float]:
    """The engine, the readable splits, their features, and the seconds that the features took.

    Features are computed anew where fp32 shows that they cost accuracy. `digests` are those of the
    images that could be read, by key. Without `--cache` checks are kept in `scratch`.
    """
    folder = (options.enabled_cache_dir or scratch) / "precision"
    search = PrecisionSearch(
        backbone=backbone,
        asked=options.precision,
        device=options.device,
        is_frozen=options.freeze == "backbone",
        num_workers=options.workers,
        seed=options.seed,
        cache=options.feature_cache,
        checks_path=folder / name_checks(backbone, options.device, options.source, splits),
    )
    is_augmented = options.augment != "none"
    views = Views(options.views if is_augmented else 1, options.augment, options.seed)
    while True:
        chosen = search.choose_engine(splits, digests, views.num)
        started = time.perf_counter()
        readable, features = extract_splits(
            splits,
            chosen.backbone,
            chosen.engine,
            num_workers=options.workers,
            cache=options.feature_cache,
            views=views,
            unreadable="error" if options.strict else "warning",
        )
        seconds = time.perf_counter() - started
        check = search.check_against_fp32(chosen, readable, features["train"])
        if check is None:
            return chosen, readable, features, seconds
        if check.holds:
            reason = f"{chosen.reason}; {check.reason}"
            return replace(chosen, reason=reason), readable, features, seconds
        # The check is kept, so that the next choice is another one, in the end fp32.
        chosen.engine.close()


def name_checks(backbone: PreparedBackbone, device: Device, source: str, splits: Splits) -> str:
    """The file of the checks of a backbone on this machine, on a source of images with labels."""
    machine = (resolve_device(device), cpu_name())
    parts = [backbone.fingerprint, backbone.folder.name, machine, source, splits.label_names]
    return f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}.json"


@dataclass(frozen=True)
class PrecisionSearch:
    """Chooses and checks the precision of `backbone`, the float one, on one source of images.

    `asked` is `--precision`. `is_frozen`: only the head is trained. `checks_path` is the file of
    the checks made so far.
    """

    backbone: PreparedBackbone
    asked: Precision
    device: Device
    is_frozen: bool
    num_workers: int
    seed: int
    cache: CacheSettings | None
    checks_path: Path

    def choose_engine(
        self, splits: Splits, digests: Mapping[str, bytes], num_views: int = 1
    ) -> Chosen:
        """The engine in the precision asked for, else in the one that the checks allow.

        `digests` are those of the readable images by key, `num_views` those of a training image.
        """
        if self.asked != "auto":
            engine = open_engine(self.backbone, self.device, self.asked)
            return Chosen(self.backbone, engine, f"--precision {self.asked}")
        checks = _read_checks(self.checks_path)
        of_int8 = [check for check in checks if check.candidate == "int8"]
        of_float = [check for check in checks if check.candidate != "int8"]
        obstacle = self._why_not_int8()
        if obstacle is None and of_int8 and all(check.holds for check in of_int8):
            quantised = self._prepare_int8(splits)
            engine = quantised.open_engine(self.device, "int8")
            return _log(Chosen(quantised, engine, _join_reasons(of_int8)))
        float_precision: Precision = "auto" if all(check.holds for check in of_float) else "fp32"
        engine = self.backbone.open_engine(self.device, float_precision)
        if obstacle is not None:
            reasons = [obstacle]
        elif of_int8:
            reasons = [check.reason for check in of_int8 if not check.holds]
        else:
            int8 = self._try_int8(splits, engine, digests, num_views)
            if isinstance(int8, Chosen):
                engine.close()
                return _log(int8)
            reasons = [int8]
        reasons += [check.reason for check in of_float]
        return _log(Chosen(self.backbone, engine, "; ".join(reasons)))

    def check_against_fp32(
        self, chosen: Chosen, splits: Splits, features: Features
    ) -> PrecisionCheck | None:
        """Whether the training images' `features` `[V·N,F]` give as good a probe as fp32's.

        None where there is nothing to check: the precision was asked for, is fp32 or was checked
        before, or the second that it may take is too short for a hundred images.
        """
        info = chosen.engine.info
        was_checked = any(
            (check.candidate, check.reference) == (info.precision, "fp32")
            for check in _read_checks(self.checks_path)
        )
        if self.asked != "auto" or info.precision == "fp32" or was_checked:
            return None
        fp32_speed = info.images_per_second / _FP32_SLOWDOWN[info.precision]
        num_images = len(features) + len(splits.val) + len(splits.test)
        seconds = max(_CHECK_SECONDS, _MAX_CHECK_FRACTION * num_images / info.images_per_second)
        order = _draw_order(splits, self.seed)[:_MAX_COMPARED]
        num_compared = int(seconds * fp32_speed)
        if min(num_compared, len(order)) < _MIN_COMPARED:
            return None
        fp32 = self._build_fp32(chosen, fp32_speed)
        reference = np.empty((0, features.shape[1]), np.float32)
        # Where few images speak against it, as many as allowed decide: how many they are at first
        # depends on how fast the machine just was, and of a few hundred chance alone would refuse
        # it in one run and not in the next. That takes up to three times as long.
        for end in (num_compared, len(order)):
            samples = [splits.train[row] for row in order[:end]]
            new = samples[len(reference) :]
            readable, found = self._extract(new, self.backbone, fp32, cache=None)
            _check_still_readable(new, readable)
            reference = np.concatenate((reference, found))
            check = _compare(
                (info.precision, features[order[:end]]),
                ("fp32", reference),
                splits.labels(samples),
                len(splits.label_names),
                task=splits.task,
                seed=self.seed,
                tolerance=_FP32_TOLERANCE,
                allow_chance=True,
            )
            if check.holds or len(samples) == len(order):
                break
        fp32.close()
        self._keep(check)
        logger.info("%s", check.reason)
        return check

    def _why_not_int8(self) -> str | None:
        if resolve_device(self.device) != "cpu":
            return "int8 is for CPUs"
        if not supports_vnni():
            return "this CPU has no VNNI, without which int8 gains little"
        if not self.is_frozen:
            return "int8 is for --freeze backbone"
        if self.cache is None or not self.backbone.folder.is_relative_to(self.cache.folder):
            return "int8 is for backbones that are kept in the cache"
        if importlib.util.find_spec("nncf") is None:
            return "int8 needs nncf, which is not installed"
        return None

    def _try_int8(
        self, splits: Splits, engine: Engine, digests: Mapping[str, bytes], num_views: int
    ) -> Chosen | str:
        """int8 where it is as accurate as the float `engine` on a sample; else why not."""
        num_missing = self._count_missing(splits, engine, digests, num_views)
        seconds = num_missing / engine.info.images_per_second
        if seconds < INT8_MIN_SECONDS:
            return (
                f"int8 is tried where computing features takes {INT8_MIN_SECONDS:.0f} s or more; "
                f"{num_missing:,} images that are not in the cache take about {seconds:.0f} s"
            )
        try:
            quantised = self._prepare_int8(splits)
            int8 = quantised.open_engine(self.device, "int8")
        except GraftError as error:
            return str(error)
        if not _is_faster(int8, engine):
            int8.close()
            return f"int8 is not faster here ({_describe_speed(int8)}, {_describe_speed(engine)})"
        check = self._compare_int8(quantised, int8, engine, splits)
        self._keep(check)
        if not check.holds:
            int8.close()
            return check.reason
        return Chosen(quantised, int8, check.reason)

    def _count_missing(
        self, splits: Splits, engine: Engine, digests: Mapping[str, bytes], num_views: int
    ) -> int:
        """Images that `engine` would have to compute, each as often as it has views."""
        assert self.cache is not None
        with open_cache(self.cache, self.backbone, engine) as cache:
            return sum(
                num_views if split == "train" else 1
                for split, samples in splits.named()
                for sample in samples
                if sample.key in digests and digests[sample.key] not in cache
            )

    def _compare_int8(
        self, quantised: PreparedBackbone, int8: Engine, engine: Engine, splits: Splits
    ) -> PrecisionCheck:
        """A check on a sample, whose features stay in the cache for the pass over all images."""
        num_compared = min(_MAX_COMPARED, int(len(splits.train) * _MAX_COMPARED_FRACTION))
        drawn = [splits.train[row] for row in _draw_order(splits, self.seed)[:num_compared]]
        samples, candidate = self._extract(drawn, quantised, int8, cache=self.cache)
        reference_name = engine.info.precision
        if len(samples) < _MIN_COMPARED:
            reason = (
                f"int8 is not compared: {_MIN_COMPARED} training images are needed, "
                f"and {len(samples)} of the {len(drawn)} drawn can be read"
            )
            return PrecisionCheck("int8", reference_name, False, reason)
        readable, reference = self._extract(samples, self.backbone, engine, cache=self.cache)
        _check_still_readable(samples, readable)
        return _compare(
            ("int8", candidate),
            (reference_name, reference),
            splits.labels(samples),
            len(splits.label_names),
            task=splits.task,
            seed=self.seed,
            tolerance=_INT8_TOLERANCE,
        )

    def _prepare_int8(self, splits: Splits) -> PreparedBackbone:
        return prepare_int8(self.backbone, splits.train, num_workers=self.num_workers)

    def _build_fp32(self, chosen: Chosen, images_per_second: float) -> Engine:
        # Neither the batch nor the streams are searched for: that would take longer than the pass.
        # A GPU's batch may be too much for fp32, and on a CPU a second batch size is compiled.
        info = chosen.engine.info
        is_cpu = resolve_device(self.device) == "cpu"
        return build_engine(
            self.backbone.folder,
            self.backbone.preprocess,
            self.backbone.config,
            device=self.device,
            precision="fp32",
            batch_size=1 if is_cpu else min(info.batch_size, 64),
            num_streams=info.num_streams,
            images_per_second=images_per_second,
        )

    def _extract(
        self,
        samples: list[Sample],
        backbone: PreparedBackbone,
        engine: Engine,
        *,
        cache: CacheSettings | None,
    ) -> tuple[list[Sample], Features]:
        """The readable samples and their features."""
        with contextlib.ExitStack() as stack:
            opened = None
            if cache is not None:
                opened = stack.enter_context(open_cache(cache, backbone, engine))
            extracted = extract_features(
                samples,
                backbone.preprocess,
                engine,
                num_workers=self.num_workers,
                description=f"comparing {engine.info.precision}",
                cache=opened,
            )
        readable = [sample for sample in samples if sample.key not in extracted.unreadable]
        return readable, extracted.features

    def _keep(self, check: PrecisionCheck) -> None:
        path = self.checks_path
        checks = [asdict(each) for each in (*_read_checks(path), check)]
        text = json.dumps(checks, indent=2) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
        except OSError as error:
            raise GraftError(
                f"--cache-dir: {path.parent} cannot be written: {error.strerror}; "
                "name another, or say --no-cache"
            ) from error


def _compare(
    candidate: tuple[str, Features],
    reference: tuple[str, Features],
    labels: Labels,
    num_classes: int,
    *,
    task: Task,
    seed: int,
    tolerance: float,
    allow_chance: bool = False,
) -> PrecisionCheck:
    """Out-of-fold predictions of a probe on each, both a precision and features `[N,F]`.

    The candidate may lose `tolerance` of the images, and with `allow_chance` what two equally good
    precisions differ by.
    """
    right = [
        _is_right(features, labels, num_classes, task, seed)
        for _, features in (candidate, reference)
    ]
    num_lost = int(right[1].sum()) - int(right[0].sum())
    allowed = tolerance * len(labels)
    if allow_chance:
        # McNemar's test (Psychometrika 12, 1947), one-sided at 5 %: some images come out right in
        # only one of two equally good precisions, and of a few hundred that alone can be more than
        # the tolerance.
        allowed = max(allowed, 1.645 * float(np.sqrt((right[0] != right[1]).sum())))
    if num_lost > allowed:
        effect = "costs accuracy"
    elif num_lost > tolerance * len(labels):
        effect = f"differs from {reference[0]} by chance alone"
    elif num_lost > 0:
        points, most = 100 * num_lost / len(labels), 100 * tolerance
        effect = f"loses {points:.1f} of the {most:.1f} points that it may"
    else:
        effect = "keeps accuracy"
    measured = (
        f"cross-validated {right[0].mean():.4f}, {reference[0]} {right[1].mean():.4f}, "
        f"on {len(labels):,} training images"
    )
    reason = f"{candidate[0]} {effect} ({measured})"
    return PrecisionCheck(candidate[0], reference[0], num_lost <= allowed, reason)


def _is_right(
    features: Features, labels: Labels, num_classes: int, task: Task, seed: int
) -> npt.NDArray[np.bool_]:
    if not np.isfinite(features).all():
        return np.zeros(len(labels), bool)
    probe = solve_probe(features, labels, num_classes, task=task, seed=seed)
    return task.is_right(probe.out_of_fold_logits, labels)


def _draw_order(splits: Splits, seed: int) -> npt.NDArray[np.int64]:
    """The training images in a seeded order of which any first part is stratified."""
    return splits.task.draw_order(splits.labels(splits.train), seed)


def _check_still_readable(samples: list[Sample], readable: list[Sample]) -> None:
    if len(readable) < len(samples):
        gone = next(sample.key for sample in samples if sample not in readable)
        raise GraftError(
            f"{gone}: gone or changed since the run began; put back what was there, and run again"
        )


def _read_checks(path: Path) -> list[PrecisionCheck]:
    # A damaged file raises any of these; the checks are then made again.
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [PrecisionCheck(**stored) for stored in json.loads(path.read_text(encoding="utf-8"))]
    return []


def _join_reasons(checks: Sequence[PrecisionCheck]) -> str:
    return "; ".join(check.reason for check in checks)


def _is_faster(engine: Engine, other: Engine) -> bool:
    return engine.info.images_per_second > other.info.images_per_second


def _describe_speed(engine: Engine) -> str:
    return f"{engine.info.precision} {engine.info.images_per_second:.0f} images/s"


def _log(chosen: Chosen) -> Chosen:
    logger.info("precision %s: %s", chosen.engine.info.precision, chosen.reason)
    logger.info("engine: %s", chosen.engine.info)
    return chosen
