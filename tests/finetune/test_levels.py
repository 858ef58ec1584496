"""A whole run with `--levels auto`: what it publishes, what timm reads of it, what serves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from finetune.config import Options
from finetune.probe import levels
from finetune.report.publishing import publish_again
from finetune.run import run
from models.checkpoint import (
    LEVEL_HEAD_FILE,
    CheckpointError,
    check_golden,
    load_checkpoint,
    logits,
)
from models.engine.engine import run as run_engine
from models.prepared import build_engine
from service.inference.predictor import scores
from service.inference.repository import load_snapshot
from service.settings import Settings
from tests.support.images import write_noise_folders
from tests.support.servers import change_config, change_file

CHOSEN = "all"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose head reads all levels of timm's smallest EfficientNet."""
    folder = tmp_path_factory.mktemp("levels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levels, "choose_set", lambda losses: list(range(len(losses)))[2])
        return run(
            Options(
                data=str(write_noise_folders(folder / "data", 10)),
                backbone="test_efficientnet",
                pretrained=False,
                image_size=64,
                levels="auto",
                precision="fp32",
                output=folder / "runs",
                repository=folder / "checkpoints",
            )
        )


def metrics_of(published: Path) -> dict[str, Any]:
    (run_dir,) = (published.parents[2] / "runs").iterdir()
    metrics: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    return metrics


def test_metrics_and_card_have_both_heads(published: Path) -> None:
    found = metrics_of(published)["levels"]
    assert found["chosen"] == CHOSEN
    assert found["num_features"] == 808
    assert list(found["losses"]) == ["last", "upper half", "all", "all and grid"]
    assert (
        f"last level alone, which timm reads, has val accuracy {found['last']['accuracy']:.4f}"
        in (published / "README.md").read_text()
    )


def test_the_head_on_all_levels_answers_as_at_save_time(published: Path) -> None:
    checkpoint = load_checkpoint(published)
    assert checkpoint.head_weight.shape == (3, 808)
    engine = build_engine(published, checkpoint.preprocess, checkpoint.config, precision="fp32")
    images = np.stack([checkpoint.preprocess(image) for image in checkpoint.golden.images])
    features = run_engine(engine, images)
    engine.close()
    assert features.shape[1] == 1384
    np.testing.assert_allclose(logits(checkpoint, features), checkpoint.golden.logits, atol=1e-3)
    check_golden(checkpoint, logits(checkpoint, features))


def test_timm_reads_the_head_on_the_last_level(published: Path) -> None:
    checkpoint = load_checkpoint(published)
    model = timm.create_model(f"local-dir:{published}", pretrained=True).eval()
    crop = checkpoint.preprocess(checkpoint.golden.images[0])
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (checkpoint.preprocess.mean, checkpoint.preprocess.std)
    )
    image = ((torch.from_numpy(crop.copy()).permute(2, 0, 1) / 255 - mean) / std)[None]
    with torch.inference_mode():
        features = model.forward_head(model.forward_features(image), pre_logits=True)
        found, expected = model(image), model.get_classifier()(features)
    assert features.shape[1] == 256
    assert torch.allclose(found, expected)
    assert not np.allclose(found.numpy(), checkpoint.golden.logits[:1], atol=1e-2)


def test_the_service_answers_by_the_head_on_all_levels(published: Path) -> None:
    snapshot = load_snapshot(Settings(CHECKPOINTS=published.parents[1]))
    try:
        assert not snapshot.refused
        model = snapshot.models[published.parent.name].default
        crop = model.backbone.preprocess(load_checkpoint(published).golden.images[0])
        features = model.backbone.engine.run(crop[None])
        expected = load_checkpoint(published).golden.logits[:1]
        np.testing.assert_allclose(scores(model, features), model.task.scores(expected), atol=1e-3)
    finally:
        for backbone in snapshot.backbones:
            backbone.engine.close()


