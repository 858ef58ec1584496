"""What a person watches in TensorBoard: curves, pictures, text, options.

Events are written through TensorBoard's own package: torch's SummaryWriter wraps it, too, and
would import torch in runs that need none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams.api_pb2 import (
    DataType,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
    Status,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter


@dataclass(frozen=True)
class Picture:
    """An encoded PNG and its size in pixels."""

    png: bytes
    height: int
    width: int


class Monitor:
    """An event file in a run's folder; `step` counts gradient steps or epochs, as the tag says."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._writer = EventFileWriter(str(run_dir))

    def scalar(self, tag: str, value: float, step: int = 0) -> None:
        self._write(Summary.Value(tag=tag, simple_value=value), step)

    def image(self, tag: str, picture: Picture, step: int = 0) -> None:
        encoded = Summary.Image(
            height=picture.height,
            width=picture.width,
            colorspace=3,
            encoded_image_string=picture.png,
        )
        self._write(Summary.Value(tag=tag, image=encoded), step)

    def text(self, tag: str, markdown: str) -> None:
        tensor = TensorProto(
            dtype=DT_STRING,
            string_val=[markdown.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        metadata = create_summary_metadata(display_name=tag, description="")
        self._write(Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor), 0)

    def options(self, options: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The options as a table, and as HParams beside the run's final `metrics`.

        Those have to be scalars of the same tags.
        """
        shown = {
            name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for name, value in options.items()
        }
        self.text(
            "options",
            "| option | value |\n|---|---|\n"
            + "\n".join(f"| {name} | `{value}` |" for name, value in shown.items()),
        )
        experiment = Experiment(
            hparam_infos=[
                HParamInfo(name=name, type=_data_type(value)) for name, value in shown.items()
            ],
            metric_infos=[MetricInfo(name=MetricName(tag=tag)) for tag in metrics],
        )
        start = SessionStartInfo(start_time_secs=time.time())
        for name, value in shown.items():
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, int | float):
                start.hparams[name].number_value = value
            else:
                start.hparams[name].string_value = value
        end = SessionEndInfo(status=Status.STATUS_SUCCESS, end_time_secs=time.time())
        for kind, data in (
            ("experiment", experiment),
            ("session_start_info", start),
            ("session_end_info", end),
        ):
            content = HParamsPluginData(version=0, **{kind: data}).SerializeToString()
            plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=content)
            self._write(
                Summary.Value(
                    tag=f"_hparams_/{kind}", metadata=SummaryMetadata(plugin_data=plugin)
                ),
                0,
            )

    def flush(self) -> None:
        """Write to the file what was given so far."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, value: Summary.Value, step: int) -> None:
        self._writer.add_event(
            Event(wall_time=time.time(), step=step, summary=Summary(value=[value]))
        )


def _data_type(value: object) -> int:
    if isinstance(value, bool):
        return int(DataType.DATA_TYPE_BOOL)
    return int(
        DataType.DATA_TYPE_FLOAT64 if isinstance(value, int | float) else DataType.DATA_TYPE_STRING
    )
