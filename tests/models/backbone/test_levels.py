"""Features of all levels: the last one unchanged, then every stage's, of one weight each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from models.backbone.build import FeatureExtractor, build_backbone
from models.backbone.custom import CustomNetwork
from models.backbone.levels import LevelFeatures, count_level_sets, feature_module
from models.engine.engine import run
from models.errors import GraftError
from models.prepared import write_prepared
from models.preprocess import Preprocess
from tests.support.tiny import NUM_FEATURES, Trunk

NAMES = ["last", "upper half", "all", "all and grid"]


class Staged(Trunk):
    """A user's own module that shows two stages."""

    def forward_intermediates(
        self, images: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        first = self.stem(images)
        second = self.tail(first)
        return second.mean(dim=(2, 3)), [first, second]


def _timm(name: str) -> nn.Module:
    model: nn.Module = timm.create_model(name)
    return model


def _swin() -> nn.Module:
    model: nn.Module = SwinTransformer(
        img_size=64,
        patch_size=4,
        window_size=4,
        embed_dim=16,
        depths=(1, 1, 1),
        num_heads=(1, 2, 4),
        num_classes=2,
    )
    return model


# A network, its image size, and its sets' widths.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[int]]] = {
    name: (functools.partial(_timm, name), size, widths)
    for name, size, widths in (
        ("test_resnet", 160, [96, 1104, 1296, 2640]),
        ("test_efficientnet", 160, [256, 688, 808, 1384]),
        ("test_convnext", 160, [64, 400, 568, 1144]),
        ("test_vit", 160, [64, 832, 1600, 2368]),
    )
} | {
    "swin": (_swin, 64, [64, 352, 400, 848]),
    "own": (lambda: CustomNetwork(Staged(0.0), NUM_FEATURES), 32, [8, 32, 50, 106]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_columns_are_the_last_level_and_the_rest_weighs_alike(name: str) -> None:
    build, size, widths = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    sets = count_level_sets(model, Preprocess(height=size, width=size))
    images = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        features = feature_module(model, tuple(sets))(images)
        last = FeatureExtractor(model)(images)
    assert list(sets) == NAMES
    assert list(sets.values()) == widths
    assert features.shape == (2, widths[-1])
    assert features.dtype == torch.float32
    assert torch.equal(features[:, : widths[0]], last)
    # A level of K columns has a norm of √K.
    squares = features[:, widths[0] :].double().square().sum(dim=1)
    assert squares == pytest.approx(widths[-1] - widths[0], rel=1e-4)


def test_a_network_that_shows_no_stages_has_its_last_level_alone() -> None:
    model = CustomNetwork(Trunk(0.0), NUM_FEATURES)
    preprocess = Preprocess(height=32, width=32)
    assert count_level_sets(model, preprocess) == {"last": NUM_FEATURES}
    assert isinstance(feature_module(model, ("last",)), FeatureExtractor)


def test_stages_that_lead_to_other_features_are_not_used() -> None:
    class Other(Staged):
        def forward_intermediates(
            self, images: torch.Tensor
        ) -> tuple[torch.Tensor, list[torch.Tensor]]:
            features, stages = super().forward_intermediates(images)
            return features + 1, stages

    model = CustomNetwork(Other(0.0), NUM_FEATURES)
    assert list(count_level_sets(model, Preprocess(height=32, width=32))) == ["last"]


def test_a_checkpoint_whose_network_shows_no_stages_any_more_is_refused() -> None:
    with pytest.raises(GraftError, match="no forward_intermediates here; install the version"):
        feature_module(nn.Linear(2, 2), NAMES)


def test_a_black_image_and_half_precision_give_finite_features() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet").eval()
    features = LevelFeatures(model.bfloat16())(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16))
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()


def test_the_engine_gives_what_torch_gives(tmp_path: Path) -> None:
    backbone = build_backbone("test_efficientnet", num_classes=2, pretrained=False)
    plain = write_prepared(backbone, tmp_path / "plain")
    prepared = write_prepared(backbone, tmp_path / "levels", all_levels=True)
    assert list(plain.level_sets) == ["last"]
    assert list(prepared.level_sets) == NAMES
    assert plain.fingerprint != prepared.fingerprint
    crops = np.random.default_rng(0).integers(0, 256, (3, 160, 160, 3), np.uint8)
    engines = [each.open_engine("cpu", "fp32") for each in (plain, prepared)]
    last, features = (run(engine, crops) for engine in engines)
    for engine in engines:
        engine.close()
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (prepared.preprocess.mean, prepared.preprocess.std)
    )
    images = (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        expected = LevelFeatures(backbone.model.eval())(images).numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(features[:, : last.shape[1]], last, rtol=1e-4, atol=1e-4)
