"""From a CSV of labels to the service's answer: images that show any number of shapes."""

from __future__ import annotations

import csv
import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config import Options
from finetune.data.splits import Sample, Splits
from finetune.evaluation.label_metrics import evaluate_labels
from finetune.resume import Choices, keep_choices, lock, restore_splits
from finetune.run import run
from finetune.tasks.multi_label import MULTI_LABEL
from models.checkpoint import load_checkpoint
from models.errors import GraftError
from models.sources import EncodedImage
from tests.conftest import SMALL_SIZE
from tests.support import tiny
from tests.support.images import SHAPES, draw_shape
from tests.support.servers import serve
from tests.support.shared import HANG_SECONDS

NUM_TRAIN, NUM_VAL = 90, 30


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two panels an image, each a shape or only noise; the last training image's label is wrong."""
    root = tmp_path_factory.mktemp("panels")
    generator = np.random.default_rng(0)
    with (root / "panels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "labels", "split"))
        for index in range(NUM_TRAIN + NUM_VAL):
            page = Image.fromarray(generator.integers(0, 70, (160, 320, 3), np.uint8))
            shapes = [SHAPES[int(choice)] for choice in generator.integers(0, 4, 2) if choice < 3]
            for place, shape in enumerate(shapes):
                page.paste(
                    Image.open(io.BytesIO(draw_shape(shape, index, size=(160, 160)))),
                    (160 * place, 0),
                )
            page.save(root / f"{index}.jpg")
            names = {"circle"} ^ set(shapes) if index == NUM_TRAIN - 1 else set(shapes)
            rows.writerow(
                (f"{index}.jpg", "|".join(sorted(names)), "train" if index < NUM_TRAIN else "val")
            )
    return root / "panels.csv"


Finetune = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def finetune(labelled: Path, tmp_path: Path, cache_dir: Path) -> Finetune:
    """Run on the panels; gives the checkpoint and metrics.json."""

    def finetune(**changes: Any) -> tuple[Path, dict[str, Any]]:
        folders = {
            "output": tmp_path / "runs",
            "repository": tmp_path / "checkpoints",
            "cache_dir": cache_dir,
        }
        checkpoint = run(Options(data=str(labelled), workers=2, **folders, **changes))
        (run_dir,) = (tmp_path / "runs").iterdir()
        return checkpoint, json.loads((run_dir / "metrics.json").read_text())

    return finetune


def test_a_probe_is_served_as_it_was_measured(
    finetune: Finetune, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, metrics = finetune()
    val = metrics["val"]
    assert val["mean_average_precision"] > 0.9
    assert set(val["per_class"]) == set(SHAPES)
    assert metrics["probe"]["mean_average_precision"] == val["mean_average_precision"]
    low, high = val["intervals"]["mean_average_precision"]
    assert (
        f"val mean average precision {val['mean_average_precision']:.4f} ({low:.3f} to {high:.3f})"
        in capsys.readouterr().out
    )
    checkpoint = load_checkpoint(folder)
    assert checkpoint.thresholds is not None
    assert checkpoint.thresholds.tolist() == pytest.approx(metrics["calibration"]["thresholds"])
    assert (checkpoint.coverage, checkpoint.threshold) == (None, None)

    (run_dir,) = (tmp_path / "runs").iterdir()
    report, card = (run_dir / "report.html").read_text(), (folder / "README.md").read_text()
    for text in (report, card):
        assert "An answer names the labels whose score" in text
        assert "mean average precision" in text
        assert "unsure" not in text.partition("All options")[0]
    assert "A multi-label image classifier of 3 labels" in card
    with (run_dir / "audit.csv").open() as file:
        (wrong, *_) = (row for row in csv.DictReader(file) if row["kind"] == "wrong_label")
    assert Path(wrong["path"]).name == f"{NUM_TRAIN - 1}.jpg"
    assert "'circle'" in wrong["detail"]

    with labelled.open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    files = [
        ("images", (row["path"], (labelled.parent / row["path"]).read_bytes())) for row in rows
    ]
    with serve(
        tmp_path / "log",
        {"CHECKPOINTS": str(tmp_path / "checkpoints"), "GRAFT_MAX_IMAGES": str(NUM_VAL)},
    ) as server:
        predictions = httpx.post(f"{server.url}/predict", files=files, timeout=HANG_SECONDS).json()[
            "predictions"
        ]
    answers = np.array(
        [
            [name in {one["label"] for one in entry["labels"]} for name in SHAPES]
            for entry in predictions
        ]
    )
    truth = np.array(
        [[name in row["labels"].split("|") for name in SHAPES] for row in rows]
    ).astype(np.int64)
    scores = [{one["label"]: one["score"] for one in entry["top"]} for entry in predictions]
    ranked = np.log(
        [
            [score[name] / (1 - min(score[name], 0.999999)) + 1e-9 for name in SHAPES]
            for score in scores
        ]
    ).astype(np.float32)
    served = evaluate_labels(ranked, truth, answers)
    # bf16 in batches of another size moves a score that lies at a threshold.
    assert served.to_dict(SHAPES)["exact_match"] == pytest.approx(
        val["exact_match"], abs=1.5 / NUM_VAL
    )
    assert served.score == pytest.approx(val["mean_average_precision"], abs=0.01)


def test_layers_train_past_the_probe(finetune: Finetune, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "graft"):
        _, metrics = finetune(
            freeze="until:blocks.5", epochs=1, augment="none", image_size=SMALL_SIZE
        )
    assert set(metrics["verdict"]) >= {
        "probe_mean_average_precision",
        "fine_tuned_mean_average_precision",
    }
    assert metrics["verdict"]["fine_tuned_mean_average_precision"] > 0.8
    assert any(
        message.startswith("epoch 1: ") and "val mean average precision" in message
        for message in caplog.messages
    )


def draw_splits() -> Splits:
    """Tiny images in which any of three colours are a little brighter."""

    def draw(split: str, count: int, first_seed: int) -> tuple[Sample, ...]:
        generator = np.random.default_rng(first_seed)
        samples = []
        for index in range(count):
            labels = np.flatnonzero(generator.random(3) < 0.5)
            pixels = generator.integers(0, 200, (tiny.SIZE, tiny.SIZE, 3))
            pixels[..., labels] += 30
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            samples.append(
                Sample(
                    f"{split} {index}",
                    tuple(map(int, labels)),
                    EncodedImage(buffer.getvalue()),
                )
            )
        return tuple(samples)

    return Splits(tiny.LABELS, draw("train", 24, 0), draw("val", 12, 1), task=MULTI_LABEL)


@pytest.mark.parametrize("cache", [True, False])
def test_a_training_learns_and_can_be_stopped_and_resumed(tmp_path: Path, cache: bool) -> None:
    splits, options = draw_splits(), tiny.options(cache=cache, epochs=3)

    def train_in(
        folder: Path, after: Callable[[int], None] | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        folder.mkdir(exist_ok=True)
        backbone, monitor = tiny.build(), tiny.Recorder(folder, after)
        try:
            tiny.train_tiny(
                backbone,
                splits,
                tiny.probe_of(backbone),
                options,
                monitor,
                folder,
                state_dir=folder,
            )
        finally:
            monitor.close()
        return tiny.snapshot(backbone), monitor.curves

    def stop(num_steps: int) -> None:
        if num_steps == 6:
            signal.raise_signal(signal.SIGINT)

    whole, curves = train_in(tmp_path / "whole")
    assert (
        curves["epoch/val_mean_average_precision"][-1][1]
        > curves["epoch/val_mean_average_precision"][0][1]
    )
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path / "stopped", stop)
    resumed, _ = train_in(tmp_path / "stopped")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_resumed_run_has_its_own_labels(tmp_path: Path) -> None:
    splits = draw_splits()
    with lock(tmp_path):
        keep_choices(tmp_path, Choices({}, splits, splits, "fp32", "it was asked for"))
    restored = restore_splits(tmp_path, splits)
    assert restored is not None
    assert [(sample.key, sample.label) for sample in restored.train] == [
        (sample.key, sample.label) for sample in splits.train
    ]
    assert restored.task is MULTI_LABEL


def test_the_loss_of_an_image_is_the_mean_of_its_labels() -> None:
    logits, labels = torch.tensor([[2.0, -1.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    expected = -(
        labels * torch.sigmoid(logits).log() + (1 - labels) * (1 - torch.sigmoid(logits)).log()
    ).mean(dim=1)
    assert torch.allclose(MULTI_LABEL.losses(logits, labels, None, 0), expected)


@pytest.mark.parametrize(
    ("name", "value", "more"),
    [
        ("balance", "weights", {}),
        ("label_smoothing", 0.1, {"freeze": "none"}),
        ("mix", "mixup", {"freeze": "none"}),
    ],
)
def test_what_single_labels_alone_have_is_refused(
    finetune: Finetune, name: str, value: object, more: dict[str, Any]
) -> None:
    with pytest.raises(
        GraftError, match=f"--{name.replace('_', '-')} {value}: it is for one label an image"
    ):
        finetune(**{name: value}, **more)


def test_comparing_backbones_says_why_not(labelled: Path, tmp_path: Path) -> None:
    from finetune.compare import compare
    from finetune.config import CompareOptions

    with pytest.raises(
        GraftError,
        match="backbones are compared by the accuracy of single labels, and its images have "
        "several",
    ):
        compare(CompareOptions(data=str(labelled), output=tmp_path, cache_dir=tmp_path / "cache"))
