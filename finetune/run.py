"""One run, top to bottom: labelled images → probe → (gradient epochs) → evaluation → checkpoint.

python finetune/run.py                                           the embedded digits, no network needed
python finetune/run.py --data photos/ --backbone resnet18        your own
python finetune/run.py --data photos/ --freeze until:layer3      train what comes after layer3, too
python finetune/run.py --resume runs/photos-20261123-045110      go on with one that was stopped or killed
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

# Run as a file, Python would look for modules in finetune/; the project's root and the user's own folder are what is meant.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.path.append(str(Path.cwd()))


from finetune.auditing.findings import Audit
from finetune.auditing.inspection import inspect
from finetune.auditing.output import write_audit
from finetune.config import Options, parse_options
from finetune.data.duplicates import Duplicates
from finetune.data.lasting_split import load_lasting_splits
from finetune.data.splits import Splits
from finetune.evaluation.calibration import Calibration, CalibrationQuality
from finetune.evaluation.comparison import Comparison
from finetune.monitor import Monitor
from finetune.probe.features import extract_splits, open_engine, prepare, prepare_meanwhile
from finetune.probe.learning_curve import measure_learning_curve
from finetune.probe.precision import extract_in_best_precision
from finetune.probe.solve import Head, Probe, soften, solve_on_best_views
from finetune.report.mistakes import explain_mistakes, worst_mistakes
from finetune.report.next_steps import commands_to_try, say_what_next, write_example
from finetune.report.page import write_report
from finetune.report.publishing import choose_golden, publish_result
from finetune.report.result import Result
from finetune.report.tensorboard import show_in_tensorboard
from finetune.resume import (
    STATE_DIR,
    Choices,
    find_published,
    is_resumable,
    keep_choices,
    lock,
    read_options,
    remove_state,
    restore_splits,
    resume_command,
    seconds_trained,
    trim_events,
)
from finetune.tasks.task import Task
from finetune.terminal import run_program
from finetune.training.broken_batch import FOLDER as BROKEN_BATCH_DIR
from models.engine.engine import Features
from models.errors import GraftError, join_first
from models.files import write_whole
from models.named import import_named
from models.prepared import PreparedBackbone
from models.scores import Floats, Labels
from models.sources import SplitName

logger = logging.getLogger("graft.run")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    return run_program(
        lambda: run(parse_options(Options, list(sys.argv[1:] if arguments is None else arguments)))
    )


def run(options: Options) -> Path:
    """Do one run and return the folder of the published checkpoint. Raises GraftError for everything the user can mend."""
    started = time.perf_counter()
    if options.resume is not None:
        options = read_options(options)
    if ":" in options.head_init:
        import_named("--head-init", options.head_init)  # known to be wrong before any work
    run_dir = options.resume
    with prepare_meanwhile(options):
        splits, duplicates = load_lasting_splits(
            options.data,
            data_root=options.data_root,
            val_fraction=options.val_fraction,
            seed=options.seed,
            runs_dir=None if options.new_split else options.output,
            cache_dir=options.enabled_cache_dir,
            num_workers=options.workers,
            restore=None if run_dir is None else functools.partial(restore_splits, run_dir),
        )
    _check_task(options, splits)
    _log_splits(options, splits)
    run_dir = run_dir or _make_run_dir(options)
    try:
        with lock(run_dir):
            return _run_in(run_dir, options, splits, duplicates, started)
    except GraftError as error:
        if is_resumable(run_dir) or find_published(options, run_dir) is not None:
            error.add_note(
                f"{run_dir} is kept; when that is mended, go on with\n  {resume_command(run_dir)}"
            )
        elif (run_dir / BROKEN_BATCH_DIR).exists():
            remove_state(run_dir)
        elif options.resume is None:
            # A run that came to nothing would only be in the way, in TensorBoard too.
            shutil.rmtree(run_dir, ignore_errors=True)
        raise
    except KeyboardInterrupt as stop:
        stop.add_note(f"go on with\n  {resume_command(run_dir)}")
        raise


def _run_in(
    run_dir: Path, options: Options, splits: Splits, duplicates: Duplicates, started: float
) -> Path:
    trim_events(run_dir)
    earlier_seconds = seconds_trained(run_dir)
    monitor = Monitor(run_dir)
    with tempfile.TemporaryDirectory(prefix="graft-") as scratch:
        result = _fit(options, splits, duplicates, monitor, run_dir, Path(scratch), earlier_seconds)
        golden = choose_golden(result, duplicates.digests)
        checkpoint = (
            find_published(options, run_dir) if options.resume else None
        ) or publish_result(result, golden, run_dir)
        mistakes = worst_mistakes(result)
        if mistakes and options.explains:
            mistakes = explain_mistakes(result, mistakes)
        show_in_tensorboard(monitor, result, mistakes)
    result.seconds["total"] = earlier_seconds + time.perf_counter() - started
    result.splits.write_csv(run_dir / "splits.csv")
    commands = commands_to_try(options, write_example(run_dir, result.splits))
    _write(
        run_dir / "report.html",
        write_report(result, mistakes, version=int(checkpoint.name), commands=commands),
    )
    # The last of all: it says that the run is done.
    _write(run_dir / "metrics.json", json.dumps(result.to_dict(), indent=2) + "\n")
    remove_state(run_dir)
    say_what_next(result, run_dir, checkpoint, commands)
    return checkpoint


def _fit(
    options: Options,
    loaded: Splits,
    duplicates: Duplicates,
    monitor: Monitor,
    run_dir: Path,
    scratch: Path,
    earlier_seconds: float,
) -> Result:
    """Features → probe → audit → gradient epochs where something is unfrozen → metrics.

    `scratch` holds backbones that are not kept; `earlier_seconds` of training were another process's, of which this one is the resumption.
    """
    backbone = prepare(
        options.backbone,
        loaded.train,
        options,
        scratch,
        weights=options.weights,
        pretrained=options.pretrained,
    )
    backbone.check_freeze(options.freeze)
    at = [time.perf_counter()]
    chosen, splits, features, extract_seconds = extract_in_best_precision(
        backbone, loaded, options, scratch, digests=duplicates.digests
    )
    backbone, engine = chosen.backbone, chosen.engine
    engine.close()
    why_precision = keep_choices(
        run_dir,
        Choices(options, loaded, splits, engine.info.precision, chosen.reason, duplicates.digests),
    )
    options = options.model_copy(update={"precision": engine.info.precision})
    at.append(time.perf_counter())
    labels = {split: splits.labels(samples) for split, samples in splits.named()}
    num_classes = len(splits.label_names)
    # Balanced drawing comes to the same, and full batches need no luck.
    weights = (
        None
        if options.balance == "none"
        else splits.task.class_weights(labels["train"], num_classes)
    )
    probe = solve_on_best_views(
        features["train"], labels["train"], num_classes, seed=options.seed, class_weights=weights
    )
    at.append(time.perf_counter())
    head, best_epoch, verdict = Head(probe.weight, probe.bias), None, None
    logits = _compute_logits(head, features)
    probe_metrics = splits.task.evaluate(logits["val"], labels["val"])
    logger.info(
        "probe: val %s %.4f, in %.1f s (L2 %.0e)",
        splits.task.metric_name,
        probe_metrics.score,
        at[2] - at[1],
        probe.l2,
    )
    audit = inspect(loaded, splits, features, probe, duplicates, backbone.preprocess)
    _say_audit(audit, write_audit(audit, run_dir, "audit", options.data), options)
    at.append(time.perf_counter())
    learnt_from = features["train"][: probe.num_views * len(labels["train"])]
    learning_curve = measure_learning_curve(
        learnt_from,
        labels["train"],
        probe,
        features["val"],
        labels["val"],
        splits.task,
        seed=options.seed,
    )
    at.append(time.perf_counter())
    if options.freeze != "backbone":
        plain = features["train"][: len(labels["train"])]
        start = (
            soften(probe, plain, labels["train"], num_classes)
            if options.head_init == "soft"
            else probe
        )
        trained, trained_head, best_epoch = _train(options, splits, start, monitor, scratch)
        trained_engine = open_engine(trained, options.device, options.precision)
        still, trained_features = extract_splits(
            splits,
            trained,
            trained_engine,
            num_workers=options.workers,
            cache=None,
            only=("val", "test"),
            unreadable="ignored",
            digests=duplicates.digests,
        )
        trained_engine.close()
        _check_none_gone(splits, still)
        trained_logits = _compute_logits(trained_head, trained_features)
        seconds = {
            "probe_seconds": at[2] - at[1],
            "train_seconds": earlier_seconds + time.perf_counter() - at[4],
        }
        weights = (
            None
            if options.balance == "none"
            else splits.task.class_weights(labels["val"], num_classes)
        )
        scores = splits.task.compare(logits["val"], trained_logits["val"], labels["val"], weights)
        verdict = Comparison(scores, has_learnt=best_epoch > 0, **seconds)
        if verdict.publishes == "fine-tuned":
            backbone, engine, head, logits, features = (
                trained,
                trained_engine,
                trained_head,
                trained_logits,
                trained_features,
            )
    at.append(time.perf_counter())
    calibration, calibrated = _calibrate(
        splits.task, probe if backbone is chosen.backbone else None, logits, labels, options
    )
    return Result(
        options=options,
        splits=splits,
        backbone=backbone,
        engine=engine.info,
        why_precision=why_precision,
        head=head,
        metrics={
            split: splits.task.evaluate(logits[split], labels[split], calibrated[split].answers)
            for split in logits
        },
        calibration=calibration,
        calibrated=calibrated,
        probe_metrics=probe_metrics,
        l2=probe.l2,
        learning_curve=learning_curve,
        val_logits=logits["val"],
        val_features=features["val"],
        audit=audit,
        best_epoch=best_epoch,
        verdict=verdict,
        seconds={
            "engine": at[1] - at[0] - extract_seconds,
            "features": extract_seconds,
            "probe": at[2] - at[1],
            "audit": at[3] - at[2],
            "learning_curve": at[4] - at[3],
            "train": earlier_seconds + at[5] - at[4],
        },
    )


def _check_none_gone(splits: Splits, still: Splits) -> None:
    """Raise GraftError where images that the probe was measured on are no longer there to measure what was trained."""
    left = {sample.key for _, samples in still.named() for sample in samples}
    if gone := [
        sample.key for _, samples in splits.named() for sample in samples if sample.key not in left
    ]:
        raise GraftError(
            f"{join_first(gone)}: gone or changed since the run began; put back what was there"
        )


def _calibrate(
    task: Task,
    probe: Probe | None,
    logits: Mapping[SplitName, Floats],
    labels: Mapping[SplitName, Labels],
    options: Options,
) -> tuple[Calibration, Mapping[SplitName, CalibrationQuality]]:
    """Of the probe where it is published; None where it is not."""
    if probe is None:
        return task.calibrate_trained(logits, labels, options.coverage, options.seed)
    return task.calibrate_probe(
        probe.out_of_fold_logits,
        probe.temperature,
        labels["train"],
        logits,
        labels,
        options.coverage,
    )


def _compute_logits(head: Head, features: Mapping[SplitName, Features]) -> dict[SplitName, Floats]:
    """Of every split that was not trained on, `[N,C]`."""
    return {
        split: features[split] @ head.weight.T + head.bias for split in features if split != "train"
    }


def _say_audit(audit: Audit, paths: tuple[Path, Path], options: Options) -> None:
    if options.strict:
        audit.refuse_leaks()
    for line in audit.to_lines():
        logger.log(logging.WARNING if audit.leaks else logging.INFO, "%s", line)
    if audit.findings:
        logger.info("audit: look at %s", paths[1])


def _check_task(options: Options, splits: Splits) -> None:
    """Raise GraftError for an option that means nothing where images have several labels."""
    for name in splits.task.unsupported_options:
        value = getattr(options, name)
        if value != type(options).model_fields[name].default:
            flag = f"--{name.replace('_', '-')}"
            raise GraftError(
                f"{flag} {value}: it is for one label an image, and {options.data} has a column "
                f"{splits.task.label_column}; leave it out"
            )


def _log_splits(options: Options, splits: Splits) -> None:
    sizes = ", ".join(f"{len(samples):,} {split}" for split, samples in splits.named())
    classes = splits.task.words.labels_of_images
    logger.info("%s: %d %s, images: %s", options.data, len(splits.label_names), classes, sizes)
    if options.balance == "none":
        splits.task.warn_if_imbalanced(splits.labels(splits.train), splits.label_names)


def _make_run_dir(options: Options) -> Path:
    """`runs/<name>-<time>`, made before any work so that an unwritable output is known at once."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        options.repository.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{number}" for number in range(2, 100))):
            run_dir = options.output / f"{options.model_name}-{stamp}{suffix}"
            try:
                run_dir.mkdir()
            except FileExistsError:
                continue
            break
    except OSError as error:
        folders = f"--output {options.output}, --repository {options.repository}"
        raise GraftError(
            f"{folders}: {error.strerror}: {error.filename}; name folders that you can write to"
        ) from error
    try:
        _write(run_dir / "config.yaml", options.to_yaml())
    except GraftError:
        run_dir.rmdir()
        raise
    return run_dir


