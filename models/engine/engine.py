"""What runs a backbone for inference, as fast as the hardware allows: OpenVINO on the CPU, torch on CUDA.

One interface for the features of a probe and for the requests of the service: `uint8 [B,H,W,3]` in, `float32 [B,F]` out, mean
and std inside, several batches in flight. Torch is imported by `TorchEngine` alone, so that a CPU deployment needs none.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from models.errors import GraftError
from models.preprocess import Pixels, Preprocess

if TYPE_CHECKING:
    import openvino as ov
    import torch

Features = npt.NDArray[np.float32]
# One after the other `uint8 [H,W,3]`, or `[B,H,W,3]` in one.
Crops = Sequence[Pixels] | Pixels
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]

_OPENVINO_PRECISION = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# What the search tries on the CPU. One image at a time fits the cache, larger batches amortise big weights and what a batch costs. Where
# four at a time gain less than this share over one, and have less than it left to gain, sixteen are not tried: they gave 5 % at most.
_BATCH_SIZES = ((1, 4), (16,))
_WORTH_MORE = 0.15
_SEARCH_ROUNDS = 3
_ROUND_SECONDS = 0.08
# What a batch costs outside the engine: one image at a time, which the engine runs as fast as four, gave 466 images a second for 558.
_SECONDS_PER_BATCH = 0.0004
# On CUDA, for each batch size.
_SEARCH_SECONDS = 0.15
NUM_SPARE_SLOTS = 3


@dataclass(frozen=True)
class EngineInfo:
    """What an engine chose, for logs, the model card and `GET /v1/models`; `images_per_second` is measured on noise."""

    engine: str
    device: str
    precision: str
    batch_size: int
    num_streams: int
    images_per_second: float

    def __str__(self) -> str:
        return (
            f"{self.engine} on {self.device}, {self.precision}, batch {self.batch_size}, {self.num_streams} streams, "
            f"{self.images_per_second:.0f} images/s"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Engine(Protocol):
    """A backbone ready to run. `submit` may be called from any thread; results do not depend on what else is in flight."""

    info: EngineInfo
    num_features: int

    @property
    def num_slots(self) -> int:
        """How many batches may be in flight before `submit` blocks."""

    def submit(self, crops: Crops) -> Future[Features]:
        """Start `uint8 [B,H,W,3]` → `float32 [B,F]`; blocks only while every slot is taken."""

    def run_here(self, crops: Crops, *, is_alone: bool = True) -> Features:
        """The same, waiting for it; where too many do so at once, one waits for another. `is_alone` says that all cores may be used."""

    def close(self) -> None:
        """Wait for what is in flight and let go of the memory."""


def run(engine: Engine, images: Pixels) -> Features:
    """`uint8 [B,H,W,3]` → `float32 [B,F]`, waiting for the answer."""
    return engine.submit(images).result()


def cpu_name() -> str:
    """The processor's own name, or the architecture where the system does not tell."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """What the processor can, in Linux' words ("avx2"); elsewhere nothing is known of it."""
    return frozenset(_cpuinfo("flags").split())


def _cpuinfo(field: str) -> str:
    """The first processor's `field` as Linux gives it; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def num_cpus() -> int:
    """The processors this process may use (a container's affinity counts, its quota does not)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def openvino_name() -> str:
    """The engine's name with its version, without loading it."""
    return f"openvino {importlib.metadata.version('openvino')}"


@cache
def openvino_core() -> ov.Core:
    """The process's one `Core`, never let go of.

    Each one's CPU plugin gives the thread a stack for signals and takes it back when it goes; where a second came in between, the
    thread is left with the address of freed memory, and its next signal ends the process (OpenVINO 2026.4).
    """
    # Imported here, as elsewhere in this file: the CUDA engine's users need not have it, and it costs 0.2 s.
    import openvino as ov

    return ov.Core()


