"""The engine on CUDA: torch. It runs on the CPU too, which is how most of it is tested."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from models.engine.engine import Crops, EngineInfo, Features, Precision
from models.engine.processor import cpu_name
from models.engine.ring import Ring, Slot, join
from models.errors import GraftError
from models.images import Pixels
from models.preprocess import Preprocess

if TYPE_CHECKING:
    import torch

    from models.engine.network import Network

_NUM_SLOTS = 3
_CUDA_BATCH_SIZES = (16, 32, 64, 128, 256, 512)
_CPU_BATCH_SIZE = 8
# For each batch size.
_SEARCH_SECONDS = 0.15
# A larger batch is taken where it gains more than this.
_WORTH_MORE = 0.05


class TorchEngine:
    """A backbone as an `nn.Module` (`[B,3,H,W]` → `[B,F]`), several batches in flight.

    The module runs in one thread at a time, whatever threads call `submit`: a module that keeps
    something between calls, as a forward hook does, needs no lock.
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

        from models.engine.network import Network

        self._device = torch.device(device)
        is_cuda = self._device.type == "cuda"
        chosen = _choose_precision(self._device, precision)
        self._image_shape = (preprocess.height, preprocess.width, 3)
        self._network = Network(module, preprocess, self._device, chosen)
        self.num_features = self._network.open(self._image_shape)
        if batch_size is None and is_cuda:
            batch_size, images_per_second = self._search()
        else:
            batch_size = batch_size or _CPU_BATCH_SIZE
            images_per_second = self._measure(batch_size)
        self._ring = Ring(self._open_slots(batch_size, all_sizes=True))
        name = torch.cuda.get_device_name(self._device) if is_cuda else cpu_name()
        self.info = EngineInfo(
            f"torch {torch.__version__}", name, chosen, batch_size, 1, images_per_second
        )

    @property
    def num_slots(self) -> int:
        return self._ring.num_slots

    def submit(self, crops: Crops) -> Future[Features]:
        size = self.info.batch_size
        if len(crops) == 0:
            empty: Future[Features] = Future()
            empty.set_result(np.empty((0, self.num_features), np.float32))
            return empty
        if len(crops) <= size:
            return self._ring.submit(crops)
        return join([self._ring.submit(crops[at : at + size]) for at in range(0, len(crops), size)])

    def run_here(self, crops: Crops, *, is_alone: bool = True) -> Features:
        return self.submit(crops).result()

    def close(self) -> None:
        self._ring.close()

    def _open_slots(self, batch_size: int, *, all_sizes: bool) -> list[Slot]:
        if self._device.type != "cuda":
            return [
                CpuSlot(self._network, batch_size, self._image_shape) for _ in range(_NUM_SLOTS)
            ]
        from models.engine.cuda import CudaBatches

        # A batch of 9 runs in the graph of 16: sizes by twos, from one image up.
        sizes = {batch_size, *(2**power for power in range(batch_size.bit_length()))}
        batches = CudaBatches(
            self._network, self._image_shape, sorted(sizes) if all_sizes else [batch_size]
        )
        return [batches.open_slot() for _ in range(_NUM_SLOTS)]

    def _search(self) -> tuple[int, float]:
        """Double the batch until that gains little or memory runs out: size and images a second."""
        import torch

        best = (0, 0.0)
        for size in _CUDA_BATCH_SIZES:
            try:
                speed = self._measure(size)
            except torch.cuda.OutOfMemoryError:
                if not best[0]:
                    raise
                torch.cuda.empty_cache()
                break
            if speed < best[1] * (1 + _WORTH_MORE):
                break
            best = (size, speed)
        return best

    def _measure(self, size: int) -> float:
        """Images a second in batches of `size`, on noise, with every slot busy."""
        noise = np.random.default_rng(0).integers(0, 256, (size, *self._image_shape), np.uint8)
        ring = Ring(self._open_slots(size, all_sizes=False))
        try:
            ring.submit(noise).result()
            in_flight, num_done, start = [ring.submit(noise)], 0, time.perf_counter()
            while time.perf_counter() - start < _SEARCH_SECONDS:
                in_flight.append(ring.submit(noise))
                in_flight.pop(0).result()
                num_done += size
            return num_done / (time.perf_counter() - start)
        finally:
            ring.close()


class CpuSlot:
    """A batch that runs while it is waited for."""

    def __init__(
        self, network: Network, batch_size: int, image_shape: tuple[int, int, int]
    ) -> None:
        self.images: Pixels = np.zeros((batch_size, *image_shape), np.uint8)
        self._network = network
        self._num_images = 0

    def start(self, num_images: int) -> None:
        self._num_images = num_images

    def wait(self) -> Features:
        import torch

        images = torch.from_numpy(self.images[: self._num_images])
        return np.asarray(self._network(images).numpy(), np.float32)


def _choose_precision(device: torch.device, precision: Precision) -> str:
    import torch

    is_cuda = device.type == "cuda"
    if precision == "auto":
        if not is_cuda:
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if precision == "int8" or (precision == "fp16" and not is_cuda):
        raise GraftError(
            f"--precision {precision}: the torch engine on {device} runs fp32 and bf16; "
            "or leave it at auto"
        )
    return precision
