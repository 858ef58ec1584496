"""The end of a run in TensorBoard: metrics, calibration, mistakes, options; both candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune.evaluation.calibration import CalibrationQuality
from finetune.evaluation.metrics import Metrics, tabulate
from finetune.monitor import Monitor
from finetune.probe.learning_curve import LearningCurve
from finetune.report.candidate import Candidate
from finetune.report.markdown import tabulate_markdown
from finetune.report.plots import Mistake, draw_confusion, draw_mistakes
from finetune.report.projector import write_projector
from finetune.report.result import Result
from finetune.report.side_by_side import command_to_publish, tabulate_results

# With more classes, one curve per class is unreadable; the table in the text tab has them all.
_MAX_CLASS_CURVES = 50


def show_in_tensorboard(monitor: Monitor, result: Result, mistakes: Sequence[Mistake]) -> None:
    """Write everything that is known at the end of a run, and close the monitor."""
    splits, chosen = result.splits, result.chosen
    label_word = splits.task.words.label
    show_candidate(monitor, chosen, splits.label_names, label_word)
    if result.tuned is not None:
        for candidate in result.candidates:
            prefix = f"candidates/{candidate.name}/"
            show_candidate(monitor, candidate, splits.label_names, label_word, prefix)
        monitor.text("verdict", _describe_candidates(monitor, result))
    show_learning_curve(monitor, result.learning_curve, result.metric)
    show_mistakes(monitor, mistakes)
    write_projector(
        monitor.run_dir,
        splits,
        chosen,
        with_thumbnails=result.options.explains,
        num_workers=result.options.workers,
    )
    monitor.scalar(f"probe/{result.metric}", result.probe_metrics.score)
    val = chosen.metrics["val"]
    final = {f"val/{result.metric}": val.score, "val/macro_f1": val.macro_f1, "val/loss": val.loss}
    monitor.options(result.options.model_dump(mode="json"), final)
    monitor.close()


def show_candidate(
    monitor: Monitor,
    candidate: Candidate,
    label_names: tuple[str, ...],
    label_word: str,
    prefix: str = "",
) -> None:
    """Metrics, calibration and confusion matrix; tags begin with `prefix`."""
    for split, metrics in candidate.metrics.items():
        show_metrics(monitor, f"{prefix}{split}", metrics, label_names, label_word)
        show_calibration(monitor, f"{prefix}{split}", candidate.calibrated[split])
    confusion = candidate.metrics["val"].confusion
    if confusion is not None:
        monitor.image(f"{prefix}val/confusion", draw_confusion(confusion, label_names))


def show_metrics(
    monitor: Monitor,
    split: str,
    metrics: Metrics,
    label_names: tuple[str, ...],
    label_word: str,
    step: int = 0,
) -> None:
    """Averages, their intervals and each class's precision and recall as curves; a table of all."""
    for name in (*metrics.NAMES, "loss"):
        monitor.scalar(f"{split}/{name}", getattr(metrics, name), step)
    for name, interval in metrics.intervals.items():
        monitor.scalar(f"{split}_interval/{name}_low", interval.low, step)
        monitor.scalar(f"{split}_interval/{name}_high", interval.high, step)
    if len(label_names) <= _MAX_CLASS_CURVES:
        for label, name in enumerate(label_names):
            monitor.scalar(f"{split}_precision/{name}", float(metrics.precision[label]), step)
            monitor.scalar(f"{split}_recall/{name}", float(metrics.recall[label]), step)
    head, *rows = tabulate(metrics, label_names, label_word)
    monitor.text(f"{split} per class", tabulate_markdown(head, rows))


def show_calibration(monitor: Monitor, split: str, quality: CalibrationQuality) -> None:
    for name, value in quality.to_dict().items():
        if value is not None:
            monitor.scalar(f"{split}_calibration/{name}", value)


def show_learning_curve(monitor: Monitor, curve: LearningCurve, metric: str) -> None:
    """The probe's score by training images, which are the steps."""
    for num_images, accuracy in zip(curve.num_images, curve.accuracies, strict=True):
        monitor.scalar(f"probe/{metric}_by_training_images", accuracy, num_images)


def show_mistakes(monitor: Monitor, mistakes: Sequence[Mistake]) -> None:
    monitor.image("val/worst_mistakes", draw_mistakes(mistakes))
    if explained := [
        replace(mistake, crop=mistake.heat_map)
        for mistake in mistakes
        if mistake.heat_map is not None
    ]:
        monitor.image("val/worst_mistakes_looked_at", draw_mistakes(explained))


def _describe_candidates(monitor: Monitor, result: Result) -> str:
    """The verdict, a table of both candidates, and how to publish the other one."""
    head, rows = tabulate_results(result.candidates, result.chosen)
    command = command_to_publish(monitor.run_dir, result.candidates, result.chosen)
    return "\n\n".join(
        (
            str(result.verdict),
            tabulate_markdown(head, rows),
            f"To publish the other candidate: `{command}`",
        )
    )
