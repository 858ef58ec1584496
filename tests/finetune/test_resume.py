"""A resumed run ends bit by bit as one that was never stopped; what does not fit is refused."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.command_line import parse_options
from finetune.config import Options
from finetune.data.splits import Splits
from finetune.resume import (
    STATE_DIR,
    TRAINING_FILE,
    Choices,
    ImagesGoneError,
    event_sizes,
    find_published,
    fix_options,
    keep_choices,
    lock,
    read_id,
    read_options,
    restore_splits,
    seconds_trained,
    trim_events,
)
from finetune.run import _moved_data_in_words, main
from finetune.terminal import Terminated
from finetune.training.state import draw_batches
from models.backbone.build import Backbone
from models.checkpoint import list_versions
from models.errors import GraftError
from tests.conftest import RunForked
from tests.support.forked import Program
from tests.support.images import write_noise_folders
from tests.support.tiny import Recorder, build, draw_splits, options, probe_of, snapshot, train_tiny

PROJECT_DIR = Path(__file__).parents[2]
# What depends on the clock.
TIMED = {"train/images_per_second", "train/waiting_for_data"}

# Killed some milliseconds after it wrote so many points of its curves; never, for 0.
RUN_AND_DIE = """
import os, signal, threading, time
import torch
torch.set_num_threads(1)
import finetune.run
from finetune.monitor import Monitor
from finetune.run import main
finetune.run.remove_state = lambda run_dir: None
num_points, write = 0, Monitor.scalar
def kill():
    time.sleep(float(os.environ["SECONDS"]))
    os.kill(os.getpid(), signal.SIGKILL)
def count(self, tag, value, step=0):
    global num_points
    num_points += 1
    write(self, tag, value, step)
    if num_points == int(os.environ["POINTS"]):
        threading.Thread(target=kill).start()
Monitor.scalar = count
assert main(os.environ["ARGUMENTS"].split("|")) == 0
"""


pytestmark = pytest.mark.usefixtures("one_thread")


class Fitted:
    """A training in one folder, stopped once after some step and resumed, or not."""

    def __init__(
        self,
        folder: Path,
        stop_after: int | None = None,
        *,
        backbone: Backbone | None = None,
        **changes: Any,
    ) -> None:
        self.folder = folder
        (folder / STATE_DIR).mkdir(parents=True, exist_ok=True)
        self.num_stops = 0
        self.curves: list[dict[str, list[tuple[int, float]]]] = []
        if stop_after is not None:
            with pytest.raises(Terminated):
                self._train(build(), stop_after, changes)
            self.num_stops += 1
        self.backbone = backbone or build()
        self.best_epoch = self._train(self.backbone, None, changes)

    def _train(self, backbone: Backbone, stop_after: int | None, changes: dict[str, Any]) -> int:
        def stop(num_steps: int) -> None:
            if num_steps == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        trim_events(self.folder)
        monitor = Recorder(self.folder, stop)
        try:
            return train_tiny(
                backbone,
                draw_splits(),
                probe_of(build()),
                options(**changes),
                monitor,
                self.folder,
                state_dir=self.folder / STATE_DIR,
            ).best_epoch
        finally:
            monitor.close()
            self.curves.append(monitor.curves)


def read_curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a run's folder as TensorBoard shows it; of what is timed only the steps."""
    accumulator = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: sorted(
            (event.step, 0.0 if tag in TIMED else event.value) for event in accumulator.Scalars(tag)
        )
        for tag in accumulator.Tags()["scalars"]
    }


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


EVERY_OPTION = {"label_smoothing": 0.1, "ema": 0.6, "layer_decay": 0.5, "gradual": 1}
WAYS: dict[str, dict[str, Any]] = {
    "activations": {},
    "crops": {"cache": False},
    "activations, every option": {**EVERY_OPTION, "mix": "mixup", "balance": "sampler"},
    "crops, every option": {**EVERY_OPTION, "mix": "both", "balance": "weights", "freeze": "none"},
}


