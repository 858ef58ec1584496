"""Stops, memory, NaN and batches that cannot be learnt are handled, or end the run in words."""

from __future__ import annotations

import csv
import logging
import os
import re
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from finetune.resume import STATE_DIR, TRAINING_FILE
from finetune.terminal import Terminated, run_program
from finetune.training.broken_batch import FOLDER, BrokenLossError
from finetune.training.memory import run_in_parts
from finetune.training.preflight import estimate_time, warn_if_starved
from models.backbone.build import Backbone
from models.backbone.memory import is_out_of_memory
from models.errors import GraftError
from tests.conftest import RunForked
from tests.support.forked import Program
from tests.support.tiny import (
    PREPROCESS,
    Recorder,
    Trunk,
    build,
    draw_splits,
    options,
    probe_of,
    snapshot,
    train_tiny,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def fit(
    folder: Path, backbone: Backbone | None = None, after: Any = None, **changes: Any
) -> tuple[Backbone, Recorder]:
    """Train with a state folder, and give the network and the curves."""
    (folder / STATE_DIR).mkdir(parents=True, exist_ok=True)
    backbone, monitor = backbone or build(), Recorder(folder, after)
    try:
        train_tiny(
            backbone,
            draw_splits(),
            probe_of(backbone),
            options(**changes),
            monitor,
            folder,
            state_dir=folder / STATE_DIR,
        )
    finally:
        monitor.close()
    return backbone, monitor


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, Terminated, 143)],
)
def test_a_signal_saves_and_ends_with_its_code(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
    kind: type[BaseException],
    code: int,
) -> None:
    def work() -> None:
        with pytest.raises(kind) as caught:
            fit(
                tmp_path,
                after=lambda num_steps: os.kill(os.getpid(), number) if num_steps == 2 else None,
            )
        caught.value.add_note("go on with\n  a command")
        raise caught.value

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run_program(work) == code
    assert capsys.readouterr().err.endswith(
        "stopped; nothing was published\ngo on with\n  a command\n"
    )
    assert (tmp_path / STATE_DIR / TRAINING_FILE).is_file()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, run_forked: RunForked) -> None:
    code = (
        "import os, signal, time\nfrom finetune.terminal import stop_softly\nwith stop_softly() "
        "as asked:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.05); "
        "print(type(asked()).__name__, flush=True)\n    os.kill(os.getpid(), signal.SIGINT); "
        "time.sleep(30)\n"
    )
    (done,) = run_forked(Program(code=code))
    assert done.returncode == 130
    assert "stopping after this step; once more ends it at once" in done.stderr
    assert done.stdout == "KeyboardInterrupt\n"


def test_sigterm_outside_of_the_training_ends_the_program_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    assert run_program(work) == 143
    assert "nothing was published" in capsys.readouterr().err


# -------------------------------------------------------------------------- NaN and infinite values


