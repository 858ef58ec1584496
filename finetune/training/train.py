"""Gradient steps on what is not frozen, starting from a solved head (LP-FT, arXiv 2202.10054)."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from finetune.config import Options
from finetune.data.splits import Splits
from finetune.evaluation.metrics import Metrics
from finetune.monitor import Monitor
from finetune.probe.solve import Probe
from finetune.resume import TRAINING_FILE, event_sizes, fix_options
from finetune.terminal import progress_bar, stop_softly
from finetune.training.activations import Batch
from finetune.training.boundary import TrainablePart
from finetune.training.broken_batch import BrokenLossError, keep_broken_batch
from finetune.training.depthwise import DepthwiseGradientsInFloat32
from finetune.training.ema import Average
from finetune.training.head import start_head
from finetune.training.inputs import ImageGoneError, Inputs, open_inputs
from finetune.training.layer_stats import Inside
from finetune.training.memory import is_out_of_memory, run_in_parts
from finetune.training.mix import Mix, build_mix
from finetune.training.optimize import build_groups, open_stages, rate_share, say_stages
from finetune.training.preflight import check_disk, check_learning, estimate_time, warn_if_starved
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
from models.backbone.freezing import (
    Freezing,
    FrozenDriftError,
    freeze,
    prove_frozen,
    set_train_mode,
)
from models.engine.openvino_engine import supports_bf16
from models.errors import GraftError
from models.prepared import resolve_device
from models.scores import Floats

logger = logging.getLogger("graft.train")

_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class _Training:
    """What all epochs share; `network` is the part of the model that trains, as Fabric wraps it."""

    backbone: Backbone
    freezing: Freezing
    splits: Splits
    inputs: Inputs
    options: Options
    monitor: Monitor
    fabric: Fabric
    precision: str
    class_weights: Floats
    mix: Mix
    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    state: TrainingState
    state_file: StateFile
    inside: Inside
    stop_asked: Callable[[], KeyboardInterrupt | None]

    @property
    def at(self) -> Progress:
        return self.state.progress

    def draw_batches(self, epoch: int) -> list[list[int]]:
        """The images of each step of an epoch, by index."""
        options = self.options
        weights = (
            self.class_weights[self.splits.labels(self.splits.train)]
            if options.balance == "sampler"
            else None
        )
        return draw_batches(
            len(self.inputs.train), options.batch_size, options.seed, epoch, weights
        )


def train(
    backbone: Backbone,
    splits: Splits,
    start: Probe,
    options: Options,
    monitor: Monitor,
    scratch: Path,
    *,
    state_dir: Path | None = None,
) -> int:
    """Train `backbone.model` in place under `options.freeze`, leave it at the epoch that validates best, and return that epoch.

    Epoch 0 is the head of `start` on the network as it came. Activations at the freeze boundary are kept in `state_dir`, with a state from
    which another call goes on where this one was stopped; without it they are in `scratch`, and there is no going on. Raises
    BrokenLossError where the loss stops being a number, FrozenDriftError where something frozen changed, GraftError where a single image
    needs too much memory, and, once the state is saved, KeyboardInterrupt on Ctrl-C and SIGTERM.
    """
    device = resolve_device(options.device)
    precision = _precision(options, device)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=device, devices=1, precision="bf16-mixed" if precision == "bf16" else "32-true"
    )
    fabric.seed_everything(options.seed, verbose=False)
    start_head(backbone, start, options.head_init)
    freezing = freeze(backbone.model, options.freeze, backbone.classifier, backbone.module_prefix)
    state_path = None if state_dir is None else state_dir / TRAINING_FILE
    try:
        opened = open_inputs(
            backbone, freezing, splits, options, state_dir or scratch, fabric.device
        )
        with contextlib.closing(opened) as inputs, stop_softly() as stop_asked:
            state = _run_epochs(
                backbone,
                freezing,
                splits,
                inputs,
                options,
                monitor,
                fabric,
                precision,
                state_path,
                stop_asked,
            )
        if state.progress.best_epoch == 0:
            logger.info("no epoch validated better than %s, which is kept", options.first_head)
        state.restore_best()
        backbone.model.eval()
        prove_frozen(backbone.model, freezing)
    except (BrokenLossError, FrozenDriftError):
        if state_path is not None:
            state_path.unlink(missing_ok=True)  # it would only come to the same again
        raise
    return state.progress.best_epoch


def _run_epochs(
    backbone: Backbone,
    freezing: Freezing,
    splits: Splits,
    inputs: Inputs,
    options: Options,
    monitor: Monitor,
    fabric: Fabric,
    precision: str,
    state_path: Path | None,
    stop_asked: Callable[[], KeyboardInterrupt | None],
) -> TrainingState:
    """All epochs, or those that a saved state has left; gives the state after them."""
    adamw = torch.optim.AdamW(build_groups(backbone, options), fused=True)
    network, optimizer = fabric.setup(inputs.network, adamw)
    num_steps = options.epochs * _num_batches(inputs, options)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_share(step, num_steps)
    )
    num_trainable = sum(
        parameter.numel() for parameter in backbone.model.parameters() if parameter.requires_grad
    )
    logger.info(
        "training %s parameters in %s, %d tensors frozen",
        f"{num_trainable:,}",
        precision,
        freezing.num_frozen_tensors,
    )
    if options.gradual:
        say_stages(backbone, freezing, options)

    def flush() -> dict[str, int]:
        monitor.flush()
        return event_sizes(monitor.run_dir)

    source = (
        f"activations at {inputs.network.boundary}"
        if isinstance(inputs.network, TrainablePart)
        else "crops"
    )
    average = (
        Average(changing_tensors(backbone.model, freezing), options.ema) if options.ema else None
    )
    state = TrainingState(
        backbone.model,
        freezing,
        adamw,
        schedule,
        Progress(options.batch_size, 2 * options.batch_size),
        average,
    )
    fixed = (
        {"what the epochs read": source, "the precision": precision}
        | fix_options(options)
        | fix_images(splits)
    )
    state_file = StateFile(
        state_path, state, minutes=options.save_minutes, fixed=fixed, flush=flush
    )
    training = _Training(
        backbone=backbone,
        freezing=freezing,
        splits=splits,
        inputs=inputs,
        options=options,
        monitor=monitor,
        fabric=fabric,
        precision=precision,
        class_weights=splits.task.class_weights(
            splits.labels(splits.train), len(splits.label_names)
        ),
        mix=build_mix(options.mix, len(splits.label_names)),
        network=network,
        optimizer=optimizer,
        schedule=schedule,
        state=state,
        state_file=state_file,
        inside=Inside(backbone, freezing, options, monitor),
        stop_asked=stop_asked,
    )
    if state_file.load():
        at = state.progress
        where = (
            f"epoch {at.epoch}, step {at.step}"
            if at.epoch <= options.epochs
            else "the end of its epochs"
        )
        logger.info(
            "resumed at %s; best so far: epoch %d, at %.4f", where, at.best_epoch, at.best_score[0]
        )
    elif options.preflight:
        _preflight(training)
    try:
        while state.progress.epoch <= options.epochs:
            _run_epoch(training)
    except ImageGoneError as error:
        # From a process that decodes, it comes with that one's traceback before it.
        raise ImageGoneError(
            str(error).rpartition(f"{ImageGoneError.__name__}: ")[2].strip()
        ) from None
    except (RuntimeError, MemoryError) as error:
        # What is in memory now may be half a step, and is not saved.
        if is_out_of_memory(error):
            raise GraftError(
                f"out of memory while images were read or weights were stepped ({error}); try fewer --workers, or --freeze until:NAME with "
                "a later module"
            ) from error
        # Raised by torch's handler of SIGCHLD, in the midst of anything.
        if "DataLoader worker" not in str(error):
            raise
        raise stop_asked() or GraftError(
            f"a process that decodes images was ended from outside, mostly for want of memory; try fewer --workers ({error})"
        ) from error
    return state


def _run_epoch(training: _Training) -> None:
    """Train, validate, and save; epoch 0 only validates the head that was solved."""
    at = training.at
    if at.epoch > 0:
        _train_epoch(training)
    metrics = _validate(training)
    _report_epoch(training, metrics)
    goal = metrics.goal(is_balanced=training.options.balance != "none")
    score = (goal, -metrics.loss)
    if at.epoch == 0 or (math.isfinite(metrics.loss) and score > at.best_score):
        training.state.keep_as_best(score)
    at.begin_next_epoch()
    training.state_file.save()
    _stop_if_asked(training)


def _train_epoch(training: _Training) -> None:
    at, inputs = training.at, training.inputs
    batches = training.draw_batches(at.epoch)
    left = batches[at.batch :]
    inputs.train.epoch = at.epoch
    _set_train_mode(training)
    bar = progress_bar(f"epoch {at.epoch}/{training.options.epochs}", sum(map(len, batches)))
    with bar as advance, _reading(_load(training, left)) as loaded:
        advance(sum(map(len, batches[: at.batch])))
        for indices in left:
            asked = time.perf_counter()
            images, labels = next(loaded)
            waited = time.perf_counter() - asked
            loss = _step(training, *training.mix(images, labels), indices)
            training.monitor.scalar("train/loss", loss, at.step)
            for group in training.optimizer.param_groups:
                training.monitor.scalar(f"rate/{group['name']}", group["lr"], at.step)
            training.schedule.step()
            at.losses.append(loss)
            at.step += 1
            at.batch += 1
            at.num_images += len(labels)
            at.waiting_seconds += waited
            at.seconds += time.perf_counter() - asked
            advance(len(labels))
            training.state_file.save_if_due()
            _stop_if_asked(training)


def _set_train_mode(training: _Training) -> None:
    frozen_now = open_stages(
        training.backbone, training.freezing, training.options, max(1, training.at.epoch)
    )
    set_train_mode(
        training.backbone.model,
        frozen_now,
        update_batch_norm=training.options.batch_norm == "update",
    )


def _step(
    training: _Training, images: torch.Tensor, targets: torch.Tensor, indices: list[int]
) -> float:
    """One step of the optimizer; gives the batch's loss before it. Raises BrokenLossError."""
    with training.inside.watch(training.at) as see_gradients:
        losses = _learn(training, images, targets)
        loss = losses.mean().item()
        norm = math.nan
        if math.isfinite(loss):
            see_gradients()
            limited = training.fabric.clip_gradients(
                training.network,
                training.optimizer,
                max_norm=_MAX_GRADIENT_NORM,
                error_if_nonfinite=False,
            )
            norm = float(limited)
        if not math.isfinite(norm):
            raise _broken(training, images, targets, loss, norm, losses, indices)
        training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    if training.state.average is not None:
        training.state.average.update(training.at.step + 1)
    return loss


