"""A network exported to OpenVINO gives the features of the network."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import openvino as ov
import torch

from models.backbone.build import Backbone, FeatureExtractor
from models.backbone.export import export_openvino
from models.engine.openvino_engine import OpenVINOEngine, openvino_core
from models.preprocess import Pixels
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


def test_an_exported_network_is_what_openvinos_own_converter_makes_of_it(
    embedded: Backbone, tmp_path: Path
) -> None:
    """The exporter calls the converter's parts by themselves, one of which is not public: an OpenVINO that changes them shows here."""
    preprocess, module = embedded.preprocess, FeatureExtractor(embedded.model.eval())
    shape = [3, preprocess.height, preprocess.width]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = ov.convert_model(
            module, example_input=torch.zeros(1, *shape), input=[-1, *shape]
        )
    ov.save_model(reference, tmp_path / "reference.xml", compress_to_fp16=False)
    export_openvino(module, "it", preprocess, tmp_path / "exported.xml")
    operations, constants = zip(
        *(_what_is_in(tmp_path / name) for name in ("exported.xml", "reference.xml")), strict=True
    )
    assert operations[0] - operations[1] == Counter(
        Convert=1, Subtract=1, Multiply=1, Transpose=1, Constant=3
    ), "but for the preprocessing"
    assert not operations[1] - operations[0]
    assert not constants[1] - constants[0]


def _what_is_in(path: Path) -> tuple[Counter[str], Counter[bytes]]:
    """How many operations of each type an IR has, and how often each constant."""
    operations = openvino_core().read_model(path).get_ordered_ops()
    constants = (
        operation.data.tobytes()
        for operation in operations
        if operation.get_type_name() == "Constant"
    )
    return Counter(operation.get_type_name() for operation in operations), Counter(constants)