def _write(path: Path, text: str) -> None:
    try:
        # A path may hold bytes that are no text.
        write_whole(
            path,
            lambda temporary: temporary.write_text(
                text, encoding="utf-8", errors="surrogateescape"
            ),
        )
    except OSError as error:
        raise GraftError(f"{path}: it cannot be written: {error.strerror}") from error


def _train(
    options: Options, splits: Splits, start: Probe, monitor: Monitor, scratch: Path
) -> tuple[PreparedBackbone, Head, int]:
    """Gradient epochs; the trained backbone is prepared for the engine in `scratch`."""
    # Imported here: a probe needs neither torch nor timm, which take longer to import than a probe to solve.
    from finetune.training.train import train
    from models.backbone.build import build_backbone
    from models.prepared import write_prepared

    backbone = build_backbone(
        options.backbone,
        num_classes=len(splits.label_names),
        weights=options.weights,
        pretrained=options.pretrained,
        image_size=options.image_size,
        seed=options.seed,
    )
    best_epoch = train(
        backbone, splits, start, options, monitor, scratch, state_dir=monitor.run_dir / STATE_DIR
    )
    logger.info("converting what was trained for the engine …")
    backbone.model.cpu()
    weight, bias = (
        tensor.detach().numpy().copy() for tensor in (backbone.head.weight, backbone.head.bias)
    )
    return write_prepared(backbone, scratch / "trained"), Head(weight, bias), best_epoch


if __name__ == "__main__":
    sys.exit(main())
