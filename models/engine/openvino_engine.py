"""The engine on CPUs: OpenVINO."""

from __future__ import annotations

import contextlib
import importlib.metadata
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.engine.engine import NUM_SPARE_SLOTS, Crops, EngineInfo, Features, Precision
from models.engine.processor import cpu_name, num_cpus
from models.errors import GraftError
from models.preprocess import Preprocess

if TYPE_CHECKING:
    import openvino as ov

_OPENVINO_PRECISION = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# What the search tries. One image fits the processor's cache; larger batches read weights less
# often and share a batch's own cost. 16 is tried only where 4 gain at least this fraction over 1,
# or have as much left to gain: elsewhere it gave 5 % at most.
_BATCH_SIZES = ((1, 4), (16,))
_MIN_GAIN = 0.15
_SEARCH_ROUNDS = 3
_ROUND_SECONDS = 0.08
# A batch's cost outside the engine. Without it the search chose batches of 1 where the engine runs
# them as fast as 4, and a run had 466 images/s instead of 558.
_SECONDS_PER_BATCH = 0.0004


def openvino_name() -> str:
    """The engine's name and version, without loading it."""
    return f"openvino {importlib.metadata.version('openvino')}"


@cache
def openvino_core() -> ov.Core:
    """The process's one `Core`, which is never freed.

    The CPU plugin of a Core gives the thread a stack for signals and frees it with the Core. With
    two Cores the thread can keep the address of the freed stack, and its next signal ends the
    process (OpenVINO 2026.4).
    """
    # Imported here, as elsewhere in this file: it takes 0.2 s, and CUDA needs none.
    import openvino as ov

    return ov.Core()


