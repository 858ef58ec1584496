"""Weights: read from a file, and loaded into a network where every tensor fits."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from models.backbone.weights_file import WeightsError as WeightsError
from models.backbone.weights_file import (
    check_weights_file,
    is_safetensors,
    split_entry,
    with_entry,
)
from models.errors import first_line, join_first

logger = logging.getLogger("graft.weights")

Tensors = dict[str, torch.Tensor]

# The entries under which training scripts keep the weights, the first of them first. "" is the file
# itself.
_ENTRIES = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "",
)
# Averages of the weights: timm's state_dict_ema, ConvNeXt's model_ema, ema, ema_state_dict …
_EMA = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)")
_AVERAGES_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
# As torch's zip files and safetensors complain.
_CUT_SHORT = (
    *("reading zip archive", "Invalid argument"),
    *("header too small", "invalid header length", "not fully covered"),
)
_NOT_WEIGHTS = re.compile(r"optim|sched|scaler", re.IGNORECASE)
_MAX_DEPTH = 4
# DistributedDataParallel's, torch.compile's, FSDP's and activation checkpointing's names.
_OUTER_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = _OUTER_WRAPPERS[1:]
_SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]
# What is saved beside weights, and runs no code when it is read: options and numpy's scalars.
_HARMLESS = [
    argparse.Namespace,
    np.dtype,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_state_dict(weights: Path) -> Tensors:
    """Read a state_dict from safetensors or `.pth`; no code in it is run. Raises WeightsError.

    `weights` is FILE or FILE::ENTRY, where a file has several state_dicts.
    """
    path, entry = split_entry(weights)
    loaded = _read(path)
    found = _find_state_dicts(loaded)
    if entry:
        return _take_entry(path, found, entry)
    if not found:
        raise WeightsError(f"{path}: it holds {type(loaded).__name__}, not a state_dict of tensors")
    name = _choose(found, path, "state_dicts")
    return found[name]


def load_strictly(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str, classifier: str
) -> None:
    """Load every tensor into `model`; those of `classifier` may be missing, extra or misshaped.

    Prefixes that wrappers give all keys are removed, and BatchNorm's counters may be missing, as
    torch allows. Raises WeightsError with the keys, where others do not fit.
    """
    own = model.state_dict()
    head = f"{classifier}." if classifier else None

    def is_head(key: str) -> bool:
        return head is not None and key.startswith(head)

    needed = {key for key in own if not is_head(key) and not key.endswith("num_batches_tracked")}
    tensors = _match_keys(tensors, own, needed, source)
    missing = [key for key in own if key not in tensors and not is_head(key)]
    if needed.isdisjoint(missing):
        missing = []
    extra = [key for key in tensors if key not in own and not is_head(key)]
    misshaped = [
        f"{key} {list(tensors[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape and not is_head(key)
    ]
    if missing or extra or misshaped:
        is_other = 2 * len(needed.intersection(missing)) > len(needed)
        hint = "; they look like those of another architecture" if is_other else ""
        raise WeightsError(
            f"{source}: the weights do not fit this network{hint}"
            + "".join(
                f"\n  {what} ({len(keys)}): {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}"
                for what, keys in (("missing", missing), ("extra", extra), ("misshaped", misshaped))
                if keys
            )
        )
    unusable = [
        f"{key} ({kind})"
        for key in own
        if key in tensors and not is_head(key)
        if (kind := _describe_unusable(tensors[key], own[key])) is not None
    ]
    if unusable:
        raise WeightsError(
            f"{source}: {len(unusable)} tensors are no plain floating-point numbers: "
            f"{join_first(unusable)}; where they were written, save model.float().state_dict()"
        )
    fitting = {
        key: tensors[key] for key in own if key in tensors and tensors[key].shape == own[key].shape
    }
    model.load_state_dict({**own, **fitting})


def _describe_unusable(tensor: torch.Tensor, own: torch.Tensor) -> str | None:
    """Why `tensor` cannot take the place of `own`; None where it can."""
    if tensor.is_meta:
        return "without values, on the meta device"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided:
        return "sparse"
    if own.is_floating_point() and not tensor.is_floating_point():
        return str(tensor.dtype).removeprefix("torch.")
    return None


def check_finite(model: nn.Module, source: str, classifier: str) -> None:
    """Raise WeightsError where weights are NaN or infinite; the classifier is replaced anyway.

    Buffers may be infinite (masks), but for the statistics of norms.
    """
    buffers = {name for name, _ in model.named_buffers()}
    broken = []
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or name.startswith(f"{classifier}."):
            continue
        may_be_infinite = name in buffers and not name.endswith(("running_mean", "running_var"))
        is_bad = tensor.isnan() if may_be_infinite else ~tensor.isfinite()
        if is_bad.any():
            broken.append(f"{name} ({int(is_bad.sum())} of {tensor.numel()} values)")
    if broken:
        raise WeightsError(
            f"{source}: weights are NaN or infinite: {join_first(broken)}; its training diverged, "
            "or the file is damaged: take an earlier checkpoint"
        )


def _read(path: Path) -> Any:
    """What the file holds. Raises WeightsError."""
    check_weights_file(path)
    try:
        if is_safetensors(path):
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message recommends to switch the check off.
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = f"it holds {kind[1]}, and is " if kind else ""
        raise WeightsError(
            f"{path}: {held}not a state_dict file that can be read without running code from it; "
            "where it was written, save model.state_dict() alone, or safetensors"
        ) from None
    # A file of another kind raises any of torch's, zipfile's or safetensors' errors.
    except Exception as error:
        kind_of_file = "safetensors" if isinstance(error, SafetensorError) else "state_dict"
        if "TorchScript" in str(error):
            raise WeightsError(
                f"{path}: it is a TorchScript program, not weights; where it was written, save "
                "model.state_dict()"
            ) from error
        if any(sign in str(error) for sign in _CUT_SHORT):
            raise WeightsError(f"{path}: it is cut short; copy or download it again") from error
        raise WeightsError(
            f"{path}: not a {kind_of_file} file that can be read without running code from it "
            f"({first_line(error)})"
        ) from error


def _find_state_dicts(loaded: Any, name: str = "", depth: int = 0) -> dict[str, Tensors]:
    """Every dict of tensors in what a file holds, by its keys joined with dots."""
    if not isinstance(loaded, dict) or depth > _MAX_DEPTH:
        return {}
    tensors = {
        key: value
        for key, value in loaded.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
    found = {name: tensors} if tensors else {}
    for key, value in loaded.items():
        if isinstance(key, str) and not _NOT_WEIGHTS.search(key):
            found |= _find_state_dicts(value, f"{name}.{key}" if name else key, depth + 1)
    return found


def _take_entry(path: Path, found: dict[str, Tensors], entry: str) -> Tensors:
    """The state_dict of that name, or the part of one whose keys begin with the name."""
    if entry in found:
        return found[entry]
    for tensors in found.values():
        part = {
            key.removeprefix(f"{entry}."): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{entry}.")
        }
        if part:
            return part
    there = join_first([name for name in found if name] or ["a state_dict without a name"])
    raise WeightsError(f"{with_entry(path, entry)}: there is no entry {entry!r}; it has {there}")


def _choose(names: Mapping[str, Any], source: str | Path, what: str) -> str:
    """The name of the weights among several; averages (EMA) only where there is nothing else.

    Raises WeightsError where the names do not say which.
    """
    plain = [name for name in names if not _EMA.search(name)]
    averages = [name for name in names if name not in plain]
    known = [entry for entry in _ENTRIES if entry in plain]
    if len(known) > 1:
        logger.info(
            "%s: taking %r; it holds %r too, which %s would take",
            source,
            known[0],
            known[1],
            with_entry(Path(str(source)), known[1]),
        )
    candidates = known[:1] or plain or averages
    if len(candidates) > 1:
        raise WeightsError(
            f"{source}: it holds {len(candidates)} {what}: {join_first(candidates)}; "
            f"name one as {with_entry(Path(str(source)), candidates[0])}"
        )
    chosen = candidates[0]
    if chosen in averages:
        logger.info("%s: its weights are averages (EMA), of %r", source, chosen)
    elif averages:
        logger.info(
            "%s: taking %s; it holds averages (EMA) too, which %s would take",
            source,
            repr(chosen) if chosen else "the weights themselves",
            with_entry(Path(str(source)), averages[0]),
        )
    return chosen


def _match_keys(
    tensors: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    needed: set[str],
    source: str,
) -> Mapping[str, torch.Tensor]:
    """The tensors under the network's own names: without what wrappers put before and between."""
    if needed <= tensors.keys() <= own.keys():
        return tensors
    tensors = {
        _unwrap_key(key, own): tensor
        for key, tensor in tensors.items()
        if key in own or key != _AVERAGES_COUNTER
    }
    fits = Counter(
        key[: len(key) - len(suffix)]
        for key in tensors
        for suffix in _suffixes(key)
        if suffix in needed
    )
    whole = [prefix for prefix, count in fits.items() if count == len(needed)]
    if "" in whole or not whole:
        # A prefix of most keys gives the better message about the few that do not fit.
        best = max(fits, key=lambda prefix: fits[prefix], default="")
        prefix = best if "" not in whole and 2 * fits[best] > len(needed) else ""
    else:
        stems = {name.removesuffix("."): None for name in whole}
        prefix = _choose(stems, source, "networks that fit") + "."
    if not prefix:
        return tensors
    others = [key for key in tensors if not key.startswith(prefix)]
    if others:
        logger.info(
            "%s: left out %d tensors that are not under %s: %s",
            source,
            len(others),
            prefix,
            join_first(others),
        )
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def _unwrap_key(key: str, own: Mapping[str, torch.Tensor]) -> str:
    if key in own:
        return key
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _OUTER_WRAPPERS and ".".join(parts) not in own:
        parts = parts[1:]
    return ".".join(parts)


def _suffixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
