"""Which task it is: decided once, by how a source names the labels of its images."""

from __future__ import annotations

from finetune.tasks.multi_label import MULTI_LABEL
from finetune.tasks.single_label import SINGLE_LABEL
from finetune.tasks.task import Task


def choose_task(named: str | tuple[str, ...]) -> Task:
    """The task of a source, by what one of its images is labelled: one name, or any number."""
    return SINGLE_LABEL if isinstance(named, str) else MULTI_LABEL
