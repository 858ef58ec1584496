"""The loop of gradient epochs: steps, validation, saved states."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader

from finetune.data.splits import Splits
from finetune.evaluation.epoch import EpochMetrics
from finetune.evaluation.metrics import Metrics
from finetune.monitor import Monitor
from finetune.resume import event_sizes
from finetune.terminal import progress_bar
from finetune.training.activations import Batch
from finetune.training.boundary import TrainablePart
from finetune.training.broken_batch import BrokenLossError, keep_broken_batch
from finetune.training.depthwise import DepthwiseGradientsInFloat32
from finetune.training.ema import Ema
from finetune.training.inputs import ImageGoneError, Inputs
from finetune.training.layer_stats import LayerStats
from finetune.training.memory import run_in_parts
from finetune.training.mix import build_mix
from finetune.training.optimize import build_optimizer, log_stages, open_stages, rate_share
from finetune.training.preflight import check_disk, check_learning, estimate_time, warn_if_starved
from finetune.training.settings import TrainingSettings
from finetune.training.state import (
    Progress,
    StateFile,
    TrainingState,
    draw_batches,
    fix_images,
    random_states,
    set_random_states,
)
from finetune.training.tensors import changing_tensors
from models.backbone.build import Backbone
from models.backbone.freezing import Freezing, set_train_mode
from models.backbone.memory import is_out_of_memory
from models.errors import GraftError

logger = logging.getLogger("graft.train")

_MAX_GRADIENT_NORM = 1.0


class Training:
    """Trains a network in place, from its first head or a saved state to the last epoch.

    `precision` is the network's in training, `fixed` what must be equal where a state is loaded
    from `state_path`, by its name for people; without that path there is no state on disk.
    `stop_asked` gives the exception to raise where the user asked to stop.
    """

    def __init__(
        self,
        backbone: Backbone,
        freezing: Freezing,
        splits: Splits,
        inputs: Inputs,
        settings: TrainingSettings,
        monitor: Monitor,
        fabric: Fabric,
        precision: str,
        state_path: Path | None,
        fixed: Mapping[str, Any],
        stop_asked: Callable[[], KeyboardInterrupt | None],
    ) -> None:
        self._backbone = backbone
        self._freezing = freezing
        self._splits = splits
        self._inputs = inputs
        self._settings = settings
        self._monitor = monitor
        self._fabric = fabric
        self._precision = precision
        self._stop_asked = stop_asked
        self._class_weights = splits.task.class_weights(
            splits.labels(splits.train), len(splits.label_names)
        )
        self._mix = build_mix(settings.mix, len(splits.label_names))
        self._layer_stats = LayerStats(backbone, freezing, settings.backbone_lr, monitor)
        adamw = build_optimizer(backbone, settings)
        self._network, self._optimizer = fabric.setup(inputs.network, adamw)
        num_steps = settings.epochs * len(self._draw_batches(1))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: rate_share(step, num_steps)
        )
        ema = None
        if settings.ema:
            ema = Ema(changing_tensors(backbone.model, freezing), settings.ema)
        self.state = TrainingState(
            backbone.model,
            freezing,
            adamw,
            self._schedule,
            Progress(settings.batch_size, 2 * settings.batch_size),
            ema,
        )
        self._state_file = StateFile(
            state_path,
            self.state,
            minutes=settings.save_minutes,
            fixed={
                "what the epochs read": _describe_inputs(inputs),
                "the precision": precision,
                **fixed,
                **fix_images(splits),
            },
            flush=self._flush_curves,
        )

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def run(self) -> None:
        """All epochs, or those that a saved state has left."""
        self._log_what_trains()
        if self._state_file.load():
            self._log_resumed()
        elif self._settings.preflight:
            self._preflight()
        try:
            while self.progress.epoch <= self._settings.epochs:
                self._run_epoch()
        except ImageGoneError as error:
            # From a process that decodes, it comes with that one's traceback before it.
            reason = str(error).rpartition(f"{ImageGoneError.__name__}: ")[2].strip()
            raise ImageGoneError(reason) from None
        except (RuntimeError, MemoryError) as error:
            # What is in memory now may be half a step, and is not saved.
            if is_out_of_memory(error):
                raise GraftError(
                    f"out of memory while images were read or weights were stepped ({error}); "
                    "try fewer --workers, or --freeze until:NAME with a later module"
                ) from error
            # Raised by torch's handler of SIGCHLD, in the midst of anything.
            if "DataLoader worker" not in str(error):
                raise
            raise self._stop_asked() or GraftError(
                "a process that decodes images was ended from outside, mostly because memory ran "
                f"out; try fewer --workers ({error})"
            ) from error

    def _run_epoch(self) -> None:
        """Train, validate, and save; epoch 0 only validates the first head."""
        progress = self.progress
        if progress.epoch > 0:
            self._train_epoch()
        metrics = self._validate()
        self._report_epoch(metrics)
        goal = metrics.goal(is_balanced=self._settings.balance != "none")
        score = (goal, -metrics.loss)
        if progress.epoch == 0 or (math.isfinite(metrics.loss) and score > progress.best_score):
            self.state.keep_as_best(score)
        progress.begin_next_epoch()
        self._state_file.save()
        self._stop_if_asked()

    def _train_epoch(self) -> None:
        progress = self.progress
        batches = self._draw_batches(progress.epoch)
        left = batches[progress.batch :]
        self._inputs.train.epoch = progress.epoch
        self._set_train_mode()
        description = f"epoch {progress.epoch}/{self._settings.epochs}"
        bar = progress_bar(description, sum(map(len, batches)))
        with bar as advance, _reading(self._load_train(left)) as loaded:
            advance(sum(map(len, batches[: progress.batch])))
            for indices in left:
                asked = time.perf_counter()
                images, labels = next(loaded)
                waited = time.perf_counter() - asked
                loss = self._step(*self._mix(images, labels), indices)
                self._monitor.scalar("train/loss", loss, progress.step)
                for group in self._optimizer.param_groups:
                    self._monitor.scalar(f"rate/{group['name']}", group["lr"], progress.step)
                self._schedule.step()
                progress.add_step(loss, len(labels), waited, time.perf_counter() - asked)
                advance(len(labels))
                self._state_file.save_if_due()
                self._stop_if_asked()

    def _set_train_mode(self) -> None:
        frozen_now = open_stages(
            self._backbone, self._freezing, self._settings.gradual, max(1, self.progress.epoch)
        )
        set_train_mode(
            self._backbone.model,
            frozen_now,
            update_batch_norm=self._settings.batch_norm == "update",
        )

    def _step(self, images: torch.Tensor, targets: torch.Tensor, indices: list[int]) -> float:
        """One step of the optimizer; gives the batch's loss before it. Raises BrokenLossError."""
        with self._layer_stats.watch(self.progress) as read_gradients:
            losses = self._compute_gradients(images, targets)
            loss = losses.mean().item()
            norm = math.nan
            if math.isfinite(loss):
                read_gradients()
                limited = self._fabric.clip_gradients(
                    self._network,
                    self._optimizer,
                    max_norm=_MAX_GRADIENT_NORM,
                    error_if_nonfinite=False,
                )
                norm = float(limited)
            if not math.isfinite(norm):
                what = f"the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
                raise self._broken_loss(what, images, targets, losses, indices)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self.state.ema is not None:
            self.state.ema.update(self.progress.step + 1)
        return loss

    def _compute_gradients(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Leave the gradients of a batch's mean loss; gives each image's loss `[B]`.

        `targets` are labels `[B]`, shares of classes `[B,C]`, or in multi-label data rows of labels
        `[B,C]`.
        """
        states = random_states()
        on_this_device = (
            DepthwiseGradientsInFloat32()
            if images.device.type == "cpu"
            else contextlib.nullcontext()
        )

        def work(part: torch.Tensor, part_targets: torch.Tensor) -> torch.Tensor:
            with on_this_device:
                logits = self._network(self._inputs.prepare(part))
            losses = self._losses(logits, part_targets)
            loss = losses.sum() / len(targets)
            if torch.isfinite(loss):
                self._fabric.backward(loss)
            return losses.detach().float()

        def undo() -> None:
            self._optimizer.zero_grad(set_to_none=True)
            set_random_states(*states)

        parts, self.progress.train_at_once = run_in_parts(
            images, targets, self.progress.train_at_once, work, undo
        )
        return torch.cat(parts)

    def _losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of each image `[B]`."""
        weights = None
        if self._settings.balance == "weights":
            weights = torch.from_numpy(self._class_weights).to(logits.device)
        return self._splits.task.losses(logits, targets, weights, self._settings.label_smoothing)

    def _broken_loss(
        self,
        what: str,
        images: torch.Tensor,
        targets: torch.Tensor,
        losses: torch.Tensor,
        indices: list[int],
    ) -> BrokenLossError:
        progress, settings = self.progress, self._settings
        rate = self._optimizer.param_groups[0]["lr"]
        kept = keep_broken_batch(
            self._monitor.run_dir,
            [self._splits.train[index] for index in indices],
            self._splits,
            losses.tolist(),
            self._backbone.preprocess,
        )
        # The limit on their norm has made all gradients NaN.
        self._optimizer.zero_grad(set_to_none=True)
        stage = self._layer_stats.find_first_nonfinite(
            lambda: self._compute_gradients(images, targets)
        )
        fp32 = ", or say --precision fp32" if self._precision == "bf16" else ""
        return BrokenLossError(
            f"epoch {progress.epoch}, step {progress.step}: {what} at a rate of {rate:.1e}; lower "
            f"--lr and --backbone-lr, to a tenth for a start (now {settings.lr:.1e} and "
            f"{settings.backbone_lr:.1e}){fp32}{stage}; {kept}"
        )

    def _validate(self) -> Metrics:
        """Metrics on the validation images of the network, or of its moving average."""
        self._network.eval()
        all_logits, all_labels = [], []

        def work(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self._network(self._inputs.prepare(images)).float().cpu()
            return logits

        progress, ema = self.progress, self.state.ema
        with (
            contextlib.nullcontext() if ema is None else ema.in_place(),
            torch.inference_mode(),
            _reading(self._load_val()) as loaded,
        ):
            for images, labels in loaded:
                parts, progress.val_at_once = run_in_parts(
                    images, labels, progress.val_at_once, work
                )
                all_logits += parts
                all_labels.append(labels.cpu())
                if self._stop_asked() is not None:
                    break
        # Only now that the network has its own weights again: this saves them.
        self._stop_if_asked()
        return self._splits.task.evaluate(
            torch.cat(all_logits).numpy(), torch.cat(all_labels).long().numpy()
        )

    def _stop_if_asked(self) -> None:
        stop = self._stop_asked()
        if stop is not None:
            self._state_file.save()
            raise stop

    def _preflight(self) -> None:
        """Raise GraftError where it is known before the first step that the training will fail."""
        inputs, settings, model = self._inputs, self._settings, self._backbone.model
        changing = changing_tensors(model, self._freezing)
        check_disk(
            self._monitor.run_dir,
            settings.repository,
            changing,
            _num_bytes(model.state_dict()),
            has_ema=self.state.ema is not None,
        )
        batches = self._draw_batches(1)
        optimizer = build_optimizer(self._backbone, settings)
        self._set_train_mode()
        images, labels = next(iter(self._load_train(batches[:1])))
        step_seconds = check_learning(
            lambda: float(self._compute_gradients(images, labels).mean()), optimizer, changing
        )
        estimate_time(
            self._load_train(batches),
            step_seconds,
            num_epochs=settings.epochs,
            num_batches=len(batches),
            num_val_batches=math.ceil(len(inputs.val) / (2 * settings.batch_size)),
            is_read_ahead=inputs.num_workers > 0,
            device=self._fabric.device,
        )

    def _draw_batches(self, epoch: int) -> list[list[int]]:
        """The images of each step of an epoch, by index."""
        weights = None
        if self._settings.balance == "sampler":
            weights = self._class_weights[self._splits.labels(self._splits.train)]
        return draw_batches(
            len(self._inputs.train),
            self._settings.batch_size,
            self._settings.seed,
            epoch,
            weights,
        )

    def _load_train(self, batches: list[list[int]]) -> DataLoader[Batch]:
        loader: DataLoader[Batch] = DataLoader(
            self._inputs.train,
            batch_sampler=batches,
            num_workers=self._inputs.num_workers,
            pin_memory=self._fabric.device.type == "cuda",
            # Its own: what starts the workers must not move the network's randomness.
            generator=torch.Generator(),
        )
        return self._fabric.setup_dataloaders(loader)  # type: ignore[no-any-return]

    def _load_val(self) -> DataLoader[Batch]:
        loader: DataLoader[Batch] = DataLoader(
            self._inputs.val,
            2 * self._settings.batch_size,
            num_workers=self._inputs.num_workers,
            generator=torch.Generator(),
        )
        return self._fabric.setup_dataloaders(loader)  # type: ignore[no-any-return]

    def _flush_curves(self) -> dict[str, int]:
        self._monitor.flush()
        return event_sizes(self._monitor.run_dir)

    def _log_what_trains(self) -> None:
        num_trainable = sum(
            parameter.numel()
            for parameter in self._backbone.model.parameters()
            if parameter.requires_grad
        )
        logger.info(
            "training %s parameters in %s, %d tensors frozen",
            f"{num_trainable:,}",
            self._precision,
            self._freezing.num_frozen_tensors,
        )
        if self._settings.gradual:
            log_stages(
                self._backbone, self._freezing, self._settings.gradual, self._settings.epochs
            )

    def _log_resumed(self) -> None:
        progress = self.progress
        where = (
            f"epoch {progress.epoch}, step {progress.step}"
            if progress.epoch <= self._settings.epochs
            else "the end of its epochs"
        )
        logger.info(
            "resumed at %s; best so far: epoch %d, at %.4f",
            where,
            progress.best_epoch,
            progress.best_score[0],
        )

    def _report_epoch(self, metrics: Metrics) -> None:
        progress = self.progress
        attribute, name = next(iter(metrics.NAMES.items()))
        curves = {"epoch/val_loss": metrics.loss, f"epoch/val_{attribute}": metrics.score}
        train_loss = None
        if progress.epoch == 0:
            logger.info(
                "epoch 0, %s: val loss %.3f, val %s %.4f",
                self._settings.first_head,
                metrics.loss,
                name,
                metrics.score,
            )
        else:
            train_loss = float(np.mean(progress.losses))
            speed = progress.num_images / progress.seconds
            waiting = progress.waiting_seconds / progress.seconds
            curves |= {
                "epoch/train_loss": train_loss,
                "train/images_per_second": speed,
                "train/waiting_for_data": waiting,
            }
            logger.info(
                "epoch %d: train loss %.3f, val loss %.3f, val %s %.4f; %.0f images/s, %.0f%% of "
                "the time waiting for data",
                progress.epoch,
                train_loss,
                metrics.loss,
                name,
                metrics.score,
                speed,
                100 * waiting,
            )
            warn_if_starved(waiting)
        progress.epochs.append(
            EpochMetrics(progress.epoch, train_loss, metrics.loss, metrics.score)
        )
        for tag, value in curves.items():
            self._monitor.scalar(tag, value, progress.epoch)


def _describe_inputs(inputs: Inputs) -> str:
    if isinstance(inputs.network, TrainablePart):
        return f"activations at {inputs.network.boundary}"
    return "crops"


@contextlib.contextmanager
def _reading(loader: DataLoader[Batch]) -> Iterator[Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """Its batches. Without `close`, their processes take 5 s to end after an error."""
    batches: Any = iter(loader)  # a generator, as Fabric's loader gives it
    try:
        yield batches
    finally:
        batches.close()


def _num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
