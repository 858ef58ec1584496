"""The steps of a run that make the models it may publish, and the one that chooses between them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.config import Options
from finetune.data.splits import Splits
from finetune.evaluation.calibration import CalibrationQuality
from finetune.evaluation.comparison import Comparison
from finetune.evaluation.metrics import Metrics
from finetune.monitor import Monitor
from finetune.probe.features import extract_splits, open_engine
from finetune.probe.levels import LevelProbes, solve_on_best_levels
from finetune.probe.solve import Head, Probe, soften, solve_on_best_views
from finetune.report.candidate import Candidate
from finetune.resume import STATE_DIR, fix_options
from finetune.tasks.task import Task
from finetune.timer import Timer
from finetune.training.settings import TrainingSettings
from models.engine.engine import Engine, EngineInfo, Features
from models.errors import GraftError, join_first
from models.prepared import PreparedBackbone
from models.scores import Floats, Labels
from models.sources import SplitName

if TYPE_CHECKING:
    from models.backbone.build import Backbone

logger = logging.getLogger("graft.run")


def fit_probe(
    options: Options,
    splits: Splits,
    backbone: PreparedBackbone,
    engine: EngineInfo,
    features: Mapping[SplitName, Features],
) -> Candidate:
    """The head solved on `features` of the pretrained backbone.

    Of "train" they are `[V·N,F]`: all images in their first, plain view, then in their second, and
    so on.
    """
    _warn_if_constant(features["train"], backbone)
    labels = _labels_by_split(splits)
    # With --balance sampler, too: weighted sampling equals a weighted loss in expectation.
    class_weights = _class_weights(labels["train"], splits, options.balance)
    with Timer() as timer:
        solved, levels = _solve(
            features["train"], labels["train"], splits, backbone, class_weights, options.seed
        )
    head = solved.head
    logits = _compute_logits(head, features)
    calibration, calibrated = splits.task.calibrate_probe(
        solved.out_of_fold_logits,
        solved.temperature,
        labels["train"],
        logits,
        labels,
        options.coverage,
    )
    probe = Candidate(
        name="probe",
        backbone=backbone,
        engine=engine,
        freeze="backbone",
        head=head,
        last_head=head if levels is None else levels.last.head,
        logits=logits,
        features=features,
        metrics=_evaluate(splits, logits, labels, calibrated),
        calibration=calibration,
        calibrated=calibrated,
        seconds=timer.seconds,
        solved=solved,
        levels=levels,
        last_metrics=(
            None if levels is None else _evaluate_on_val(levels.last.head, splits, features)
        ),
    )
    logger.info(
        "probe: val %s %.4f, in %.1f s (L2 %.0e)",
        splits.task.metric_name,
        probe.metrics["val"].score,
        probe.seconds,
        solved.l2,
    )
    return probe


def _warn_if_constant(features: Features, backbone: PreparedBackbone) -> None:
    """Log a warning where all images have the same features, from which nothing can be learnt."""
    if len(features) < 2 or not np.array_equal(features[0], features[-1]):
        return
    if (features == features[0]).all():
        logger.warning(
            "%s gives the same features for all images, from which nothing can be learnt (weights: "
            "%s); are its weights all zero, or its output a constant?",
            backbone.name,
            backbone.weights,
        )


def _solve(
    features: Features,
    labels: Labels,
    splits: Splits,
    backbone: PreparedBackbone,
    class_weights: Floats | None,
    seed: int,
) -> tuple[Probe, LevelProbes | None]:
    """The probe on the last level, or on the best levels of a backbone that gives them."""
    solve: dict[str, Any] = {"task": splits.task, "seed": seed, "class_weights": class_weights}
    num_classes = len(splits.label_names)
    if len(backbone.level_sets) == 1:
        return solve_on_best_views(features, labels, num_classes, **solve), None
    levels = solve_on_best_levels(features, labels, num_classes, backbone.level_sets, **solve)
    return levels.probe, levels


def _evaluate_on_val(head: Head, splits: Splits, features: Mapping[SplitName, Features]) -> Metrics:
    return splits.task.evaluate(head.logits(features["val"]), splits.labels(splits.val))


def fine_tune(
    options: Options,
    splits: Splits,
    probe: Candidate,
    digests: Mapping[str, bytes],
    monitor: Monitor,
    scratch: Path,
    earlier_seconds: float,
) -> Candidate:
    """The network after gradient epochs that start from the probe, measured where the probe was.

    `digests` of the images' bytes are by their keys. `scratch` takes the trained backbone,
    converted for the engine. `earlier_seconds` are those that earlier processes of this run
    trained. Raises GraftError where an image is no longer what it was, and as `train` does.
    """
    # Imported here: a probe needs neither torch nor timm, whose import takes seconds.
    from finetune.training.train import train
    from models.backbone.build import build_backbone
    from models.prepared import write_prepared

    labels = _labels_by_split(splits)
    with Timer(earlier_seconds) as timer:
        network = build_backbone(
            options.backbone,
            num_classes=len(splits.label_names),
            weights=options.weights,
            pretrained=options.pretrained,
            image_size=options.image_size,
            seed=options.seed,
        )
        network = replace(network, preprocess=probe.backbone.preprocess)
        trained = train(
            network,
            splits,
            _first_head(probe, labels["train"], splits.task, options.head_init),
            training_settings(options),
            monitor,
            scratch,
            state_dir=monitor.run_dir / STATE_DIR,
            fixed=fix_options(options.model_dump(mode="json")),
        )
        logger.info("converting the trained network to the engine's format …")
        network.model.cpu()
        own_head = _copy_head(network)
        backbone = write_prepared(network, scratch / "trained", all_levels=options.uses_all_levels)
        engine = open_engine(backbone, options.device, options.precision)
        features = _extract_again(splits, backbone, engine, options.workers, digests)
        engine.close()
        levels = _solve_anew(own_head, features, labels, splits, backbone, options)
        head = own_head if levels is None else levels.probe.head
        # Solved anew on the last level alone, it takes the place of the network's own.
        last_head = own_head if levels is None or levels.chosen != "last" else head
        logits = _compute_logits(head, features)
    calibration, calibrated = splits.task.calibrate_trained(
        logits, labels, options.coverage, options.seed
    )
    return Candidate(
        name="tuned",
        backbone=backbone,
        engine=engine.info,
        freeze=options.freeze,
        head=head,
        last_head=last_head,
        logits=logits,
        features=features,
        metrics=_evaluate(splits, logits, labels, calibrated),
        calibration=calibration,
        calibrated=calibrated,
        seconds=timer.seconds,
        levels=levels,
        last_metrics=None if levels is None else _evaluate_on_val(last_head, splits, features),
        best_epoch=trained.best_epoch,
        epochs=trained.epochs,
    )


def _solve_anew(
    trained: Head,
    features: Mapping[SplitName, Features],
    labels: Mapping[SplitName, Labels],
    splits: Splits,
    backbone: PreparedBackbone,
    options: Options,
) -> LevelProbes | None:
    """Heads on the levels of the trained network, if the best of them is better than its own.

    By more than chance on the validation images, as the candidates are compared. The network has
    learnt from the training images, so what is left out of a fold is not new to it:
    cross-validation says which levels and which L2 fit, but not how good the head is.
    """
    if len(backbone.level_sets) == 1:
        return None
    solve: dict[str, Any] = {
        "task": splits.task,
        "seed": options.seed,
        "class_weights": _class_weights(labels["train"], splits, options.balance),
    }
    levels = solve_on_best_levels(
        features["train"], labels["train"], len(splits.label_names), backbone.level_sets, **solve
    )
    scores = splits.task.compare(
        trained.logits(features["val"]),
        levels.probe.logits(features["val"]),
        labels["val"],
        _class_weights(labels["val"], splits, options.balance),
    )
    is_better = scores.interval.low > 0
    logger.info(
        "head solved anew on the trained network (%s): val %s %.4f, the trained one's %.4f: %s",
        levels.chosen,
        splits.task.metric_name,
        scores.second,
        scores.first,
        "it answers" if is_better else "the trained one stays",
    )
    return levels if is_better else None


def compare(options: Options, splits: Splits, probe: Candidate, tuned: Candidate) -> Comparison:
    """Whether the fine-tuned candidate is better by more than chance, on the validation images."""
    labels = splits.labels(splits.val)
    scores = splits.task.compare(
        probe.logits["val"],
        tuned.logits["val"],
        labels,
        _class_weights(labels, splits, options.balance),
    )
    return Comparison(
        scores,
        probe_seconds=probe.seconds,
        train_seconds=tuned.seconds,
        has_learnt=tuned.best_epoch != 0,
        asked=options.publish,
    )


def choose(probe: Candidate, tuned: Candidate | None, verdict: Comparison | None) -> Candidate:
    """The candidate to publish: the verdict's, or the only one."""
    if tuned is None or verdict is None or verdict.publishes == "probe":
        return probe
    return tuned


