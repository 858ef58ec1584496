"""Gradient steps on what is not frozen, starting from the probe's head (LP-FT, arXiv 2202.10054)."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from finetune.config import Options
from finetune.data import Splits
from finetune.evaluate import Metrics, evaluate
from finetune.inputs import Batch, Inputs, open_inputs
from finetune.monitor import Monitor
from finetune.probe import Probe
from finetune.terminal import progress_bar
from models.backbone import Backbone
from models.engine import supports_bf16
from models.errors import GraftError
from models.freezing import Freezing, freeze, parameter_groups, prove_frozen, set_train_mode
from models.prepared import resolve_device

logger = logging.getLogger("graft.train")

# The share of all steps over which the rates rise to their peak; from there they follow a cosine to zero.
_WARMUP_FRACTION = 0.1
_MAX_GRADIENT_NORM = 1.0
# Above this share of an epoch spent waiting for data, the run says how to shorten it.
_MAX_WAITING = 0.3


def train(backbone: Backbone, splits: Splits, probe: Probe, options: Options, monitor: Monitor, scratch: Path) -> int:
    """Train `backbone.model` in place under `options.freeze`, leave it at the epoch that validates best, and return that epoch.

    Epoch 0 is the probe itself. Activations at the freeze boundary are kept in `scratch`. Raises GraftError where the loss stops
    being a number, and FrozenDriftError where something frozen changed.
    """
    device = resolve_device(options.device)
    precision = _precision(options, device)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(accelerator=device, devices=1, precision="bf16-mixed" if precision == "bf16" else "32-true")
    fabric.seed_everything(options.seed, verbose=False)
    _set_head(backbone, probe)
    freezing = freeze(backbone.model, options.freeze, backbone.classifier, backbone.module_prefix)
    with contextlib.closing(open_inputs(backbone, freezing, splits, options, scratch, fabric.device)) as inputs:
        best_epoch, best_state = _run_epochs(backbone, freezing, inputs, options, monitor, fabric, precision)
    if best_epoch == 0:
        logger.info("no epoch validated better than the probe: the probe is kept")
    backbone.model.load_state_dict(best_state)
    backbone.model.eval()
    prove_frozen(backbone.model, freezing)
    return best_epoch


def _run_epochs(
    backbone: Backbone, freezing: Freezing, inputs: Inputs, options: Options, monitor: Monitor, fabric: Fabric, precision: str
) -> tuple[int, dict[str, torch.Tensor]]:
    """The epoch that validated best, and the network's state after it."""
    groups = parameter_groups(
        backbone.model,
        backbone.classifier,
        head_lr=options.lr,
        backbone_lr=options.backbone_lr,
        weight_decay=options.weight_decay,
    )
    model, optimizer = fabric.setup(inputs.network, torch.optim.AdamW(groups, fused=True))
    batches, val_batches = fabric.setup_dataloaders(*_loaders(inputs, options, fabric.device.type))
    num_steps = options.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    num_trainable = sum(parameter.numel() for parameter in backbone.model.parameters() if parameter.requires_grad)
    logger.info("training %s parameters in %s, %d tensors frozen", f"{num_trainable:,}", precision, freezing.num_frozen_tensors)

    best = _validate(model, val_batches, inputs)
    best_epoch, best_state = 0, _copy_state(backbone.model)
    monitor.scalar("epoch/val_loss", best.loss, 0)
    monitor.scalar("epoch/val_accuracy", best.accuracy, 0)
    logger.info("epoch 0, the probe's head: val loss %.3f, val accuracy %.4f", best.loss, best.accuracy)
    step = 0
    for epoch in range(1, options.epochs + 1):
        inputs.train.epoch = epoch
        set_train_mode(backbone.model, freezing, update_batch_norm=options.batch_norm == "update")
        losses, num_images, waited, started = [], 0, 0.0, time.perf_counter()
        with progress_bar(f"epoch {epoch}/{options.epochs}", len(batches) * options.batch_size) as advance:
            iterator = iter(batches)
            while True:
                asked = time.perf_counter()
                batch = next(iterator, None)
                waited += time.perf_counter() - asked
                if batch is None:
                    break
                images, labels = batch
                loss = nn.functional.cross_entropy(model(inputs.prepare(images)), labels)
                if not torch.isfinite(loss):
                    rate = optimizer.param_groups[0]["lr"]
                    raise GraftError(
                        f"epoch {epoch}, step {step}: the loss is {loss.item()} at a rate of {rate:.1e}; lower --lr and --backbone-lr"
                    )
                fabric.backward(loss)
                fabric.clip_gradients(model, optimizer, max_norm=_MAX_GRADIENT_NORM)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                monitor.scalar("train/loss", losses[-1], step)
                for group in optimizer.param_groups:
                    monitor.scalar(f"rate/{group['name']}", group["lr"], step)
                schedule.step()
                step += 1
                num_images += len(labels)
                advance(len(labels))
        seconds = time.perf_counter() - started
        metrics = _validate(model, val_batches, inputs)
        _report_epoch(monitor, epoch, float(np.mean(losses)), metrics, num_images / seconds, waited / seconds)
        if math.isfinite(metrics.loss) and (metrics.accuracy, -metrics.loss) > (best.accuracy, -best.loss):
            best, best_epoch, best_state = metrics, epoch, _copy_state(backbone.model)
    return best_epoch, best_state


