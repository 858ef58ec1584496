"""A network converted to OpenVINO's format."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from models.errors import GraftError
from models.named import is_custom
from models.preprocess import Preprocess


def export_openvino(module: nn.Module, name: str, preprocess: Preprocess, path: Path) -> None:
    """Write `module`, images `[B,3,H,W]` → features `[B,F]`, as OpenVINO IR (.xml and .bin).

    The IR takes `u8 [?,H,W,3]` and gives `f32 [?,F]`; mean and std are part of its graph. Raises
    GraftError, with `name`, where OpenVINO cannot convert the network.
    """
    import openvino as ov
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    shape = [3, preprocess.height, preprocess.width]
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # OpenVINO converts through torch.jit.trace, which warns that it is deprecated.
            warnings.simplefilter("ignore")
            # Whether the network is deterministic is checked by three more passes and an import of
            # torch.distributed (2 s). timm's networks are; a user's own may not be.
            options = {"check_trace": is_custom(name)}
            decoder = TorchScriptPythonDecoder(
                module, example_input=torch.zeros(1, *shape), trace_kwargs=options
            )
            # What ov.convert_model comes to for one input of known type (2026.4: the same graph and weights), in a second less.
            frontend = FrontEndManager().load_by_framework("pytorch")
            loaded = frontend.load(decoder)
            (images,) = loaded.get_inputs()
            loaded.set_partial_shape(images, ov.PartialShape([-1, *shape]))
            loaded.set_element_type(images, ov.Type.f32)
            model = frontend.convert(loaded)
            apply_moc_transformations(model, cf=False, smart_reshape=True)
    # OpenVINO's frontend raises errors of its own, and tracing whatever the user's code raises.
    except Exception as error:
        raise GraftError(
            f"OpenVINO cannot convert {name}: {str(error).strip().splitlines()[0]}"
        ) from error
    finally:
        for part, is_training in modes.items():
            part.training = is_training
    steps = ov.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().preprocess().convert_element_type(ov.Type.f32).mean(
        [255 * value for value in preprocess.mean]
    ).scale([255 * value for value in preprocess.std])
    steps.input().model().set_layout(ov.Layout("NCHW"))
    ov.save_model(steps.build(), path, compress_to_fp16=False)
