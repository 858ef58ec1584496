"""The engine on CPUs gives the same bits however images come, and refuses what it cannot run."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from models.engine.engine import Precision, run
from models.engine.openvino_engine import BoundRequest, OpenVINOEngine, supports_bf16
from models.errors import GraftError
from models.images import Pixels
from models.prepared import PreparedBackbone
from tests.conftest import RunPython
from tests.support.shared import HANG_SECONDS

_SIGNAL = """
import os
import signal
import sys
from pathlib import Path
from models.engine.openvino_engine import OpenVINOEngine
from models.preprocess import Preprocess

options = {"batch_size": 1, "num_streams": 1, "images_per_second": 1.0}
first, second = (OpenVINOEngine(Path(sys.argv[1]), Preprocess(), **options) for _ in range(2))
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
from tests.support.shared import HANG_SECONDS

images = opset13.parameter([-1, 8, 8, 3], np.uint8)
means = opset13.reduce_mean(opset13.convert(images, np.float32), opset13.constant(np.array([1, 2])))
path = Path(sys.argv[1]) / "means.xml"
ov.save_model(ov.Model([means], [images]), path)
noise = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
expected = noise.mean(axis=(1, 2))
options = {"batch_size": 1, "num_streams": 2, "images_per_second": 1.0}
for _ in range(100):
    engine = OpenVINOEngine(path, Preprocess(8, 8), **options)
    futures = [engine.submit(noise) for _ in range(2)]
    engine.close()
    assert all(np.allclose(future.result(), expected, atol=0.01) for future in futures)
print("fine")
"""


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
    run_it = BoundRequest.run

    def note(request: BoundRequest, images: Pixels, out: np.ndarray) -> None:
        num_streams.append(request._request.get_compiled_model().get_property("NUM_STREAMS"))
        run_it(request, images, out)

    monkeypatch.setattr(BoundRequest, "run", note)
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
        thread.join(HANG_SECONDS)
    assert found == [True] * 12, "one thread more than streams waits, and all are served"
    assert sum(own_seconds) > 0.8 * (time.process_time() - before)
    assert np.array_equal(run(own, crops), expected)
    own.close()


def test_the_callers_array_may_change_once_the_answer_is_there(
    engine: OpenVINOEngine, crops: Pixels
) -> None:
    mine = crops[:4].copy()
    first = run(engine, mine)
    kept = first.copy()
    mine[:] = 0
    run(engine, mine)
    assert np.array_equal(first, kept)


def test_close_waits_for_what_is_in_flight(prepared: PreparedBackbone, crops: Pixels) -> None:
    engine = OpenVINOEngine(
        prepared.openvino_path, prepared.preprocess, precision="fp32", batch_size=2, num_streams=1
    )
    future = engine.submit(crops[:6])
    engine.close()
    assert future.result(timeout=HANG_SECONDS).shape == (6, 1280)


def test_engines_that_come_and_go_leave_the_process_alive(
    run_python: RunPython, tmp_path: Path
) -> None:
    """With OpenVINO's callbacks, about one close in 300 deadlocked or aborted the process."""
    finished = run_python(_COME_AND_GO, str(tmp_path))
    assert (finished.returncode, finished.stdout) == (0, "fine\n"), finished.stderr


def test_a_signal_after_engines_went_in_the_order_they_came_harms_nobody(
    run_python: RunPython, prepared: PreparedBackbone
) -> None:
    """Each Core that is freed can leave the thread a freed stack for signals: a crash once."""
    finished = run_python(_SIGNAL, str(prepared.openvino_path))
    assert (finished.returncode, finished.stdout) == (0, "signalled\n"), finished.stderr


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
    prepared: PreparedBackbone, precision: Precision
) -> None:
    reason = (
        "is not quantised"
        if precision == "int8"
        else "runs fp32.* through OpenVINO; or leave it at auto"
    )
    with pytest.raises(GraftError, match=rf"--precision {precision}: .* {reason}"):
        OpenVINOEngine(prepared.openvino_path, prepared.preprocess, precision=precision)


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
