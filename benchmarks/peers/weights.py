"""Write the pretrained weights that Graft loads to a file for timm, so that peers start from them.

python benchmarks/peers/weights.py tf_efficientnet_lite0 FILE.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

# The peers' environment does not have the project installed.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import timm
import torch
from safetensors.torch import save_file

from models.backbone.build import build_backbone


def main(name: str, path: Path) -> None:
    """Raise AssertionError if timm does not load the same tensors, except for the classifier."""
    backbone = build_backbone(name, num_classes=2)
    prefix = f"{backbone.classifier}."
    tensors = {
        key: tensor
        for key, tensor in backbone.model.state_dict().items()
        if not key.startswith(prefix)
    }
    save_file(tensors, path)
    read = timm.create_model(
        name, pretrained=True, num_classes=2, pretrained_cfg_overlay={"file": str(path)}
    ).state_dict()
    assert all(torch.equal(tensor, read[key]) for key, tensor in tensors.items()), (
        f"{path}: timm reads other weights from it"
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
