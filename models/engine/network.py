"""A backbone as the torch engine runs it: crops in, features out, in one precision."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from models.preprocess import Preprocess

logger = logging.getLogger("graft.engine")


class Network:
    """`uint8 [B,H,W,3]` on the device → `float32 [B,F]`, mean and std inside, in one precision."""

    def __init__(
        self, module: nn.Module, preprocess: Preprocess, device: torch.device, precision: str
    ) -> None:
        self.device = device
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            precision
        ]
        self._module = module.eval().to(device).to(memory_format=torch.channels_last)
        self._is_half = False
        self._mean = torch.tensor(preprocess.mean, device=device) * 255
        self._std = torch.tensor(preprocess.std, device=device) * 255

    def open(self, image_shape: tuple[int, int, int]) -> int:
        """Choose how weights are kept; gives the number of features."""
        images = torch.zeros((1, *image_shape), dtype=torch.uint8, device=self.device)
        half = self._try_half(images)
        if half is not None:
            self._module, self._is_half = half, True
        return int(self(images).shape[1])

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        # TF32 is not what is meant by fp32: its products have bf16's eleven bits.
        exact = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=False, allow_tf32=False
        )
        with torch.inference_mode(), exact:
            normalised = ((images.float() - self._mean) / self._std).permute(0, 3, 1, 2)
            if self._is_half:
                features: torch.Tensor = self._module(normalised.to(self._dtype))
                return features.float()
            with torch.autocast(
                self.device.type, self._dtype, enabled=self._dtype is not torch.float32
            ):
                features = self._module(normalised)
                return features.float()

    def _try_half(self, images: torch.Tensor) -> nn.Module | None:
        """A copy whose weights have the precision: no batch casts them. None where it fails."""
        if self.device.type != "cuda" or self._dtype is torch.float32:
            return None
        original = self._module
        try:
            self._module, self._is_half = copy.deepcopy(original).to(self._dtype), True
            self(images)
            return self._module
        # Whatever a user's own code raises on weights of half precision; autocast is the other way.
        except Exception as error:
            logger.info(
                "the backbone runs under autocast, for its weights cannot be halved: %s", error
            )
            return None
        finally:
            self._module, self._is_half = original, False
