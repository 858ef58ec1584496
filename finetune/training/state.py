"""The state of gradient epochs on disk, from which a stopped run goes on bit by bit.

One safetensors file: the tensors, and in its metadata the rest as JSON. Two files could not be
replaced at once. It holds the tensors that training changes; frozen ones are built anew, and must
equal those of the first process. The order of the images needs no state: `draw_batches` derives it
from seed and epoch. There is no gradient scaler to save either: training in fp32 or bf16 needs
none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from finetune.data.splits import Splits
from finetune.evaluation.epoch import EpochMetrics
from finetune.resume import METADATA_KEY, check_fixed
from finetune.tasks.balance import draw_balanced
from finetune.training.ema import Ema
from finetune.training.tensors import Tensors, changing_tensors, copy_tensors
from models.backbone.freezing import Freezing, digest_tensor
from models.errors import GraftError, describe_error
from models.files import write_whole
from models.scores import Floats

logger = logging.getLogger("graft.state")

_FORMAT_VERSION = 4
_DIGEST_KEY = "digest"


@dataclass
class Progress:
    """Where training is: `batch` batches of `epoch` are done, `step` of all epochs.

    `losses`, `num_images` and the seconds are those of the epoch so far, `epochs` the metrics of
    the finished ones, and `seconds_trained` the seconds of all processes when the state was saved.
    `best_score` is an epoch's accuracy (with `--balance` the balanced one) and its negative loss.
    `train_at_once` and `val_at_once` are the images that fitted into memory.
    """

    train_at_once: int
    val_at_once: int
    epoch: int = 0
    batch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    num_images: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    best_epoch: int = 0
    best_score: tuple[float, float] = (-math.inf, -math.inf)
    seconds_trained: float = 0.0
    epochs: list[EpochMetrics] = field(default_factory=list)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Progress:
        """From `asdict`, by way of JSON."""
        epochs = [EpochMetrics(**epoch) for epoch in stored["epochs"]]
        return cls(**{**stored, "best_score": tuple(stored["best_score"]), "epochs": epochs})

    def add_step(
        self, loss: float, num_images: int, waiting_seconds: float, seconds: float
    ) -> None:
        """`waiting_seconds` for the batch are part of the step's `seconds`."""
        self.losses.append(loss)
        self.step += 1
        self.batch += 1
        self.num_images += num_images
        self.waiting_seconds += waiting_seconds
        self.seconds += seconds

    def begin_next_epoch(self) -> None:
        self.epoch += 1
        self.batch, self.losses, self.num_images = 0, [], 0
        self.seconds, self.waiting_seconds = 0.0, 0.0


