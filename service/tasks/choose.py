"""The tasks that are served, and which of them is a checkpoint's."""

from __future__ import annotations

from models.checkpoint import Checkpoint
from service.tasks.multi_label import (
    MultiLabel,
    MultiLabelColumns,
    MultiLabelPrediction,
    MultiLabelRow,
)
from service.tasks.single_label import PredictColumns, Prediction, PredictRow, SingleLabel
from service.tasks.task import Task

# The shapes of the tasks' answers: of one image in `/predict`, and of TensorFlow Serving's rows
# and columns.
AnyPrediction = Prediction | MultiLabelPrediction
AnyRows = list[PredictRow] | list[MultiLabelRow]
AnyColumns = PredictColumns | MultiLabelColumns


def task_of(checkpoint: Checkpoint) -> Task:
    labels, temperature = checkpoint.label_names, checkpoint.temperature
    match checkpoint.task:
        case "single-label":
            return SingleLabel(labels, temperature, checkpoint.coverage, checkpoint.threshold)
        case "multi-label":
            assert checkpoint.thresholds is not None, "load_checkpoint reads them for this task"
            return MultiLabel(labels, temperature, checkpoint.thresholds)
