"""Weights files as users have them, and images as a network takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from models.images import Pixels


def save_weights(tensors: Any, path: Path) -> Path:
    """Write safetensors or `.pth`, by the suffix; a `.pth` may hold anything."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def normalise(crops: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Crops `uint8 [B,H,W,3]` → `float32 [B,3,H,W]`."""
    scaled = (torch.from_numpy(crops.copy()).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return scaled.permute(0, 3, 1, 2)
