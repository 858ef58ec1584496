"""The torch engine on modules that keep something between calls, and on sizes of all kinds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from finetune.training.boundary import FrozenPart
from models.engine.engine import Precision, run
from models.engine.openvino_engine import OpenVINOEngine
from models.engine.torch_engine import TorchEngine
from models.errors import GraftError
from models.images import Pixels
from models.prepared import PreparedBackbone, build_engine
from models.preprocess import Preprocess

SIZE = 8
PREPROCESS = Preprocess(height=SIZE, width=SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Mean(nn.Module):
    """Slow enough between its steps for another thread to come in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Identity()
        self.rest = nn.Flatten()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.stem(images)
        torch.randn(200, 200) @ torch.randn(200, 200)
        features: torch.Tensor = self.rest(images.mean(dim=(2, 3)))
        return features


class Uncapturable(nn.Module):
    """What it does depends on a value: no CUDA graph can hold that."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) * (2 if float(images.sum().item()) >= 0 else 1)


def uniform_crops(values: list[int]) -> Pixels:
    return np.stack([np.full((SIZE, SIZE, 3), value, np.uint8) for value in values])


@pytest.mark.parametrize("device", DEVICES)
def test_many_threads_get_the_activations_of_their_own_images(device: str) -> None:
    """A hook on a shared module gave one thread the activations of another's images."""
    engine = TorchEngine(
        FrozenPart(Mean(), "stem"), PREPROCESS, device=device, precision="fp32", batch_size=2
    )

    def ask(value: int) -> bool:
        features = engine.submit(uniform_crops([value, value])).result()
        return features.shape == (2, 3 * SIZE * SIZE) and np.allclose(features, value / 255)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, list(range(1, 201))))
    engine.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module", [Mean(), Uncapturable()])
@pytest.mark.parametrize("num_images", [0, 1, 3, 4, 5, 12, 13])
def test_any_number_of_images_is_answered(device: str, module: nn.Module, num_images: int) -> None:
    engine = TorchEngine(module, PREPROCESS, device=device, precision="fp32", batch_size=4)
    values = list(range(10, 10 + num_images))
    features = engine.run_here(list(uniform_crops(values)) if values else uniform_crops([0])[:0])
    factor = 2 if isinstance(module, Uncapturable) else 1
    assert features.shape == (num_images, 3)
    assert np.allclose(features[:, 0], factor * np.array(values) / 255)
    engine.close()


@pytest.mark.parametrize("device", DEVICES)
def test_the_module_keeps_its_weights_precision(device: str) -> None:
    """It may be one that trains: the engine halves the weights of a copy."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    engine = TorchEngine(module, PREPROCESS, device=device, precision="bf16", batch_size=2)
    engine.run_here(uniform_crops([1, 2]))
    engine.close()
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.cpu(), before[name])


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_that_the_cpu_does_not_run_is_refused(precision: Precision) -> None:
    with pytest.raises(GraftError, match=f"--precision {precision}: the torch engine on cpu"):
        TorchEngine(nn.Flatten(), PREPROCESS, device="cpu", precision=precision)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_cuda_agrees_with_the_cpu(
    prepared: PreparedBackbone, engine: OpenVINOEngine, crops: Pixels, precision: Precision
) -> None:
    on_cuda = build_engine(
        prepared.folder, prepared.preprocess, prepared.config, device="cuda", precision=precision
    )
    one, other = run(on_cuda, crops), run(engine, crops)
    cosine = (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert cosine.min() > (0.9999 if precision == "fp32" else 0.99)
    on_cuda.close()
