"""Engines give the network's features, the same bits in whatever company, from many threads, and refuse in words."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from models.backbone.build import FeatureExtractor, build_from_config
from models.backbone.weights import read_state_dict
from models.engine.engine import Engine, run
from models.engine.openvino_engine import OpenVINOEngine, _Request, supports_bf16
from models.engine.processor import cpu_name, num_cpus
from models.engine.torch_engine import TorchEngine
from models.errors import GraftError
from models.prepared import PreparedBackbone, build_engine, resolve_device
from models.preprocess import Pixels
from tests.conftest import RunPython


@pytest.fixture(scope="module")
def torch_engine(prepared: PreparedBackbone) -> Iterator[TorchEngine]:
    model = build_from_config(
        prepared.config, read_state_dict(prepared.folder / "model.safetensors")
    )
    engine = TorchEngine(
        FeatureExtractor(model), prepared.preprocess, device="cpu", precision="fp32", batch_size=4
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=["openvino", "torch"])
def any_engine(
    request: pytest.FixtureRequest, engine: OpenVINOEngine, torch_engine: TorchEngine
) -> Engine:
    return engine if request.param == "openvino" else torch_engine


def relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def test_both_engines_give_the_networks_features(
    engine: OpenVINOEngine, torch_engine: TorchEngine, crops: Pixels
) -> None:
    by_openvino, by_torch = run(engine, crops), run(torch_engine, crops)
    assert by_openvino.shape == by_torch.shape == (10, 1280)
    assert by_openvino.dtype == by_torch.dtype == np.float32
    assert relative(by_openvino, by_torch) < 1e-4


def test_features_do_not_depend_on_the_batch_they_come_in(
    engine: OpenVINOEngine, crops: Pixels
) -> None:
    together = run(engine, crops)
    for size in (1, 2, 3, 4, 7):
        apart = np.concatenate(
            [run(engine, crops[start : start + size]) for start in range(0, len(crops), size)]
        )
        assert np.array_equal(apart, together), size
    assert np.array_equal(run(engine, crops[::-1])[::-1], together)
    assert np.array_equal(run(engine, np.stack([crops[3]] * 6)), together[[3] * 6])


def test_crops_may_come_one_by_one_and_one_of_another_shape_costs_its_batch_alone(
    engine: OpenVINOEngine, crops: Pixels
) -> None:
    expected = run(engine, crops)
    assert np.array_equal(engine.submit(list(crops)).result(), expected)
    assert np.array_equal(engine.run_here(list(crops)), expected)
    for wrong in (crops[0][:1], crops[0][..., :1], np.zeros((1, 1, 3), np.uint8)):
        for _ in range(engine.num_slots + 1):
            with pytest.raises(ValueError, match="a crop is of shape"):
                engine.submit([*crops[:3], wrong]).result()
            with pytest.raises(ValueError, match="a crop is of shape"):
                engine.run_here([wrong])
    assert np.array_equal(engine.run_here(crops), expected)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_lone_image_runs_on_every_core_and_gives_the_same_bits(
    prepared: PreparedBackbone, crops: Pixels, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    engine = OpenVINOEngine(
        prepared.openvino_path, prepared.preprocess, batch_size=batch_size, num_streams=2
    )
    expected = engine.run_here(crops)
    num_streams: list[int] = []
    run_it = _Request.run

    def note(request: _Request, images: Pixels, out: np.ndarray) -> None:
        num_streams.append(request._request.get_compiled_model().get_property("NUM_STREAMS"))
        run_it(request, images, out)

    monkeypatch.setattr(_Request, "run", note)
    engine.use_all_cores_for_one()
    alone = [engine.run_here(crops[index : index + 1]) for index in range(len(crops))]
    assert np.array_equal(np.concatenate(alone), expected)
    assert num_streams == [1] * len(crops)
    # Beside another batch it takes the core that is left.
    slot = engine._idle.get()
    assert np.array_equal(engine.run_here(crops[:1]), expected[:1])
    assert num_streams.pop() == 2
    engine._idle.put(slot)
    assert np.array_equal(engine.run_here(crops[:5]), expected[:5])
    assert num_streams[-2:] == ([1, 1] if batch_size == 1 else [2, 1])
    engine.close()


def test_in_the_callers_threads_it_gives_the_same_bits_and_hands_nothing_over(
    engine: OpenVINOEngine, prepared: PreparedBackbone, crops: Pixels
) -> None:
    expected = engine.run_here(crops)
    own = OpenVINOEngine(
        prepared.openvino_path,
        prepared.preprocess,
        precision="fp32",
        batch_size=4,
        num_streams=2,
        in_callers_thread=True,
    )
    found: list[bool] = []
    own_seconds: list[float] = []

    def ask() -> None:
        before = time.thread_time()
        found.extend(np.array_equal(own.run_here(crops), expected) for _ in range(4))
        own_seconds.append(time.thread_time() - before)

    own.run_here(crops)
    before = time.process_time()
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 12, "one thread more than streams waits, and all are served"
    assert sum(own_seconds) > 0.8 * (time.process_time() - before)
    assert np.array_equal(run(own, crops), expected)
    own.close()


def test_many_threads_at_once_each_get_their_own_features(
    any_engine: Engine, crops: Pixels
) -> None:
    expected = run(any_engine, crops)
    tolerance = 0 if isinstance(any_engine, OpenVINOEngine) else 1e-4
    errors: list[object] = []

    def ask(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(4):
            chosen = generator.integers(0, len(crops), int(generator.integers(1, 7)))
            difference = relative(run(any_engine, crops[chosen]), expected[chosen])
            if difference > tolerance:
                errors.append((seed, difference))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []


def test_more_batches_than_slots_may_be_in_flight(any_engine: Engine, crops: Pixels) -> None:
    assert any_engine.num_slots >= 2
    futures: list[Future[np.ndarray]] = [
        any_engine.submit(crops[index % 10 :][:2]) for index in range(4 * any_engine.num_slots)
    ]
    expected = run(any_engine, crops)
    for index, future in enumerate(futures):
        assert relative(future.result(), expected[index % 10 :][:2]) < 1e-4


def test_the_callers_array_may_change_once_the_answer_is_there(
    engine: OpenVINOEngine, crops: Pixels
) -> None:
    mine = crops[:4].copy()
    first = run(engine, mine)
    kept = first.copy()
    mine[:] = 0
    run(engine, mine)
    assert np.array_equal(first, kept)


def test_arrays_that_are_not_contiguous_or_not_writeable_are_taken(
    any_engine: Engine, crops: Pixels
) -> None:
    expected = run(any_engine, crops[::2])
    locked = crops[::2].copy()
    locked.flags.writeable = False
    assert relative(run(any_engine, locked), expected) < 1e-4
    mirrored = crops[:4, :, ::-1]
    assert relative(run(any_engine, mirrored), run(any_engine, mirrored.copy())) < 1e-4


def test_an_empty_batch_gives_no_features(any_engine: Engine, crops: Pixels) -> None:
    features = run(any_engine, crops[:0])
    assert (features.shape, features.dtype) == ((0, 1280), np.float32)


def test_images_of_another_size_fail_alone(any_engine: Engine, crops: Pixels) -> None:
    expected = run(any_engine, crops[:2])
    wrong = [any_engine.submit(crops[:4, :, :, :2]) for _ in range(2 * any_engine.num_slots)]
    for future in wrong:
        assert future.exception(timeout=30) is not None
    assert relative(any_engine.submit(crops[:2]).result(timeout=30), expected) < 1e-4


def test_close_waits_for_what_is_in_flight(prepared: PreparedBackbone, crops: Pixels) -> None:
    engine = OpenVINOEngine(
        prepared.openvino_path, prepared.preprocess, precision="fp32", batch_size=2, num_streams=1
    )
    future = engine.submit(crops[:6])
    engine.close()
    assert future.result(timeout=5).shape == (6, 1280)


def test_engines_that_come_and_go_leave_the_process_alive(
    run_python: RunPython, tmp_path: Path
) -> None:
    """With callbacks on OpenVINO's own threads, about one close in 300 deadlocked or aborted the process."""
    finished = run_python(_COME_AND_GO, str(tmp_path))
    assert (finished.returncode, finished.stdout) == (0, "fine\n"), finished.stderr


