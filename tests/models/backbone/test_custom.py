"""A user's own network is built by its callable, or refused with what is wrong in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.backbone.build import (
    FeatureExtractor,
    backbone_tensors,
    build_backbone,
    build_from_config,
)
from models.backbone.weights import WeightsError, read_state_dict
from models.checkpoint import WEIGHTS_FILE
from models.engine.engine import run
from models.errors import GraftError
from models.prepared import write_prepared
from tests.support.weights import normalise, save_weights

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

class Half(Trunk):
    # Computes in bf16, with a buffer in it.
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.5, 0.3], dtype=torch.bfloat16))
        self.conv = self.conv.bfloat16()
    def forward(self, images):
        return self.conv(images.bfloat16()).mean(dim=(2, 3)) * self.scale[1]

class Branch(Trunk):
    def forward(self, images):
        features = super().forward(images)
        return 2 * features if images.abs().sum() > 0 else features

class Broken(Trunk):
    def __init__(self):
        super().__init__()
        self.conv.weight.data[0] = float("nan")

class Count(Trunk):
    def forward(self, images):
        return super().forward(images).long()

def build_half(): return Half()
def build_nan(): return Broken()
def build_branch(): return Branch()
def build_count(): return Count()
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
        ("ownnets.small:build_count", r"not a tensor of torch\.int64"),
        (
            "ownnets.small:build_nan",
            r"weights are NaN or infinite: backbone\.conv\.weight \(27 of 162 values\)",
        ),
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


def test_a_users_own_network_may_hold_and_compute_bf16(own_package: str, tmp_path: Path) -> None:
    backbone = build_backbone("ownnets.small:build_half", num_classes=2)
    arrays = backbone_tensors(backbone)
    assert arrays["backbone.scale"].dtype == np.float32
    prepared = write_prepared(backbone, tmp_path / "prepared")
    images = np.random.default_rng(0).integers(0, 255, (2, 40, 48, 3), np.uint8)
    engine = prepared.open_engine("cpu", "fp32")
    served = run(engine, images)
    engine.close()
    # The engine on CUDA builds it from the config and the stored tensors.
    rebuilt = build_from_config(
        prepared.config, read_state_dict(tmp_path / "prepared" / WEIGHTS_FILE)
    )
    own: Any = rebuilt
    assert own.backbone.scale.dtype == torch.bfloat16
    batch = normalise(images, backbone.preprocess.mean, backbone.preprocess.std)
    with torch.inference_mode():
        features = FeatureExtractor(rebuilt)(batch)
    assert features.dtype == torch.float32
    assert torch.equal(features, FeatureExtractor(backbone.model.eval())(batch))
    assert np.allclose(served, features.numpy(), rtol=0.05, atol=0.05)


def test_a_network_that_the_engine_computes_otherwise_is_refused(
    own_package: str, tmp_path: Path
) -> None:
    """Tracing keeps one way through a forward that branches on the values of images."""
    backbone = build_backbone("ownnets.small:build_branch", num_classes=2)
    with pytest.raises(
        GraftError,
        match=r"^--backbone ownnets\.small:build_branch: openvino \S+ gives other features than "
        r"torch for it at 40 × 48 pixels: they differ by 50\.0% of the largest; .*branch",
    ):
        write_prepared(backbone, tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()
