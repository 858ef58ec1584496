"""What a run says of features that nothing can be learnt from."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from finetune.config import Options
from finetune.run import run
from tests.support.images import write_noise_folders
from tests.support.weights import save_weights


@pytest.mark.parametrize(("scale", "is_said"), [(0, True), (1, False)])
def test_weights_that_tell_no_images_apart_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scale: int, is_said: bool
) -> None:
    tensors = timm.create_model("test_efficientnet").state_dict()
    scaled = {name: scale * tensor for name, tensor in tensors.items()}
    run(
        Options(
            data=str(write_noise_folders(tmp_path / "data", 6)),
            backbone="test_efficientnet",
            weights=save_weights(scaled, tmp_path / "scaled.pth"),
            image_size=64,
            output=tmp_path / "runs",
            repository=tmp_path / "checkpoints",
        )
    )
    assert ("gives the same features for all images" in caplog.text) == is_said