def _loaders(inputs: Inputs, options: Options, device: str) -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    train_loader = DataLoader(
        inputs.train,
        options.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(options.seed),
        num_workers=inputs.num_workers,
        # A last batch of one image would break BatchNorm in training, and tell little.
        drop_last=len(inputs.train) > options.batch_size,
        pin_memory=device == "cuda",
    )
    return train_loader, DataLoader(inputs.val, 2 * options.batch_size, num_workers=inputs.num_workers)


def _report_epoch(monitor: Monitor, epoch: int, train_loss: float, metrics: Metrics, speed: float, waiting: float) -> None:
    curves = {
        "epoch/train_loss": train_loss,
        "epoch/val_loss": metrics.loss,
        "epoch/val_accuracy": metrics.accuracy,
        "train/images_per_second": speed,
        "train/waiting_for_data": waiting,
    }
    for tag, value in curves.items():
        monitor.scalar(tag, value, epoch)
    logger.info(
        "epoch %d: train loss %.3f, val loss %.3f, val accuracy %.4f; %.0f images/s, %.0f%% of the time waiting for data",
        epoch,
        train_loss,
        metrics.loss,
        metrics.accuracy,
        speed,
        100 * waiting,
    )
    if waiting > _MAX_WAITING:
        logger.warning("the training waits for data: more --workers, smaller image files, or --views to decode them once would help")


def _rate(step: int, num_steps: int) -> float:
    """The share of the peak rate at a step: linear warm-up, then cosine."""
    num_warmup = max(1, round(num_steps * _WARMUP_FRACTION))
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def _precision(options: Options, device: str) -> str:
    """bf16 where asked for, or by itself where the hardware has it: twice as fast on such a CPU. Weights stay in fp32."""
    if options.precision in ("fp32", "bf16"):
        return options.precision
    return "bf16" if device == "cuda" or supports_bf16() else "fp32"


def _set_head(backbone: Backbone, probe: Probe) -> None:
    with torch.no_grad():
        backbone.head.weight.copy_(torch.from_numpy(probe.weight))
        backbone.head.bias.copy_(torch.from_numpy(probe.bias))


def _validate(model: nn.Module, batches: DataLoader[Batch], inputs: Inputs) -> Metrics:
    model.eval()
    with torch.inference_mode():
        pairs = [(model(inputs.prepare(images)).float().cpu(), labels.cpu()) for images, labels in batches]
    logits, labels = (torch.cat(parts).numpy() for parts in zip(*pairs, strict=True))
    return evaluate(logits, labels)


def _copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
