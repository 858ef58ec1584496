"""A user's own network is built by its callable, or refused with what is wrong in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.backbone.build import FeatureExtractor, backbone_tensors, build_backbone
from models.backbone.weights import WeightsError
from models.errors import GraftError
from tests.support.weights import save_weights

OWN = """
import torch
from torch import nn

class Trunk(nn.Module):
    pretrained_cfg = {
        "input_size": (3, 40, 48),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "crop_pct": 1.0,
    }
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
    def forward(self, images):
        return self.norm(self.conv(images)).mean(dim=(2, 3))

class Map(Trunk):
    def forward(self, images):
        return self.conv(images)

class Pair(Trunk):
    def forward(self, images):
        return (images, images)

def build(): return Trunk()
def build_map(): return Map()
def build_pair(): return Pair()
def build_text(): return "resnet18"
def build_narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(7, 3))
"""


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    package = tmp_path / "ownnets"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "small.py").write_text(OWN)
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "ownnets"
    for name in [name for name in sys.modules if name.split(".")[0] == "ownnets"]:
        del sys.modules[name]


def test_a_users_own_network_is_built(own_package: str) -> None:
    backbone = build_backbone("ownnets.small:build", num_classes=4)
    preprocess = backbone.preprocess
    assert (preprocess.height, preprocess.width, preprocess.mean, preprocess.crop_fraction) == (
        40,
        48,
        (0.1, 0.2, 0.3),
        1.0,
    )
    assert (
        backbone.num_features,
        backbone.head.out_features,
        backbone.classifier,
        backbone.module_prefix,
    ) == (6, 4, "head", "backbone.")
    with torch.inference_mode():
        images = torch.rand(2, 3, 40, 48)
        features = FeatureExtractor(backbone.model.eval())(images)
        assert features.shape == (2, 6)
        assert torch.equal(backbone.model(images), backbone.head(features))
    assert {name.split(".")[0] for name in backbone_tensors(backbone)} == {"backbone"}
    assert "ownnets.small:build" in backbone.weights


def test_a_users_own_network_takes_weights_strictly(own_package: str, tmp_path: Path) -> None:
    module: Any = build_backbone("ownnets.small:build", num_classes=2).model.backbone
    tensors = {name: torch.full_like(tensor, 3) for name, tensor in module.state_dict().items()}
    backbone = build_backbone(
        "ownnets.small:build", num_classes=2, weights=save_weights(tensors, tmp_path / "own.pth")
    )
    loaded: Any = backbone.model.backbone
    assert loaded.conv.weight.unique().tolist() == [3]
    assert backbone.weights == "file own.pth"
    del tensors["norm.bias"]
    with pytest.raises(WeightsError, match=r"missing \(1\): norm\.bias"):
        build_backbone(
            "ownnets.small:build",
            num_classes=2,
            weights=save_weights(tensors, tmp_path / "less.pth"),
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ownnets.small:build_text", "it returned str, not an nn.Module"),
        (
            "ownnets.small:build_map",
            r"it must give features \[B, F\] for images \[B, 3, H, W\], "
            r"not a tensor of shape \[2, 6, 38, 46\]",
        ),
        ("ownnets.small:build_pair", "not tuple"),
        ("ownnets.small:build_narrow", r"it fails on images \[2, 3, 224, 224\]"),
        (
            "ownnets.small:nothing",
            "has no attribute 'nothing'; package.module:callable must be importable",
        ),
        ("ownnets.nowhere:build", "No module named 'ownnets.nowhere'"),
        ("ownnets.broken:build", "No module named 'a_module_that_is_not_there'"),
    ],
)
def test_a_users_own_network_that_does_not_work_is_refused_in_words(
    own_package: str, name: str, message: str
) -> None:
    with pytest.raises(GraftError, match=f"^--backbone {name}: .*{message}"):
        build_backbone(name, num_classes=2)