class TrainingState:
    """Everything that training changes, and the best tensors so far.

    With an `ema`, the best tensors are the moving average's, which is what is validated.
    """

    def __init__(
        self,
        model: nn.Module,
        freezing: Freezing,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        progress: Progress,
        ema: Ema | None = None,
    ) -> None:
        self.progress = progress
        self.ema = ema
        self._frozen = freezing.digests
        self._tensors = changing_tensors(model, freezing)
        self._parameters: dict[torch.Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters()
        }
        self._optimizer = optimizer
        self._schedule = schedule
        self._best: Tensors = {}

    def keep_as_best(self, score: tuple[float, float]) -> None:
        """The epoch under way is the best so far."""
        self.progress.best_epoch, self.progress.best_score = self.progress.epoch, score
        validated = self._tensors if self.ema is None else self.ema.tensors
        self._best = {name: tensor.detach().clone() for name, tensor in validated.items()}

    def restore_best(self) -> None:
        copy_tensors(self._best, self._tensors)

    def save(self, path: Path, fixed: Mapping[str, Any], events: Mapping[str, int]) -> None:
        """Write all of it, whole or not at all. Raises OSError or SafetensorError.

        `fixed` must be the same when it is loaded; `events` are the event files' sizes in bytes, by
        name.
        """
        random_tensors, random_rest = random_states()
        optimizer = {
            f"{self._parameters[parameter]}/{key}": value
            for parameter, values in self._optimizer.state.items()
            for key, value in values.items()
        }
        kinds = {
            "model": self._tensors,
            "best": self._best,
            "optimizer": optimizer,
            "random": random_tensors,
        }
        if self.ema is not None:
            kinds["ema"] = self.ema.tensors
        tensors = {
            f"{kind}/{name}": tensor.detach().to("cpu", copy=True).contiguous()
            for kind, named in kinds.items()
            for name, tensor in named.items()
        }
        rest = {
            "format_version": _FORMAT_VERSION,
            "fixed": fixed,
            "frozen": self._frozen,
            "progress": asdict(self.progress),
            "groups": [
                {key: value for key, value in group.items() if key != "params"}
                for group in self._optimizer.param_groups
            ],
            "schedule": self._schedule.state_dict(),
            "random": random_rest,
            "events": events,
        }
        text = json.dumps(rest)
        metadata = {METADATA_KEY: text, _DIGEST_KEY: _digest(text, tensors)}
        write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    def load(self, path: Path, fixed: Mapping[str, Any]) -> None:
        """Restore what `save` wrote.

        Raises GraftError where the file is damaged, or where a frozen tensor or something `fixed`
        differs from then.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                names: list[str] = list(file.keys())
                tensors: Tensors = {name: file.get_tensor(name) for name in names}
            rest = json.loads(metadata[METADATA_KEY])
            version = rest["format_version"]
            if version == _FORMAT_VERSION and metadata[_DIGEST_KEY] != _digest(
                metadata[METADATA_KEY], tensors
            ):
                raise ValueError("its digest differs")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise GraftError(
                f"{path}: the saved state cannot be read: {describe_error(error)}; remove it, and "
                "--resume begins again"
            ) from error
        if version != _FORMAT_VERSION:
            raise GraftError(
                f"{path}: the state has format {version}, this Graft reads format "
                f"{_FORMAT_VERSION}; use the Graft of the run"
            )
        kinds: dict[str, Tensors] = {
            "model": {},
            "best": {},
            "ema": {},
            "optimizer": {},
            "random": {},
        }
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            kinds[kind][name] = tensor
        self._check_same(path, rest, fixed, kinds["model"])
        copy_tensors(kinds["model"], self._tensors)
        if self.ema is not None:
            copy_tensors(kinds["ema"], self.ema.tensors)
        self._best = {
            name: tensor.to(self._tensors[name].device) for name, tensor in kinds["best"].items()
        }
        self._load_optimizer(rest["groups"], kinds["optimizer"])
        self._schedule.load_state_dict(rest["schedule"])
        set_random_states(kinds["random"], rest["random"])
        self.progress = Progress.from_dict(rest["progress"])

    def _check_same(
        self, path: Path, rest: Mapping[str, Any], fixed: Mapping[str, Any], tensors: Tensors
    ) -> None:
        run_dir = path.parent.parent
        then = rest["frozen"]
        differing = [
            name for name in {**then, **self._frozen} if then.get(name) != self._frozen.get(name)
        ]
        if differing:
            raise GraftError(
                f"--resume {run_dir}: {len(differing)} of {len(then)} frozen tensors are not what "
                f"they were when the run began ({', '.join(differing[:4])}); put the backbone's "
                "weights and code back as they were then, or begin another run"
            )
        check_fixed(run_dir, rest["fixed"], fixed, f"; where {path} is another run's, remove it")
        if {name: tensor.shape for name, tensor in tensors.items()} != {
            name: tensor.shape for name, tensor in self._tensors.items()
        }:
            raise GraftError(
                f"--resume {run_dir}: the backbone's code has changed: other tensors train now "
                "than when the run began; put it back as it was then, or begin another run"
            )

    def _load_optimizer(self, groups: list[dict[str, Any]], tensors: Tensors) -> None:
        # In place: Fabric's optimizer shares groups and state with the one that it wraps, which
        # `load_state_dict` would replace.
        for group, saved in zip(self._optimizer.param_groups, groups, strict=True):
            group.update(saved)
        by_name = {name: parameter for parameter, name in self._parameters.items()}
        for key, value in tensors.items():
            name, _, kind = key.rpartition("/")
            parameter = by_name[name]
            # The fused kernels ask for the parameter's own layout, channels_last on a GPU.
            like = (
                torch.empty_like(parameter)
                if value.shape == parameter.shape
                else torch.empty_like(value, device=parameter.device)
            )
            self._optimizer.state[parameter][kind] = like.detach().copy_(value)


class StateFile:
    """A training's state at `path`, saved every so many minutes; nothing where `path` is None."""

    def __init__(
        self,
        path: Path | None,
        state: TrainingState,
        *,
        minutes: float,
        fixed: Mapping[str, Any],
        flush: Callable[[], Mapping[str, int]],
    ) -> None:
        """`flush` writes the curves to disk and gives their files' sizes in bytes, by name."""
        self._path = path
        self._state = state
        self._seconds = 60 * minutes
        self._fixed = fixed
        self._flush = flush
        self._saved = self._began = time.monotonic()
        self._earlier_seconds = 0.0

    def load(self) -> bool:
        """Load the state; False where there is none."""
        if self._path is None or not self._path.exists():
            return False
        self._state.load(self._path, self._fixed)
        self._earlier_seconds = self._state.progress.seconds_trained
        return True

    def save_if_due(self) -> None:
        if time.monotonic() - self._saved >= self._seconds:
            self.save()

    def save(self) -> None:
        """Save the state; where that fails, log it, and let the training go on."""
        if self._path is None:
            return
        self._state.progress.seconds_trained = (
            self._earlier_seconds + time.monotonic() - self._began
        )
        try:
            self._state.save(self._path, self._fixed, self._flush())
        except (OSError, SafetensorError) as error:
            logger.warning(
                "%s: the state could not be saved (%s); if the run ends now, --resume goes on from "
                "the one before",
                self._path,
                error,
            )
        self._saved = time.monotonic()


