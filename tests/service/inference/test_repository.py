"""Which checkpoints are served, the newest good version of each model, and why others are not."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file, save

from models.checkpoint import CONFIG_FILE, OPENVINO_FILE, WEIGHTS_FILE
from models.errors import GraftError
from models.prepared import resolve_device
from service.errors import RequestError
from service.inference.repository import explain_empty, load_snapshot
from service.inference.server import Server
from service.settings import Settings, load_settings
from tests.support.permissions import as_nobody, make_open_folder
from tests.support.servers import change_config, change_file, copy_checkpoint
from tests.support.shared import HANG_SECONDS


def settings(root: Path, **more: Any) -> Settings:
    return Settings(CHECKPOINTS=root, **more)


def test_the_newest_version_of_every_model_is_served_on_one_shared_backbone(
    colors: Path, tmp_path: Path
) -> None:
    for name, version in (("one", 1), ("one", 2), ("one", 10), ("two", 3)):
        copy_checkpoint(colors, tmp_path, name, version)
    repository = load_snapshot(settings(tmp_path))
    assert {name: served.latest for name, served in repository.models.items()} == {
        "one": 10,
        "two": 3,
    }
    assert repository.refused == ()
    assert repository.models["one"].default.backbone is repository.models["two"].default.backbone
    assert len(repository.backbones) == 1


def test_a_corrupted_newest_version_is_refused_and_the_one_before_serves(
    colors: Path, tmp_path: Path
) -> None:
    copy_checkpoint(colors, tmp_path, "colors", 1)
    broken = copy_checkpoint(colors, tmp_path, "colors", 2)
    change_file(broken / WEIGHTS_FILE, lambda data: data[:-1] + bytes([data[-1] ^ 1]), rehash=False)
    repository = load_snapshot(settings(tmp_path))
    assert repository.models["colors"].default.checkpoint.version == 1
    (refusal,) = repository.refused
    assert (refusal.name, refusal.version) == ("colors", 2)
    assert WEIGHTS_FILE in refusal.reason
    assert str(tmp_path) not in refusal.reason


def test_a_head_that_is_not_the_one_of_the_golden_images_is_refused(
    colors: Path, tmp_path: Path
) -> None:
    changed = copy_checkpoint(colors, tmp_path, "colors", 1)
    head = f"{json.loads((changed / CONFIG_FILE).read_text())['graft']['head']}.weight"

    def turn_head(data: bytes) -> bytes:
        tensors = load_file(changed / WEIGHTS_FILE)
        return save({**tensors, head: tensors[head][::-1].copy()})

    change_file(changed / WEIGHTS_FILE, turn_head, rehash=True)
    repository = load_snapshot(settings(tmp_path))
    assert repository.models == {}
    assert "golden" in repository.refused[0].reason


def test_a_backbone_that_openvino_cannot_read_is_refused(colors: Path, tmp_path: Path) -> None:
    copy_checkpoint(colors, tmp_path, "good", 1)
    broken = copy_checkpoint(colors, tmp_path, "broken", 1)
    change_file(broken / OPENVINO_FILE, lambda data: data[: len(data) // 2], rehash=True)
    change_config(broken, lambda config: config["graft"].update(fingerprint="0" * 64))
    repository = load_snapshot(settings(tmp_path))
    assert set(repository.models) == {"good"}
    assert [refusal.name for refusal in repository.refused] == ["broken"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"graft": 1}', '{"graft": {"format_version": 99}}'],
    ids=lambda text: text or "empty",
)
def test_an_invalid_config_is_refused(colors: Path, tmp_path: Path, text: str) -> None:
    broken = copy_checkpoint(colors, tmp_path, "broken", 1)
    (broken / CONFIG_FILE).write_text(text)
    repository = load_snapshot(settings(tmp_path))
    assert repository.models == {}
    assert len(repository.refused) == 1


def test_an_invalid_preprocess_is_refused(colors: Path, tmp_path: Path) -> None:
    broken = copy_checkpoint(colors, tmp_path, "broken", 1)
    change_config(broken, lambda config: config["graft"]["preprocess"].update(height="tall"))
    assert [refusal.name for refusal in load_snapshot(settings(tmp_path)).refused] == ["broken"]


def test_the_search_recorded_in_the_checkpoint_is_taken_over(colors: Path, tmp_path: Path) -> None:
    copied = copy_checkpoint(colors, tmp_path, "colors", 1)
    change_config(
        copied, lambda config: config["graft"]["engine"].update(batch_size=3, num_streams=1)
    )
    info = load_snapshot(settings(tmp_path)).models["colors"].default.info
    assert (info.batch_size, info.num_streams) == (3, 1)


def test_precision_is_configured_or_recorded_or_the_devices_best(
    colors: Path, tmp_path: Path
) -> None:
    copied = copy_checkpoint(colors, tmp_path, "colors", 1)
    assert (
        load_snapshot(settings(tmp_path, precision="fp32")).models["colors"].default.info.precision
        == "fp32"
    )
    change_config(copied, lambda config: config["graft"]["engine"].update(precision="fp32"))
    assert load_snapshot(settings(tmp_path)).models["colors"].default.info.precision == "fp32"
    # The CPU engine has no fp16: a checkpoint saved on CUDA gets this CPU's best precision.
    change_config(copied, lambda config: config["graft"]["engine"].update(precision="fp16"))
    assert load_snapshot(settings(tmp_path)).models["colors"].default.info.precision in (
        "bf16",
        "fp32",
    )


@pytest.mark.parametrize("folder", [".", "missing"])
def test_a_repository_without_checkpoints_is_empty(tmp_path: Path, folder: str) -> None:
    (tmp_path / "colors" / "1").mkdir(parents=True)
    repository = load_snapshot(settings(tmp_path / folder))
    assert repository.models == {}
    assert repository.refused == ()


def test_a_model_that_may_not_be_read_is_refused_alone_and_served_on(
    colors: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make_open_folder() as root:
        for name in ("good", "served"):
            copy_checkpoint(colors, root, name, 1)
        start = load_snapshot(settings(root))
        for name, version in (("good", 2), ("private", 1), ("lost+found", 1)):
            copy_checkpoint(colors, root, name, version)
        closed = ("good/2", "private", "served", "lost+found")
        for name in closed:
            (root / name).chmod(0)
        with as_nobody():
            refused = load_snapshot(settings(root), start)
            load_snapshot(settings(root), refused)
        assert refused.models == start.models
        assert [(one.name, one.version) for one in refused.refused] == [
            ("good", 2),
            ("private", None),
            ("served", None),
        ]
        for refusal in refused.refused:
            assert "Permission denied" in refusal.reason
            assert str(root) not in refusal.reason
        # Once, not at every look.
        assert caplog.text.count("refused the model private: its folder cannot be read") == 1
        for name in closed:
            (root / name).chmod(0o755)
        latest = {
            name: served.latest
            for name, served in load_snapshot(settings(root), refused).models.items()
        }
        assert latest == {"good": 2, "private": 1, "served": 1}


@contextmanager
def killed_engines() -> Iterator[None]:
    """Every engine's process is killed while it loads, as by the system when memory runs out."""
    is_over = threading.Event()

    def kill() -> None:
        while not is_over.wait(0.01):
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    if "service.engine.worker" in child.cmdline():
                        child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        is_over.set()
        killer.join()


