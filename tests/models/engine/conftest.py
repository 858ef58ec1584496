"""Both engines on the embedded backbone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from models.backbone.build import FeatureExtractor, build_from_config
from models.backbone.weights import read_state_dict
from models.engine.engine import Engine
from models.engine.openvino_engine import OpenVINOEngine
from models.engine.torch_engine import TorchEngine
from models.prepared import PreparedBackbone


@pytest.fixture(scope="module")
def torch_engine(prepared: PreparedBackbone) -> Iterator[TorchEngine]:
    model = build_from_config(
        prepared.config, read_state_dict(prepared.folder / "model.safetensors")
    )
    engine = TorchEngine(
        FeatureExtractor(model), prepared.preprocess, device="cpu", precision="fp32", batch_size=4
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=["openvino", "torch"])
def any_engine(
    request: pytest.FixtureRequest, engine: OpenVINOEngine, torch_engine: TorchEngine
) -> Engine:
    return engine if request.param == "openvino" else torch_engine
