"""What a run writes is what TensorBoard's own reader finds: curves, pictures, text and options."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (
    STORE_EVERYTHING_SIZE_GUIDANCE,
    EventAccumulator,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from finetune.evaluation.class_metrics import ClassMetrics, evaluate_classes
from finetune.monitor import Monitor
from finetune.report.plots import Mistake, draw_confusion, draw_mistakes
from finetune.report.tensorboard import show_metrics


def read(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir), size_guidance=STORE_EVERYTHING_SIZE_GUIDANCE)
    events.Reload()
    return events


def text_of(events: EventAccumulator, tag: str) -> str:
    [event] = events.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    monitor = Monitor(tmp_path)
    yield monitor
    monitor.close()


@pytest.fixture
def metrics() -> ClassMetrics:
    logits = np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 2, 1]]
    return evaluate_classes(logits, np.array([0, 1, 1, 2, 2, 2]))


def test_scalars_come_back_with_their_steps(monitor: Monitor, tmp_path: Path) -> None:
    for step, value in enumerate((0.5, 0.25, float("nan"))):
        monitor.scalar("train/loss", value, step)
    monitor.close()
    found = [(event.step, event.value) for event in read(tmp_path).Scalars("train/loss")]
    assert found[:2] == [(0, 0.5), (1, 0.25)]
    assert np.isnan(found[2][1])


def test_pictures_can_be_decoded_and_have_the_size_they_say(
    monitor: Monitor, metrics: ClassMetrics, tmp_path: Path
) -> None:
    crop = np.full((32, 32, 3), (200, 30, 60), np.uint8)
    pictures = {
        "val/confusion": draw_confusion(metrics.confusion, ("a", "b", "c")),
        "val/worst_mistakes": draw_mistakes([Mistake(crop, "cat", "dog", 0.87)] * 7),
        "val/none": draw_mistakes([]),
    }
    for tag, picture in pictures.items():
        monitor.image(tag, picture, step=2)
    monitor.close()
    events = read(tmp_path)
    assert events.Tags()["images"] == list(pictures)
    for tag in pictures:
        [event] = events.Images(tag)
        image = Image.open(io.BytesIO(event.encoded_image_string))
        assert (image.width, image.height, event.step) == (event.width, event.height, 2)
        assert image.width > 200
    mistakes = np.asarray(Image.open(io.BytesIO(pictures["val/worst_mistakes"].png)).convert("RGB"))
    assert (mistakes == (200, 30, 60)).all(axis=2).mean() > 0.1
    assert (
        not (
            np.asarray(Image.open(io.BytesIO(pictures["val/none"].png)).convert("RGB"))
            == (200, 30, 60)
        )
        .all(axis=2)
        .any()
    )


def test_a_confusion_shades_where_the_images_are(metrics: ClassMetrics) -> None:
    diagonal = draw_confusion(
        evaluate_classes(np.eye(2, dtype=np.float32)[[0, 1]], np.array([0, 1])).confusion,
        ("a", "b"),
    )
    flipped = draw_confusion(
        evaluate_classes(np.eye(2, dtype=np.float32)[[1, 0]], np.array([0, 1])).confusion,
        ("a", "b"),
    )
    pixels = np.asarray(Image.open(io.BytesIO(diagonal.png)).convert("L")).astype(int)
    height, width = pixels.shape
    upper_left, upper_right = (
        pixels[: height // 2, : width // 2].mean(),
        pixels[: height // 2, width // 2 :].mean(),
    )
    other = np.asarray(Image.open(io.BytesIO(flipped.png)).convert("L")).astype(int)
    assert upper_left < upper_right - 20
    assert (
        other[: height // 2, : width // 2].mean() > other[: height // 2, width // 2 :].mean() + 20
    )


@pytest.mark.parametrize("num_classes", [2, 40, 120])
def test_a_confusion_of_any_number_of_classes_stays_a_picture_of_bounded_size(
    num_classes: int,
) -> None:
    labels = np.arange(num_classes)
    picture = draw_confusion(
        evaluate_classes(np.eye(num_classes, dtype=np.float32), labels).confusion,
        tuple(f"class {label}" for label in labels),
    )
    image = Image.open(io.BytesIO(picture.png))
    assert image.size == (picture.width, picture.height)
    assert 300 < picture.width <= 1600


def test_metrics_are_curves_and_a_table(
    monitor: Monitor, metrics: ClassMetrics, tmp_path: Path
) -> None:
    show_metrics(monitor, "val", metrics, ("cat", "dog", "emu"), step=4)
    monitor.close()
    events = read(tmp_path)
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "loss"):
        [event] = events.Scalars(f"val/{name}")
        assert (event.step, event.value) == (4, pytest.approx(getattr(metrics, name), rel=1e-6))
    for name, interval in metrics.intervals.items():
        assert events.Scalars(f"val_interval/{name}_low")[0].value == pytest.approx(
            interval.low, rel=1e-6
        )
    assert events.Scalars("val_precision/cat")[0].value == pytest.approx(0.5)
    assert events.Scalars("val_recall/emu")[0].value == pytest.approx(2 / 3)
    assert text_of(events, "val per class").splitlines()[2:] == [
        "| cat | 0.500 | 1.000 | 0.667 | 1 |",
        "| dog | 0.500 | 0.500 | 0.500 | 2 |",
        "| emu | 1.000 | 0.667 | 0.800 | 3 |",
    ]


def test_many_classes_have_a_table_and_no_curves(monitor: Monitor, tmp_path: Path) -> None:
    names = tuple(f"class{label}" for label in range(51))
    show_metrics(
        monitor, "val", evaluate_classes(np.eye(51, dtype=np.float32), np.arange(51)), names
    )
    monitor.close()
    events = read(tmp_path)
    assert not [tag for tag in events.Tags()["scalars"] if "/class" in tag]
    assert "val/accuracy" in events.Tags()["scalars"]
    assert all(f"| {name} |" in text_of(events, "val per class") for name in names)


def test_options_are_a_table_and_hparams_beside_the_metrics(
    monitor: Monitor, tmp_path: Path
) -> None:
    options = {"lr": 0.5, "epochs": 5, "strict": False, "freeze": "until:layer3", "weights": None}
    monitor.scalar("val/accuracy", 0.75)
    monitor.options(options, {"val/accuracy": 0.75})
    monitor.close()
    events = read(tmp_path)
    table = text_of(events, "options")
    assert "| freeze | `until:layer3` |" in table
    assert "| strict | `False` |" in table
    parts = {}
    for kind in ("experiment", "session_start_info", "session_end_info"):
        content = events.SummaryMetadata(f"_hparams_/{kind}").plugin_data
        assert content.plugin_name == "hparams"
        parts[kind] = getattr(HParamsPluginData.FromString(content.content), kind)
    start = parts["session_start_info"].hparams
    assert (
        start["lr"].number_value,
        start["epochs"].number_value,
        start["freeze"].string_value,
    ) == (0.5, 5, "until:layer3")
    assert start["strict"].HasField("bool_value")
    assert not start["strict"].bool_value
    assert start["weights"].string_value == "null"
    assert [info.name for info in parts["experiment"].hparam_infos] == list(options)
    assert [info.name.tag for info in parts["experiment"].metric_infos] == ["val/accuracy"]


def test_text_is_shown_by_the_text_plugin(monitor: Monitor, tmp_path: Path) -> None:
    monitor.text("note", "# ünïcode\n| a | b |")
    monitor.close()
    events = read(tmp_path)
    assert text_of(events, "note") == "# ünïcode\n| a | b |"
    assert events.SummaryMetadata("note/text_summary").plugin_data.plugin_name == "text"


def test_events_can_be_read_while_the_run_goes_on(monitor: Monitor, tmp_path: Path) -> None:
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    monitor.scalar("a", 1)
    monitor.close()
    assert read(tmp_path).Scalars("a")[0].value == 1


def test_watching_needs_no_torch(run_python: object) -> None:
    done = run_python(
        "import sys; sys.modules['torch'] = None; import finetune.monitor, finetune.report.plots; print('fine')"
    )  # type: ignore[operator]
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr
