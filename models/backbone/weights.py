"""Weights: read from a file, and loaded into a network where every tensor fits."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from models.errors import GraftError


class WeightsError(GraftError):
    """Pretrained weights that cannot be had, or that do not fit the network."""


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a state_dict from safetensors or `.pth`; no code in it is run. Raises WeightsError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path}: there is no such weights file") from None
    except pickle.UnpicklingError:
        # torch's own message recommends to switch the check off.
        raise WeightsError(
            f"{path}: not a state_dict file that can be read without running code from it; "
            "save model.state_dict(), or safetensors"
        ) from None
    # A file of another kind raises any of torch's, zipfile's or safetensors' errors.
    except Exception as error:
        kind = "safetensors" if isinstance(error, SafetensorError) else "state_dict"
        reason = (str(error).strip().splitlines() or [""])[0]
        raise WeightsError(
            f"{path}: not a {kind} file that can be read without running code from it ({reason})"
        ) from error
    # Training scripts wrap the state_dict, and DistributedDataParallel prefixes its keys.
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(
        isinstance(value, torch.Tensor) for value in loaded.values()
    ):
        raise WeightsError(f"{path}: it holds {type(loaded).__name__}, not a state_dict of tensors")
    return {key.removeprefix("module."): tensor for key, tensor in loaded.items()}


def load_strictly(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str, classifier: str
) -> None:
    """Load every tensor into `model`; those of `classifier` may be missing, extra or misshaped.

    Raises WeightsError with the keys, where others are.
    """
    own = model.state_dict()
    head = f"{classifier}." if classifier else None

    def is_head(key: str) -> bool:
        return head is not None and key.startswith(head)

    missing = [key for key in own if key not in tensors and not is_head(key)]
    extra = [key for key in tensors if key not in own and not is_head(key)]
    misshaped = [
        f"{key} {list(tensors[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape and not is_head(key)
    ]
    if missing or extra or misshaped:
        raise WeightsError(
            f"{source}: the weights do not fit this network"
            + "".join(
                f"\n  {what} ({len(keys)}): {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}"
                for what, keys in (("missing", missing), ("extra", extra), ("misshaped", misshaped))
                if keys
            )
        )
    fitting = {
        key: tensors[key] for key in own if key in tensors and tensors[key].shape == own[key].shape
    }
    model.load_state_dict({**own, **fitting})
