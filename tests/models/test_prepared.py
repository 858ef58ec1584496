"""A prepared backbone is made once, kept whole by what shapes it, and used without torch."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from models.backbone.build import Backbone, backbone_tensors, build_backbone
from models.backbone.custom import CustomNetwork
from models.checkpoint import fingerprint
from models.engine.engine import run
from models.engine.openvino_engine import OpenVINOEngine, supports_bf16
from models.engine.processor import cpu_name, num_cpus
from models.errors import GraftError
from models.prepared import (
    PreparedBackbone,
    build_engine,
    prepare_backbone,
    read_prepared,
    resolve_device,
    write_prepared,
)
from models.preprocess import Preprocess
from tests.conftest import RunForked
from tests.support import tiny
from tests.support.forked import Program

PREPARE = """
import sys, time
from pathlib import Path
from models.prepared import prepare_backbone
prepared = prepare_backbone(
    {name!r},
    weights={weights},
    pretrained=True,
    image_size=None,
    cache_dir=Path({cache_dir!r}),
    scratch_dir=Path({scratch_dir!r}),
)
print(prepared.folder)
print(prepared.fingerprint)
print("torch" in sys.modules)
"""


def prepare(
    name: str, cache_dir: Path | None, scratch_dir: Path, **options: Any
) -> PreparedBackbone:
    arguments: dict[str, Any] = {"weights": None, "pretrained": True, "image_size": None, **options}
    return prepare_backbone(name, cache_dir=cache_dir, scratch_dir=scratch_dir, **arguments)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedBackbone, Path, Path]:
    """A small network prepared from a weights file: itself, its cache folder and the file."""
    folder = tmp_path_factory.mktemp("small")
    weights = write_weights(folder / "weights.pth", 1)
    return (
        prepare("test_resnet", folder / "cache", folder, weights=weights),
        folder / "cache",
        weights,
    )


def tiny_backbone() -> Backbone:
    """A network that converts in no time, with BatchNorm."""
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Conv2d(3, 4, 9, stride=8), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return Backbone(
        "own:tiny",
        CustomNetwork(trunk, 4),
        "head",
        Preprocess(height=48, width=48),
        "none",
        None,
        "backbone.",
    )


def write_weights(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    return path


def test_it_says_what_was_prepared(prepared: PreparedBackbone, cache_dir: Path) -> None:
    assert prepared.folder.parent == cache_dir / "backbones"
    assert (prepared.name, prepared.classifier, prepared.num_features) == (
        "tf_efficientnet_lite0",
        "classifier",
        1280,
    )
    assert (prepared.is_pretrained, prepared.license) == (True, "apache-2.0")
    assert prepared.config["architecture"] == "tf_efficientnet_lite0"
    tensors = prepared.read_tensors()
    assert len(tensors) == 294
    assert not any(name.startswith("classifier") for name in tensors)
    assert prepared.fingerprint == fingerprint(
        "tf_efficientnet_lite0", tensors, prepared.preprocess
    )
    assert prepared.fingerprint == build_fingerprint()
    assert {"backbone.bin", "backbone.xml", "config.json", "model.safetensors"} <= {
        path.name for path in prepared.folder.iterdir()
    }


def build_fingerprint() -> str:
    """Of the network as built, not as stored."""
    backbone = build_backbone("tf_efficientnet_lite0", num_classes=9, seed=4)
    return fingerprint("tf_efficientnet_lite0", backbone_tensors(backbone), backbone.preprocess)


def test_a_second_time_it_comes_from_the_cache_without_torch(
    prepared: PreparedBackbone, cache_dir: Path, run_python: Any, tmp_path: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in prepared.folder.iterdir()}
    program = PREPARE.format(
        name="tf_efficientnet_lite0",
        weights=None,
        cache_dir=str(cache_dir),
        scratch_dir=str(tmp_path),
    )
    done = run_python(program)
    assert done.stdout.split() == [str(prepared.folder), prepared.fingerprint, "False"], done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in prepared.folder.iterdir()} == before
    assert read_prepared(prepared.folder) == prepared


def test_the_content_of_a_weights_file_decides_and_not_its_name(
    small: tuple[PreparedBackbone, Path, Path], tmp_path: Path
) -> None:
    prepared, cache, weights = small
    renamed = Path(shutil.copy(weights, tmp_path / "renamed.pth"))
    assert prepare("test_resnet", cache, tmp_path, weights=renamed) == prepared
    rewritten = prepare("test_resnet", cache, tmp_path, weights=write_weights(renamed, 2))
    assert rewritten.folder != prepared.folder
    assert rewritten.fingerprint != prepared.fingerprint
    assert not np.array_equal(
        rewritten.read_tensors()["conv1.0.weight"], prepared.read_tensors()["conv1.0.weight"]
    )


def test_the_input_size_decides(small: tuple[PreparedBackbone, Path, Path], tmp_path: Path) -> None:
    prepared, cache, weights = small
    smaller = prepare("test_resnet", cache, tmp_path, weights=weights, image_size=64)
    assert smaller.folder != prepared.folder
    assert smaller.fingerprint != prepared.fingerprint
    engine = build_engine(
        smaller.folder,
        smaller.preprocess,
        smaller.config,
        device="cpu",
        precision="fp32",
        batch_size=1,
        num_streams=1,
    )
    assert run(engine, np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, smaller.num_features)
    engine.close()


def test_processes_that_prepare_at_once_agree_and_leave_one_folder(
    run_forked: RunForked, tmp_path: Path
) -> None:
    weights = write_weights(tmp_path / "weights.pth", 1)
    program = PREPARE.format(
        name="test_resnet",
        weights=f"Path({str(weights)!r})",
        cache_dir=str(tmp_path / "cache"),
        scratch_dir=str(tmp_path / "scratch"),
    )
    results = run_forked(*[Program(code=program)] * 2)
    assert [done.returncode for done in results] == [0, 0], results
    answers = {tuple(done.stdout.split()[:2]) for done in results}
    assert len(answers) == 1
    folder = Path(answers.pop()[0])
    assert list((tmp_path / "cache" / "backbones").iterdir()) == [folder]
    assert read_prepared(folder).num_features > 0


def test_random_weights_are_not_kept(tmp_path: Path) -> None:
    prepared = prepare("test_resnet", tmp_path / "cache", tmp_path / "scratch", pretrained=False)
    assert prepared.folder == tmp_path / "scratch" / "backbone"
    assert not prepared.is_pretrained
    assert not (tmp_path / "cache").exists()


def test_a_users_own_network_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ownnet.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    conv = nn.Conv2d(3, 4, 9, stride=8)\n"
        "    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    prepared = prepare("ownnet:build", tmp_path / "cache", tmp_path / "scratch", image_size=48)
    del sys.modules["ownnet"]
    assert prepared.folder == tmp_path / "scratch" / "backbone"
    assert (prepared.num_features, prepared.classifier, prepared.config["architecture"]) == (
        4,
        "head",
        "ownnet:build",
    )
    assert not (tmp_path / "cache").exists()
    engine = OpenVINOEngine(
        prepared.openvino_path, prepared.preprocess, precision="fp32", batch_size=1, num_streams=1
    )
    assert run(engine, np.zeros((2, 48, 48, 3), np.uint8)).shape == (2, 4)
    engine.close()


def test_without_a_cache_folder_nothing_is_kept(
    small: tuple[PreparedBackbone, Path, Path], tmp_path: Path
) -> None:
    _, _, weights = small
    assert (
        prepare("test_resnet", None, tmp_path / "scratch", weights=weights).folder
        == tmp_path / "scratch" / "backbone"
    )


def test_a_weights_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=r"gone\.pth: there is no such weights file"):
        prepare("test_resnet", tmp_path / "cache", tmp_path, weights=tmp_path / "gone.pth")


def test_a_cache_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(GraftError, match=r"the converted backbone could not be written to .*cache"):
        write_prepared(tiny_backbone(), tmp_path / "cache" / "backbones" / "tiny")


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    class Unconvertible(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            eigenvalues: torch.Tensor = torch.linalg.eigvals(images.mean(dim=1))
            return eigenvalues.real

    backbone = dataclasses.replace(tiny_backbone(), model=CustomNetwork(Unconvertible(), 48))
    with pytest.raises(GraftError, match=r"OpenVINO cannot convert own:tiny: ."):
        write_prepared(backbone, tmp_path / "backbones" / "broken")
    assert list((tmp_path / "backbones").iterdir()) == []


def test_what_another_run_wrote_meanwhile_is_as_good(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    first = write_prepared(backbone, tmp_path / "here")
    second = write_prepared(backbone, tmp_path / "here")
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert (
        json.loads((tmp_path / "here" / "config.json").read_text())["fingerprint"]
        == first.fingerprint
    )


def test_preparing_leaves_the_network_in_the_mode_it_was_in(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    backbone.model.train()
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    write_prepared(backbone, tmp_path / "here")
    assert backbone.model.training
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items()
    )


def test_the_search_for_batch_and_streams_is_remembered(tmp_path: Path) -> None:
    prepared = write_prepared(tiny.build(), tmp_path / "tiny")
    first = prepared.open_engine("cpu", "fp32")
    first.close()
    again = prepared.open_engine("cpu", "fp32")
    again.close()
    # The speed is measured, so two searches would not agree on it to the last digit.
    assert again.info == first.info
    path = prepared.folder / "engine-fp32.json"
    recorded = json.loads(path.read_text())
    for changed in (
        {"num_cpus": 1000},
        {"device": "another"},
        {"engine": "openvino 2020.1"},
        {"batch_size": 0},
        {"precision": None},
    ):
        path.write_text(json.dumps({**recorded, **changed}))
        other = prepared.open_engine("cpu", "fp32")
        other.close()
        assert other.info != again.info
        assert json.loads(path.read_text()) == {
            **other.info.to_dict(),
            "num_cpus": recorded["num_cpus"],
        }


def test_an_engine_that_is_known_is_loaded_with_its_first_batch(
    prepared: PreparedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared.open_engine("cpu", "fp32").close()
    loaded: list[OpenVINOEngine] = []

    def open_it(*args: Any, **options: Any) -> OpenVINOEngine:
        loaded.append(OpenVINOEngine(*args, **options))
        return loaded[-1]

    monkeypatch.setattr("models.prepared.OpenVINOEngine", open_it)
    never = prepared.open_engine("cpu", "fp32")
    never.close()
    assert not loaded
    engine = prepared.open_engine("cpu", "fp32")
    at_once = build_engine(
        prepared.folder,
        prepared.preprocess,
        prepared.config,
        device="cpu",
        precision="fp32",
        batch_size=1,
    )
    loaded.clear()
    crops = np.random.default_rng(0).integers(
        0, 256, (5, prepared.preprocess.height, prepared.preprocess.width, 3), np.uint8
    )
    found = [engine.submit(crops) for _ in range(3)]
    for future in found:
        np.testing.assert_array_equal(future.result(), run(at_once, crops))
    assert len(loaded) == 1
    assert (engine.num_features, engine.num_slots) == (at_once.num_features, at_once.num_slots)
    for one in (engine, at_once):
        one.close()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "backbone.bin", "backbone.xml", "config.json"]
)
def test_a_damaged_backbone_in_the_cache_is_made_again(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = write_weights(tmp_path / "weights.pth", 1)
    good = prepare("test_resnet", tmp_path / "cache", tmp_path, weights=weights)
    damaged = bytearray((good.folder / name).read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (good.folder / name).write_bytes(damaged)
    with caplog.at_level("WARNING"):
        again = prepare("test_resnet", tmp_path / "cache", tmp_path, weights=weights)
    assert "damaged" in caplog.text
    assert again.fingerprint == good.fingerprint
    assert read_prepared(again.folder) == again


def test_the_wait_for_a_conversion_is_announced_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = write_weights(tmp_path / "weights.pth", 1)
    with caplog.at_level("INFO", "graft"):
        prepare("test_resnet", tmp_path / "cache", tmp_path, weights=weights)
        assert caplog.messages[0] == "converting test_resnet for this machine (once) …"
        caplog.clear()
        prepare("test_resnet", tmp_path / "cache", tmp_path, weights=weights)
        assert not caplog.messages
        prepare("test_resnet", None, tmp_path, weights=weights)
        assert caplog.messages[0] == "converting test_resnet for this machine …"


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_is_refused_where_there_is_none_and_auto_is_the_cpu() -> None:
    with pytest.raises(GraftError, match=r"--device.* torch .*no CUDA device.*auto, or say cpu"):
        resolve_device("cuda")
    assert resolve_device("auto") == "cpu"
