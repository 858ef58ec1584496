"""Freezing: policy → `requires_grad`, BatchNorm mode and parameter groups; and proof afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.backbone.freeze_policy import resolve_policy
from models.errors import GraftError, join_first


class FrozenDriftError(GraftError):
    """A frozen parameter or buffer changed during the run."""


@dataclass(frozen=True)
class Freezing:
    """The frozen modules of a network, by name as in `named_modules`, and their tensors' digests.

    A module's name stands for its own parameters and buffers; its children have their own names.
    """

    policy: str
    frozen_modules: frozenset[str]
    digests: dict[str, str]

    @property
    def num_frozen_tensors(self) -> int:
        return len(self.digests)


def freeze(model: nn.Module, policy: str, classifier: str, prefix: str = "") -> Freezing:
    """Set `requires_grad` by the policy, and take every frozen tensor's digest for `prove_frozen`.

    Raises GraftError for a policy that does not fit the network (see `resolve_policy`).
    """
    frozen = resolve_policy(
        policy,
        [name for name, _ in model.named_modules()],
        classifier=classifier,
        prefix=prefix,
        stages=stages(model, classifier, prefix),
    )
    digests = {name: digest_tensor(tensor) for name, tensor in _frozen_tensors(model, frozen)}
    freezing = Freezing(policy, frozen, digests)
    set_trainable(model, freezing)
    return freezing


def set_trainable(model: nn.Module, freezing: Freezing) -> None:
    """Set `requires_grad` of what is not frozen, and unset it of what is."""
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(name not in freezing.frozen_modules)


def set_train_mode(model: nn.Module, freezing: Freezing, *, update_batch_norm: bool) -> None:
    """`model.train()`, but frozen modules in eval: BatchNorm statistics stay, dropout is off.

    Without `update_batch_norm` the other BatchNorms keep their statistics too; their weights and
    biases train.
    """
    model.train()
    if not update_batch_norm:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        # An ancestor of something that trains keeps its mode: only its own tensors are frozen.
        if all(
            prefix + child in freezing.frozen_modules
            for child, _ in module.named_modules()
            if child
        ) and (name in freezing.frozen_modules):
            module.eval()


def prove_frozen(model: nn.Module, freezing: Freezing) -> None:
    """Raise FrozenDriftError unless every frozen tensor has the bits that it had in `freeze`."""
    now = {
        name: digest_tensor(tensor)
        for name, tensor in _frozen_tensors(model, freezing.frozen_modules)
    }
    drifted = [name for name, digest in freezing.digests.items() if now.get(name) != digest]
    if drifted:
        shown = join_first(drifted, 8)
        raise FrozenDriftError(
            f"--freeze {freezing.policy}: {len(drifted)} of {len(freezing.digests)} frozen tensors "
            f"changed during the run: {shown}. Nothing was published; a module that updates its "
            "own buffers or is stepped by hand is the usual cause"
        )


def parameter_groups(
    model: nn.Module,
    classifier: str,
    *,
    head_lr: float,
    backbone_lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    prefix: str = "",
) -> list[dict[str, Any]]:
    """An optimizer's groups of trainable parameters; biases and norms have no weight decay.

    `backbone_lr` is the last stage's rate; each earlier stage has `layer_decay` times the rate of
    the next (ULMFiT, arXiv 1801.06146; BEiT, arXiv 2106.08254). Groups are named by what they hold:
    `head`, `backbone`; with a layer decay `backbone_1` (the last stage), `backbone_2` …, and with
    `_no_decay` behind.
    """
    depth_of = depths(model, classifier, prefix)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = depth_of[name.rpartition(".")[0]]
            # Without a layer decay all stages are one group.
            groups.setdefault(
                (depth if layer_decay < 1 else min(depth, 1), parameter.ndim > 1), []
            ).append(parameter)
    backbone = "backbone" if layer_decay == 1 else "backbone_{}"
    return [
        {
            "name": f"{backbone.format(depth) if depth else 'head'}{'' if decays else '_no_decay'}",
            "params": parameters,
            "lr": head_lr if depth == 0 else backbone_lr * layer_decay ** (depth - 1),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (depth, decays), parameters in groups.items()
    ]


def depths(model: nn.Module, classifier: str, prefix: str = "") -> dict[str, int]:
    """Each module's distance from the end, by name: 0 the classifier, 1 the last stage …

    A stage without weights (a norm between two others), and a module in no stage, belong to the
    stage before them; the network's own tensors to the first.
    """
    number, number_of = 0, {}
    for stage in stages(model, classifier, prefix):
        has_weights = any(
            parameter.ndim > 1 for parameter in model.get_submodule(prefix + stage).parameters()
        )
        number = max(1, number + has_weights)
        number_of[prefix + stage] = number
    last, now, depth_of = max(1, number), 1, {}
    for name, _ in model.named_modules():
        now = next((number for stage, number in number_of.items() if _is_within(name, stage)), now)
        depth_of[name] = 0 if _is_within(name, classifier) else 1 + last - now
    return depth_of


def stages(model: nn.Module, classifier: str, prefix: str = "") -> list[str]:
    """Names to offer for `until:NAME`: top-level children, and the children of containers."""
    found = []
    for name, child in model.get_submodule(prefix.rstrip(".")).named_children():
        if prefix + name == classifier.split(".")[0] or next(child.parameters(), None) is None:
            continue
        if isinstance(child, nn.Sequential | nn.ModuleList) and name in (
            "blocks",
            "stages",
            "layers",
            "features",
        ):
            found += [f"{name}.{inner}" for inner, _ in child.named_children()]
        else:
            found.append(name)
    return found


def digest_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of the values' bits, the same on every device and in every memory layout."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()


def _is_within(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(f"{ancestor}.")


def _frozen_tensors(model: nn.Module, frozen: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        if name in frozen:
            prefix = f"{name}." if name else ""
            for kind in (
                module.named_parameters(recurse=False),
                module.named_buffers(recurse=False),
            ):
                yield from ((prefix + tensor_name, tensor) for tensor_name, tensor in kind)
