"""A backbone in int8: quantised after training by NNCF, once, and kept beside the float one.

A head is solved on the quantised features, and so makes up for the rounding. A quantised backbone
is therefore another backbone, with its own fingerprint.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from models.checkpoint import CONFIG_FILE, OPENVINO_FILE, WEIGHTS_FILE, fingerprint, hash_file
from models.engine.openvino_engine import openvino_core
from models.errors import GraftError, describe_error, first_line
from models.files import move_whole, temporary_folder
from models.images import Pixels
from models.prepared import PreparedBackbone, hash_openvino, read_kept, read_prepared

# Images to calibrate on: more of them changed no figure (NNCF's own default is 300).
NUM_CALIBRATION_IMAGES = 100


def find_quantised(backbone: PreparedBackbone) -> PreparedBackbone | None:
    """The quantised backbone kept beside `backbone`, or None."""
    kept = read_kept(_folder(backbone))
    return None if kept is None else _for_crops_of(backbone, kept)


def quantise(backbone: PreparedBackbone, images: Pixels) -> PreparedBackbone:
    """Quantise `backbone`, calibrated on `images` `uint8 [N,H,W,3]`, and keep the result beside it.

    Raises GraftError where NNCF is not installed or cannot quantise the network, or where the
    folder cannot be written.
    """
    folder = _folder(backbone)
    try:
        with temporary_folder(folder.parent) as temporary:
            _write_quantised(backbone, images, temporary / OPENVINO_FILE)
            shutil.copyfile(backbone.folder / WEIGHTS_FILE, temporary / WEIGHTS_FILE)
            stored: dict[str, Any] = json.loads(
                (backbone.folder / CONFIG_FILE).read_text(encoding="utf-8")
            )
            stored["fingerprint"] = fingerprint(
                stored["config"]["architecture"],
                backbone.read_tensors(),
                backbone.preprocess,
                hash_openvino(temporary),
            )
            stored["files"] = {name: hash_file(temporary / name) for name in stored["files"]}
            (temporary / CONFIG_FILE).write_text(json.dumps(stored, indent=2) + "\n")
            # Where another run was faster, heads are solved on its folder.
            move_whole(temporary, folder)
        return _for_crops_of(backbone, read_prepared(folder))
    except OSError as error:
        raise GraftError(
            f"the quantised backbone could not be written to {folder}: {describe_error(error)}"
        ) from error


def _folder(backbone: PreparedBackbone) -> Path:
    # Calibrated on other crops.
    fit = "" if backbone.fit == "crop" else f"-{backbone.fit}"
    stretch = "-stretch" if backbone.preprocess.stretch else ""
    return backbone.folder.with_name(f"{backbone.folder.name}-int8{fit}{stretch}")


def _for_crops_of(backbone: PreparedBackbone, quantised: PreparedBackbone) -> PreparedBackbone:
    if backbone.preprocess.stretch:
        quantised = quantised.stretched()
    return quantised.fitted(backbone.fit)


def _write_quantised(backbone: PreparedBackbone, images: Pixels, path: Path) -> None:
    try:
        import nncf
    except ImportError:
        raise GraftError(
            "--precision int8 needs nncf: pip install nncf; or leave --precision at auto"
        ) from None
    import openvino as ov

    nncf.set_log_level(logging.ERROR)
    model = openvino_core().read_model(backbone.openvino_path)
    samples = nncf.Dataset([image[None] for image in images])
    is_transformer = any(
        operation.get_type_name() in ("Softmax", "ScaledDotProductAttention")
        for operation in model.get_ops()
    )
    try:
        quantised = nncf.quantize(
            model,
            samples,
            subset_size=len(images),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
        )
    except (RuntimeError, ValueError) as error:
        raise GraftError(
            f"--precision int8: NNCF cannot quantise {backbone.name}: {first_line(error)}"
        ) from error
    ov.save_model(quantised, path, compress_to_fp16=False)
