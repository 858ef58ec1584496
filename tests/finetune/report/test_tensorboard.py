"""What the end of a run writes is what TensorBoard's own reader finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from finetune.monitor import Monitor
from finetune.report.plots import Mistake
from finetune.report.result import Result
from finetune.report.tensorboard import show_in_tensorboard, show_metrics
from finetune.tasks.multi_label import MULTI_LABEL
from finetune.tasks.single_label import SINGLE_LABEL
from tests.support.events import read_events, text_of
from tests.support.results import make_result

CROP = np.full((32, 32, 3), 90, np.uint8)


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    monitor = Monitor(tmp_path)
    yield monitor
    monitor.close()


@pytest.fixture(scope="module")
def tuned() -> Result:
    """Of a run that trained layers and published the probe."""
    return make_result(is_trained=True)


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


def test_a_probe_is_shown_once(monitor: Monitor, tmp_path: Path) -> None:
    result = make_result()
    show_in_tensorboard(monitor, result, [Mistake(CROP, "cat", "dog", 0.87)])
    events = read_events(tmp_path)
    assert events.Tags()["images"] == ["val/confusion", "val/worst_mistakes"]
    score = result.probe_metrics.score
    assert events.Scalars("val/accuracy")[0].value == pytest.approx(score, rel=1e-6)
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("candidates")]
    assert not [tag for tag in events.Tags()["tensors"] if tag.startswith("verdict")]


def test_heat_maps_are_a_picture_of_their_own(monitor: Monitor, tmp_path: Path) -> None:
    mistakes = [
        Mistake(CROP, "cat", "dog", 0.87, heat_map=CROP),
        Mistake(CROP, "cat", "dog", 0.8),
    ]
    show_in_tensorboard(monitor, make_result(), mistakes)
    assert read_events(tmp_path).Tags()["images"] == [
        "val/confusion",
        "val/worst_mistakes",
        "val/worst_mistakes_looked_at",
    ]


def test_both_candidates_have_metrics_and_confusion(
    monitor: Monitor, tuned: Result, tmp_path: Path
) -> None:
    show_in_tensorboard(monitor, tuned, [])
    events = read_events(tmp_path)
    for candidate in tuned.candidates:
        [event] = events.Scalars(f"candidates/{candidate.name}/val/accuracy")
        assert event.value == pytest.approx(candidate.metrics["val"].score, rel=1e-6)
        assert events.Images(f"candidates/{candidate.name}/val/confusion")
        assert f"candidates/{candidate.name}/val_calibration/error" in events.Tags()["scalars"]
    # The published one stands under the tags of every run.
    [event] = events.Scalars("val/accuracy")
    assert event.value == pytest.approx(tuned.probe_metrics.score, rel=1e-6)
    text = text_of(events, "verdict")
    assert str(tuned.verdict) in text
    assert "| probe, published | val |" in text
    assert "| fine-tuned | val |" in text
    assert f"`python finetune/publish.py {tmp_path} --which tuned`" in text


def test_any_number_of_labels_an_image_has_no_confusion(monitor: Monitor, tmp_path: Path) -> None:
    show_in_tensorboard(monitor, make_result(task=MULTI_LABEL, is_trained=True), [])
    events = read_events(tmp_path)
    assert events.Tags()["images"] == ["val/worst_mistakes"]
    assert "candidates/tuned/val/mean_average_precision" in events.Tags()["scalars"]
