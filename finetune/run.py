"""One run, top to bottom: labelled images → probe → (gradient epochs) → evaluation → checkpoint.

python finetune/run.py                                           the embedded digits, no network needed
python finetune/run.py --data photos/ --backbone resnet18        your own
python finetune/run.py --data photos/ --freeze until:layer3      train what comes after layer3, too
python finetune/run.py --resume runs/photos-20261123-045110      go on with one that was stopped or killed
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import shlex
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

# Run as a file, Python would look for modules in finetune/; the project's root and the user's own folder are what is meant.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.path.append(str(Path.cwd()))

import numpy as np
import numpy.typing as npt

from finetune.audit import inspect, write_audit
from finetune.balance import class_weights, say_if_uneven
from finetune.broken_batch import FOLDER as BROKEN_BATCH_DIR
from finetune.calibration import Calibrated, Calibration, calibrate_probe, calibrate_trained
from finetune.card import write_card
from finetune.config import Options, parse_options
from finetune.data import SplitName, Splits
from finetune.duplicates import Duplicates
from finetune.evaluate import Metrics, evaluate
from finetune.features import extract_splits, open_engine, prepare
from finetune.findings import Audit
from finetune.learning_curve import measure_learning_curve
from finetune.monitor import Monitor
from finetune.plots import Mistake, draw_confusion, draw_heat, draw_mistakes
from finetune.precision import Chosen, choose_engine, compare_with_fp32
from finetune.probe import Floats, Labels, Probe, log_loss, softmax, solve_probe
from finetune.projector import write_projector
from finetune.report import write_report
from finetune.result import Head, Result
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
    trim_events,
)
from finetune.split import load_lasting_splits
from finetune.terminal import run_program
from finetune.thresholds import LabelCalibrated, LabelCalibration, calibrate_probe_of_labels, calibrate_trained_of_labels
from finetune.verdict import compare_with_probe
from models.checkpoint import FORMAT_VERSION, Golden, publish, sigmoid
from models.engine import Features
from models.errors import GraftError
from models.files import write_whole
from models.named import import_named
from models.prepared import PreparedBackbone

logger = logging.getLogger("graft.run")

_NUM_GOLDEN = 4
_NUM_MISTAKES = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    return run_program(lambda: run(parse_options(Options, list(sys.argv[1:] if arguments is None else arguments))))


def run(options: Options) -> Path:
    """Do one run and return the folder of the published checkpoint. Raises GraftError for everything the user can mend."""
    started = time.perf_counter()
    if options.resume is not None:
        options = read_options(options)
    if ":" in options.head_init:
        import_named("--head-init", options.head_init)  # known to be wrong before any work
    run_dir = options.resume
    splits, duplicates = load_lasting_splits(options, restore=None if run_dir is None else functools.partial(restore_splits, run_dir))
    _check_task(options, splits)
    _log_splits(options, splits)
    run_dir = run_dir or _make_run_dir(options)
    try:
        with lock(run_dir):
            return _run_in(run_dir, options, splits, duplicates, started)
    except GraftError as error:
        if is_resumable(run_dir):
            error.add_note(f"{run_dir} is kept; when that is mended, go on with\n  {resume_command(run_dir)}")
        elif (run_dir / BROKEN_BATCH_DIR).exists():
            remove_state(run_dir)
        elif options.resume is None:
            # A run that came to nothing would only be in the way, in TensorBoard too.
            shutil.rmtree(run_dir, ignore_errors=True)
        raise
    except KeyboardInterrupt as stop:
        stop.add_note(f"go on with\n  {resume_command(run_dir)}")
        raise


def _run_in(run_dir: Path, options: Options, splits: Splits, duplicates: Duplicates, started: float) -> Path:
    trim_events(run_dir)
    monitor = Monitor(run_dir)
    with tempfile.TemporaryDirectory(prefix="graft-") as scratch:
        result = _fit(options, splits, duplicates, monitor, run_dir, Path(scratch))
        golden = _choose_golden(result)
        checkpoint = (find_published(options, run_dir) if options.resume else None) or _publish(result, golden, run_dir)
        mistakes = _worst_mistakes(result)
        if mistakes and options.explains:
            mistakes = _explain(result, mistakes)
        _show_in_tensorboard(monitor, result, mistakes)
    result.seconds["total"] = time.perf_counter() - started
    result.splits.write_csv(run_dir / "splits.csv")
    commands = _commands(options, _write_example(run_dir, result.splits))
    _write(run_dir / "report.html", write_report(result, mistakes, version=int(checkpoint.name), commands=commands))
    # The last of all: it says that the run is done.
    _write(run_dir / "metrics.json", json.dumps(result.to_dict(), indent=2) + "\n")
    remove_state(run_dir)
    _say_what_next(result, run_dir, checkpoint, commands)
    return checkpoint


def _fit(options: Options, loaded: Splits, duplicates: Duplicates, monitor: Monitor, run_dir: Path, scratch: Path) -> Result:
    """Features → probe → audit → gradient epochs where something is unfrozen → metrics; `scratch` holds backbones that are not kept."""
    backbone = prepare(options.backbone, loaded.train, options, scratch, weights=options.weights, pretrained=options.pretrained)
    backbone.check_freeze(options.freeze)
    at = [time.perf_counter()]
    chosen, splits, features, extract_seconds = _extract(backbone, loaded, options, scratch)
    backbone, engine = chosen.backbone, chosen.engine
    engine.close()
    why_precision = keep_choices(run_dir, Choices(loaded, splits, engine.info.precision, chosen.reason))
    options = options.model_copy(update={"precision": engine.info.precision})
    at.append(time.perf_counter())
    labels = {split: splits.labels(samples) for split, samples in splits.named()}
    probe = _solve(features["train"], labels["train"], len(splits.label_names), options)
    at.append(time.perf_counter())
    head, best_epoch, verdict = Head(probe.weight, probe.bias), None, None
    logits = _compute_logits(head, features)
    probe_metrics = evaluate(logits["val"], labels["val"])
    metric = next(iter(probe_metrics.NAMES.values()))
    logger.info("probe: val %s %.4f, in %.1f s (L2 %.0e)", metric, probe_metrics.score, at[2] - at[1], probe.l2)
    audit = inspect(loaded, splits, features, probe, duplicates, backbone.preprocess)
    _say_audit(audit, write_audit(audit, run_dir, "audit", options.data), options)
    at.append(time.perf_counter())
    learnt_from = features["train"][: probe.num_views * len(labels["train"])]
    learning_curve = measure_learning_curve(learnt_from, labels["train"], probe, features["val"], labels["val"], seed=options.seed)
    at.append(time.perf_counter())
    if options.freeze != "backbone":
        trained, trained_head, best_epoch = _train(options, splits, probe, monitor, scratch)
        trained_engine = open_engine(trained, options)
        splits, trained_features = extract_splits(splits, trained, trained_engine, options, only=("val", "test"), keep=False)
        trained_engine.close()
        trained_logits = _compute_logits(trained_head, trained_features)
        seconds = {"probe_seconds": at[2] - at[1], "train_seconds": time.perf_counter() - at[4]}
        weights = None if options.balance == "none" else class_weights(labels["val"], len(splits.label_names))
        verdict = compare_with_probe(logits["val"], trained_logits["val"], labels["val"], class_weights=weights, **seconds)
        logger.info("%s", verdict)
        if verdict.publishes == "fine-tuned":
            backbone, engine, head, logits, features = trained, trained_engine, trained_head, trained_logits, trained_features
    at.append(time.perf_counter())
    calibration, calibrated = _calibrate(probe if backbone is chosen.backbone else None, logits, labels, options)
    return Result(
        options=options,
        splits=splits,
        backbone=backbone,
        engine=engine.info,
        why_precision=why_precision,
        head=head,
        metrics={split: evaluate(logits[split], labels[split], _answers(calibrated[split])) for split in logits},
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
            "train": at[5] - at[4],
        },
    )


def _calibrate(
    probe: Probe | None, logits: Mapping[SplitName, Floats], labels: Mapping[SplitName, Labels], options: Options
) -> tuple[Calibration | LabelCalibration, Mapping[SplitName, Calibrated | LabelCalibrated]]:
    """Of the probe where it is published; None where it is not."""
    if labels["train"].ndim == 2:
        if probe is not None:
            return calibrate_probe_of_labels(probe, labels["train"], logits, labels)
        return calibrate_trained_of_labels(logits, labels, options.seed)
    if probe is not None:
        return calibrate_probe(probe, labels["train"], logits, labels, options.coverage)
    return calibrate_trained(logits, labels, options.coverage, options.seed)


def _answers(calibrated: Calibrated | LabelCalibrated) -> npt.NDArray[np.bool_] | None:
    return calibrated.answers if isinstance(calibrated, LabelCalibrated) else None


def _compute_logits(head: Head, features: Mapping[SplitName, Features]) -> dict[SplitName, Floats]:
    """Of every split that was not trained on, `[N,C]`."""
    return {split: features[split] @ head.weight.T + head.bias for split in features if split != "train"}


def _extract(
    backbone: PreparedBackbone, splits: Splits, options: Options, scratch: Path
) -> tuple[Chosen, Splits, dict[SplitName, Features], float]:
    """The engine, the readable part of `splits` and its features, and the seconds that they took; anew where they cost accuracy."""
    num_views = 1 if options.augment == "none" else options.views
    while True:
        chosen = choose_engine(backbone, splits, options, scratch, num_views=num_views)
        started = time.perf_counter()
        on = (chosen.backbone, chosen.engine, options)
        readable, features = extract_splits(splits, *on, num_views=num_views, augment=options.augment)
        seconds = time.perf_counter() - started
        verdict = compare_with_fp32(chosen, backbone, readable, features["train"], options, scratch)
        if verdict is None:
            return chosen, readable, features, seconds
        if verdict.holds:
            return replace(chosen, reason=f"{chosen.reason}; {verdict.reason}"), readable, features, seconds
        # It is remembered, so the next choice is another one, fp32 in the end.
        chosen.engine.close()


def _say_audit(audit: Audit, paths: tuple[Path, Path], options: Options) -> None:
    if options.strict:
        audit.refuse_leaks()
    for line in audit.to_lines():
        logger.log(logging.WARNING if audit.leaks else logging.INFO, "%s", line)
    if audit.findings:
        logger.info("audit: look at %s", paths[1])


def _check_task(options: Options, splits: Splits) -> None:
    """Raise GraftError for an option that means nothing where images have several labels."""
    for name in ("balance", "mix", "label_smoothing"):
        value = getattr(options, name)
        if splits.is_multi_label and value != type(options).model_fields[name].default:
            flag = f"--{name.replace('_', '-')}"
            raise GraftError(f"{flag} {value}: it is for one label an image, and {options.data} has a column labels; leave it out")


def _log_splits(options: Options, splits: Splits) -> None:
    sizes = ", ".join(f"{len(samples):,} {split}" for split, samples in splits.named())
    classes = "labels, any number an image" if splits.is_multi_label else "classes"
    logger.info("%s: %d %s, images: %s", options.data, len(splits.label_names), classes, sizes)
    if options.balance == "none" and not splits.is_multi_label:
        say_if_uneven(splits.labels(splits.train), splits.label_names)


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
        raise GraftError(f"{folders}: {error.strerror}: {error.filename}; name folders that you can write to") from error
    _write(run_dir / "config.yaml", options.to_yaml())
    return run_dir


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        raise GraftError(f"{path}: it cannot be written: {error.strerror}") from error


def _solve(features: Features, labels: Labels, num_classes: int, options: Options) -> Probe:
    """The probe on all views of the training images, or on the plain ones alone where cross-validation finds that as good."""
    num_views = len(features) // max(1, len(labels))
    # Balanced drawing comes to the same, and full batches need no luck.
    weights = None if options.balance == "none" else class_weights(labels, num_classes)
    plain = solve_probe(features[: len(labels)], labels, num_classes, seed=options.seed, class_weights=weights)
    if num_views == 1:
        return plain
    augmented = solve_probe(features, labels, num_classes, seed=options.seed, num_views=num_views, class_weights=weights)
    losses = [log_loss(probe.out_of_fold_logits, labels, weights) for probe in (plain, augmented)]
    helps = losses[1] < losses[0]
    verdict = "they help" if helps else "they do not help, and the plain crop alone is used"
    logger.info("%d views: out-of-fold log loss %.4f, without %.4f: %s", num_views, losses[1], losses[0], verdict)
    return augmented if helps else plain


def _train(options: Options, splits: Splits, probe: Probe, monitor: Monitor, scratch: Path) -> tuple[PreparedBackbone, Head, int]:
    """Gradient epochs; the trained backbone is prepared for the engine in `scratch`."""
    # Imported here: a probe needs neither torch nor timm, which take longer to import than a probe to solve.
    from finetune.train import train
    from models.backbone import build_backbone
    from models.prepared import write_prepared

    backbone = build_backbone(
        options.backbone,
        num_classes=len(splits.label_names),
        weights=options.weights,
        pretrained=options.pretrained,
        image_size=options.image_size,
        seed=options.seed,
    )
    best_epoch = train(backbone, splits, probe, options, monitor, scratch, state_dir=monitor.run_dir / STATE_DIR)
    backbone.model.cpu()
    weight, bias = (tensor.detach().numpy().copy() for tensor in (backbone.head.weight, backbone.head.bias))
    return write_prepared(backbone, scratch / "trained"), Head(weight, bias), best_epoch


def _choose_golden(result: Result) -> Golden:
    """Validation images spread over the classes, with their logits, for the service to replay."""
    samples = result.splits.val
    chosen = np.unique(np.linspace(0, len(samples) - 1, _NUM_GOLDEN).round().astype(int))
    return Golden(tuple(samples[index].read() for index in chosen), result.val_logits[chosen])


def _publish(result: Result, golden: Golden, run_dir: Path) -> Path:
    options, backbone, num_classes = result.options, result.backbone, len(result.splits.label_names)
    report = result.to_dict()
    config = {
        **backbone.config,
        "num_classes": num_classes,
        "label_names": list(result.splits.label_names),
        "pretrained_cfg": {**backbone.config["pretrained_cfg"], "num_classes": num_classes},
        "graft": {
            "format_version": FORMAT_VERSION,
            "run": run_dir.name,
            "fingerprint": backbone.fingerprint,
            "freeze": result.freeze,
            "head": backbone.classifier,
            "temperature": result.calibration.temperature,
            **_describe_task(result),
            "preprocess": backbone.preprocess.to_dict(),
            "metrics": {name: report[name] for name in (*result.metrics, "probe")},
            "engine": report["engine"],
            "weights": backbone.weights,
            "is_pretrained": backbone.is_pretrained,
            "license": backbone.license,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "openvino", "pillow", "simplejpeg")},
        },
    }
    head = {f"{backbone.classifier}.weight": result.head.weight, f"{backbone.classifier}.bias": result.head.bias}

    def copy_engine(path: Path) -> None:
        for suffix in (".xml", ".bin"):
            shutil.copyfile(backbone.openvino_path.with_suffix(suffix), path.with_suffix(suffix))

    return publish(
        options.repository,
        options.model_name,
        state={**backbone.read_tensors(), **head},
        config=config,
        golden=golden,
        write_engine=copy_engine,
        card=lambda version: write_card(result, version),
    )


def _describe_task(result: Result) -> dict[str, Any]:
    """What tells the service how to answer."""
    calibration = result.calibration
    if isinstance(calibration, LabelCalibration):
        return {"task": "multi-label", "thresholds": calibration.thresholds.tolist()}
    return {"conformal": {"coverage": calibration.coverage, "threshold": calibration.threshold}}


def _show_in_tensorboard(monitor: Monitor, result: Result, mistakes: Sequence[Mistake]) -> None:
    label_names, curve = result.splits.label_names, result.learning_curve
    for split, metrics in result.metrics.items():
        monitor.metrics(split, metrics, label_names)
        monitor.calibration(split, result.calibrated[split])
    for num_images, accuracy in zip(curve.num_images, curve.accuracies, strict=True):
        monitor.scalar(f"probe/{result.metric}_by_training_images", accuracy, num_images)
    if result.verdict is not None:
        monitor.text("verdict", str(result.verdict))
    val = result.metrics["val"]
    if isinstance(val, Metrics):
        monitor.image("val/confusion", draw_confusion(val, label_names))
    monitor.image("val/worst_mistakes", draw_mistakes(mistakes))
    if explained := [replace(mistake, crop=mistake.looked_at) for mistake in mistakes if mistake.looked_at is not None]:
        monitor.image("val/worst_mistakes_looked_at", draw_mistakes(explained))
    write_projector(monitor.run_dir, result, with_thumbnails=result.options.explains)
    monitor.scalar(f"probe/{result.metric}", result.probe_metrics.score)
    final = {f"val/{result.metric}": val.score, "val/macro_f1": val.macro_f1, "val/loss": val.loss}
    monitor.options(result.options.model_dump(mode="json"), final)
    monitor.close()


def _worst_mistakes(result: Result) -> list[Mistake]:
    """The wrong answers of highest score."""
    if isinstance(result.calibration, LabelCalibration):
        return _worst_decisions(result, result.calibration)
    splits, scores = result.splits, softmax(result.val_logits / result.calibration.temperature)
    predicted = scores.argmax(axis=1)
    wrong = [index for index, sample in enumerate(splits.val) if predicted[index] != sample.label]
    worst = sorted(wrong, key=lambda index: -float(scores[index, predicted[index]]))[:_NUM_MISTAKES]
    return [
        Mistake(
            result.backbone.preprocess(splits.val[index].read()),
            splits.label_names[splits.val[index].label],
            splits.label_names[predicted[index]],
            float(scores[index, predicted[index]]),
            splits.val[index].key,
            label=int(predicted[index]),
        )
        for index in worst
    ]


def _worst_decisions(result: Result, calibration: LabelCalibration) -> list[Mistake]:
    """Multi-label: of each image the label that it was most wrongly given or denied, the worst ones first."""
    splits, names = result.splits, result.splits.label_names
    scores = sigmoid(result.val_logits / np.float32(calibration.temperature))
    has_label = splits.labels(splits.val) == 1
    wrongness = np.where((scores >= calibration.thresholds) == has_label, 0, np.where(has_label, 1 - scores, scores))
    worst = wrongness.argmax(axis=1)
    order = np.argsort(-wrongness.max(axis=1), kind="stable")[:_NUM_MISTAKES]
    return [
        Mistake(
            result.backbone.preprocess(splits.val[index].read()),
            splits.describe(splits.val[index]) or "no label",
            f"not {names[worst[index]]}" if has_label[index, worst[index]] else names[worst[index]],
            float(wrongness[index, worst[index]]),
            splits.val[index].key,
            label=int(worst[index]),
        )
        for index in order
        if wrongness[index].any()
    ]


def _explain(result: Result, mistakes: Sequence[Mistake]) -> list[Mistake]:
    """The same, each with a picture of where the network looked; without where that cannot be had."""
    # Imported here: torch and captum take longer to import than a probe to solve.
    from finetune.explain import explain

    answers = [mistake.label for mistake in mistakes]
    try:
        heats = explain(result.backbone, result.head, [mistake.crop for mistake in mistakes], answers)
    except GraftError as error:
        logger.warning("no pictures of where the network looked: %s", error)
        return list(mistakes)
    return [replace(mistake, looked_at=draw_heat(mistake.crop, heat)) for mistake, heat in zip(mistakes, heats, strict=True)]


def _write_example(run_dir: Path, splits: Splits) -> Path:
    """A validation image as a file, so that the printed request works as it stands."""
    sample = splits.val[0]
    if isinstance(sample.image, Path):
        return sample.image
    path = run_dir / "example.png"
    path.write_bytes(sample.read())
    return path


def _commands(options: Options, example: Path) -> str:
    """What to type to serve the repository, and to ask the model about an image."""
    repository = options.repository.resolve()
    is_default = repository == Path(__file__).resolve().parent.parent / "checkpoints"
    setting = "" if is_default else f"CHECKPOINTS={shlex.quote(str(repository))} "
    # Within double quotes, curl's -F takes `;` and `,` for what they are.
    escaped = str(example).replace("\\", "\\\\").replace('"', '\\"')
    image = shlex.quote(f'images=@"{escaped}"' if any(char in escaped for char in ';,"\\') else f"images=@{escaped}")
    home = Path(__file__).resolve().parent.parent
    make = "make serve" if Path.cwd() == home else f"make -C {shlex.quote(str(home))} serve"
    return f"{setting}{make}\ncurl -F {image} 'http://localhost:3000/predict?model={options.model_name}'"


def _say_what_next(result: Result, run_dir: Path, checkpoint: Path, commands: str) -> None:
    val = result.metrics["val"]
    verdict = "" if result.verdict is None else f"{result.verdict}\n"
    test = f", test {result.metrics['test'].with_interval(result.metric)}" if "test" in result.metrics else ""
    if isinstance(val, Metrics):
        averages = f"balanced {val.balanced_accuracy:.4f}, macro F1 {val.macro_f1:.4f}"
    else:
        averages = f"macro F1 {val.macro_f1:.4f}, exact match {val.exact_match:.4f}"
    print(
        f"""
val {result.metric_name} {val.with_interval(result.metric)}{test}, {averages}; {result.seconds["total"]:.1f} s
{verdict}{result.describe_calibration()}
{result.learning_curve}

  report       {run_dir / "report.html"}
  checkpoint   {checkpoint}
  metrics      {run_dir / "metrics.json"}
  TensorBoard  {run_dir}   (make tensorboard)

Next, in one terminal (again, if it serves already) and in another:
{textwrap.indent(commands, "  ")}"""
    )


if __name__ == "__main__":
    sys.exit(main())
