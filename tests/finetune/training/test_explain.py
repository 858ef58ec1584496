"""Heat maps are hot where the answer was made, whatever the network is made of."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from finetune.probe.solve import Head
from finetune.report.plots import draw_heat
from finetune.run import run
from finetune.training.explain import _from_maps, _to_maps, explain
from models.backbone.build import build_backbone
from models.errors import GraftError
from models.images import Pixels
from models.prepared import PreparedBackbone, write_prepared
from tests.support.images import write_noise_folders
from tests.support.tiny import options

SIZE = 32


pytestmark = pytest.mark.usefixtures("one_thread")


class Brightness(nn.Module):
    """Features are how red and how green an image is, from 8x8 places; `layout` is its stage's."""

    def __init__(self, layout: str = "maps") -> None:
        super().__init__()
        self.layout = layout
        self.stage = nn.Sequential(nn.Conv2d(3, 2, 4, stride=4), nn.ReLU(), Laid(layout))
        with torch.no_grad():
            state = self.stage[0].state_dict()
            state["bias"].zero_()
            state["weight"].zero_()
            state["weight"][0, 0] = state["weight"][1, 1] = 1 / 16
        self.pretrained_cfg = {"input_size": (3, SIZE, SIZE), "mean": (0, 0, 0), "std": (1, 1, 1)}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.stage(images)
        if self.layout == "tokens":
            return output[:, 1:].mean(dim=1)
        return output.mean(dim=(1, 2) if self.layout == "channels last" else (2, 3))


