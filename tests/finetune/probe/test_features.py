"""Features are in the order of the samples; unreadable samples are reported and left out."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from finetune.data.splits import Sample
from finetune.probe.features import _report_unreadable, extract_features
from models.engine.engine import Crops, Features, run
from models.engine.openvino_engine import OpenVINOEngine
from models.errors import GraftError
from models.prepared import PreparedBackbone
from models.sources import EncodedImage
from tests.support.images import draw_shape


def sample(index: int, data: bytes | None = None) -> Sample:
    kind = ("JPEG", "PNG")[index % 2]
    return Sample(
        f"image {index}",
        0,
        EncodedImage(draw_shape("circle", index, kind) if data is None else data),
    )


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("count", [0, 1, 4, 11])
def test_features_keep_the_order_of_the_samples(
    prepared: PreparedBackbone, engine: OpenVINOEngine, count: int, num_workers: int
) -> None:
    samples = [sample(index) for index in range(count)]
    extracted = extract_features(
        samples, prepared.preprocess, engine, num_workers=num_workers, description="test"
    )
    assert extracted.unreadable == {}
    assert extracted.features.shape == (count, engine.num_features)
    for index in range(count):
        assert np.array_equal(
            extracted.features[index],
            run(engine, prepared.preprocess(samples[index].read())[None])[0],
        )


def test_unreadable_samples_are_named_and_left_out(
    prepared: PreparedBackbone, engine: OpenVINOEngine
) -> None:
    samples = [sample(index) for index in range(9)]
    samples[0] = sample(0, b"")
    samples[4] = sample(4, b"some text")
    samples[8] = sample(8, draw_shape("cross", 1, "PNG")[:200])
    extracted = extract_features(
        samples, prepared.preprocess, engine, num_workers=3, description="test"
    )
    assert list(extracted.unreadable) == ["image 0", "image 4", "image 8"]
    assert "empty" in extracted.unreadable["image 0"]
    assert "not an image" in extracted.unreadable["image 4"]
    assert "cannot be decoded" in extracted.unreadable["image 8"]
    kept = [index for index in range(9) if index not in (0, 4, 8)]
    expected = run(engine, np.stack([prepared.preprocess(samples[index].read()) for index in kept]))
    assert np.array_equal(extracted.features, expected)


def test_unreadable_images_that_are_not_shown_are_in_the_audit() -> None:
    reasons = {f"{number}.jpg": "the file is empty" for number in range(12)}
    with pytest.raises(GraftError, match=r"  and 2 more; audit.html, of a run or of finetune/aud"):
        _report_unreadable(reasons, is_error=True)


def test_nothing_readable_gives_no_features(
    prepared: PreparedBackbone, engine: OpenVINOEngine
) -> None:
    extracted = extract_features(
        [sample(0, b"x"), sample(1, b"y")],
        prepared.preprocess,
        engine,
        num_workers=2,
        description="test",
    )
    assert extracted.features.shape == (0, engine.num_features)
    assert len(extracted.unreadable) == 2


def test_a_file_that_goes_away_after_it_was_listed_is_unreadable(
    prepared: PreparedBackbone, engine: OpenVINOEngine, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{index}.jpg" for index in range(3)]
    for index, path in enumerate(paths):
        path.write_bytes(draw_shape("square", index))
    samples = [Sample(str(path), 0, path) for path in paths]
    paths[1].unlink()
    paths[2].unlink()
    paths[2].mkdir()
    extracted = extract_features(
        samples, prepared.preprocess, engine, num_workers=2, description="test"
    )
    assert extracted.features.shape[0] == 1
    assert extracted.unreadable == {
        str(paths[1]): "the file cannot be read: No such file or directory",
        str(paths[2]): "the file cannot be read: Is a directory",
    }


class Watched:
    """An engine that records at each batch how many images were read by then."""

    def __init__(self, engine: OpenVINOEngine) -> None:
        self._engine = engine
        self.info, self.num_features, self.num_slots = (
            engine.info,
            engine.num_features,
            engine.num_slots,
        )
        self.num_read = 0
        self.num_submitted = 0
        self.most_ahead = 0
        self._lock = threading.Lock()

    def read_bytes(self) -> bytes:
        with self._lock:
            self.num_read += 1
        return draw_shape("circle", 0, "PNG", (16, 16))

    def submit(self, images: Crops) -> Future[Features]:
        self.most_ahead = max(self.most_ahead, self.num_read - self.num_submitted)
        self.num_submitted += len(images)
        return self._engine.submit(images)

    def run_here(self, images: Crops, *, is_alone: bool = True) -> Features:
        raise AssertionError("a run submits its images")

    def close(self) -> None:
        raise AssertionError("the engine is the caller's to close")


def test_decoding_runs_ahead_only_a_few_batches(
    prepared: PreparedBackbone, engine: OpenVINOEngine
) -> None:
    """Memory does not depend on the size of the dataset."""
    watched = Watched(engine)
    samples = [Sample(str(index), 0, watched) for index in range(80)]  # type: ignore[arg-type]
    extract_features(samples, prepared.preprocess, watched, num_workers=2, description="test")
    assert (watched.num_read, watched.num_submitted) == (80, 80)
    assert watched.most_ahead <= 6 * engine.info.batch_size + 2


def test_errors_other_than_image_errors_are_raised(
    prepared: PreparedBackbone, engine: OpenVINOEngine
) -> None:
    class Broken:
        def read_bytes(self) -> bytes:
            raise ZeroDivisionError("a bug")

    samples = [sample(0), Sample("x", 0, Broken())]  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        extract_features(samples, prepared.preprocess, engine, num_workers=1, description="test")
