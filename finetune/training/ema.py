"""The exponential moving average of the weights (`--ema`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.optim.swa_utils import get_ema_multi_avg_fn

from finetune.training.tensors import Tensors, copy_tensors


class Ema:
    """A moving average of `current`, a network's own tensors by name, kept beside them.

    It begins with their values now. Integer tensors, such as BatchNorm's count of batches, are
    those of the last step.
    """

    def __init__(self, current: Tensors, decay: float) -> None:
        self._current = current
        self._decay = decay
        self.tensors: Tensors = {name: tensor.detach().clone() for name, tensor in current.items()}

    def update(self, step: int) -> None:
        """Take in the tensors after `step` steps, from 1 up.

        The decay rises to its value as (1 + step) / (10 + step), so that the initial weights soon
        count little.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        names = [name for name, tensor in self._current.items() if tensor.is_floating_point()]
        blend = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        blend(
            [self.tensors[name] for name in names],
            [self._current[name].detach() for name in names],
            None,
        )
        integers = {
            name: tensor for name, tensor in self.tensors.items() if not tensor.is_floating_point()
        }
        copy_tensors(self._current, integers)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the network has the averaged tensors."""
        own = {name: tensor.detach().clone() for name, tensor in self._current.items()}
        copy_tensors(self.tensors, self._current)
        try:
            yield
        finally:
            copy_tensors(own, self._current)