@cache
def supports_bf16() -> bool:
    """Whether the CPU computes in bf16 by itself (AVX-512 BF16 or AMX), as OpenVINO sees it."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@cache
def supports_vnni() -> bool:
    """Whether the CPU multiplies int8 by itself (VNNI or AMX); only Linux tells.

    OpenVINO's own INT8 capability says no more than that it can run int8, which CPUs without VNNI do hardly faster than floats.
    """
    return not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(cpu_flags())


def _is_quantised(model: ov.Model) -> bool:
    return any(operation.get_type_name() == "FakeQuantize" for operation in model.get_ops())


class OpenVINOEngine:
    """A backbone saved as OpenVINO IR (input `u8 [?,H,W,3]`, output `f32 [?,F]`), run on the CPU.

    It is compiled twice, for the best batch and for one image: what does not fill a batch runs image by image, which is less work
    than padding it and answers a lone image in a quarter of the time (4.8 against 15.6 ms, EfficientNet-Lite0 in bf16, batch 4);
    `use_all_cores_for_one` adds a third. All are static, and an image's features are the same bits from each, in whatever company it comes.
    """

    def __init__(
        self,
        model_path: Path,
        preprocess: Preprocess,
        *,
        precision: Precision = "auto",
        batch_size: int | None = None,
        num_streams: int | None = None,
        images_per_second: float | None = None,
        in_callers_thread: bool = False,
    ) -> None:
        """What is given of batch, streams and speed (all three: as recorded on this machine) is not searched for.

        With `in_callers_thread`, `run_here` computes in the thread that calls it, on one core, `num_streams` of them at once: nothing is
        handed over, so no core waits for a thread that the kernel left queued on the other (3 to 5 % on two cores). Each stream then has
        weights of its own.

        Raises GraftError where the IR cannot be read or the precision is not to be had on this CPU."""

        self._model_path = model_path
        self._in_callers_thread = in_callers_thread
        self._image_shape = (preprocess.height, preprocess.width, 3)
        chosen = self._choose_precision(precision)
        try:
            by_size: dict[int, ov.CompiledModel] = {}
            if not (batch_size and num_streams and images_per_second):
                num_streams = num_streams or num_cpus()
                sizes = ((batch_size,),) if batch_size else _BATCH_SIZES
                by_size, batch_size, images_per_second = self._search(chosen, sizes, num_streams)
            sizes_used = {1, batch_size}
            if in_callers_thread:
                models = [
                    {size: self._compile(chosen, size) for size in sizes_used}
                    for _ in range(num_streams)
                ]
            else:
                shared = {
                    size: by_size.get(size) or self._compile(chosen, size, num_streams)
                    for size in sizes_used
                }
                # Streams do not wait while images are made, results copied out and the next batch is fetched from an event loop: 8 %
                # more requests/s than with one slot more than streams, on two cores.
                models = [shared] * (num_streams + NUM_SPARE_SLOTS)
        except RuntimeError as error:
            raise GraftError(
                f"{model_path}: OpenVINO cannot load it: {str(error).strip().splitlines()[-1]}"
            ) from error
        self.num_features = int(models[0][1].output(0).partial_shape[1].get_length())
        self.info = EngineInfo(
            openvino_name(), cpu_name(), chosen, batch_size, num_streams, images_per_second
        )
        self._slots = [
            {
                size: _Request(compiled, size, self.num_features, in_callers_thread)
                for size, compiled in one.items()
            }
            for one in models
        ]
        # A thread a slot waits for its requests. Callbacks of OpenVINO's would run on its streams, which then wait for Python's lock, and
        # a request that is let go of before its callback is (2026.4) ends in a deadlock or in the process's abort.
        self._threads = ThreadPoolExecutor(self.num_slots, thread_name_prefix="openvino-engine")
        self._idle: queue.SimpleQueue[dict[int, _Request]] = queue.SimpleQueue()
        for slot in self._slots:
            self._idle.put(slot)
        self._alone: queue.SimpleQueue[_Request] = queue.SimpleQueue()

    def use_all_cores_for_one(self) -> None:
        """Compile it once more (half a second), to run an image that is the only one in flight on every core: 1.9 for 3.4 ms."""
        if self.info.num_streams > 1:
            self._alone.put(
                _Request(
                    self._compile(self.info.precision, 1, num_streams=1),
                    1,
                    self.num_features,
                    False,
                )
            )

    @property
    def num_slots(self) -> int:
        return self.info.num_streams + NUM_SPARE_SLOTS

    def submit(self, crops: Crops) -> Future[Features]:
        future: Future[Features] = Future()
        features = np.empty((len(crops), self.num_features), np.float32)
        size = self.info.batch_size
        starts = range(0, len(crops), size)
        pending = _Countdown(len(starts), future, features)
        if not len(starts):
            future.set_result(features)
        for start in starts:
            chunk, out = crops[start : start + size], features[start : start + size]
            self._threads.submit(self._run, self._idle.get(), chunk, out, pending)
        return future

    def run_here(self, crops: Crops, *, is_alone: bool = True) -> Features:
        features = np.empty((len(crops), self.num_features), np.float32)
        slot = self._idle.get()
        try:
            self._run_on(slot, crops, features, is_alone=is_alone)
        finally:
            self._idle.put(slot)
        return features

    def _run(
        self, slot: dict[int, _Request], chunk: Crops, out: Features, pending: _Countdown
    ) -> None:
        error = None
        try:
            self._run_on(slot, chunk, out)
        # It is the future's to raise, and the slot goes back whatever it is: the last one lost would block `submit` for ever.
        except Exception as raised:
            error = raised
        self._idle.put(slot)
        pending.finish_one(error)

    def _run_on(
        self, slot: dict[int, _Request], crops: Crops, out: Features, *, is_alone: bool = True
    ) -> None:
        size = self.info.batch_size
        num_whole = len(crops) - len(crops) % size if size > 1 else 0
        for start in range(0, num_whole, size):
            slot[size].run(crops[start : start + size], out[start : start + size])
        if num_whole == len(crops):
            return
        alone = self._take_alone() if is_alone else None
        try:
            for index in range(num_whole, len(crops)):
                (alone or slot[1]).run(crops[index : index + 1], out[index : index + 1])
        finally:
            if alone is not None:
                self._alone.put(alone)

    def _take_alone(self) -> _Request | None:
        """The request that runs on every core, where no other slot is taken."""
        if self._idle.qsize() < len(self._slots) - 1:
            return None
        with contextlib.suppress(queue.Empty):
            return self._alone.get_nowait()
        return None

    def close(self) -> None:
        self._threads.shutdown()
        self._slots, self._idle, self._alone = [], queue.SimpleQueue(), queue.SimpleQueue()
        # So that a late `submit` is refused by the threads, and does not wait for ever.
        self._idle.put({})

    def _choose_precision(self, precision: Precision) -> str:
        has_bf16 = supports_bf16()
        if precision == "int8":
            if not _is_quantised(openvino_core().read_model(self._model_path)):
                raise GraftError(f"--precision int8: {self._model_path} is not quantised")
            return "int8"
        if precision == "auto":
            return "bf16" if has_bf16 else "fp32"
        if precision not in ("fp32", "bf16") or (precision == "bf16" and not has_bf16):
            allowed = "fp32, bf16" if has_bf16 else "fp32"
            raise GraftError(
                f"--precision {precision}: {cpu_name()} runs {allowed} through OpenVINO; or leave it at auto"
            )
        return precision

    def _compile(
        self, precision: str, batch_size: int, num_streams: int | None = None
    ) -> ov.CompiledModel:
        """With no `num_streams`, for whichever thread calls, and it alone."""
        model = openvino_core().read_model(self._model_path)
        model.reshape([batch_size, *self._image_shape])
        if num_streams is None:
            parallel = {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": "1",
                "INFERENCE_NUM_THREADS": "1",
                "ENABLE_CPU_PINNING": "NO",
            }
        else:
            parallel = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": str(num_streams)}
        return openvino_core().compile_model(
            model,
            "CPU",
            {
                **parallel,
                # In a quantised network it is what the layers left in floating point run in.
                "INFERENCE_PRECISION_HINT": _OPENVINO_PRECISION[
                    precision if precision != "int8" else "bf16" if supports_bf16() else "fp32"
                ],
            },
        )

    def _search(
        self, precision: str, sizes: Sequence[Sequence[int]], num_streams: int
    ) -> tuple[dict[int, ov.CompiledModel], int, float]:
        """What was compiled, the best batch size and its images a second: of rounds in which the sizes take turns the fastest, because
        what else runs on the machine only ever slows a round down. One round a size chose 466 images a second over 640."""
        by_size: dict[int, ov.CompiledModel] = {}
        speeds: dict[int, float] = {}
        for some in sizes:
            by_size |= {size: self._compile(precision, size, num_streams) for size in some}
            for _ in range(_SEARCH_ROUNDS):
                for size in some:
                    speeds[size] = max(
                        speeds.get(size, 0), self._measure(by_size[size], size, num_streams)
                    )
            fastest = max(speeds.values())
            if (
                fastest < (1 + _WORTH_MORE) * speeds[some[0]]
                and fastest * _SECONDS_PER_BATCH / some[-1] < _WORTH_MORE
            ):
                break
        best = min(speeds, key=lambda size: 1 / speeds[size] + _SECONDS_PER_BATCH / size)
        return by_size, best, speeds[best]

    def _measure(self, compiled: ov.CompiledModel, batch_size: int, num_streams: int) -> float:
        import openvino as ov

        noise = np.random.default_rng(0).integers(
            0, 256, (batch_size, *self._image_shape), np.uint8
        )
        requests = ov.AsyncInferQueue(compiled, num_streams + 1)
        for _ in range(num_streams):
            requests.start_async({0: noise})
        requests.wait_all()
        num_done, start = 0, time.perf_counter()
        while time.perf_counter() - start < _ROUND_SECONDS:
            requests.start_async({0: noise})
            num_done += batch_size
        requests.wait_all()
        return num_done / (time.perf_counter() - start)


class _Request:
    """A request of OpenVINO's with arrays of its own, which cost less to copy to than others to bind; one thread at a time runs it."""

    def __init__(
        self, compiled: ov.CompiledModel, size: int, num_features: int, in_callers_thread: bool
    ) -> None:
        import openvino as ov

        self._in_callers_thread = in_callers_thread
        self._request = compiled.create_infer_request()
        self._input = np.empty((size, *compiled.input(0).shape[1:]), np.uint8)
        self._output = np.empty((size, num_features), np.float32)
        self._request.set_input_tensor(0, ov.Tensor(self._input, shared_memory=True))
        self._request.set_output_tensor(0, ov.Tensor(self._output, shared_memory=True))

    def run(self, crops: Crops, out: Features) -> None:
        for row, crop in zip(self._input, crops, strict=True):
            # An assignment would stretch what is smaller.
            if crop.shape != row.shape:
                raise ValueError(
                    f"a crop is of shape {list(crop.shape)}, the engine takes {list(row.shape)}"
                )
            row[...] = crop
        if self._in_callers_thread:
            self._request.infer(share_outputs=True)
        else:
            self._request.start_async()
            self._request.wait()
        out[:] = self._output


class _Countdown:
    """Completes a future when the last chunk of its batch has come, or fails it with the first error."""

    def __init__(self, num_chunks: int, future: Future[Features], features: Features) -> None:
        self._left = num_chunks
        self._future = future
        self._features = features
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def finish_one(self, error: Exception | None) -> None:
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            done = self._left == 0
        if done and not self._future.cancelled():
            if self._error is None:
                self._future.set_result(self._features)
            else:
                self._future.set_exception(self._error)


class TorchEngine:
    """A backbone as an `nn.Module` (`[B,3,H,W]` → `[B,F]`), for CUDA: channels_last, half precision, copies on a side stream.

    It runs on the CPU too, which is how it is tested where there is no GPU.
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
        # Copies wait on this stream, not on the compute of the batch before.
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
                f"--precision {precision}: the torch engine on {self._device} runs fp32 and bf16; or leave it at auto"
            )
        return precision

    def _search(self, batch_size: int | None) -> tuple[int, float]:
        """Double the batch until a further doubling gains under 5 % or memory runs out."""
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