def test_a_signal_after_engines_went_in_the_order_they_came_harms_nobody(
    run_python: RunPython, prepared: PreparedBackbone
) -> None:
    """OpenVINO's plugin leaves the thread a freed stack for signals, unless it stays loaded: this was a segmentation fault."""
    finished = run_python(_SIGNAL, str(prepared.openvino_path))
    assert (finished.returncode, finished.stdout) == (0, "signalled\n"), finished.stderr


_SIGNAL = """
import os
import signal
import sys
from pathlib import Path
from models.engine.openvino_engine import OpenVINOEngine
from models.preprocess import Preprocess

first, second = (OpenVINOEngine(Path(sys.argv[1]), Preprocess(), batch_size=1, num_streams=1, images_per_second=1.0) for _ in range(2))
for engine in (first, second):
    engine.close()
del first, second, engine
signal.signal(signal.SIGUSR1, lambda *_: print("signalled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


_COME_AND_GO = """
import sys
from pathlib import Path
import numpy as np
import openvino as ov
from openvino import opset13
from models.engine.openvino_engine import OpenVINOEngine
from models.preprocess import Preprocess

images = opset13.parameter([-1, 8, 8, 3], np.uint8)
means = opset13.reduce_mean(opset13.convert(images, np.float32), opset13.constant(np.array([1, 2])))
path = Path(sys.argv[1]) / "means.xml"
ov.save_model(ov.Model([means], [images]), path)
noise = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
for _ in range(100):
    engine = OpenVINOEngine(path, Preprocess(8, 8), batch_size=1, num_streams=2, images_per_second=1.0)
    futures = [engine.submit(noise) for _ in range(2)]
    engine.close()
    assert all(np.allclose(future.result(), noise.mean(axis=(1, 2)), atol=0.01) for future in futures)
