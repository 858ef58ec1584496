"""A network converted to OpenVINO's format."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from models.errors import GraftError, first_line
from models.images import Pixels
from models.named import is_custom
from models.preprocess import Preprocess

if TYPE_CHECKING:
    import openvino as ov


def export_openvino(module: nn.Module, name: str, preprocess: Preprocess, path: Path) -> None:
    """Write `module`, images `[B,3,H,W]` → features `[B,F]`, as OpenVINO IR (.xml and .bin).

    The IR takes `u8 [?,H,W,3]` and gives `f32 [?,F]`; mean and std are part of its graph. Raises
    GraftError, with `name`, where OpenVINO cannot convert the network.
    """
    import openvino as ov

    try:
        with warnings.catch_warnings(), torch.no_grad(), _in_eval_mode(module):
            # OpenVINO converts through torch.jit.trace, which warns that it is deprecated.
            warnings.simplefilter("ignore")
            model = _convert(module, name, [3, preprocess.height, preprocess.width])
    # OpenVINO's frontend raises errors of its own, and tracing whatever the user's code raises.
    except Exception as error:
        raise GraftError(f"OpenVINO cannot convert {name}: {first_line(error)}") from error
    ov.save_model(add_preprocess(model, preprocess), path, compress_to_fp16=False)


def compute_features(
    module: nn.Module, preprocess: Preprocess, crops: Pixels
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Features `float32 [B,F]` of `uint8 [B,H,W,3]` by torch on the CPU, as the IR gives them."""
    scaled = torch.from_numpy(crops).float() / 255
    images = (scaled - torch.tensor(preprocess.mean)) / torch.tensor(preprocess.std)
    with torch.inference_mode(), _in_eval_mode(module):
        features: torch.Tensor = module(images.permute(0, 3, 1, 2).contiguous())
    return features.float().numpy()


@contextlib.contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, is_training in modes.items():
            part.training = is_training


def add_preprocess(model: ov.Model, preprocess: Preprocess) -> ov.Model:
    """Have `model`, which takes `f32 [?,3,H,W]`, take `u8 [?,H,W,3]` and normalise it."""
    import openvino as ov

    steps = ov.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().preprocess().convert_element_type(ov.Type.f32).mean(
        [255 * value for value in preprocess.mean]
    ).scale([255 * value for value in preprocess.std])
    steps.input().model().set_layout(ov.Layout("NCHW"))
    return steps.build()


def _convert(module: nn.Module, name: str, image_shape: list[int]) -> ov.Model:
    """What `ov.convert_model` makes of one image tensor `f32 [?,*image_shape]`, by its own parts.

    `apply_moc_transformations` is a private interface. `ov.convert_model` (2026.4) would take a
    cold run of 120 images from 14.6 to 22.0 core-seconds (on a loaded machine), and it waits up
    to 1 s more to send usage statistics. tests/models/backbone/test_export.py compares the two.
    """
    import openvino as ov
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    # The check that a network is deterministic takes three more passes. timm's networks are; a
    # user's own may not be.
    options = {"check_trace": is_custom(name)}
    decoder = TorchScriptPythonDecoder(
        module, example_input=torch.zeros(1, *image_shape), trace_kwargs=options
    )
    frontend = FrontEndManager().load_by_framework("pytorch")
    loaded = frontend.load(decoder)
    (images,) = loaded.get_inputs()
    loaded.set_partial_shape(images, ov.PartialShape([-1, *image_shape]))
    loaded.set_element_type(images, ov.Type.f32)
    model = frontend.convert(loaded)
    apply_moc_transformations(model, cf=False, smart_reshape=True)
    return model
