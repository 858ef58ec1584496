"""The average of the weights over the steps (`--ema`), which is mostly a better network than the weights after the last one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.optim.swa_utils import get_ema_multi_avg_fn

from finetune.training.tensors import Tensors, copy_tensors


class Average:
    """An exponential moving average of `current`, a network's own tensors by name, beside them.

    It begins with what they are now. Whole numbers, such as BatchNorm's count of batches, are those of the last step.
    """

    def __init__(self, current: Tensors, decay: float) -> None:
        self._current = current
        self._decay = decay
        self.tensors: Tensors = {name: tensor.detach().clone() for name, tensor in current.items()}

    def update(self, step: int) -> None:
        """Take in the tensors after `step` steps, from 1 up.

        The decay rises to its value as (1 + step) / (10 + step), so that what the training began with is soon forgotten.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        names = [name for name, tensor in self._current.items() if tensor.is_floating_point()]
        blend = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        blend(
            [self.tensors[name] for name in names],
            [self._current[name].detach() for name in names],
            None,
        )
        copy_tensors(
            self._current,
            {
                name: tensor
                for name, tensor in self.tensors.items()
                if not tensor.is_floating_point()
            },
        )

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the network is the average."""
        own = {name: tensor.detach().clone() for name, tensor in self._current.items()}
        copy_tensors(self.tensors, self._current)
        try:
            yield
        finally:
            copy_tensors(own, self._current)