@cache
def supports_bf16() -> bool:
    """Whether the CPU has instructions for bf16 (AVX-512 BF16 or AMX), as OpenVINO finds it."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVINOEngine:
    """A backbone saved as OpenVINO IR (input `u8 [?,H,W,3]`, output `f32 [?,F]`), run on the CPU.

    It is compiled for the best batch and for one image. Images that do not fill a batch run one by
    one, which is less work than padding: a lone image is answered in 4.8 ms instead of 15.6
    (EfficientNet-Lite0 in bf16, batch 4). `use_all_cores_for_one` compiles a third time. All have
    static shapes, and an image's features are the same bits from each.
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
        """Open the IR. Where batch size, streams and speed are all given, nothing is searched for.

        With `in_callers_thread`, `run_here` computes in the calling thread on one core, in
        `num_streams` threads at once, each with its own copy of the weights. No core then waits for
        a thread that the kernel queued on another (3 to 5 % on two cores).

        Raises GraftError where the IR cannot be read or the CPU does not run the precision.
        """
        self._model_path = model_path
        self._in_callers_thread = in_callers_thread
        self._image_shape = (preprocess.height, preprocess.width, 3)
        chosen = self._choose_precision(precision)
        try:
            models, batch_size, num_streams, images_per_second = self._compile_slots(
                chosen, batch_size, num_streams, images_per_second
            )
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
                size: BoundRequest(compiled, size, self.num_features, in_callers_thread)
                for size, compiled in one.items()
            }
            for one in models
        ]
        # One thread per slot waits for its requests. OpenVINO's callbacks would run on its streams,
        # which then wait for Python's lock; and a request that is freed before its callback
        # deadlocks or aborts the process (2026.4).
        self._threads = ThreadPoolExecutor(self.num_slots, thread_name_prefix="openvino-engine")
        self._idle: queue.SimpleQueue[dict[int, BoundRequest]] = queue.SimpleQueue()
        for slot in self._slots:
            self._idle.put(slot)
        self._alone: queue.SimpleQueue[BoundRequest] = queue.SimpleQueue()

    def use_all_cores_for_one(self) -> None:
        """Compile once more (0.5 s): an image alone in flight then takes 1.9 ms instead of 3.4."""
        if self.info.num_streams > 1:
            compiled = self._compile(self.info.precision, 1, num_streams=1)
            self._alone.put(BoundRequest(compiled, 1, self.num_features, in_callers_thread=False))

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
        self, slot: dict[int, BoundRequest], chunk: Crops, out: Features, pending: _Countdown
    ) -> None:
        error = None
        try:
            self._run_on(slot, chunk, out)
        # The future raises it. The slot goes back in any case, or `submit` would block for ever.
        except Exception as raised:
            error = raised
        self._idle.put(slot)
        pending.finish_one(error)

    def _run_on(
        self, slot: dict[int, BoundRequest], crops: Crops, out: Features, *, is_alone: bool = True
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

    def _take_alone(self) -> BoundRequest | None:
        """The request that runs on all cores; None where another slot is in use."""
        if self._idle.qsize() < len(self._slots) - 1:
            return None
        with contextlib.suppress(queue.Empty):
            return self._alone.get_nowait()
        return None

    def close(self) -> None:
        self._threads.shutdown()
        self._slots, self._idle, self._alone = [], queue.SimpleQueue(), queue.SimpleQueue()
        # A later `submit` finds a slot and is refused by the threads, instead of waiting for ever.
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
                f"--precision {precision}: {cpu_name()} runs {allowed} through OpenVINO; "
                "or leave it at auto"
            )
        return precision

    def _compile_slots(
        self,
        precision: str,
        batch_size: int | None,
        num_streams: int | None,
        images_per_second: float | None,
    ) -> tuple[list[dict[int, ov.CompiledModel]], int, int, float]:
        """For each slot the models by batch size; and batch size, streams and speed."""
        by_size: dict[int, ov.CompiledModel] = {}
        if not (batch_size and num_streams and images_per_second):
            num_streams = num_streams or num_cpus()
            sizes = ((batch_size,),) if batch_size else _BATCH_SIZES
            by_size, batch_size, images_per_second = self._search(precision, sizes, num_streams)
        sizes_used = {1, batch_size}
        if self._in_callers_thread:
            slots = [
                {size: self._compile(precision, size) for size in sizes_used}
                for _ in range(num_streams)
            ]
        else:
            shared = {
                size: by_size.get(size) or self._compile(precision, size, num_streams)
                for size in sizes_used
            }
            # So that streams do not wait while images are decoded, results copied and the next
            # batch fetched: 8 % more requests/s than with one spare slot, on two cores.
            slots = [shared] * (num_streams + NUM_SPARE_SLOTS)
        return slots, batch_size, num_streams, images_per_second

    def _compile(
        self, precision: str, batch_size: int, num_streams: int | None = None
    ) -> ov.CompiledModel:
        """For `num_streams` streams; for the calling thread and one core where None."""
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
                # In a quantised network: of the layers that stay in floating point.
                "INFERENCE_PRECISION_HINT": _OPENVINO_PRECISION[
                    precision if precision != "int8" else "bf16" if supports_bf16() else "fp32"
                ],
            },
        )

    def _search(
        self, precision: str, sizes: Sequence[Sequence[int]], num_streams: int
    ) -> tuple[dict[int, ov.CompiledModel], int, float]:
        """The compiled models by size, the best batch size and its images/s.

        The sizes take turns, and each one's fastest round counts: other processes only slow rounds
        down. By one round per size, 466 images/s were once chosen over 640.
        """
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
                fastest < (1 + _MIN_GAIN) * speeds[some[0]]
                and fastest * _SECONDS_PER_BATCH / some[-1] < _MIN_GAIN
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


def _is_quantised(model: ov.Model) -> bool:
    return any(operation.get_type_name() == "FakeQuantize" for operation in model.get_ops())


class BoundRequest:
    """OpenVINO's request with its own arrays: copying to them is faster than binding others.

    One thread at a time may run it.
    """

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
            # An assignment would broadcast a smaller one.
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
    """Completes a future with the last chunk of its batch; with the first error, if there is
    one.
    """

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
