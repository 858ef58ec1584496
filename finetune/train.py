"""Gradient steps on what is not frozen, starting from the probe's head (LP-FT, arXiv 2202.10054)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, Dataset

from finetune.config import Options
from finetune.data import Sample, Splits
from finetune.evaluate import Metrics, evaluate
from finetune.monitor import Monitor
from finetune.probe import Probe
from finetune.progress import progress_bar
from models.backbone import Backbone
from models.engine import supports_bf16
from models.errors import GraftError
from models.freezing import freeze, parameter_groups, prove_frozen, set_train_mode
from models.prepared import resolve_device
from models.preprocess import Preprocess, View

logger = logging.getLogger("graft.train")

# The share of all steps over which the rates rise to their peak; from there they follow a cosine to zero.
_WARMUP_FRACTION = 0.1
_MAX_GRADIENT_NORM = 1.0


class Crops(Dataset[tuple[torch.Tensor, int]]):
    """Samples as `uint8 [H,W,3]` crops with their labels; augmented ones depend on seed, epoch and index alone, not on the worker."""

    def __init__(self, samples: Sequence[Sample], preprocess: Preprocess, *, augment: str = "none", seed: int = 0) -> None:
        self._samples = samples
        self._preprocess = preprocess
        self._augment = augment
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample = self._samples[index]
        view = None if self._augment == "none" else self._draw_view(index)
        return torch.from_numpy(self._preprocess(sample.read(), view=view).copy()), sample.label

    def _draw_view(self, index: int) -> View:
        generator = np.random.default_rng((self._seed, self.epoch, index))
        shift_x, shift_y = generator.uniform(-0.08, 0.08, 2)
        mirror = self._augment == "flip" and bool(generator.random() < 0.5)
        return View(float(shift_x), float(shift_y), float(generator.uniform(0.85, 1.12)), mirror)


def train(backbone: Backbone, splits: Splits, probe: Probe, options: Options, monitor: Monitor) -> int:
    """Train `backbone.model` in place under `options.freeze`, leave it at the epoch that validates best, and return that epoch.

    Epoch 0 is the probe itself. Raises GraftError where the loss stops being a number, and FrozenDriftError where something
    frozen changed.
    """
    device = resolve_device(options.device)
    precision = _precision(options, device)
    fabric = Fabric(accelerator=device, devices=1, precision="bf16-mixed" if precision == "bf16" else "32-true")
    fabric.seed_everything(options.seed, verbose=False)
    _set_head(backbone, probe)
    freezing = freeze(backbone.model, options.freeze, backbone.classifier, backbone.module_prefix)
    groups = parameter_groups(
        backbone.model,
        backbone.classifier,
        head_lr=options.lr,
        backbone_lr=options.backbone_lr,
        weight_decay=options.weight_decay,
    )
    num_trainable = sum(parameter.numel() for parameter in backbone.model.parameters() if parameter.requires_grad)
    logger.info("training %s parameters, %d tensors frozen, %s", f"{num_trainable:,}", freezing.num_frozen_tensors, precision)
    # On the CPU the backward pass of a depthwise convolution is five times slower in channels_last (torch 2.14, EfficientNet-Lite0).
    memory_format = torch.channels_last if device == "cuda" else torch.contiguous_format
    model, optimizer = fabric.setup(backbone.model.to(memory_format=memory_format), torch.optim.AdamW(groups, fused=True))
    crops = Crops(splits.train, backbone.preprocess, augment=options.augment, seed=options.seed)
    # A last batch of one image would break BatchNorm in training, and tell little.
    is_last_dropped = len(crops) > options.batch_size
    shuffler = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(
        crops,
        options.batch_size,
        shuffle=True,
        generator=shuffler,
        num_workers=options.workers,
        drop_last=is_last_dropped,
        pin_memory=device == "cuda",
    )
    val_loader = DataLoader(Crops(splits.val, backbone.preprocess), 2 * options.batch_size, num_workers=options.workers)
    batches, val_batches = fabric.setup_dataloaders(loader, val_loader)
    num_steps = options.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    normalise = Normalise(backbone.preprocess, fabric.device, memory_format)

    best = _validate(model, val_batches, normalise, len(splits.label_names))
    best_epoch, best_state = 0, _copy_state(backbone.model)
    logger.info("epoch 0, the probe's head: val loss %.3f, val accuracy %.4f", best.loss, best.accuracy)
    step = 0
    for epoch in range(1, options.epochs + 1):
        crops.epoch = epoch
        set_train_mode(backbone.model, freezing, update_batch_norm=options.batch_norm == "update")
        losses, num_images, started = [], 0, time.perf_counter()
        with progress_bar(f"epoch {epoch}/{options.epochs}", len(loader) * options.batch_size) as advance:
            for images, labels in batches:
                loss = nn.functional.cross_entropy(model(normalise(images)), labels)
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
        speed = num_images / (time.perf_counter() - started)
        metrics = _validate(model, val_batches, normalise, len(splits.label_names))
        monitor.scalar("train/images_per_second", speed, epoch)
        monitor.scalar("epoch/train_loss", float(np.mean(losses)), epoch)
        monitor.scalar("epoch/val_loss", metrics.loss, epoch)
        monitor.scalar("epoch/val_accuracy", metrics.accuracy, epoch)
        logger.info(
            "epoch %d/%d: train loss %.3f, val loss %.3f, val accuracy %.4f, %.0f images/s",
            epoch,
            options.epochs,
            np.mean(losses),
            metrics.loss,
            metrics.accuracy,
            speed,
        )
        if (metrics.accuracy, -metrics.loss) > (best.accuracy, -best.loss):
            best, best_epoch, best_state = metrics, epoch, _copy_state(backbone.model)
    backbone.model.load_state_dict(best_state)
    backbone.model.eval()
    prove_frozen(backbone.model, freezing)
    return best_epoch


class Normalise:
    """`uint8 [B,H,W,3]` → `float32 [B,3,H,W]` with the backbone's mean and std, on the device and in its memory format."""

    def __init__(self, preprocess: Preprocess, device: torch.device, memory_format: torch.memory_format) -> None:
        self._memory_format = memory_format
        self._mean = torch.tensor(preprocess.mean, device=device) * 255
        self._std = torch.tensor(preprocess.std, device=device) * 255

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return ((images.float() - self._mean) / self._std).permute(0, 3, 1, 2).contiguous(memory_format=self._memory_format)


def _rate(step: int, num_steps: int) -> float:
    """The share of the peak rate at a step: linear warm-up, then cosine."""
    num_warmup = max(1, round(num_steps * _WARMUP_FRACTION))
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def _precision(options: Options, device: str) -> str:
    """bf16 where asked for, or by itself where the hardware has it: three times as fast on such a CPU. Weights stay in fp32."""
    if options.precision in ("fp32", "bf16"):
        return options.precision
    return "bf16" if device == "cuda" or supports_bf16() else "fp32"


def _set_head(backbone: Backbone, probe: Probe) -> None:
    with torch.no_grad():
        backbone.head.weight.copy_(torch.from_numpy(probe.weight))
        backbone.head.bias.copy_(torch.from_numpy(probe.bias))


def _validate(model: nn.Module, batches: DataLoader[tuple[torch.Tensor, int]], normalise: Normalise, num_classes: int) -> Metrics:
    model.eval()
    with torch.inference_mode():
        pairs = [(model(normalise(images)).float().cpu(), labels.cpu()) for images, labels in batches]
    logits, labels = (torch.cat(parts).numpy() for parts in zip(*pairs, strict=True))
    assert logits.shape[1] == num_classes
    return evaluate(logits, labels)


def _copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
