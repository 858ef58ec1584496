"""Weights files are read without running code, and fit the network wholly or are refused."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from models.backbone.build import backbone_tensors, build_backbone
from models.backbone.weights import WeightsError, load_strictly, read_state_dict
from tests.support.weights import save_weights


def prefixed(prefix: str, tensors: Any) -> dict[str, Any]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


# What training scripts, wrappers and loops write, by who writes it.
FORMS: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda own: {"state_dict": own, "epoch": 3},
    "model": lambda own: {"model": own, "args": {"lr": 0.1}},
    "DistributedDataParallel": lambda own: prefixed("module.", own),
    "both": lambda own: {"state_dict": prefixed("module.", own)},
    "PyTorch's tutorial": lambda own: {"epoch": 1, "model_state_dict": own, "loss": 0.5},
    "net": lambda own: {"net": own, "acc": 93.1, "epoch": 7},
    "nested": lambda own: {"checkpoint": {"model": {"state_dict": own}}},
    "torch.compile": lambda own: prefixed("_orig_mod.", own),
    "compiled, then distributed": lambda own: prefixed("module._orig_mod.", own),
    "distributed, then compiled": lambda own: prefixed("_orig_mod.module.", own),
    "a compiled part": lambda own: {
        name.replace("bn1.", "bn1._orig_mod."): tensor for name, tensor in own.items()
    },
    "Lightning": lambda own: {
        "state_dict": {**prefixed("model.", own), "criterion.weight": torch.ones(5)}
    },
    "Lightning, compiled": lambda own: {"state_dict": prefixed("model._orig_mod.", own)},
    "two wrappers": lambda own: prefixed("learner.encoder.", own),
    "AveragedModel": lambda own: {**prefixed("module.", own), "n_averaged": torch.tensor(3)},
    "timm's train.py": lambda own: {"state_dict": own, "args": argparse.Namespace(lr=1)},
    "a numpy scalar beside": lambda own: {"state_dict": own, "best": np.float64(1)},
    "with its optimizer": lambda own: {
        "model": own,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "model": {"x": torch.ones(1)}},
    },
    "an EMA of it beside": lambda own: {
        "state_dict": own,
        "state_dict_ema": {name: tensor + 1 for name, tensor in own.items()},
    },
    "an EMA of it beside, in one dict": lambda own: {
        **prefixed("ema_model.", {name: tensor + 1 for name, tensor in own.items()}),
        **prefixed("model.", own),
    },
    "only an EMA": lambda own: {"model_ema": own, "epoch": 3},
    "without BatchNorm's counters": lambda own: {
        name: tensor for name, tensor in own.items() if not name.endswith("num_batches_tracked")
    },
    "double": lambda own: {name: tensor.double() for name, tensor in own.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_training_scripts_write_is_unwrapped(form: str, tmp_path: Path) -> None:
    tensors = timm.create_model("test_resnet").state_dict()
    path = save_weights(FORMS[form](tensors), tmp_path / "last.pth")
    loaded = backbone_tensors(build_backbone("test_resnet", num_classes=2, weights=path))
    assert set(loaded) == {name for name in tensors if not name.startswith("fc.")}
    assert all(np.array_equal(array, tensors[name].numpy()) for name, array in loaded.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_half_precision_weights_are_widened(
    dtype: torch.dtype, suffix: str, tmp_path: Path
) -> None:
    half = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in timm.create_model("test_resnet").state_dict().items()
    }
    path = tmp_path / f"half{suffix}"
    # Hugging Face's files are safetensors by other names too.
    save_weights(half, tmp_path / "as.safetensors" if suffix == ".bin" else path)
    if suffix == ".bin":
        (tmp_path / "as.safetensors").rename(path)
    loaded = backbone_tensors(build_backbone("test_resnet", num_classes=2, weights=path))
    for name, array in loaded.items():
        assert array.dtype == (np.float32 if half[name].is_floating_point() else np.int64)
        assert np.array_equal(array, half[name].float().numpy())


@pytest.mark.parametrize(
    ("entry", "value"),
    [("state_dict", 0.0), ("state_dict_ema", 1.0), ("deeper.teacher", 2.0), ("both.b", 4.0)],
)
def test_one_of_several_state_dicts_can_be_chosen(entry: str, value: float, tmp_path: Path) -> None:
    own = timm.create_model("test_resnet").state_dict()

    def filled(value: float) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(tensor, value) for name, tensor in own.items()}

    held = {
        "state_dict": filled(0),
        "state_dict_ema": filled(1),
        "deeper": {"teacher": filled(2)},
        "both": prefixed("a.", filled(3)) | prefixed("b.", filled(4)),
    }
    path = save_weights(held, tmp_path / "last.pth")
    name = Path(f"{path}::{entry}")
    if entry == "both.b":
        # Two networks in one dict: the file does not say which.
        path = save_weights(held["both"], tmp_path / "two.pth")
        with pytest.raises(WeightsError, match=r"two\.pth: it holds 2 .*: a, b; name one as .*::a"):
            build_backbone("test_resnet", num_classes=2, weights=path)
        name = Path(f"{path}::b")
    backbone = build_backbone("test_resnet", num_classes=2, weights=name)
    assert backbone.weights == f"file {name.name}"
    assert (backbone_tensors(backbone)["bn1.bias"] == value).all()


def test_averages_are_said_with_the_way_to_choose_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = timm.create_model("test_resnet").state_dict()
    path = save_weights({"state_dict": own, "state_dict_ema": own}, tmp_path / "last.pth")
    with caplog.at_level(logging.INFO, "graft"):
        read_state_dict(path)
    assert caplog.messages == [
        f"{path}: taking 'state_dict'; it holds averages (EMA) too, which "
        f"{path}::state_dict_ema would take"
    ]


def test_an_entry_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    held = {"net": {"weight": torch.ones(1)}, "ema": {"weight": torch.ones(1)}}
    path = save_weights(held, tmp_path / "last.pth")
    with pytest.raises(
        WeightsError, match=r"last\.pth::best: there is no entry 'best'; it has net, ema$"
    ):
        read_state_dict(Path(f"{path}::best"))
    two = save_weights({"student": held["net"], "teacher": held["ema"]}, tmp_path / "dino.pth")
    with pytest.raises(
        WeightsError,
        match=r"dino\.pth: it holds 2 state_dicts: student, teacher; name one as \S+::student$",
    ):
        read_state_dict(two)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["conv1.0.weight", "bn1.bias", "bn1.running_var"])
def test_weights_that_are_not_finite_are_named(key: str, value: float, tmp_path: Path) -> None:
    tensors = timm.create_model("test_resnet").state_dict()
    tensors[key].view(-1)[0] = value
    path = save_weights(tensors, tmp_path / "diverged.pth")
    with pytest.raises(
        WeightsError,
        match=rf"diverged\.pth: weights are NaN or infinite: {key} \(1 of \d+ values\); .*earlier",
    ):
        build_backbone("test_resnet", num_classes=2, weights=path)


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
        match=r"they look like those of another architecture\n"
        r"  missing \(289\): conv_stem\.weight.*…\n  extra \(117\): layer1\..*…\n"
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
        ("empty.pth", b"", "it is an empty file"),
        ("empty.safetensors", b"", "it is an empty file"),
        ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("page.pth", b"\n<!DOCTYPE html><html>", r"a web page \(HTML\)"),
        ("page.safetensors", b"<html><body>404", r"a web page \(HTML\)"),
        ("denied.pth", b'<?xml version="1.0"?><Error>', "an XML answer"),
        ("model.safetensors.index.json", b'{"weight_map": {}}', "it is JSON"),
        ("keras.h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("packed.pth", b"\x1f\x8b\x08\x00", "gunzip"),
        ("cut.pth", b"PK\x03\x04" + bytes(40), "it is cut short; copy or download it again"),
        (
            "cut.safetensors",
            safetensors.torch.save({"a": torch.zeros(9)})[:-4],
            "it is cut short; copy or download it again",
        ),
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


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda tensor: tensor.to(torch.int8), "int8"),
        (lambda tensor: tensor > 0, "bool"),
        (lambda tensor: tensor + 1j, "complex64"),
        (lambda tensor: tensor.to_sparse(), "sparse"),
        (lambda tensor: tensor.to("meta"), "without values, on the meta device"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_tensors_that_are_no_plain_numbers_are_named(
    change: Callable[[torch.Tensor], torch.Tensor], kind: str
) -> None:
    model = timm.create_model("test_resnet")
    tensors = model.state_dict()
    tensors["layer1.0.conv1.weight"] = change(tensors["layer1.0.conv1.weight"])
    with pytest.raises(WeightsError) as caught:
        load_strictly(model, tensors, "x.pth", "fc")
    assert str(caught.value) == (
        "x.pth: 1 tensors are no plain floating-point numbers: layer1.0.conv1.weight "
        f"({kind}); where they were written, save model.float().state_dict()"
    )


def test_a_torchscript_program_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))  # type: ignore[no-untyped-call]
    torch.jit.save(traced, path)
    with pytest.raises(WeightsError, match=r"it is a TorchScript program, not weights; .*save"):
        read_state_dict(path)


def test_of_several_entries_the_other_one_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {"a": torch.zeros(1)}
    path = save_weights({"model": tensors, "state_dict": tensors}, tmp_path / "two.pth")
    with caplog.at_level("INFO", "graft"):
        read_state_dict(path)
    expected = f"{path}: taking 'state_dict'; it holds 'model' too, which {path}::model would take"
    assert expected in caplog.messages


def test_a_pth_that_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="it holds list, not a state_dict"):
        read_state_dict(save_weights([1, 2], tmp_path / "list.pth"))


def test_a_whole_model_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = save_weights(timm.create_model("test_resnet"), tmp_path / "model.pth")
    with pytest.raises(
        WeightsError, match=r"it holds timm\.models\.\S+, .*; .*save model\.state_dict\(\) alone"
    ):
        read_state_dict(path)


def test_a_folder_of_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="it is a folder; name the file"):
        read_state_dict(tmp_path)
