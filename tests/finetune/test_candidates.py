"""What a run refuses to make a candidate of."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from finetune.config import Options
from finetune.run import run
from models.errors import GraftError
from tests.support.images import write_noise_folders
from tests.support.weights import save_weights


def test_weights_that_tell_no_images_apart_are_refused(tmp_path: Path) -> None:
    tensors = timm.create_model("test_efficientnet").state_dict()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with pytest.raises(GraftError, match=r"the same features for all .*zeros\.pth"):
        run(
            Options(
                data=str(write_noise_folders(tmp_path / "data", 6)),
                backbone="test_efficientnet",
                weights=save_weights(zeros, tmp_path / "zeros.pth"),
                image_size=64,
                output=tmp_path / "runs",
                repository=tmp_path / "checkpoints",
            )
        )
    assert not list(tmp_path.glob("checkpoints/*/1"))