@contextmanager
def few_descriptors() -> Iterator[None]:
    """A file can be opened, the connections of an engine's process cannot."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (killed_engines, "the engine's process ended with -9 while it loaded"),
        (few_descriptors, "it cannot be loaded (OSError)"),
        (as_nobody, "Permission denied"),
    ],
)
def test_what_is_not_the_files_fault_is_tried_again_in_the_same_precision(
    colors: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: Callable[[], AbstractContextManager[None]],
    reason: str,
) -> None:
    with make_open_folder() as root:
        copied = copy_checkpoint(colors, root, "colors", 1)
        change_config(copied, lambda config: config["graft"]["engine"].update(precision="fp32"))
        (copied / CONFIG_FILE).chmod(0o600)
        with trouble():
            refused = load_snapshot(settings(root))
        assert refused.models == {}
        assert [reason in one.reason for one in refused.refused] == [True]
        # Not at once.
        assert load_snapshot(settings(root), refused).models == {}
        assert "which this device lacks" not in caplog.text
        monkeypatch.setattr("service.inference.repository._RETRY_SECONDS", 0)
        with trouble():
            refused = load_snapshot(settings(root))
        after = load_snapshot(settings(root), refused)
        assert after.models["colors"].default.info.precision == "fp32"
        assert after.refused == ()


def test_a_version_that_cannot_be_read_again_is_served_on(colors: Path) -> None:
    with make_open_folder() as root:
        copied = copy_checkpoint(colors, root, "colors", 1)
        start = load_snapshot(settings(root))
        change_config(copied, lambda config: config["graft"].update(temperature=2.0))
        (copied / CONFIG_FILE).chmod(0o600)
        with as_nobody():
            after = load_snapshot(settings(root), start)
            after = load_snapshot(settings(root), after)
        assert after.models["colors"].default is start.models["colors"].default
        assert len(after.refused) == 1


def test_a_start_that_fails_is_tried_again(colors: Path) -> None:
    async def scenario(root: Path) -> None:
        server = Server(settings(root, poll_seconds=0.1))
        with as_nobody():
            await server.start()
            await asyncio.sleep(1)
        with pytest.raises(RequestError, match="the server's log says why"):
            server.check_ready()
        root.chmod(0o755)
        async with asyncio.timeout(HANG_SECONDS):
            while not server.is_loaded:
                await asyncio.sleep(0.05)
        assert set(server.check_ready().models) == {"good"}
        await server.stop()

    with make_open_folder() as root:
        copy_checkpoint(colors, root, "good", 1)
        root.chmod(0)
        asyncio.run(scenario(root))


def test_a_pipe_in_the_place_of_a_file_is_named(colors: Path, tmp_path: Path) -> None:
    for name in ("rollout", "golden", "good"):
        copy_checkpoint(colors, tmp_path, name, 1)
    os.mkfifo(tmp_path / "rollout" / "rollout.json")
    (tmp_path / "golden" / "1" / "golden.npz").unlink()
    os.mkfifo(tmp_path / "golden" / "1" / "golden.npz")
    found = load_snapshot(settings(tmp_path))
    assert set(found.models) == {"rollout", "good"}
    reasons = {(one.name, one.version): one.reason for one in found.refused}
    assert reasons == {
        ("rollout", None): "rollout.json is no file; put a JSON file there, or remove it",
        ("golden", 1): "golden.npz is a pipe, socket or device; put the file itself there",
    }


@pytest.mark.parametrize(
    ("below", "message"),
    [
        ("nowhere", "{root}/nowhere does not exist"),
        ("photos/cat/1.jpg", "{root}/photos/cat/1.jpg is not a folder"),
        ("models/odd", "{root}/models/odd is a model; say CHECKPOINTS={root}/models"),
        ("models/odd/1", "{root}/models/odd/1 is a version of a model; say CHECKPOINTS={root}/mod"),
        (".", "{root} has the models in models/; say CHECKPOINTS={root}/models"),
        ("photos", "{root}/photos is a folder of images; for a model of them say make run ARGS="),
        ("photos/cat", "{root}/photos/cat is a folder of images"),
        ("empty", ""),
    ],
)
def test_a_folder_that_is_no_repository_is_called_what_it_is(
    tmp_path: Path, below: str, message: str
) -> None:
    for file in ("models/odd/1/config.json", "photos/cat/1.jpg", "empty/notes.txt"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    found = explain_empty(tmp_path / below)
    assert found.startswith(message.format(root=tmp_path))
    assert bool(found) == bool(message)


def test_a_folder_called_all_is_refused(colors: Path, tmp_path: Path) -> None:
    for name in ("all", "colors"):
        copy_checkpoint(colors, tmp_path, name, 1)
    found = load_snapshot(settings(tmp_path))
    assert set(found.models) == {"colors"}
    assert [(one.name, one.version) for one in found.refused] == [("all", None)]
    assert "give this one another name" in found.refused[0].reason


def test_cuda_is_an_error_only_where_it_is_asked_for_and_missing() -> None:
    assert resolve_device("cpu") == "cpu"
    if resolve_device("auto") == "cuda":
        pytest.skip("this machine has CUDA")
    with pytest.raises(GraftError, match="GRAFT_DEVICE"):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("GRAFT_MAX_IMAGES", "many", "a whole number from 1 up"),
        ("GRAFT_MAX_IMAGES", "0", "a whole number from 1 up"),
        ("GRAFT_DEADLINE_SECONDS", "-1", "a number above 0"),
        ("GRAFT_DEVICE", "tpu", "auto, cpu or cuda"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(GraftError, match=f"^{variable}={value}: it must be {allowed}$"):
        load_settings()


def test_more_images_in_a_request_than_the_queue_holds_is_a_bad_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRAFT_MAX_QUEUE_IMAGES", "10")
    with pytest.raises(GraftError, match="GRAFT_MAX_QUEUE_IMAGES"):
        load_settings()


def test_checkpoints_beside_the_code_are_found_from_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CHECKPOINTS", raising=False)
    monkeypatch.chdir(tmp_path)
    beside = load_settings().checkpoints
    assert beside.is_absolute()
    assert (beside.parent / "service" / "app.py").is_file()
    (tmp_path / "checkpoints").mkdir()
    assert load_settings().checkpoints.resolve() == tmp_path / "checkpoints"