def _first_head(probe: Candidate, train_labels: Labels, task: Task, head_init: str) -> Probe:
    """The solved head that training begins from, unless `--head-init` names another."""
    last = probe.last
    if head_init != "soft":
        return last
    plain = probe.features["train"][: len(train_labels), : last.weight.shape[1]]
    return soften(last, plain, train_labels, len(last.bias), task)


def _copy_head(network: Backbone) -> Head:
    weight, bias = (
        tensor.detach().numpy().copy() for tensor in (network.head.weight, network.head.bias)
    )
    return Head(weight, bias)


def _extract_again(
    splits: Splits,
    backbone: PreparedBackbone,
    engine: Engine,
    num_workers: int,
    digests: Mapping[str, bytes],
) -> dict[SplitName, Features]:
    """Features of "val" and "test", of several levels those of "train" too.

    Raises GraftError where an image is not what the probe saw.
    """
    only: tuple[SplitName, ...] = ("val", "test")
    if len(backbone.level_sets) > 1:
        only = ("train", *only)
    readable_splits, features = extract_splits(
        splits,
        backbone,
        engine,
        num_workers=num_workers,
        cache=None,
        only=only,
        unreadable="ignored",
        digests=digests,
    )
    readable_keys = {sample.key for _, samples in readable_splits.named() for sample in samples}
    every = [sample.key for _, samples in splits.named() for sample in samples]
    if gone := [key for key in every if key not in readable_keys]:
        raise GraftError(
            f"{join_first(gone)}: gone or changed since the run began; put back what was there"
        )
    return features


def training_settings(options: Options) -> TrainingSettings:
    """The options that gradient epochs use."""
    names = (field.name for field in fields(TrainingSettings))
    return TrainingSettings(**{name: getattr(options, name) for name in names})


def _evaluate(
    splits: Splits,
    logits: Mapping[SplitName, Floats],
    labels: Mapping[SplitName, Labels],
    calibrated: Mapping[SplitName, CalibrationQuality],
) -> dict[SplitName, Metrics]:
    return {
        split: splits.task.evaluate(logits[split], labels[split], calibrated[split].answers)
        for split in logits
    }


def _labels_by_split(splits: Splits) -> dict[SplitName, Labels]:
    return {split: splits.labels(samples) for split, samples in splits.named()}


def _class_weights(labels: Labels, splits: Splits, balance: str) -> Floats | None:
    if balance == "none":
        return None
    return splits.task.class_weights(labels, len(splits.label_names))


def _compute_logits(head: Head, features: Mapping[SplitName, Features]) -> dict[SplitName, Floats]:
    """`[N,C]` of every split except train."""
    return {split: head.logits(features[split]) for split in features if split != "train"}
