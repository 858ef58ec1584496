"""A network exported to OpenVINO gives the features of the network."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch

from models.backbone.build import Backbone, FeatureExtractor, build_backbone
from models.backbone.export import add_preprocess, export_openvino
from models.engine.openvino_engine import OpenVINOEngine, openvino_core
from models.errors import GraftError
from models.images import Pixels
from models.preprocess import Preprocess
from tests.support.weights import normalise


def test_the_exported_network_gives_the_features_of_the_network(
    embedded: Backbone, engine: OpenVINOEngine, crops: Pixels
) -> None:
    preprocess = embedded.preprocess
    with torch.inference_mode():
        expected = FeatureExtractor(embedded.model.eval())(
            normalise(crops, preprocess.mean, preprocess.std)
        ).numpy()
    assert np.abs(engine.submit(crops).result() - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "test_vit"])
def test_an_exported_network_is_what_openvinos_own_converter_makes_of_it(
    name: str, tmp_path: Path
) -> None:
    """The exporter calls private parts of OpenVINO, as ov.convert_model of 2026.4 does.

    Where this fails with another version, repeat what its ov.convert_model does.
    """
    backbone = build_backbone(name, num_classes=2, pretrained=False)
    preprocess, module = backbone.preprocess, FeatureExtractor(backbone.model.eval())
    shape = [3, preprocess.height, preprocess.width]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = ov.convert_model(
            module, example_input=torch.zeros(1, *shape), input=[-1, *shape]
        )
    ov.save_model(
        add_preprocess(reference, preprocess), tmp_path / "reference.xml", compress_to_fp16=False
    )
    export_openvino(module, name, preprocess, tmp_path / "exported.xml")
    version = f"made by OpenVINO {ov.get_version()}; 2026.4 made the same of both"
    exported, expected = (
        _operations(tmp_path / f"{stem}.xml") for stem in ("exported", "reference")
    )
    assert exported == expected, version
    exported_weights = (tmp_path / "exported.bin").read_bytes()
    assert exported_weights == (tmp_path / "reference.bin").read_bytes(), version


class Unsure(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise AssertionError  # as timm's networks do, without a message


def test_a_network_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=r"^OpenVINO cannot convert own: \S"):
        export_openvino(Unsure(), "own", Preprocess(), tmp_path / "own.xml")


def _operations(path: Path) -> list[tuple[str, list[str], dict[str, object]]]:
    """Type, output shapes and attributes of each operation of an IR, in order."""
    return [
        (
            operation.get_type_name(),
            [str(output.get_partial_shape()) for output in operation.outputs()],
            operation.get_attributes(),
        )
        for operation in openvino_core().read_model(path).get_ordered_ops()
    ]
