"""Validation images as TensorBoard's own projector reads them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client

from finetune.data.splits import Sample, Splits
from finetune.monitor import Monitor
from finetune.report.candidate import Candidate
from finetune.report.projector import _principal_components, write_projector
from models.errors import GraftError
from models.sources import EncodedImage
from tests.support.images import draw_noise
from tests.support.results import make_result
from tests.support.tiny import LABELS


def make(num_images: int, num_features: int = 20) -> tuple[Splits, Candidate]:
    """Three classes, with a picture of an image's class each.

    The first answer is wrong, and the first file's name has what would break a table.
    """
    generator = np.random.default_rng(0)
    labels = np.arange(num_images) % len(LABELS)
    samples = [
        Sample(f"photos/{index}.png", int(label), EncodedImage(draw_noise(int(label), index)))
        for index, label in enumerate(labels)
    ]
    samples[0] = replace(samples[0], key="photos/a\tb\n\udcff.png")
    answers = [1, *labels[1:]]
    centres = 5 * generator.standard_normal((len(LABELS), num_features))
    features = centres[labels] + generator.standard_normal((num_images, num_features))
    candidate = replace(
        make_result().probe,
        logits={"val": 8 * np.eye(len(LABELS), dtype=np.float32)[answers]},
        features={"val": features.astype(np.float32)},
    )
    return Splits(LABELS, (), tuple(samples)), candidate


def write(
    run_dir: Path, splits: Splits, candidate: Candidate, *, with_thumbnails: bool = False
) -> None:
    write_projector(run_dir, splits, candidate, with_thumbnails=with_thumbnails, num_workers=2)


class Projector:
    """TensorBoard's plugin on a folder of runs."""

    def __init__(self, folder: Path) -> None:
        events = EventMultiplexer().AddRunsFromDirectory(str(folder))
        events.Reload()
        flags: Any = SimpleNamespace(generic_data="auto")
        context = TBContext(
            logdir=str(folder),
            flags=flags,
            data_provider=MultiplexerDataProvider(events, str(folder)),
        )
        self._apps = ProjectorPlugin(context).get_plugin_apps()

    def get(self, route: str, **query: object) -> Any:
        response = Client(self._apps[route]).get("/", query_string=query)
        assert response.status_code == 200, response.text
        return response


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's folder, which TensorBoard knows as one by its events."""
    folder = tmp_path / "runs" / "pets-1"
    monitor = Monitor(folder)
    monitor.scalar("val/accuracy", 1.0)
    monitor.close()
    return folder


def test_tensorboard_finds_points_labels_and_thumbnails(run_dir: Path) -> None:
    write(run_dir, *make(30), with_thumbnails=True)
    projector = Projector(run_dir.parent)
    assert projector.get("/runs").json == ["pets-1"]
    (embedding,) = projector.get("/info", run="pets-1").json["embeddings"]
    assert embedding["tensorShape"] == [30, 20]
    points = np.frombuffer(projector.get("/tensor", run="pets-1", name="val").data, np.float32)
    assert points.shape == (30 * 20,)
    rows = projector.get("/metadata", run="pets-1", name="val").text.splitlines()
    assert rows[0] == "label\tanswer\tis it right\tscore\tfile"
    assert rows[2].startswith("green\tgreen\tright\t")
    assert rows[2].endswith("\tphotos/1.png")
    assert rows[1].startswith("red\tgreen\twrong\t")
    assert rows[1].endswith("\tphotos/a b ?.png")
    assert len(rows) == 1 + 30
    sprite = projector.get("/sprite_image", run="pets-1", name="val")
    assert sprite.mimetype == "image/jpeg"
    side = embedding["sprite"]["singleImageDim"][0]
    with Image.open(run_dir / "projector" / "sprite.jpg") as image:
        assert image.size == (6 * side, 6 * side)
        # Row by row: the colour of the label is the strongest of each tile.
        for index in range(30):
            tile = np.asarray(image)[
                index // 6 * side : (index // 6 + 1) * side,
                index % 6 * side : (index % 6 + 1) * side,
            ]
            assert tile.mean(axis=(0, 1)).argmax() == index % 3


def test_without_thumbnails_there_is_no_sprite(run_dir: Path) -> None:
    write(run_dir, *make(30))
    (embedding,) = Projector(run_dir.parent).get("/info", run="pets-1").json["embeddings"]
    assert "sprite" not in embedding
    assert not (run_dir / "projector" / "sprite.jpg").exists()


@pytest.mark.parametrize(
    ("num_images", "num_features", "shape"),
    [(3, 20, (3, 3)), (40, 8, (40, 8)), (300, 400, (300, 50))],
)
def test_distances_are_kept_by_as_many_directions_as_are_needed(
    run_dir: Path, num_images: int, num_features: int, shape: tuple[int, int]
) -> None:
    splits, candidate = make(num_images, num_features)
    write(run_dir, splits, candidate)
    points = np.loadtxt(run_dir / "projector" / "tensors.tsv", delimiter="\t", ndmin=2)
    assert points.shape == shape

    def distances(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(np.linalg.norm(rows[:, None] - rows[None, :3], axis=2))

    found, expected = distances(points), distances(candidate.features["val"])
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95
    if shape[1] < 50:
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_of_very_many_images_some_of_all_classes_are_shown(run_dir: Path) -> None:
    splits, candidate = make(4500)
    started = time.process_time()
    write(run_dir, splits, candidate)
    assert time.process_time() - started < 5
    rows = (run_dir / "projector" / "metadata.tsv").read_text().splitlines()[1:]
    assert len(rows) == 2000
    assert {row.split("\t")[0] for row in rows} == set(LABELS)
    assert rows[-1].endswith("photos/4499.png")


def test_files_that_went_leave_an_empty_place(run_dir: Path, tmp_path: Path) -> None:
    splits, candidate = make(5)
    gone = replace(splits.val[2], image=tmp_path / "gone.png")
    splits = replace(splits, val=(*splits.val[:2], gone, *splits.val[3:]))
    write(run_dir, splits, candidate, with_thumbnails=True)
    with Image.open(run_dir / "projector" / "sprite.jpg") as image:
        tiles = np.asarray(image).reshape(3, 48, 3, 48, 3).swapaxes(1, 2).reshape(9, 48, 48, 3)
    is_empty = [bool(tile.mean() > 230) for tile in tiles]
    assert is_empty == [False, False, True, False, False, True, True, True, True]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "projector").write_text("a file where the folder should be")
    with pytest.raises(GraftError, match="projector: it cannot be written: File exists"):
        write(tmp_path, *make(5))


def test_large_features_are_finite_points() -> None:
    features = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    expected = _principal_components(features)
    found = _principal_components(features * np.float32(1e25))
    np.testing.assert_allclose(found, expected * np.float32(1e25), rtol=1e-3, atol=1e22)
