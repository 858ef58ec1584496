"""What a run writes is what TensorBoard's own reader finds: curves, pictures, text and options."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from finetune.monitor import Monitor, Picture
from tests.conftest import RunPython
from tests.support.events import read_events, text_of


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    monitor = Monitor(tmp_path)
    yield monitor
    monitor.close()


def test_scalars_come_back_with_their_steps(monitor: Monitor, tmp_path: Path) -> None:
    for step, value in enumerate((0.5, 0.25, float("nan"))):
        monitor.scalar("train/loss", value, step)
    monitor.close()
    found = [(event.step, event.value) for event in read_events(tmp_path).Scalars("train/loss")]
    assert found[:2] == [(0, 0.5), (1, 0.25)]
    assert np.isnan(found[2][1])


def test_a_picture_comes_back_as_it_was(monitor: Monitor, tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.new("RGB", (300, 200), (200, 30, 60)).save(encoded, "PNG")
    monitor.image("val/confusion", Picture(encoded.getvalue(), height=200, width=300), step=2)
    monitor.close()
    events = read_events(tmp_path)
    assert events.Tags()["images"] == ["val/confusion"]
    [event] = events.Images("val/confusion")
    assert (event.width, event.height, event.step) == (300, 200, 2)
    assert event.encoded_image_string == encoded.getvalue()


def test_options_are_a_table_and_hparams_beside_the_metrics(
    monitor: Monitor, tmp_path: Path
) -> None:
    options = {"lr": 0.5, "epochs": 5, "strict": False, "freeze": "until:layer3", "weights": None}
    monitor.scalar("val/accuracy", 0.75)
    monitor.options(options, {"val/accuracy": 0.75})
    monitor.close()
    events = read_events(tmp_path)
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
    events = read_events(tmp_path)
    assert text_of(events, "note") == "# ünïcode\n| a | b |"
    assert events.SummaryMetadata("note/text_summary").plugin_data.plugin_name == "text"


def test_events_can_be_read_while_the_run_goes_on(monitor: Monitor, tmp_path: Path) -> None:
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    monitor.scalar("a", 1)
    monitor.close()
    assert read_events(tmp_path).Scalars("a")[0].value == 1


def test_watching_needs_no_torch(run_python: RunPython) -> None:
    code = "import sys; sys.modules['torch'] = None; import finetune.report.tensorboard"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
