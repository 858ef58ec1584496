"""Epochs read kept activations where possible, else crops, and train the same on both."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from finetune.candidates import training_settings
from finetune.config import Options
from finetune.data.splits import Sample, Splits
from finetune.data.views import draw_view
from finetune.monitor import Monitor
from finetune.probe.solve import Probe
from finetune.training.activations import Activations, Bf16File
from finetune.training.boundary import TrainablePart
from finetune.training.inputs import Crops, Inputs, Normalise, open_inputs
from models.backbone.build import Backbone
from models.backbone.custom import CustomNetwork
from models.backbone.freezing import freeze
from models.errors import GraftError
from models.preprocess import Preprocess
from models.sources import EncodedImage
from tests.support.images import draw_noise
from tests.support.tiny import train_tiny

SIZE = 24
LABELS = ("red", "green", "blue")
# What reaches the network are the whole numbers 0 to 255, all of which bfloat16 holds.
WHOLE_NUMBERS = Preprocess(
    height=SIZE,
    width=SIZE,
    crop_fraction=0.8,
    mean=(0.0, 0.0, 0.0),
    std=(1 / 255, 1 / 255, 1 / 255),
)
CPU = torch.device("cpu")


class Trunk(nn.Module):
    """A frozen stem that picks pixels, so its activations are exact, and a tail that trains."""

    def __init__(self, has_skip: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1, stride=2, bias=False)
        self.stem.weight.data = torch.eye(3)[:, :, None, None]
        self.tail = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())
        self.has_skip = has_skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.tail(self.stem(images) / 255).mean(dim=(2, 3))
        return features + images.mean(dim=(1, 2, 3))[:, None] / 255 if self.has_skip else features


pytestmark = pytest.mark.usefixtures("one_thread")


def build(has_skip: bool = False) -> Backbone:
    torch.manual_seed(0)
    model = CustomNetwork(Trunk(has_skip), 8)
    model.reset_classifier(3)
    return Backbone("own:trunk", model, "head", WHOLE_NUMBERS, "none", None, "backbone.")


def draw_samples(count: int, first_seed: int = 0) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            f"{label} {seed}",
            label,
            EncodedImage(draw_noise(label, seed, brighter=50, size=2 * SIZE)),
        )
        for seed in range(first_seed, first_seed + count)
        for label in range(len(LABELS))
    )


SPLITS = Splits(LABELS, draw_samples(8), draw_samples(3, 50))


def options(**changes: Any) -> Options:
    defaults: dict[str, Any] = {
        "freeze": "until:stem",
        "epochs": 1,
        "batch_size": 6,
        "precision": "fp32",
        "augment": "none",
        "workers": 1,
    }
    return Options(**{**defaults, "device": "cpu", **changes})


def open_own(
    scratch: Path, backbone: Backbone | None = None, splits: Splits = SPLITS, **changes: Any
) -> Inputs:
    backbone, chosen = backbone or build(), options(**changes)
    freezing = freeze(backbone.model, chosen.freeze, backbone.classifier, backbone.module_prefix)
    return open_inputs(backbone, freezing, splits, training_settings(chosen), scratch, CPU)


def bf16_file(path: Path, values: np.ndarray) -> Bf16File:
    kept = Bf16File(path, *values.shape)
    kept[list(range(len(values)))] = values
    return kept


def test_rounding_to_bf16_is_torchs(tmp_path: Path) -> None:
    """Every sign, exponent and mantissa that bf16 has, with each way to be between two of them."""
    between = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = ((np.arange(2**16, dtype=np.uint32) << 16)[:, None] + between).view(np.float32)
    values = values[np.isfinite(values).all(axis=1)]
    kept = bf16_file(tmp_path / "kept.npy", values)
    expected = torch.from_numpy(values).bfloat16()
    for row in (0, 1, 127, 0x3F80, len(values) // 2 - 1, len(values) // 2, len(values) - 1):
        assert kept.read(row).dtype == torch.bfloat16
        assert torch.equal(kept.read(row), expected[row])
    found = torch.stack([kept.read(row) for row in range(0, len(values), 3)])
    assert torch.equal(found.view(torch.int16), expected[::3].view(torch.int16))


def test_infinities_stay_and_nan_stays_nan(tmp_path: Path) -> None:
    kept = bf16_file(
        tmp_path / "kept.npy", np.array([[np.inf, -np.inf, np.nan, -0.0]], np.float32)
    ).read(0)
    assert kept[:2].tolist() == [float("inf"), float("-inf")]
    assert kept[2].isnan()
    assert kept[3] == 0
    assert torch.signbit(kept[3])


def test_activations_on_a_full_disk_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk would otherwise end the process by SIGBUS at the first row written."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(
            GraftError,
            match=r"val\.npy: the activations take 0\.8 MB and cannot be written: No space left on "
            r"device",
        ):
            Bf16File(tmp_path / "val.npy", 100, 4000)
    assert list(tmp_path.iterdir()) == []
    Bf16File(tmp_path / "val.npy", 100, 4000)
    (kept,) = tmp_path.iterdir()
    assert kept.stat().st_blocks * 512 >= kept.stat().st_size > 800_000


@pytest.mark.parametrize("num_bytes", [0, 40, 1000])
def test_kept_activations_that_were_cut_short_are_computed_again(
    tmp_path: Path, num_bytes: int
) -> None:
    path = tmp_path / "val.npy"
    bf16_file(path, np.ones((100, 8), np.float32)).keep()
    os.truncate(path, num_bytes)
    again = Bf16File(path, 100, 8)
    assert not again.is_kept
    again[list(range(100))] = np.full((100, 8), 2, np.float32)
    again.keep()
    assert Bf16File(path, 100, 8).read(99).tolist() == [2.0] * 8


@pytest.mark.parametrize(("shape", "what"), [((100, 8), "of another run"), ((50, 16), "of this")])
def test_kept_activations_of_something_else_are_computed_again(
    tmp_path: Path, shape: tuple[int, int], what: str
) -> None:
    path = tmp_path / "val.npy"
    kept = Bf16File(path, 100, 8, "of this")
    kept[list(range(100))] = np.ones((100, 8), np.float32)
    kept.keep()
    assert Bf16File(path, 100, 8, "of this").is_kept
    assert not Bf16File(path, *shape, what).is_kept


def test_epochs_read_one_view_after_the_other_and_begin_again(tmp_path: Path) -> None:
    views = [
        bf16_file(tmp_path / f"{view}.npy", np.array([[view, 0], [view, 1]], np.float32))
        for view in range(3)
    ]
    activations = Activations(views, [5, 6])
    seen = []
    for epoch in range(1, 8):
        activations.epoch = epoch
        (first, first_label), (second, second_label) = (
            activations[index] for index in range(len(activations))
        )
        assert (first.tolist()[1], second.tolist()[1], first_label, second_label) == (0, 1, 5, 6)
        assert first[0] == second[0]
        seen.append(int(first[0]))
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_a_crop_depends_on_seed_epoch_and_index_and_on_nothing_else() -> None:
    samples = draw_samples(2)

    def crops(seed: int, epoch: int) -> Crops:
        dataset = Crops(
            samples, WHOLE_NUMBERS, targets=[0] * len(samples), augment="flip", seed=seed
        )
        dataset.epoch = epoch
        return dataset

    first = crops(1, 1)
    forwards = [first[index][0] for index in range(6)]
    again = crops(1, 1)
    backwards = [again[index][0] for index in reversed(range(6))][::-1]
    for index in range(6):
        assert torch.equal(forwards[index], backwards[index])
        view = draw_view("flip", 1, 1, index)
        assert np.array_equal(
            forwards[index].numpy(), WHOLE_NUMBERS(samples[index].read(), view=view)
        )
        assert not torch.equal(forwards[index], crops(1, 2)[index][0])
        assert not torch.equal(forwards[index], crops(2, 1)[index][0])


def test_workers_draw_the_same_views_as_one_process() -> None:
    dataset = Crops(draw_samples(4), WHOLE_NUMBERS, targets=[0, 1, 2] * 4, augment="light", seed=3)
    dataset.epoch = 2
    alone, shared = (
        list(DataLoader(dataset, 4, num_workers=num_workers)) for num_workers in (0, 2)
    )
    for (images, labels), (same_images, same_labels) in zip(alone, shared, strict=True):
        assert images.dtype == torch.uint8
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


def test_without_augmentation_every_epoch_sees_the_plain_crop() -> None:
    dataset = Crops(draw_samples(1), WHOLE_NUMBERS, targets=[0, 1, 2])
    for epoch in (1, 2):
        dataset.epoch = epoch
        assert np.array_equal(dataset[2][0].numpy(), WHOLE_NUMBERS(draw_samples(1)[2].read()))
        assert dataset[2][1] == 2


def test_normalised_images_have_the_backbones_mean_and_std() -> None:
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    found = Normalise(Preprocess(), CPU, torch.channels_last)(images)
    expected = (
        images.permute(0, 3, 1, 2) / 255 - torch.tensor(Preprocess().mean)[:, None, None]
    ) / torch.tensor(Preprocess().std)[:, None, None]
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_activations_are_kept_at_the_boundary_in_the_order_of_the_samples(tmp_path: Path) -> None:
    inputs = open_own(tmp_path)
    assert isinstance(inputs.network, TrainablePart)
    assert isinstance(inputs.train, Activations)
    for dataset, samples in ((inputs.train, SPLITS.train), (inputs.val, SPLITS.val)):
        assert len(dataset) == len(samples)
        for index, sample in enumerate(samples):
            activation, label = dataset[index]
            expected = torch.from_numpy(WHOLE_NUMBERS(sample.read()).copy()).permute(2, 0, 1)[
                :, ::2, ::2
            ]
            assert torch.equal(activation.float(), expected.flatten().float())
            assert label == sample.label
    inputs.close()


@pytest.mark.parametrize(
    ("augment", "views", "epochs", "expected"),
    [("none", 3, 5, 1), ("light", 1, 9, 4), ("light", 6, 2, 6)],
)
def test_as_many_views_are_kept_as_are_asked_for_or_of_use(
    tmp_path: Path, augment: str, views: int, epochs: int, expected: int
) -> None:
    inputs = open_own(
        tmp_path,
        splits=Splits(LABELS, SPLITS.train[:3], SPLITS.val[:3]),
        augment=augment,
        views=views,
        epochs=epochs,
    )
    inputs.close()
    assert len(list(tmp_path.glob("train-*.npy"))) == expected
    seen = set()
    for epoch in range(1, 2 * expected + 1):
        inputs.train.epoch = epoch
        activation = inputs.train[0][0]
        seen.add(activation.view(torch.int16).numpy().tobytes())
        if epoch <= expected:
            # The very view that this epoch would draw without the cache.
            view = draw_view(augment, 0, epoch, 0)  # type: ignore[arg-type]
            crop = WHOLE_NUMBERS(SPLITS.train[0].read(), view=view)
            assert torch.equal(
                activation.float(),
                torch.from_numpy(crop.copy()).permute(2, 0, 1)[:, ::2, ::2].flatten().float(),
            )
    assert len(seen) == expected


@pytest.mark.parametrize("reason", ["--no-cache", "skip", "full disk", "nothing frozen"])
def test_crops_are_used_where_activations_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    if reason == "full disk":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 0, 10_000))
    backbone = build(has_skip=reason == "skip")
    inputs = open_own(
        tmp_path,
        backbone,
        cache=reason != "--no-cache",
        freeze="none" if reason == "nothing frozen" else "until:stem",
    )
    said = {
        "skip": "this network cannot be cut at its freeze boundary",
        "full disk": "half of the free disk is",
    }.get(reason)
    assert (said in caplog.text) if said else not caplog.records
    assert isinstance(inputs.train, Crops)
    assert isinstance(inputs.val, Crops)
    assert inputs.network is backbone.model
    assert not any("forward" in vars(module) for module in backbone.model.modules())
    images, labels = next(iter(DataLoader(inputs.train, 4)))
    assert inputs.network(inputs.prepare(images)).shape == (4, 3)
    assert labels.tolist() == [0, 1, 2, 0]
    inputs.close()


@pytest.mark.parametrize("freeze", ["until:stem", "until:tail.0"])
def test_an_epoch_on_kept_activations_moves_the_weights_as_one_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, freeze: str
) -> None:
    """At the stem bf16 is exact; behind the first layer of the tail it rounds."""
    start = build()
    probe = Probe(
        np.zeros((3, 8), np.float32),
        np.zeros(3, np.float32),
        1.0,
        np.zeros((0, 3), np.float32),
        1.0,
    )
    ends = []
    for cache in (True, False):
        backbone, scratch = build(), tmp_path / str(cache)
        scratch.mkdir()
        monitor = Monitor(scratch)
        caplog.clear()
        with caplog.at_level(logging.INFO, "graft.inputs"):
            trained = train_tiny(
                backbone,
                SPLITS,
                probe,
                options(freeze=freeze, cache=cache, lr=0.01, backbone_lr=0.01),
                monitor,
                scratch,
            )
        monitor.close()
        assert trained.best_epoch == 1
        assert ("kept activations at backbone." in caplog.text) == cache
        ends.append(dict(backbone.model.named_parameters()))
    tolerance = 1e-5 if freeze == "until:stem" else 2e-3
    for name, before in start.model.named_parameters():
        kept, anew = ends[0][name].data, ends[1][name].data
        torch.testing.assert_close(kept, anew, rtol=0, atol=tolerance, msg=name)
        is_frozen = name.startswith("backbone.stem") or (
            freeze == "until:tail.0" and name.startswith("backbone.tail.0")
        )
        assert torch.equal(kept, before.data) == is_frozen


class Viewing(nn.Module):
    """`view` cannot join what a convolution in channels_last leaves apart in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, stride=2)
        self.tail = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.tail(self.stem(images))
        features: torch.Tensor = maps.view(len(maps), -1)
        return features


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("trunk", [Trunk, Viewing])
def test_channels_last_is_taken_where_the_network_can(
    trunk: type[nn.Module], cache: bool, tmp_path: Path
) -> None:
    model = CustomNetwork(trunk(), 8 if trunk is Trunk else 100)
    model.reset_classifier(3)
    backbone = Backbone("own:trunk", model, "head", WHOLE_NUMBERS, "none", None, "backbone.")
    inputs = open_own(tmp_path, backbone, cache=cache)
    seen: list[torch.Tensor] = []
    model.get_submodule("backbone.tail").register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0])
    )
    batch, _ = next(iter(DataLoader(inputs.train, 4)))
    inputs.network(inputs.prepare(batch)).sum().backward()
    assert isinstance(inputs.network, TrainablePart) == cache
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == (trunk is Trunk)
    assert seen[0].is_contiguous() == (trunk is Viewing)


def test_an_image_that_vanishes_before_its_activation_is_kept_raises(tmp_path: Path) -> None:
    """Left out in silence, it would give every later image the label of the one before."""
    path = tmp_path / "3.png"
    samples = (*SPLITS.train[:3], Sample(str(path), 0, path), *SPLITS.train[3:])
    with pytest.raises(
        GraftError,
        match=r"3\.png: gone or changed since the run began \(the file cannot be read: No such "
        r"file",
    ):
        open_own(tmp_path, splits=Splits(LABELS, samples, SPLITS.val))