def _digest(text: str, tensors: Tensors) -> str:
    """Of everything in a state: safetensors has no checksum of its own."""
    digests = {name: digest_tensor(tensor) for name, tensor in sorted(tensors.items())}
    return hashlib.sha256(f"{text}{json.dumps(digests)}".encode()).hexdigest()


def fix_images(splits: Splits) -> dict[str, str]:
    """A digest of the training and validation images with their labels, to be compared."""
    named = [
        (split, [(sample.key, splits.describe(sample)) for sample in samples])
        for split, samples in splits.named()
    ]
    digest = hashlib.sha256(json.dumps([splits.label_names, named]).encode()).hexdigest()[:8]
    return {
        "its list of images and labels": f"{len(splits.train)} to train on, {len(splits.val)} to "
        f"validate on ({digest})"
    }


def draw_batches(
    num_images: int, batch_size: int, seed: int, epoch: int, weights: Floats | None = None
) -> list[list[int]]:
    """The images of each gradient step of an epoch, by index, from seed and epoch alone.

    With `weights` `[num_images]`, 1 on average, an image comes as often as its weight says. A last
    batch that is not full is left out: one of a single image would break BatchNorm in training.
    """
    generator = np.random.default_rng((seed, epoch))
    drawn = generator.permutation(num_images)
    if weights is not None:
        drawn = generator.permutation(draw_balanced(drawn, weights, generator.random()))
    order = drawn.tolist()
    return [
        order[start : start + batch_size]
        for start in range(0, max(1, num_images - batch_size + 1), batch_size)
    ]


def random_states() -> tuple[Tensors, Any]:
    """torch's generators as tensors; Python's and numpy's as JSON."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states |= {
            f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())
        }
    kind, keys, *rest = np.random.get_state(legacy=True)
    return states, {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def set_random_states(states: Tensors, rest: Any) -> None:
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(state, int(name.removeprefix("cuda")))
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *others = rest["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *others))
