"""MixUp, CutMix and label smoothing are what their papers say, and what epochs learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

import finetune.training.loop
from finetune.command_line import parse_options
from finetune.config import Options
from finetune.tasks.single_label import SINGLE_LABEL
from finetune.training.mix import build_mix
from models.errors import GraftError
from tests.support.tiny import (
    PREPROCESS,
    Recorder,
    Trunk,
    build,
    draw_splits,
    options,
    probe_of,
    train_tiny,
)

IMAGES = torch.randint(
    0, 256, (5, 8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
ACTIVATIONS = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
TARGETS = torch.tensor([0, 1, 2, 2, 1])
ONE_HOT = torch.eye(3)[TARGETS]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("batch", [IMAGES, ACTIVATIONS], ids=["images", "activations"])
def test_mixup_fades_each_into_the_one_before_it(batch: torch.Tensor) -> None:
    mix = build_mix("mixup", 3)
    shares_seen = set()
    for seed in range(5):
        torch.manual_seed(seed)
        mixed, shares = mix(batch, TARGETS)
        torch.manual_seed(seed)
        share = float(torch.distributions.Beta(torch.tensor([0.2]), torch.tensor([0.2])).sample(()))
        torch.testing.assert_close(
            mixed, share * batch.float() + (1 - share) * batch.float().roll(1, 0)
        )
        torch.testing.assert_close(shares, share * ONE_HOT + (1 - share) * ONE_HOT.roll(1, 0))
        assert mixed.dtype == torch.float32
        shares_seen.add(share)
    assert len(shares_seen) == 5


def test_cutmix_pastes_a_box_and_shares_the_label_by_its_area() -> None:
    mix = build_mix("cutmix", 3)
    torch.manual_seed(1)
    areas = set()
    for _ in range(10):
        mixed, shares = mix(IMAGES, TARGETS)
        is_pasted = (mixed != IMAGES).any(dim=3)
        assert torch.equal(mixed[is_pasted], IMAGES.roll(1, 0)[is_pasted].float())
        rows, columns = is_pasted.any(dim=(0, 2)), is_pasted.any(dim=(0, 1))
        area = int(rows.sum() * columns.sum())
        # Noise of three channels differs everywhere, so that the box is seen.
        assert is_pasted[:, rows][:, :, columns].all()
        torch.testing.assert_close(
            shares, ONE_HOT + (ONE_HOT.roll(1, 0) - ONE_HOT) * area / (8 * 12)
        )
        areas.add(area)
    assert len(areas) > 3


def test_both_come_by_turns_and_none_changes_nothing() -> None:
    torch.manual_seed(0)
    mix = build_mix("both", 3)
    is_faded = [bool((mix(IMAGES, TARGETS)[0] % 1 != 0).any()) for _ in range(20)]
    assert 3 < sum(is_faded) < 17
    state = torch.get_rng_state()
    images, labels = build_mix("none", 3)(IMAGES, TARGETS)
    assert images is IMAGES
    assert labels is TARGETS
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0])])
def test_the_loss_of_each_image_is_the_formulas(
    smoothing: float, weights: torch.Tensor | None
) -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    counted = torch.ones(3) if weights is None else weights
    for targets, shares in ((TARGETS, ONE_HOT), (0.3 * ONE_HOT + 0.7 * ONE_HOT.roll(1, 0),) * 2):
        smooth = (1 - smoothing) * shares + smoothing / 3
        expected = -(counted * smooth * logits.log_softmax(dim=1)).sum(dim=1)
        torch.testing.assert_close(
            SINGLE_LABEL.losses(logits, targets, weights, smoothing),
            expected,
        )


# ---------------------------------------------------------------------------------- gradient epochs


@pytest.mark.parametrize(
    ("mix", "freeze", "cache"),
    [("mixup", "until:stem", True), ("both", "until:stem", False), ("both", "none", True)],
)
def test_epochs_train_on_mixed_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mix: str, freeze: str, cache: bool
) -> None:
    """The first loss is that of the first mixed batch, with its labels smoothed."""
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def build_watched(kind: str, num_classes: int) -> object:
        assert (kind, num_classes) == (mix, 3)
        own = build_mix(kind, num_classes)

        def watched(images: Any, labels: Any) -> Any:
            batches.append(own(images, labels))
            return batches[-1]

        return watched

    monkeypatch.setattr(finetune.training.loop, "build_mix", build_watched)
    backbone = build()
    cast(Trunk, backbone.model.backbone).dropout.p = 0.0
    monitor = Recorder(tmp_path)
    given = options(
        mix=mix, freeze=freeze, cache=cache, label_smoothing=0.1, epochs=1, batch_norm="keep"
    )
    train_tiny(backbone, draw_splits(), probe_of(backbone), given, monitor, tmp_path)
    monitor.close()
    start = build()
    start.model.eval()
    mixed, shares = batches[0]
    assert len(batches) == len(monitor.curves["train/loss"]) == 4
    with torch.no_grad():
        if cache and freeze != "none":
            stem_out = mixed.reshape(6, 6, 15, 15)
            features = start.model.get_submodule("backbone.tail")(stem_out).mean(dim=(2, 3))
            logits = start.head(features)
        else:
            images = (mixed / 255 - torch.tensor(PREPROCESS.mean)) / torch.tensor(PREPROCESS.std)
            logits = start.model(images.permute(0, 3, 1, 2))
    expected = -((0.9 * shares + 0.1 / 3) * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert monitor.curves["train/loss"][0][1] == pytest.approx(float(expected), rel=1e-5)


def test_mixing_is_drawn_from_the_seed(tmp_path: Path) -> None:
    losses = []
    for seed in (1, 1, 2):
        backbone, monitor = build(), Recorder(tmp_path)
        train_tiny(
            backbone,
            draw_splits(),
            probe_of(backbone),
            options(mix="mixup", epochs=1, seed=seed),
            monitor,
            tmp_path,
        )
        monitor.close()
        losses.append(monitor.curves["train/loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--mix cutmix --freeze until:layer3",
            "--mix cutmix: it pastes pixels, and --freeze until:layer3 trains on .* kept at "
            "layer3; say",
        ),
        (
            "--mix both --freeze until:layer3",
            "--mix both: it pastes pixels, .*say --mix mixup, .*, or --no-cache, which runs",
        ),
        (
            "--mix mixup",
            "--mix mixup: it is for gradient epochs, and --freeze backbone has none; say "
            "--freeze until:NAME or none",
        ),
        (
            "--label-smoothing 0.1",
            r"--label-smoothing 0\.1: it is for gradient epochs, and --freeze backbone has none; "
            r"say",
        ),
        (
            "--label-smoothing 1 --freeze none",
            "--label-smoothing 1: it must be a number from 0 and below 1",
        ),
        (
            "--mix mixup --freeze none --batch-size 1",
            "--mix mixup: it blends the images of a batch, and --batch-size 1 has only one; say 2",
        ),
    ],
)
def test_impossible_mixes_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(GraftError, match=f"^{message}"):
        parse_options(Options, arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        "--mix cutmix --freeze until:layer3 --no-cache",
        "--mix both --freeze none",
        "--resume runs/a",
    ],
)
def test_possible_mixes_are_accepted(arguments: str) -> None:
    parse_options(Options, arguments.split())
