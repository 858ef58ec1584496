"""What a finished run shows in TensorBoard: metrics, calibration, pictures of its mistakes, options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune.evaluation.calibration import CalibrationQuality
from finetune.evaluation.metrics import Metrics, tabulate
from finetune.monitor import Monitor
from finetune.report.plots import Mistake, draw_confusion, draw_mistakes
from finetune.report.projector import write_projector
from finetune.report.result import Result

# With more classes, one curve per class is unreadable; the table in the text tab has them all.
_MAX_CLASS_CURVES = 50


def show_in_tensorboard(monitor: Monitor, result: Result, mistakes: Sequence[Mistake]) -> None:
    """Write everything that is known at the end of a run, and close the monitor."""
    label_names, curve = result.splits.label_names, result.learning_curve
    for split, metrics in result.metrics.items():
        show_metrics(monitor, split, metrics, label_names, result.splits.task.words.label)
        show_calibration(monitor, split, result.calibrated[split])
    for num_images, accuracy in zip(curve.num_images, curve.accuracies, strict=True):
        monitor.scalar(f"probe/{result.metric}_by_training_images", accuracy, num_images)
    if result.verdict is not None:
        monitor.text("verdict", str(result.verdict))
    val = result.metrics["val"]
    if val.confusion is not None:
        monitor.image("val/confusion", draw_confusion(val.confusion, label_names))
    monitor.image("val/worst_mistakes", draw_mistakes(mistakes))
    if explained := [
        replace(mistake, crop=mistake.looked_at)
        for mistake in mistakes
        if mistake.looked_at is not None
    ]:
        monitor.image("val/worst_mistakes_looked_at", draw_mistakes(explained))
    write_projector(monitor.run_dir, result, with_thumbnails=result.options.explains)
    monitor.scalar(f"probe/{result.metric}", result.probe_metrics.score)
    final = {f"val/{result.metric}": val.score, "val/macro_f1": val.macro_f1, "val/loss": val.loss}
    monitor.options(result.options.model_dump(mode="json"), final)
    monitor.close()


def show_metrics(
    monitor: Monitor,
    split: str,
    metrics: Metrics,
    label_names: tuple[str, ...],
    label_word: str = "class",
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
    lines = (
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    )
    monitor.text(f"{split} per class", "\n".join(lines))


def show_calibration(monitor: Monitor, split: str, quality: CalibrationQuality) -> None:
    for name, value in quality.to_dict().items():
        if value is not None:
            monitor.scalar(f"{split}_calibration/{name}", value)