print("fine")
"""


def test_an_engine_says_what_it_chose(prepared: PreparedBackbone) -> None:
    engine = build_engine(prepared.folder, prepared.preprocess, prepared.config, device="cpu")
    info = engine.info
    assert info.engine.startswith("openvino 20")
    assert (info.device, info.precision) == (cpu_name(), "bf16" if supports_bf16() else "fp32")
    assert info.batch_size in (1, 4, 16)
    assert info.num_streams == num_cpus()
    assert info.images_per_second > 1
    assert all(
        str(part) in str(info)
        for part in (
            info.engine,
            info.device,
            info.precision,
            f"batch {info.batch_size}",
            "images/s",
        )
    )
    assert info.to_dict()["precision"] == info.precision
    engine.close()


def test_bf16_stays_near_fp32_where_the_cpu_has_it(
    prepared: PreparedBackbone, engine: OpenVINOEngine, crops: Pixels
) -> None:
    if not supports_bf16():
        with pytest.raises(GraftError, match=r"--precision bf16: .* runs fp32 through OpenVINO"):
            OpenVINOEngine(
                prepared.openvino_path,
                prepared.preprocess,
                precision="bf16",
                batch_size=4,
                num_streams=1,
            )
        return
    coarse = OpenVINOEngine(
        prepared.openvino_path, prepared.preprocess, precision="bf16", batch_size=4, num_streams=1
    )
    one, other = run(coarse, crops), run(engine, crops)
    cosine = (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert cosine.min() > 0.99
    assert not np.array_equal(one, other)
    coarse.close()


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_that_is_not_to_be_had_is_refused(
    prepared: PreparedBackbone, precision: str
) -> None:
    reason = (
        "is not quantised"
        if precision == "int8"
        else "runs fp32.* through OpenVINO; or leave it at auto"
    )
    with pytest.raises(GraftError, match=rf"--precision {precision}: .* {reason}"):
        OpenVINOEngine(prepared.openvino_path, prepared.preprocess, precision=precision)
    with pytest.raises(GraftError, match=f"--precision {precision}: the torch engine on cpu"):
        TorchEngine(torch.nn.Flatten(), prepared.preprocess, device="cpu", precision=precision)


@pytest.mark.parametrize(
    "content", [b"", b"this is no model", b"<?xml version='1.0'?><net name='x' version='11'></net>"]
)
def test_a_broken_ir_is_refused_with_its_path(
    prepared: PreparedBackbone, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "backbone.xml"
    path.write_bytes(content)
    with pytest.raises(GraftError, match=r"backbone\.xml: OpenVINO cannot load it: .+"):
        OpenVINOEngine(path, prepared.preprocess, precision="fp32", batch_size=1, num_streams=1)


@pytest.mark.parametrize("part", [".xml", ".bin"])
def test_a_missing_half_of_the_ir_is_refused(
    prepared: PreparedBackbone, part: str, tmp_path: Path
) -> None:
    for suffix in {".xml", ".bin"} - {part}:
        (tmp_path / f"backbone{suffix}").write_bytes(
            prepared.openvino_path.with_suffix(suffix).read_bytes()
        )
    with pytest.raises(GraftError, match="OpenVINO cannot load it"):
        OpenVINOEngine(
            tmp_path / "backbone.xml",
            prepared.preprocess,
            precision="fp32",
            batch_size=1,
            num_streams=1,
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_is_refused_where_there_is_none_and_auto_is_the_cpu() -> None:
    with pytest.raises(GraftError, match=r"--device.* torch .*no CUDA device.*auto, or say cpu"):
        resolve_device("cuda")
    assert resolve_device("auto") == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_cuda_agrees_with_the_cpu(
    prepared: PreparedBackbone, engine: OpenVINOEngine, crops: Pixels, precision: str
) -> None:
    on_cuda = build_engine(
        prepared.folder, prepared.preprocess, prepared.config, device="cuda", precision=precision
    )
    one, other = run(on_cuda, crops), run(engine, crops)
    cosine = (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert cosine.min() > (0.9999 if precision == "fp32" else 0.99)
    on_cuda.close()