def test_a_version_that_is_published_again_has_both_heads(published: Path, tmp_path: Path) -> None:
    again = publish_again(published, tmp_path, "again", new_labels=False)
    for name in (LEVEL_HEAD_FILE, "model.safetensors", "golden.npz"):
        assert (again / name).read_bytes() == (published / name).read_bytes()
    assert load_checkpoint(again).head_weight.shape == (3, 808)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda copy: (copy / LEVEL_HEAD_FILE).unlink(), "No such file"),
        (
            lambda copy: change_file(copy / LEVEL_HEAD_FILE, lambda data: data[:-4], rehash=False),
            "its hash differs",
        ),
        (
            lambda copy: change_file(copy / LEVEL_HEAD_FILE, lambda data: data[:-4], rehash=True),
            "not a checkpoint that can be read",
        ),
        (
            lambda copy: change_config(copy, lambda config: config.pop("levels")),
            r"the head is \(3, 808\)",
        ),
        (
            lambda copy: change_config(
                copy, lambda config: config["graft"].update(format_version=3)
            ),
            "this Graft reads the formats 1 and 2",
        ),
    ],
    ids=["gone", "other bytes", "cut short", "no such set", "of the future"],
)
def test_a_damaged_head_is_refused(
    published: Path, tmp_path: Path, change: Any, message: str
) -> None:
    copy = publish_again(published, tmp_path, "copy", new_labels=False)
    change(copy)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copy)


def test_of_the_last_level_alone_the_checkpoint_is_as_before(tmp_path: Path) -> None:
    checkpoint = run(
        Options(
            data=str(write_noise_folders(tmp_path / "data", 6)),
            backbone="test_efficientnet",
            pretrained=False,
            image_size=64,
            levels="last",
            output=tmp_path / "runs",
            repository=tmp_path / "checkpoints",
        )
    )
    assert json.loads((checkpoint / "config.json").read_text())["graft"]["format_version"] == 1
    assert not (checkpoint / LEVEL_HEAD_FILE).exists()
    assert metrics_of(checkpoint)["levels"] is None


def train_tiny(folder: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """A run that trains the last blocks; gives the tuned candidate's folder and its metrics."""
    checkpoint = run(
        Options(
            **{
                "data": str(write_noise_folders(folder / "data", 12, brighter=30)),
                "backbone": "test_efficientnet",
                "pretrained": False,
                "image_size": 64,
                "freeze": "until:blocks.3",
                "epochs": 1,
                "publish": "tuned",
                "explain": "no",
                "precision": "fp32",
                "output": folder / "runs",
                "repository": folder / "checkpoints",
                **changes,
            }
        )
    )
    return checkpoint, metrics_of(checkpoint)["candidates"]["tuned"]


def test_after_epochs_that_taught_nothing_the_head_is_solved_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels, "choose_set", lambda losses: list(range(len(losses)))[2])
    checkpoint, tuned = train_tiny(tmp_path, head_init="zeros", lr=1e-6, backbone_lr=1e-8)
    assert tuned["levels"]["chosen"] == CHOSEN
    assert tuned["levels"]["last"]["accuracy"] < tuned["val"]["accuracy"]
    assert load_checkpoint(checkpoint).head_weight.shape == (3, 808)
    # The trained network's own head, which has hardly left zero, is the one that timm reads.
    model = timm.create_model(f"local-dir:{checkpoint}", pretrained=True)
    assert 0 < model.get_classifier().weight.abs().max() < 1e-3
    snapshot = load_snapshot(Settings(CHECKPOINTS=checkpoint.parents[1]))
    try:
        assert not snapshot.refused
    finally:
        for backbone in snapshot.backbones:
            backbone.engine.close()


def test_a_trained_head_stays_where_one_solved_anew_is_no_better(tmp_path: Path) -> None:
    checkpoint, tuned = train_tiny(tmp_path, head_init="probe", lr=1e-6, backbone_lr=1e-8)
    assert tuned["levels"] is None
    assert load_checkpoint(checkpoint).head_weight.shape == (3, 256)


def test_a_head_solved_anew_on_the_last_level_is_the_one_that_timm_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels, "choose_set", lambda _: 0)
    data = str(write_noise_folders(tmp_path / "bright", 40, brighter=120))
    checkpoint, tuned = train_tiny(tmp_path, data=data, head_init="zeros", lr=1e-6, epochs=1)
    assert tuned["levels"]["chosen"] == "last"
    assert tuned["levels"]["last"]["accuracy"] == tuned["val"]["accuracy"]
    head = load_checkpoint(checkpoint).head_weight
    model = timm.create_model(f"local-dir:{checkpoint}", pretrained=True)
    assert np.array_equal(model.get_classifier().weight.detach().numpy(), head)
    assert np.abs(head).max() > 1e-2
