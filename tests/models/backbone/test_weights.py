"""Weights files are read without running code, and fit the network wholly or are refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from models.backbone.build import backbone_tensors, build_backbone
from models.backbone.weights import WeightsError, read_state_dict
from tests.support.weights import save_weights


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"state_dict": tensors, "epoch": 3},
        lambda tensors: {"model": tensors, "args": {"lr": 0.1}},
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {
            "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}
        },
    ],
)
def test_what_training_scripts_write_is_unwrapped(
    wrap: Callable[[Any], Any], tmp_path: Path
) -> None:
    tensors = timm.create_model("test_resnet").state_dict()
    path = save_weights(wrap(tensors), tmp_path / "last.pth")
    loaded = backbone_tensors(build_backbone("test_resnet", num_classes=2, weights=path))
    assert all(np.array_equal(array, tensors[name].numpy()) for name, array in loaded.items())


@pytest.mark.parametrize("num_classes", [0, 5])
def test_the_classifier_of_a_weights_file_may_be_another_or_missing(
    num_classes: int, tmp_path: Path
) -> None:
    tensors = timm.create_model("test_resnet", num_classes=num_classes).state_dict()
    backbone = build_backbone(
        "test_resnet", num_classes=2, weights=save_weights(tensors, tmp_path / "five.safetensors")
    )
    assert backbone.head.out_features == 2
    assert np.array_equal(
        backbone_tensors(backbone)["conv1.0.weight"], tensors["conv1.0.weight"].numpy()
    )


def test_weights_that_do_not_fit_are_refused_with_every_kind_of_key(
    resnet_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tensors = dict(resnet_weights)
    del tensors["layer1.0.conv1.weight"]
    tensors["layer7.weight"] = torch.zeros(2)
    tensors["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    path = save_weights(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(WeightsError) as caught:
        build_backbone("resnet18", num_classes=3, weights=path)
    lines = str(caught.value).splitlines()
    assert lines == [
        f"--weights {path}: the weights do not fit this network",
        "  missing (1): layer1.0.conv1.weight",
        "  extra (1): layer7.weight",
        "  misshaped (1): conv1.weight [64, 3, 3, 3] instead of [64, 3, 7, 7]",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("bn1.bias"), r"missing \(1\): bn1\.bias$"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), r"extra \(1\): more$"),
        (
            lambda tensors: tensors.update({"bn1.bias": torch.zeros(7)}),
            r"misshaped \(1\): bn1\.bias \[7\] instead of \[\d+\]$",
        ),
    ],
)
def test_a_single_key_that_does_not_fit_is_enough(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    tensors = dict(timm.create_model("test_resnet").state_dict())
    change(tensors)
    with pytest.raises(WeightsError, match=rf"do not fit this network\n  {message}"):
        build_backbone(
            "test_resnet", num_classes=2, weights=save_weights(tensors, tmp_path / "odd.pth")
        )


def test_weights_of_another_network_are_refused(
    resnet_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = save_weights(resnet_weights, tmp_path / "resnet18.safetensors")
    with pytest.raises(
        WeightsError,
        match=r"missing \(289\): conv_stem\.weight.*…\n  extra \(117\): layer1\..*…\n"
        r"  misshaped \(4\): bn1\.weight \[64\] instead",
    ):
        build_backbone("tf_efficientnet_lite0", num_classes=3, weights=path)


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "write",
    [
        lambda thing, path: torch.save(thing, path),
        lambda thing, path: path.write_bytes(pickle.dumps(thing)),
    ],
)
def test_a_pickle_with_code_in_it_is_refused_and_not_run(
    write: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / "evil.pth"
    write({"conv1.weight": Code(tmp_path / "owned")}, path)
    with pytest.raises(WeightsError, match="without running code"):
        build_backbone("test_resnet", num_classes=2, weights=path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pth", None, "there is no such weights file"),
        ("gone.safetensors", None, "there is no such weights file"),
        ("text.pth", b"not weights", "not a state_dict file that can be read"),
        ("text.safetensors", b"not weights", "not a safetensors file that can be read"),
        ("empty.pth", b"", "not a state_dict file that can be read"),
    ],
)
def test_a_weights_file_that_cannot_be_read_is_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}: .*{message}"):
        build_backbone("test_resnet", num_classes=2, weights=path)


def test_a_pth_that_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="it holds list, not a state_dict"):
        read_state_dict(save_weights([1, 2], tmp_path / "list.pth"))