class Laid(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if self.layout == "tokens":
            return torch.cat((torch.zeros(len(maps), 1, 2), maps.flatten(2).transpose(1, 2)), dim=1)
        return maps.movedim(1, -1) if self.layout == "channels last" else maps


class Blind(nn.Module):
    """It sees one pixel, and no stage of it has places."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.stage(images[..., 0, 0])
        return features


class Rounded(Brightness):
    """No gradient passes its end."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).detach()


def build_maps() -> nn.Module:
    return Brightness()


def build_channels_last() -> nn.Module:
    return Brightness("channels last")


def build_tokens() -> nn.Module:
    return Brightness("tokens")


def prepare(name: str, folder: Path) -> PreparedBackbone:
    return write_prepared(
        build_backbone(
            f"tests.finetune.training.test_explain:{name}", num_classes=2, pretrained=False
        ),
        folder / "prepared",
    )


HEAD = Head(np.eye(2, dtype=np.float32), np.zeros(2, np.float32))


def crop_with_corners() -> Pixels:
    """Red in the upper left quarter, green in the lower right one."""
    crop = np.zeros((SIZE, SIZE, 3), np.uint8)
    crop[: SIZE // 2, : SIZE // 2, 0] = 200
    crop[SIZE // 2 :, SIZE // 2 :, 1] = 200
    return crop


def quarters(heat: np.ndarray) -> dict[str, float]:
    half = SIZE // 2
    return {
        "upper left": float(heat[:half, :half].mean()),
        "lower right": float(heat[half:, half:].mean()),
        "all": float(heat.mean()),
    }


@pytest.mark.parametrize("name", ["build_maps", "build_channels_last", "build_tokens"])
def test_it_is_hot_where_the_answer_was_made(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "graft"):
        red, green = explain(prepare(name, tmp_path), HEAD, [crop_with_corners()] * 2, [0, 1])
    assert red.shape == green.shape == (SIZE, SIZE)
    assert (red.min(), red.max(), green.max()) == (0, 1, 1)
    assert quarters(red)["upper left"] > 0.8 > 0.1 > quarters(red)["lower right"]
    assert quarters(green)["lower right"] > 0.8 > 0.1 > quarters(green)["upper left"]
    assert "Grad-CAM at backbone.stage" in caplog.text


@pytest.mark.parametrize("shape", [(2, 7, 5, 5), (2, 5, 5, 7), (2, 26, 7), (2, 25, 7), (2, 30, 7)])
def test_maps_are_put_back_as_they_were(shape: tuple[int, ...]) -> None:
    output = torch.randn(shape)
    maps = _to_maps(output)
    assert maps.shape == (2, 7, 5, 5)
    assert torch.equal(_from_maps(maps, output), output)


@pytest.mark.parametrize("policy", ["token", "avg"])
def test_a_transformer_is_explained_where_its_places_still_count(
    tmp_path: Path, policy: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the class token alone, other tokens have no gradient behind the last attention."""
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **given: create(name, **{**given, "global_pool": policy})
    )
    backbone = build_backbone("test_vit", num_classes=3, pretrained=False, image_size=64)
    prepared = write_prepared(backbone, tmp_path / "prepared")
    generator = np.random.default_rng(0)
    head = Head(
        generator.standard_normal((3, backbone.num_features)).astype(np.float32),
        np.zeros(3, np.float32),
    )
    side = backbone.preprocess.height
    with caplog.at_level(logging.INFO, "graft"):
        (heat,) = explain(
            prepared, head, [generator.integers(0, 255, (side, side, 3), np.uint8)], [1]
        )
    assert heat.shape == (side, side)
    assert heat.max() > 0
    num_blocks = len(cast(nn.Sequential, backbone.model.blocks))
    expected = f"blocks.{num_blocks - (2 if policy == 'token' else 1)}"
    assert f"Grad-CAM at {expected}" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Blind", "Grad-CAM needs a stage with places"),
        ("Rounded", "Grad-CAM cannot be computed: RuntimeError: "),
    ],
)
def test_explaining_an_unexplainable_network_raises(
    tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(
        GraftError, match=f"^tests.finetune.training.test_explain:{name}: {message}"
    ):
        explain(prepare(name, tmp_path), HEAD, [crop_with_corners()], [0])


def test_hot_places_are_coloured_and_cold_ones_grey() -> None:
    crop = np.full((4, 4, 3), (10, 20, 30), np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 1
    drawn = draw_heat(crop, heat)
    assert (drawn[1:] == 20).all()
    assert drawn[0, 0, 0] > 70 > drawn[0, 0, 2]
    assert (crop == (10, 20, 30)).all()


@pytest.mark.parametrize(
    ("flags", "num_per_mistake"),
    [
        ({}, 2),
        ({"explain": "no"}, 1),
        ({"freeze": "backbone"}, 1),
        ({"freeze": "backbone", "explain": "yes"}, 2),
    ],
)
def test_a_run_explains_its_mistakes_by_itself_where_it_trained(
    tmp_path: Path, flags: dict[str, str], num_per_mistake: int
) -> None:
    folders = {
        "output": tmp_path / "runs",
        "repository": tmp_path / "checkpoints",
        "cache_dir": tmp_path / "cache",
    }
    data = write_noise_folders(tmp_path / "noise", 12)
    run(
        options(
            data=str(data),
            backbone="tests.support.tiny:build_trunk",
            epochs=1,
            batch_norm="keep",
            **{**folders, **flags},
        )
    )
    (run_dir,) = (tmp_path / "runs").iterdir()
    page = (run_dir / "report.html").read_text()
    assert page.count("<figure>") > 0
    assert page.count("<img ") == num_per_mistake * page.count("<figure>")
    assert ("Grad-CAM" in page) == (num_per_mistake == 2)
    assert (run_dir / "projector" / "sprite.jpg").exists() == (num_per_mistake == 2)
    pictures = EventAccumulator(str(run_dir), size_guidance={"images": 0})
    pictures.Reload()
    assert ("val/worst_mistakes_looked_at" in pictures.Tags()["images"]) == (num_per_mistake == 2)


def test_a_run_ends_well_without_pictures_that_cannot_be_had(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_noise_folders(tmp_path / "noise", 12)
    folders = {
        "output": tmp_path / "runs",
        "repository": tmp_path / "checkpoints",
        "cache_dir": tmp_path / "cache",
    }
    with caplog.at_level(logging.WARNING, "graft"):
        run(
            options(
                data=str(data),
                backbone="tests.finetune.training.test_explain:Blind",
                freeze="backbone",
                batch_norm="keep",
                explain="yes",
                **folders,
            )
        )
    assert (
        "no pictures of where the network looked: tests.finetune.training.test_explain:Blind: "
        "Grad-CAM needs a stage with places" in caplog.text
    )
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert "Grad-CAM" not in (run_dir / "report.html").read_text()
