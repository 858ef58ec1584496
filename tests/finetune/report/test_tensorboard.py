"""What the end of a run writes is what TensorBoard's own reader finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from finetune.monitor import Monitor
from finetune.report.tensorboard import show_metrics
from finetune.tasks.single_label import SINGLE_LABEL
from tests.support.events import read_events, text_of


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    monitor = Monitor(tmp_path)
    yield monitor
    monitor.close()


def test_metrics_are_curves_and_a_table(monitor: Monitor, tmp_path: Path) -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 2, 1]]
    metrics = SINGLE_LABEL.evaluate(logits, np.array([0, 1, 1, 2, 2, 2]))
    show_metrics(monitor, "val", metrics, ("c|at", "dog", "<emu>"), "class", step=4)
    monitor.close()
    events = read_events(tmp_path)
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "loss"):
        [event] = events.Scalars(f"val/{name}")
        assert (event.step, event.value) == (4, pytest.approx(getattr(metrics, name), rel=1e-6))
    for name, interval in metrics.intervals.items():
        [event] = events.Scalars(f"val_interval/{name}_low")
        assert event.value == pytest.approx(interval.low, rel=1e-6)
    assert events.Scalars("val_precision/c|at")[0].value == pytest.approx(0.5)
    assert events.Scalars("val_recall/<emu>")[0].value == pytest.approx(2 / 3)
    assert text_of(events, "val per class").splitlines()[2:] == [
        "| c\\|at | 0.500 | 1.000 | 0.667 | 1 |",
        "| dog | 0.500 | 0.500 | 0.500 | 2 |",
        "| &lt;emu> | 1.000 | 0.667 | 0.800 | 3 |",
    ]


def test_many_classes_have_a_table_and_no_curves(monitor: Monitor, tmp_path: Path) -> None:
    names = tuple(f"class{label}" for label in range(51))
    metrics = SINGLE_LABEL.evaluate(np.eye(51, dtype=np.float32), np.arange(51))
    show_metrics(monitor, "val", metrics, names, "class")
    monitor.close()
    events = read_events(tmp_path)
    assert not [tag for tag in events.Tags()["scalars"] if "/class" in tag]
    assert "val/accuracy" in events.Tags()["scalars"]
    assert all(f"| {name} |" in text_of(events, "val per class") for name in names)
