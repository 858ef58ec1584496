"""The engine on CUDA: torch. It is imported when an engine is opened: on a CPU, none is needed."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from models.engine.engine import Crops, EngineInfo, Features, Precision
from models.engine.processor import cpu_name
from models.errors import GraftError
from models.preprocess import Pixels, Preprocess

if TYPE_CHECKING:
    import torch

# How long each batch size is measured.
_SEARCH_SECONDS = 0.15


class TorchEngine:
    """A backbone as an `nn.Module`, images `[B,3,H,W]` → features `[B,F]`.

    channels_last, half precision, copies on a stream of their own. Tests run it on the CPU where
    there is no GPU.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        preprocess: Preprocess,
        *,
        device: str = "cuda",
        precision: Precision = "auto",
        batch_size: int | None = None,
    ) -> None:
        """Raises GraftError where the device cannot run the precision."""
        import torch

        self._torch = torch
        self._device = torch.device(device)
        chosen = self._choose_precision(precision)
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen]
        self._module = module.eval().to(self._device).to(memory_format=torch.channels_last)
        self._image_shape = (preprocess.height, preprocess.width, 3)
        self._mean = torch.tensor(preprocess.mean, device=self._device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(preprocess.std, device=self._device).view(1, 3, 1, 1) * 255
        # On this stream copies do not wait for the batch before to be computed.
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._threads = ThreadPoolExecutor(self.num_slots, thread_name_prefix="torch-engine")
        batch_size, images_per_second = self._search(batch_size)
        name = torch.cuda.get_device_name(self._device) if self._copies else cpu_name()
        self.info = EngineInfo(
            f"torch {torch.__version__}", name, chosen, batch_size, 1, images_per_second
        )

    @property
    def num_slots(self) -> int:
        return 2

    def submit(self, crops: Crops) -> Future[Features]:
        return self._threads.submit(self._run, crops)

    def run_here(self, crops: Crops, *, is_alone: bool = True) -> Features:
        return self._threads.submit(self._run, crops).result()

    def close(self) -> None:
        self._threads.shutdown()

    def _run(self, crops: Crops) -> Features:
        images, size = np.asarray(crops), self.info.batch_size
        chunks = [
            self._forward(images[start : start + size]) for start in range(0, len(images), size)
        ]
        return np.concatenate(chunks) if chunks else np.empty((0, self.num_features), np.float32)

    def _forward(self, images: Pixels) -> Features:
        torch = self._torch
        with torch.inference_mode():
            batch = torch.from_numpy(np.require(images, np.uint8, ["C", "W"]))
            if self._copies is not None:
                with torch.cuda.stream(self._copies):
                    batch = batch.pin_memory().to(self._device, non_blocking=True)
                torch.cuda.current_stream(self._device).wait_stream(self._copies)
                batch.record_stream(torch.cuda.current_stream(self._device))
            normalized = (batch.permute(0, 3, 1, 2).float() - self._mean) / self._std
            with torch.autocast(
                self._device.type, self._dtype, enabled=self._dtype is not torch.float32
            ):
                features = self._module(normalized.contiguous(memory_format=torch.channels_last))
            return np.asarray(features.float().cpu().numpy(), np.float32)

    def _choose_precision(self, precision: Precision) -> str:
        torch = self._torch
        is_cuda = self._device.type == "cuda"
        if precision == "auto":
            if not is_cuda:
                return "fp32"
            return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        if precision == "int8" or (precision == "fp16" and not is_cuda):
            raise GraftError(
                f"--precision {precision}: the torch engine on {self._device} runs fp32 and bf16; "
                "or leave it at auto"
            )
        return precision

    def _search(self, batch_size: int | None) -> tuple[int, float]:
        """The fastest batch size and its images/s: doubled until that gains under 5 % or OOM."""
        is_cuda = self._device.type == "cuda"
        best = (0, 0.0)
        for size in (
            (batch_size,) if batch_size else ((16, 32, 64, 128, 256, 512) if is_cuda else (8,))
        ):
            noise = np.random.default_rng(0).integers(0, 256, (size, *self._image_shape), np.uint8)
            try:
                self.num_features = self._forward(noise).shape[1]
                num_done, start = 0, time.perf_counter()
                while time.perf_counter() - start < _SEARCH_SECONDS:
                    self._forward(noise)
                    num_done += size
            except self._torch.cuda.OutOfMemoryError:
                if not best[0]:
                    raise
                self._torch.cuda.empty_cache()
                break
            speed = num_done / (time.perf_counter() - start)
            if speed < best[1] * 1.05:
                break
            best = (size, speed)
        return best