class Poisoned(nn.Module):
    """Its gradient, or what it gives for images brighter than the others, is no number."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.trunk = Trunk(dropout=0.0)
        self.where = where

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.trunk(images)
        if self.training and self.where == "image":
            brightness = images.mean(dim=(1, 2, 3))
            features = (
                features + torch.where(brightness == brightness.max(), torch.nan, 0.0)[:, None]
            )
        if self.training and self.where == "gradient":
            # The square root's slope at zero is infinite.
            features = features + (features * 0).sqrt()
        return features


def read_broken_batch(folder: Path) -> list[dict[str, str]]:
    with (folder / FOLDER / "batch.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_nan_loss_keeps_the_batch_for_inspection(tmp_path: Path) -> None:
    with pytest.raises(BrokenLossError) as caught:
        fit(tmp_path, build(lambda: Poisoned("image")), freeze="none", epochs=1)
    rows = read_broken_batch(tmp_path)
    (broken,) = [row for row in rows if row["loss"] == "nan"]
    assert len(rows) == 6
    said = str(caught.value)
    assert said.startswith("epoch 1, step 0: the loss is nan at a rate of ")
    assert "lower --lr and --backbone-lr, to a tenth for a start (now 5.0e-02 and 2.0e-02)" in said
    assert said.endswith(
        f"the 6 images of the batch are in {tmp_path / FOLDER}, with each one's loss in "
        f"batch.csv: NaN or infinite for {broken['path']}"
    )
    by_key = {sample.key: sample for sample in draw_splits().train}
    for row in rows:
        sample = by_key[row["path"]]
        assert row["label"] == draw_splits().describe(sample)
        assert np.array_equal(
            np.asarray(Image.open(tmp_path / FOLDER / row["file"])), PREPROCESS(sample.read())
        )
    assert not (tmp_path / STATE_DIR / TRAINING_FILE).exists()


def test_a_nan_gradient_is_found_before_the_step(tmp_path: Path) -> None:
    backbone = build(lambda: Poisoned("gradient"))
    with pytest.raises(
        BrokenLossError, match=r"^epoch 1, step 0: the gradient is (nan|inf) at a rate of"
    ):
        fit(tmp_path, backbone, freeze="none", epochs=1)
    assert all(tensor.isfinite().all() for tensor in backbone.model.parameters())


# ------------------------------------------------------------------------------------------- memory


class Greedy(nn.Module):
    """It has memory for a few images only, and says so in one of the ways in which torch does."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.trunk = Trunk(dropout=0.0)
        self.most = most
        self.error = error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # While it is traced and tried it behaves.
        if torch.is_grad_enabled() and self.training and len(images) > self.most:
            raise self.error
        features: torch.Tensor = self.trunk(images)
        return features


ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 9 bytes."
    ),
    RuntimeError("std::bad_alloc"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


EVERY_OPTION = {
    "balance": "weights",
    "label_smoothing": 0.1,
    "mix": "both",
    "ema": 0.6,
    "layer_decay": 0.5,
}


@pytest.mark.parametrize(
    ("error", "changes"), [*((error, {}) for error in ERRORS), (MemoryError(), EVERY_OPTION)]
)
def test_out_of_memory_halves_the_batch_and_moves_the_weights_as_the_whole_would(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception, changes: dict[str, Any]
) -> None:
    # Statistics of a batch are those of its parts, so they are kept.
    common: dict[str, Any] = {"freeze": "none", "batch_norm": "keep", "batch_size": 8, **changes}
    whole, whole_monitor = fit(tmp_path / "whole", build(lambda: Greedy(8, error)), **common)
    caplog.clear()
    parts, monitor = fit(tmp_path / "parts", build(lambda: Greedy(2, error)), **common)
    assert [
        record.message.split(": ")[-1]
        for record in caplog.records
        if "out of memory" in record.message
    ] == [
        "from here on 4 images at once; the result is that of the whole batch",
        "from here on 2 images at once; the result is that of the whole batch",
    ]
    before = snapshot(build(lambda: Greedy(8, error)))
    for name, tensor in snapshot(whole).items():
        moved = float((tensor.float() - before[name].float()).abs().max())
        torch.testing.assert_close(
            snapshot(parts)[name], tensor, rtol=0, atol=max(1e-7, 1e-3 * moved), msg=name
        )
    for (step, loss), (same_step, same_loss) in zip(
        monitor.curves["train/loss"], whole_monitor.curves["train/loss"], strict=True
    ):
        assert step == same_step
        assert loss == pytest.approx(same_loss, rel=1e-4)


def test_a_single_image_that_does_not_fit_raises_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(
        GraftError,
        match=r"^out of memory with a single image \(no room\); try a smaller --image-size or "
        r"--backbone, --freeze",
    ):
        fit(tmp_path, build(lambda: Greedy(0, MemoryError("no room"))), freeze="none")


def test_an_error_that_is_none_of_memory_is_not_hidden(tmp_path: Path) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fit(tmp_path, build(lambda: Greedy(2, error)), freeze="none")


def test_a_failed_part_is_undone_and_a_short_batch_keeps_the_limit() -> None:
    images, done = torch.arange(6.0), []

    def work(part: torch.Tensor, _: torch.Tensor) -> float:
        done.append(len(part))
        if done == [4, 2]:
            raise MemoryError
        return float(part.sum())

    parts, at_once = run_in_parts(images, images, 4, work, done.clear)
    assert (parts, at_once, done) == ([1.0, 5.0, 9.0], 2, [2, 2, 2])
    assert run_in_parts(images[:3], images[:3], 4, lambda part, _: len(part)) == ([3], 4)


# A limit on the process, a little above what it has: the whole batch does not fit, a part of it
# does.
STARVE = """
import logging, os, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from torch import nn
from tests.support.tiny import Recorder, Trunk, build, draw_splits, options, probe_of, train_tiny

class Hungry(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = Trunk(dropout=0.0)
        self.wide = nn.Conv2d(3, 1024, 1)

    def forward(self, images):
        # 16 MB an image, and as much again for its gradient.
        if self.training and "limit" not in globals():
            globals()["limit"] = True
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = used + int(os.environ["SPARE_MB"]) * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        wide = self.wide(nn.functional.interpolate(images, scale_factor=2)).relu()
        return self.trunk(images) + wide.mean(dim=(1, 2, 3))[:, None]

logging.basicConfig(format="%(message)s")
folder = Path(os.environ["FOLDER"])
backbone = build(Hungry)
before = backbone.model.backbone.wide.weight.clone()
trained = train_tiny(
    backbone,
    draw_splits(),
    probe_of(backbone),
    options(freeze="none", epochs=1, batch_size=16, cache=False),
    Recorder(folder),
    folder,
)
print("finished", trained.best_epoch >= 0)
"""


def test_memory_that_really_runs_out_ends_in_a_finished_run(
    tmp_path: Path, run_forked: RunForked
) -> None:
    (done,) = run_forked(Program(code=STARVE, env={"SPARE_MB": "300", "FOLDER": str(tmp_path)}))
    assert done.returncode == 0, done.stderr
    assert "out of memory (" in done.stderr
    assert done.stdout.endswith("finished True\n")


def test_memory_for_less_than_one_image_raises(tmp_path: Path, run_forked: RunForked) -> None:
    (done,) = run_forked(Program(code=STARVE, env={"SPARE_MB": "4", "FOLDER": str(tmp_path)}))
    assert done.returncode == 1
    assert "GraftError: out of memory with a single image (" in done.stderr


# ---------------------------------------------------------------------------------------- preflight


@pytest.mark.parametrize(
    "changes",
    [{}, {"cache": False}, {**EVERY_OPTION, "freeze": "none", "gradual": 1}],
    ids=["activations", "crops", "every option"],
)
def test_preflight_logs_what_to_expect_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    plain, _ = fit(tmp_path / "plain", **changes)
    with caplog.at_level(logging.INFO, "graft.preflight"):
        checked, _ = fit(tmp_path / "checked", preflight=True, repository=tmp_path, **changes)
    assert all(
        torch.equal(tensor, snapshot(plain)[name]) for name, tensor in snapshot(checked).items()
    )
    assert "preflight: disk: the state of the training takes 0 MB of" in caplog.text
    assert "preflight: the loss on one batch went from" in caplog.text
    assert re.search(r"preflight: training will take about \d+ s on .+", caplog.text)
    assert ": 2 epochs of 4 steps, " in caplog.text


def test_preflight_stops_a_run_whose_loss_does_not_fall(tmp_path: Path) -> None:
    with pytest.raises(
        GraftError,
        match=r"^--preflight: the loss on one batch went from \S+ to \S+ in 20 steps, and should "
        r"have fallen",
    ):
        fit(tmp_path, preflight=True, repository=tmp_path, lr=50.0, backbone_lr=50.0)


def test_preflight_stops_a_run_that_the_disk_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 0, 10_000))
    with pytest.raises(
        GraftError,
        match=r"--preflight: .* MB in .*, where 0 MB are free; make room, or name another "
        r"--(output|repository)",
    ):
        fit(tmp_path, preflight=True, repository=tmp_path, cache=False)


def test_starvation_is_named_with_its_remedy(caplog: pytest.LogCaptureFixture) -> None:
    warn_if_starved(0.29)
    assert not caplog.records
    warn_if_starved(0.31)
    assert (
        "the training waits for data: more --workers, smaller image files, or --views"
        in caplog.text
    )
    caplog.clear()

    def read_slowly() -> Iterator[int]:
        for index in range(5):
            time.sleep(0.02)
            yield index

    plan: dict[str, Any] = {
        "num_epochs": 1,
        "num_batches": 5,
        "num_val_batches": 1,
        "device": torch.device("cpu"),
    }
    estimate_time(read_slowly(), 0.05, is_read_ahead=True, **plan)
    assert "waits for data" not in caplog.text
    estimate_time(read_slowly(), 0.005, is_read_ahead=True, **plan)
    assert "waits for data" in caplog.text
