"""Write a backbone's pretrained weights, as Graft loads them, to a file that timm reads: the peers start from the same tensors.

python benchmarks/peers/weights.py tf_efficientnet_lite0 FILE.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, Python would look for modules in its own folder; the project's root is what is meant.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import timm
import torch
from safetensors.torch import save_file

from models.backbone.build import build_backbone


def main(name: str, path: Path) -> None:
    """Raises AssertionError where timm, reading the file, does not end with the same tensors in every place but the classifier."""
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