@pytest.fixture(scope="module", params=WAYS)
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Fitted]:
    changes = WAYS[request.param]
    return changes, Fitted(tmp_path_factory.mktemp("undisturbed"), **changes)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 8])
def test_a_training_stopped_at_any_step_ends_as_one_that_never_was(
    tmp_path: Path, undisturbed: tuple[dict[str, Any], Fitted], stop_after: int
) -> None:
    """Four steps an epoch: within one, at its end, and at the end of all."""
    changes, expected = undisturbed
    found = Fitted(tmp_path, stop_after, **changes)
    assert found.num_stops == 1
    assert sum(len(curves.get("train/loss", ())) for curves in found.curves) == 8
    assert found.best_epoch == expected.best_epoch
    assert_same_tensors(snapshot(found.backbone), snapshot(expected.backbone))
    assert read_curves(tmp_path) == read_curves(expected.folder)


def test_frozen_parameters_and_buffers_are_bit_equal_after_a_resume(tmp_path: Path) -> None:
    before = snapshot(build())
    after = snapshot(Fitted(tmp_path, 5).backbone)
    frozen = [name for name in before if name.startswith("backbone.stem")]
    assert len(frozen) == 7
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_every_image_is_in_one_batch_of_an_epoch_whatever_was_drawn_before() -> None:
    batches = draw_batches(13, 6, 5, 2)
    assert [len(batch) for batch in batches] == [6, 6]
    assert len({index for batch in batches for index in batch}) == 12
    assert batches == draw_batches(13, 6, 5, 2)
    assert batches != draw_batches(13, 6, 5, 3)
    assert batches != draw_batches(13, 6, 4, 2)
    assert draw_batches(5, 6, 0, 1)[0] != list(range(5))
    assert sorted(draw_batches(5, 6, 0, 1)[0]) == list(range(5))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The state folder of a training that was stopped after its third step."""
    monitor = Recorder(
        tmp_path, lambda num_steps: os.kill(os.getpid(), signal.SIGTERM) if num_steps == 3 else None
    )
    (tmp_path / STATE_DIR).mkdir()
    with pytest.raises(Terminated):
        train_tiny(
            build(),
            draw_splits(),
            probe_of(build()),
            options(),
            monitor,
            tmp_path,
            state_dir=tmp_path / STATE_DIR,
        )
    monitor.close()
    return tmp_path / STATE_DIR


def go_on(state_dir: Path, backbone: Backbone | None = None, **changes: Any) -> int:
    monitor = Recorder(state_dir.parent)
    try:
        backbone = backbone or build()
        return train_tiny(
            backbone,
            draw_splits(),
            probe_of(build()),
            options(**changes),
            monitor,
            state_dir,
            state_dir=state_dir,
        ).best_epoch
    finally:
        monitor.close()


def test_a_backbone_whose_frozen_weights_are_others_is_refused(stopped: Path) -> None:
    backbone = build()
    backbone.model.get_buffer("backbone.stem.1.running_mean").add_(1e-6)
    with pytest.raises(
        GraftError,
        match=r"1 of 7 frozen tensors are not what they were when the run began "
        r"\(backbone\.stem\.1\.running_m",
    ):
        go_on(stopped, backbone)


def test_a_run_that_would_freeze_something_else_is_refused(stopped: Path) -> None:
    with pytest.raises(GraftError, match="frozen tensors are not what they were"):
        go_on(stopped, freeze="none")


def test_a_run_that_would_read_something_else_is_refused(stopped: Path) -> None:
    with pytest.raises(
        GraftError,
        match=r"what the epochs read was activations at backbone\.stem when the run began, and is "
        r"crops now",
    ):
        go_on(stopped, cache=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 3}, "--epochs was 2 when the run began, and is 3 now"),
        ({"batch_size": 4}, "--batch-size was 6 when the run began, and is 4 now"),
        ({"lr": 0.1}, "--lr was 0.05 when the run began, and is 0.1 now"),
        ({"ema": 0.9}, "--ema was 0.0 when the run began, and is 0.9 now"),
        ({"layer_decay": 0.5}, "--layer-decay was 1.0 when the run began, and is 0.5 now"),
        ({"seed": 1}, "--seed was 0 when the run began, and is 1 now"),
    ],
)
def test_an_option_that_was_edited_in_the_config_of_a_run_is_refused(
    stopped: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(
        GraftError,
        match=f"--resume {stopped.parent}: {said}; put it back .an option in .*config.yaml",
    ):
        go_on(stopped, **changes)


def test_options_that_shape_no_step_may_be_others_after_a_resume(stopped: Path) -> None:
    assert go_on(stopped, workers=2, save_minutes=3.0, coverage=0.5) >= 0


def test_the_state_of_a_run_on_other_images_is_refused(stopped: Path) -> None:
    splits = draw_splits()
    others = replace(splits, train=(replace(splits.train[0], key="another"), *splits.train[1:]))
    monitor = Recorder(stopped.parent)
    try:
        with pytest.raises(
            GraftError,
            match=r"its list of images and labels was 24 to train on, 12 .* and is 24 to train on, "
            r"12 .* now",
        ):
            train_tiny(
                build(), others, probe_of(build()), options(), monitor, stopped, state_dir=stopped
            )
    finally:
        monitor.close()


def flip_a_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 1000),
        lambda path: flip_a_bit(path, -1),
        lambda path: flip_a_bit(path, -5000),
    ],
)
def test_a_damaged_state_raises_with_the_way_out(
    stopped: Path, damage: Callable[[Path], None]
) -> None:
    damage(stopped / TRAINING_FILE)
    with pytest.raises(
        GraftError,
        match=r"training\.safetensors: the saved state cannot be read: .*; remove it, and --resume "
        r"begins again",
    ):
        go_on(stopped)


def test_damaged_kept_activations_are_computed_again(
    stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    was = (stopped / "val.npy").read_bytes()
    flip_a_bit(stopped / "val.npy", 400)
    assert go_on(stopped) >= 0
    assert (
        "val.npy: the kept activations cannot be used (they are damaged, or of something else): "
        "they are computed again" in caplog.text
    )
    assert (stopped / "val.npy").read_bytes() == was


def test_the_seconds_of_every_process_count(stopped: Path) -> None:
    before = seconds_trained(stopped.parent)
    assert before > 0
    assert go_on(stopped) >= 0
    assert seconds_trained(stopped.parent) > before
    assert seconds_trained(stopped.parent.parent) == 0


def test_a_state_that_cannot_be_saved_is_logged_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / STATE_DIR).mkdir()
    monkeypatch.setattr("finetune.training.state.save_file", refuse)
    assert go_on(tmp_path / STATE_DIR) >= 0
    assert "the state could not be saved" in caplog.text
    assert not (tmp_path / STATE_DIR / TRAINING_FILE).exists()


def test_nothing_that_was_saved_is_a_pickle(stopped: Path) -> None:
    assert {path.name for path in stopped.iterdir()} >= {TRAINING_FILE, "val.npy", "train-1.npy"}
    for path in stopped.glob("*.npy"):
        np.load(path, allow_pickle=False)
    header = (stopped / TRAINING_FILE).read_bytes()[8:9]
    assert header == b"{"


# --------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def arguments(tmp_path: Path, cache_dir: Path) -> list[str]:
    data = write_noise_folders(tmp_path / "data", 16)
    (data / "red" / "broken.png").write_text("an image that cannot be read")
    return (
        f"--data {data} --backbone tests.support.tiny:build_trunk --freeze until:stem --epochs 3 "
        "--batch-size 6 --workers 1 --precision fp32 --augment light --lr 0.05 --backbone-lr 0.02 "
        "--save-minutes 0 --device cpu --no-cache --seed 2 --name tiny --cache-dir "
        f"{cache_dir} --output {tmp_path / 'runs'} --repository {tmp_path / 'checkpoints'}"
    ).split()


def only_run(tmp_path: Path) -> Path:
    (run_dir,) = (tmp_path / "runs").iterdir()
    return run_dir


def read_outcome(run_dir: Path, repository: Path, version: int) -> dict[str, Any]:
    """Everything that two equal runs must share."""
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for described in (metrics, *metrics["candidates"].values()):
        for timed in ("seconds", "engine"):
            del described[timed]
    metrics["verdict"] = {
        key: value for key, value in metrics["verdict"].items() if not key.endswith("seconds")
    }
    checkpoint = repository / "tiny" / str(version)
    config = json.loads((checkpoint / "config.json").read_text())
    with safe_open(run_dir / STATE_DIR / TRAINING_FILE, framework="np") as file:
        # The network's, the best epoch's, the optimizer's, and the generator's.
        trained = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    return {
        "trained": trained,
        "weights": (checkpoint / "model.safetensors").read_bytes(),
        "fingerprint": config["graft"]["fingerprint"],
        "golden": np.load(checkpoint / "golden.npz")["logits"].tobytes(),
        "metrics": metrics,
        "curves": read_curves(run_dir),
        "splits": (run_dir / "splits.csv").read_text(),
    }


@pytest.mark.long
def test_a_run_killed_again_and_again_ends_as_one_that_never_was(
    tmp_path: Path, arguments: list[str], run_forked: RunForked
) -> None:
    """With every option and no cache, so that processes decode images and outlive the killed one.

    Three times; GRAFT_KILLS=20 asks for more.
    """
    num_kills = int(os.environ.get("GRAFT_KILLS", "3"))
    every_option = (
        "--balance sampler --label-smoothing 0.1 --mix mixup --ema 0.6 --gradual 1 "
        "--layer-decay 0.5"
    )
    arguments = f"{' '.join(arguments)} {every_option}".replace(
        "--epochs 3 ", f"--epochs {max(3, num_kills)} "
    ).split()
    generator = random.Random(num_kills)

    def finetune(given: list[str], points: int = 0) -> tuple[int, str]:
        settings = {
            "POINTS": str(points),
            "SECONDS": str(generator.uniform(0, 0.05)),
            "ARGUMENTS": "|".join(given),
        }
        (done,) = run_forked(Program(code=RUN_AND_DIE, env=settings))
        return done.returncode, done.stderr

    code, said = finetune(arguments)
    assert code == 0, said
    expected = read_outcome(only_run(tmp_path), tmp_path / "checkpoints", 1)
    assert expected["metrics"]["training"]["best_epoch"] > 0
    only_run(tmp_path).rename(tmp_path / "undisturbed")
    for index in range(num_kills):
        given = ["--resume", str(only_run(tmp_path))] if index else arguments
        # Five points a step, six steps an epoch, an epoch a kill: it is never done before.
        code, said = finetune(given, generator.randint(1, 25))
        assert code == -signal.SIGKILL, said
    code, said = finetune(["--resume", str(only_run(tmp_path))])
    assert code == 0, said
    assert "resumed at epoch" in said
    assert list_versions(tmp_path / "checkpoints", "tiny") == [1, 2]
    found = read_outcome(only_run(tmp_path), tmp_path / "checkpoints", 2)
    assert {name for name in expected if found[name] != expected[name]} == set()


def test_a_run_stopped_after_it_published_publishes_nothing_twice(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("finetune.run.show_in_tensorboard", interrupt)
        assert main([*arguments, "--cache"]) == 130
    run_dir = only_run(tmp_path)
    assert capsys.readouterr().err.endswith(
        f"go on with\n  {Path(sys.executable).name} finetune/run.py --resume {run_dir}\n"
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, "graft"):
        assert main(["--resume", str(run_dir)]) == 0
    assert "resumed at the end of its epochs" in caplog.text
    assert f"checkpoint   {tmp_path / 'checkpoints' / 'tiny' / '1'}" in capsys.readouterr().out
    assert list_versions(tmp_path / "checkpoints", "tiny") == [1]
    assert read_curves(run_dir)["epoch/val_loss"][-1][0] == 3
    assert not (run_dir / STATE_DIR).exists()
    assert main(["--resume", str(run_dir)]) == 2


def test_a_probe_that_failed_after_it_published_is_kept_and_publishes_nothing_twice(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise GraftError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("finetune.run.write_report", refuse)
        assert main([*arguments, "--freeze", "backbone"]) == 2
    run_dir = only_run(tmp_path)
    assert f"{run_dir} is kept; after fixing this, go on with\n  " in capsys.readouterr().err
    # Another run's folder of the same name, elsewhere, is not this one.
    config = tmp_path / "checkpoints" / "tiny" / "1" / "config.json"
    assert find_published(tmp_path / "checkpoints", "tiny", read_id(run_dir)) == config.parent
    config.write_text(config.read_text().replace(read_id(run_dir) or "", "0" * 32))
    assert find_published(tmp_path / "checkpoints", "tiny", read_id(run_dir)) is None
    config.write_text(config.read_text().replace("0" * 32, read_id(run_dir) or ""))
    assert main(["--resume", str(run_dir)]) == 0
    assert list_versions(tmp_path / "checkpoints", "tiny") == [1]


def test_a_run_whose_options_cannot_be_written_leaves_no_folder(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.run.write_whole", refuse)
    assert main(arguments) == 2
    assert "config.yaml: it cannot be written: No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "runs").iterdir()) == []


# --------------------------------------------------------------------------- what a run folder says


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """The folder of a run that ended before its training."""
    run_dir = tmp_path / "runs" / "tiny-1"
    run_dir.mkdir(parents=True)
    data = write_noise_folders(tmp_path / "data", 4)
    (run_dir / "config.yaml").write_text(
        Options(data=str(data), lr=0.25, freeze="until:stem", name="tiny").to_yaml()
    )
    (run_dir / STATE_DIR).mkdir()
    return run_dir


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--lr", "0.5"],
            "--lr 0.5: the run in {} has 0.25, and a resumed run goes on as it began; leave the "
            "flag out",
        ),
        (["--freeze", "none"], "--freeze none: the run in {} has until:stem"),
        (["--no-pretrained"], "--pretrained False: the run in {} has True"),
        (["--seed", "3", "--epochs", "9"], "--epochs 9: the run in {} has 5"),
    ],
)
def test_a_flag_that_contradicts_the_run_is_refused(
    left: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["--resume", str(left), *flags]) == 2
    assert said.format(left) in capsys.readouterr().err
    assert left.exists()


def test_a_flag_equal_to_the_runs_own_is_accepted(left: Path) -> None:
    again = read_options(Options(resume=left, lr=0.25, name="tiny"))
    assert (
        again.model_dump()
        == Options(
            data=str(left.parent.parent / "data"), lr=0.25, freeze="until:stem", name="tiny"
        ).model_dump()
    )
    assert again.resume == left


def test_a_flag_that_changes_no_outcome_is_let_through(left: Path) -> None:
    resumed = read_options(Options(resume=left, workers=7, save_minutes=3.0))
    assert (resumed.workers, resumed.save_minutes, resumed.lr) == (7, 3.0, 0.25)


def test_an_option_edited_before_anything_was_trained_is_refused(
    left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choose(left, draw_splits(4))
    config = left / "config.yaml"
    config.write_text(config.read_text().replace("until:stem", "backbone"))
    assert main(["--resume", str(left)]) == 2
    assert (
        f"--resume {left}: --freeze was until:stem when the run began, and is backbone now; put "
        "it back" in capsys.readouterr().err
    )


def test_a_folder_that_is_no_run_or_is_done_is_refused(
    left: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(tmp_path / "nope")]) == 2
    assert f"--resume {tmp_path}/nope: there is no such folder; it" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path)]) == 2
    assert (
        f"--resume {tmp_path}: no config.yaml in it; it takes the folder of a run"
        in capsys.readouterr().err
    )
    (left / "metrics.json").write_text("{}")
    assert main(["--resume", str(left)]) == 2
    assert (
        f"--resume {left}: that run is done, its results are in metrics.json; --config "
        f"{left}/config.yaml repeats it" in capsys.readouterr().err
    )


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"folder": "/tm'])
def test_damaged_choices_of_a_run_raise(
    left: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (left / STATE_DIR).mkdir(exist_ok=True)
    (left / STATE_DIR / "run.json").write_text(content)
    assert main(["--resume", str(left)]) == 2
    assert "run.json: it cannot be read: " in (said := capsys.readouterr().err)
    assert f"; remove {left / STATE_DIR}, and --resume begins again" in said


def test_a_run_that_is_at_work_cannot_be_resumed(left: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from finetune.resume import lock\n"
        "with lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(left)], stdout=subprocess.PIPE, text=True, cwd=PROJECT_DIR
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(GraftError, match="another process is at work on this run"), lock(left):
            pass
        holder.kill()
    with lock(left):
        pass


def choose(left: Path, splits: Splits, readable: Splits | None = None) -> str:
    its_own = parse_options(Options, ["--config", str(left / "config.yaml")])
    fixed = fix_options(its_own.model_dump(mode="json"))
    return keep_choices(left, Choices(fixed, splits, readable or splits, "bf16", "because"))


def test_a_resumed_run_has_its_own_images_though_the_folder_grew(left: Path) -> None:
    before = draw_splits(4)
    choose(left, before)
    grown = draw_splits(6)
    swapped = Splits(("black", *grown.label_names), train=grown.val, val=grown.train)
    assert restore_splits(left, swapped) == before
    assert choose(left, before) == "because"
    assert read_options(Options(resume=left)).precision == "bf16"


def test_relative_paths_are_those_of_the_folder_in_which_the_run_was_started(
    left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(left.parent)
    choose(left, draw_splits(4))
    monkeypatch.chdir(PROJECT_DIR)
    assert read_options(Options(resume=Path(os.path.relpath(left)))).resume == left
    assert Path.cwd() == left.parent


@pytest.mark.parametrize(
    ("error", "num_notes"),
    [(GraftError("--data x: no images"), 1), (ImagesGoneError("gone; say --data NEW"), 0)],
)
def test_the_way_out_for_moved_images_is_said_once(
    left: Path, error: GraftError, num_notes: int
) -> None:
    with pytest.raises(GraftError) as caught, _moved_data_in_words(Options(resume=left)):
        raise error
    assert len(getattr(caught.value, "__notes__", ())) == num_notes


def test_images_that_are_gone_are_named(left: Path) -> None:
    splits = draw_splits(4)
    assert restore_splits(left, splits) is None
    choose(left, splits)
    with pytest.raises(
        GraftError,
        match="images of the run are gone: train 0 0; bring them back, say --data NEW ",
    ):
        restore_splits(left, Splits(splits.label_names, splits.train[1:], splits.val))
    with pytest.raises(
        GraftError,
        match="train 0 0: whether it can be read has changed since the run began; put it back as "
        "it was",
    ):
        choose(left, splits, Splits(splits.label_names, splits.train[1:], splits.val))


def test_curves_without_a_state_begin_again(left: Path) -> None:
    for _ in range(2):
        trim_events(left)
        monitor = Recorder(left)
        monitor.scalar("a", 1.0, 1)
        monitor.close()
    assert read_curves(left) == {"a": [(1, 1.0)]}
    assert len(event_sizes(left)) == 1