def _learn(training: _Training, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Leave the gradients of a batch's mean loss, and give each image's loss `[B]`; in parts where memory asks for it.

    `targets` are labels `[B]`, shares of classes `[B,C]`, or in multi-label data rows of labels `[B,C]`.
    """
    states, options, task = random_states(), training.options, training.splits.task
    weights = (
        torch.from_numpy(training.class_weights).to(images.device)
        if options.balance == "weights"
        else None
    )
    on_this_device = (
        DepthwiseGradientsInFloat32() if images.device.type == "cpu" else contextlib.nullcontext()
    )

    def work(part: torch.Tensor, part_targets: torch.Tensor) -> torch.Tensor:
        with on_this_device:
            logits = training.network(training.inputs.prepare(part))
        losses = task.losses(logits, part_targets, weights, options.label_smoothing)
        loss = losses.sum() / len(targets)
        if torch.isfinite(loss):
            training.fabric.backward(loss)
        return losses.detach().float()

    def undo() -> None:
        training.optimizer.zero_grad(set_to_none=True)
        set_random_states(*states)

    parts, training.at.train_at_once = run_in_parts(
        images, targets, training.at.train_at_once, work, undo
    )
    return torch.cat(parts)


def _broken(
    training: _Training,
    images: torch.Tensor,
    labels: torch.Tensor,
    loss: float,
    norm: float,
    losses: torch.Tensor,
    indices: list[int],
) -> BrokenLossError:
    at, options = training.at, training.options
    rate = training.optimizer.param_groups[0]["lr"]
    what = f"the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    samples = [training.splits.train[index] for index in indices]
    kept = keep_broken_batch(
        training.monitor.run_dir,
        samples,
        training.splits,
        losses.tolist(),
        training.backbone.preprocess,
    )
    training.optimizer.zero_grad(
        set_to_none=True
    )  # the limit on their norm has made all of them NaN
    where = training.inside.find_broken(lambda: _learn(training, images, labels))
    fp32 = ", or say --precision fp32" if training.precision == "bf16" else ""
    return BrokenLossError(
        f"epoch {at.epoch}, step {at.step}: {what} at a rate of {rate:.1e}; lower --lr and --backbone-lr, to a tenth for a start "
        f"(now {options.lr:.1e} and {options.backbone_lr:.1e}){fp32}{where}; {kept}"
    )


def _validate(training: _Training) -> Metrics:
    """Metrics on the validation images of the network, or of its average where there is one."""
    at, inputs = training.at, training.inputs
    training.network.eval()
    all_logits, all_labels = [], []

    def work(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = training.network(inputs.prepare(images)).float().cpu()
        return logits

    average = training.state.average
    with (
        contextlib.nullcontext() if average is None else average.in_place(),
        torch.inference_mode(),
        _reading(_load_val(training)) as loaded,
    ):
        for images, labels in loaded:
            parts, at.val_at_once = run_in_parts(images, labels, at.val_at_once, work)
            all_logits += parts
            all_labels.append(labels.cpu())
            if training.stop_asked() is not None:
                break
    # Not before the network is its own again: this saves it.
    _stop_if_asked(training)
    return training.splits.task.evaluate(
        torch.cat(all_logits).numpy(), torch.cat(all_labels).long().numpy()
    )


def _stop_if_asked(training: _Training) -> None:
    stop = training.stop_asked()
    if stop is not None:
        training.state_file.save()
        raise stop


def _preflight(training: _Training) -> None:
    """Raise GraftError where it can be known now that the run will come to nothing."""
    inputs, options, model = training.inputs, training.options, training.backbone.model
    changing = changing_tensors(model, training.freezing)
    model_bytes = _num_bytes(model.state_dict())
    check_disk(
        training.monitor.run_dir,
        options.repository,
        changing,
        model_bytes,
        has_average=training.state.average is not None,
    )
    batches = training.draw_batches(1)
    optimizer = torch.optim.AdamW(build_groups(training.backbone, options), fused=True)
    _set_train_mode(training)
    images, labels = next(iter(_load(training, batches[:1])))
    step_seconds = check_learning(
        lambda: float(_learn(training, images, labels).mean()), optimizer, changing
    )
    num_val_batches = math.ceil(len(inputs.val) / (2 * options.batch_size))
    estimate_time(
        _load(training, batches),
        step_seconds,
        num_epochs=options.epochs,
        num_batches=len(batches),
        num_val_batches=num_val_batches,
        is_read_ahead=inputs.num_workers > 0,
        device=training.fabric.device,
    )


def _load(training: _Training, batches: list[list[int]]) -> DataLoader[Batch]:
    """The training images of some batches. A generator of its own: what starts the workers must not move the network's randomness."""
    loader: DataLoader[Batch] = DataLoader(
        training.inputs.train,
        batch_sampler=batches,
        num_workers=training.inputs.num_workers,
        pin_memory=training.fabric.device.type == "cuda",
        generator=torch.Generator(),
    )
    return training.fabric.setup_dataloaders(loader)  # type: ignore[no-any-return]


def _load_val(training: _Training) -> DataLoader[Batch]:
    inputs = training.inputs
    loader: DataLoader[Batch] = DataLoader(
        inputs.val,
        2 * training.options.batch_size,
        num_workers=inputs.num_workers,
        generator=torch.Generator(),
    )
    return training.fabric.setup_dataloaders(loader)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _reading(loader: DataLoader[Batch]) -> Iterator[Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """Its batches; the processes that read them end with it. Left to the garbage collector after an error, they take 5 s to."""
    batches: Any = iter(loader)  # a generator, as Fabric's loader gives it
    try:
        yield batches
    finally:
        batches.close()


def _num_batches(inputs: Inputs, options: Options) -> int:
    return len(draw_batches(len(inputs.train), options.batch_size, options.seed, 1))


def _num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _report_epoch(training: _Training, metrics: Metrics) -> None:
    at = training.at
    attribute, name = next(iter(metrics.NAMES.items()))
    curves = {"epoch/val_loss": metrics.loss, f"epoch/val_{attribute}": metrics.score}
    if at.epoch == 0:
        logger.info(
            "epoch 0, %s: val loss %.3f, val %s %.4f",
            training.options.first_head,
            metrics.loss,
            name,
            metrics.score,
        )
    else:
        train_loss, speed, waiting = (
            float(np.mean(at.losses)),
            at.num_images / at.seconds,
            at.waiting_seconds / at.seconds,
        )
        curves |= {
            "epoch/train_loss": train_loss,
            "train/images_per_second": speed,
            "train/waiting_for_data": waiting,
        }
        logger.info(
            "epoch %d: train loss %.3f, val loss %.3f, val %s %.4f; %.0f images/s, %.0f%% of the time waiting for data",
            at.epoch,
            train_loss,
            metrics.loss,
            name,
            metrics.score,
            speed,
            100 * waiting,
        )
        warn_if_starved(waiting)
    for tag, value in curves.items():
        training.monitor.scalar(tag, value, at.epoch)


def _precision(options: Options, device: str) -> str:
    """bf16 where asked for, or by itself where the hardware has it: twice as fast on such a CPU. Weights stay in fp32."""
    if options.precision in ("fp32", "bf16"):
        return options.precision
    return "bf16" if device == "cuda" or supports_bf16() else "fp32"
