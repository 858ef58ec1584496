"""Features are computed once. After any damage, what is read is what was written, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from finetune.data import cache as cache_module
from finetune.data.cache import MAX_SEGMENTS, FeatureCache, digest_image, merge_segments, trim
from finetune.data.splits import Sample
from finetune.probe.features import extract_features
from models.engine.engine import Crops, EngineInfo, Features
from models.engine.openvino_engine import OpenVINOEngine
from models.errors import GraftError
from models.prepared import PreparedBackbone
from models.preprocess import View
from models.sources import EncodedImage
from tests.support.images import draw_shape
from tests.support.shared import HANG_SECONDS

PROJECT_DIR = Path(__file__).parents[3]
INFO = EngineInfo("openvino 1", "a processor", "fp32", 4, 2, 100.0)
NUM_FEATURES = 5
RECORD_SIZE = 4 * NUM_FEATURES + 4
DIGESTS = [digest_image(bytes([index])) for index in range(12)]
FEATURES = np.random.default_rng(0).normal(size=(12, NUM_FEATURES)).astype(np.float32)
NUM_IMAGES = 80


def open_cache(
    cache_dir: Path,
    fingerprint: str = "a network",
    info: EngineInfo = INFO,
    num_features: int = NUM_FEATURES,
) -> FeatureCache:
    return FeatureCache(cache_dir, fingerprint, info, num_features)


def read(cache: FeatureCache, digest: bytes) -> Features | None:
    out = np.full(NUM_FEATURES, np.nan, np.float32)
    return out if cache.read(digest, out) else None


def fill(cache_dir: Path, indices: range, fingerprint: str = "a network") -> Path:
    """Write some rows as a run does, and give the folder they are in."""
    with open_cache(cache_dir, fingerprint) as cache:
        cache.write([DIGESTS[index] for index in indices], FEATURES[indices.start : indices.stop])
    return cache.folder


def readable(cache_dir: Path) -> list[int]:
    """Which of DIGESTS a new run finds; each must be what was written."""
    found = []
    with open_cache(cache_dir) as cache:
        for index, digest in enumerate(DIGESTS):
            features = read(cache, digest)
            if features is not None:
                assert np.array_equal(features, FEATURES[index])
                found.append(index)
    return found


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def drawn_samples(count: int) -> list[Sample]:
    return [
        Sample(f"image {index}", 0, EncodedImage(draw_shape("circle", index, size=(64, 48))))
        for index in range(count)
    ]


class Counted:
    """The engine, counting the images that it is given."""

    def __init__(self, engine: OpenVINOEngine) -> None:
        self._engine = engine
        self.info, self.num_features, self.num_slots = (
            engine.info,
            engine.num_features,
            engine.num_slots,
        )
        self.num_images = 0

    def submit(self, images: Crops) -> Future[Features]:
        self.num_images += len(images)
        return self._engine.submit(images)

    def run_here(self, images: Crops, *, is_alone: bool = True) -> Features:
        raise AssertionError("a run submits its images")

    def close(self) -> None:
        raise AssertionError("the engine is the caller's to close")


Extract = Callable[[list[Sample]], tuple[Features, int]]


@pytest.fixture(scope="module")
def prepared(small_prepared: PreparedBackbone) -> PreparedBackbone:
    return small_prepared


@pytest.fixture(scope="module")
def engine(prepared: PreparedBackbone) -> Iterator[OpenVINOEngine]:
    engine = OpenVINOEngine(
        prepared.openvino_path, prepared.preprocess, precision="fp32", batch_size=4, num_streams=2
    )
    yield engine
    engine.close()


@pytest.fixture
def extract(prepared: PreparedBackbone, engine: OpenVINOEngine, tmp_path: Path) -> Extract:
    """One run on some samples: their features, and how many images the engine was given."""

    def run(samples: list[Sample]) -> tuple[Features, int]:
        counted = Counted(engine)
        with FeatureCache(
            tmp_path, prepared.fingerprint, engine.info, engine.num_features
        ) as cache:
            extracted = extract_features(
                samples,
                prepared.preprocess,
                counted,
                num_workers=2,
                description="test",
                cache=cache,
            )
        assert (cache.num_hits, cache.num_misses) == (
            len(samples) - counted.num_images,
            counted.num_images,
        )
        return extracted.features, counted.num_images

    return run


def test_what_was_written_is_read_back_and_the_rest_is_not_there(tmp_path: Path) -> None:
    assert readable(tmp_path) == []
    fill(tmp_path, range(7))
    assert readable(tmp_path) == list(range(7))
    with open_cache(tmp_path) as cache:
        assert DIGESTS[6] in cache
        assert DIGESTS[7] not in cache
        assert read(cache, DIGESTS[7]) is None
        assert (cache.num_hits, cache.num_misses) == (0, 0)


def test_an_augmented_view_is_another_image() -> None:
    views = [None, View(), View(0.1), View(0.1, mirror=True), View(0.1, scale=1.1)]
    assert len({digest_image(b"an image", view) for view in views}) == len(views)
    assert digest_image(b"an image", View(0.1)) == digest_image(b"an image", View(0.1))


def test_a_grown_folder_computes_only_what_is_new(extract: Extract) -> None:
    samples = drawn_samples(11)
    first, num_first = extract(samples[:7])
    grown, num_grown = extract([*samples[7:], *samples[:7]])
    again, num_again = extract(samples)
    assert (num_first, num_grown, num_again) == (7, 4, 0)
    assert np.array_equal(grown[4:], first)
    assert np.array_equal(again, np.concatenate([first, grown[:4]]))


def test_features_from_the_cache_are_the_engines_bit_for_bit(
    prepared: PreparedBackbone, engine: OpenVINOEngine, extract: Extract
) -> None:
    samples = drawn_samples(5)
    plain = extract_features(
        samples, prepared.preprocess, engine, num_workers=2, description="test"
    ).features
    for _ in range(2):
        assert np.array_equal(extract(samples)[0], plain)


def test_an_image_is_found_by_its_content_and_not_by_its_name(extract: Extract) -> None:
    data = draw_shape("circle", 0)
    extract([Sample("here", 0, EncodedImage(data))])
    assert extract([Sample("there", 1, EncodedImage(data))])[1] == 0
    assert extract([Sample("here", 0, EncodedImage(draw_shape("circle", 1)))])[1] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "openvino 2"},
        {"device": "another processor"},
        {"precision": "bf16"},
        {"batch_size": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_engine_that_rounds_differently_does_not_hit(
    tmp_path: Path, change: dict[str, object]
) -> None:
    fill(tmp_path, range(3))
    changed = dataclasses.replace(INFO, **change)  # type: ignore[arg-type]
    with open_cache(tmp_path, info=changed) as cache:
        assert DIGESTS[0] not in cache


def test_another_network_does_not_hit(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    with open_cache(tmp_path, fingerprint="another network") as cache:
        assert DIGESTS[0] not in cache
    with open_cache(tmp_path, num_features=NUM_FEATURES + 1) as cache:
        assert DIGESTS[0] not in cache


def test_what_moves_no_bit_of_a_feature_hits(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    with open_cache(
        tmp_path, info=dataclasses.replace(INFO, num_streams=16, images_per_second=1.0)
    ) as cache:
        assert DIGESTS[0] in cache


@pytest.mark.parametrize("size", range(0, 4 * 16 + 1, 5))
def test_rows_whose_key_was_not_written_are_never_read(tmp_path: Path, size: int) -> None:
    os.truncate(only(fill(tmp_path, range(4)), "*.keys"), size)
    assert readable(tmp_path) == list(range(size // 16))


@pytest.mark.parametrize("size", [*range(0, 4 * RECORD_SIZE, 7), 4 * RECORD_SIZE - 1])
def test_keys_whose_row_is_cut_off_find_nothing(tmp_path: Path, size: int) -> None:
    os.truncate(only(fill(tmp_path, range(4)), "*.rows"), size)
    assert readable(tmp_path) == list(range(size // RECORD_SIZE))


@pytest.mark.parametrize("pattern", ["*.keys", "*.rows"])
def test_a_folder_in_the_place_of_a_file_finds_nothing(tmp_path: Path, pattern: str) -> None:
    path = only(fill(tmp_path, range(4)), pattern)
    path.unlink()
    path.mkdir()
    assert readable(tmp_path) == []
    fill(tmp_path, range(2))
    assert readable(tmp_path) == [0, 1]


def test_keys_without_a_file_of_rows_find_nothing(tmp_path: Path) -> None:
    only(fill(tmp_path, range(4)), "*.rows").unlink()
    assert readable(tmp_path) == []


def test_rows_that_a_power_cut_left_as_zeros_are_noticed(tmp_path: Path) -> None:
    """A file system may keep a file's length and lose what was in it."""
    rows_path = only(fill(tmp_path, range(4)), "*.rows")
    rows_path.write_bytes(rows_path.read_bytes()[: 2 * RECORD_SIZE] + bytes(2 * RECORD_SIZE))
    assert readable(tmp_path) == [0, 1]


@pytest.mark.parametrize("at", range(0, RECORD_SIZE, 3))
def test_a_flipped_bit_in_a_row_is_noticed(tmp_path: Path, at: int) -> None:
    rows_path = only(fill(tmp_path, range(3)), "*.rows")
    damaged = bytearray(rows_path.read_bytes())
    damaged[RECORD_SIZE + at] ^= 1 << (at % 8)
    rows_path.write_bytes(damaged)
    assert readable(tmp_path) == [0, 2]


def test_the_features_of_a_damaged_row_are_computed_anew(extract: Extract, tmp_path: Path) -> None:
    samples = drawn_samples(6)
    expected, _ = extract(samples)
    rows_path = only(tmp_path, "features/*/*.rows")
    damaged = bytearray(rows_path.read_bytes())
    for row in (1, 4):
        damaged[row * (len(damaged) // 6) + 100] ^= 0x10
    rows_path.write_bytes(damaged)
    features, num_computed = extract(samples)
    assert num_computed == 2
    assert np.array_equal(features, expected)


def test_rows_damaged_while_a_run_reads_them_are_computed_anew(
    prepared: PreparedBackbone, engine: OpenVINOEngine, tmp_path: Path
) -> None:
    samples = drawn_samples(3)
    plain = extract_features(
        samples, prepared.preprocess, engine, num_workers=2, description="test"
    ).features
    for _ in range(2):
        with FeatureCache(
            tmp_path, prepared.fingerprint, engine.info, engine.num_features
        ) as cache:
            for path in tmp_path.glob("features/*/*.rows"):
                os.truncate(path, 0)
            extracted = extract_features(
                samples, prepared.preprocess, engine, num_workers=2, description="test", cache=cache
            )
        assert np.array_equal(extracted.features, plain)


def test_two_writers_at_once_do_not_meet(tmp_path: Path) -> None:
    def write(indices: list[int]) -> None:
        with open_cache(tmp_path) as cache:
            barrier.wait()
            for index in indices:
                cache.write([DIGESTS[index]], FEATURES[index : index + 1])

    barrier = threading.Barrier(2)
    threads = [
        threading.Thread(target=write, args=(list(indices),))
        for indices in (range(8), range(11, 3, -1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert readable(tmp_path) == list(range(12))
    assert len(list(tmp_path.glob("features/*/*.rows"))) == 2


def test_a_run_reads_what_another_has_written_so_far(tmp_path: Path) -> None:
    with open_cache(tmp_path) as writing:
        writing.write(DIGESTS[:3], FEATURES[:3])
        assert readable(tmp_path) == [0, 1, 2]
        writing.write(DIGESTS[3:5], FEATURES[3:5])
    assert readable(tmp_path) == [0, 1, 2, 3, 4]


def test_a_run_that_only_reads_leaves_no_file(tmp_path: Path) -> None:
    folder = fill(tmp_path, range(3))
    readable(tmp_path)
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(
        GraftError, match=r"--cache-dir .*cache: .+; name another, or say --no-cache"
    ):
        open_cache(tmp_path / "cache")


def test_trim_removes_the_folder_used_longest_ago(tmp_path: Path) -> None:
    folders = {
        name: fill(tmp_path, range(4), fingerprint=name) for name in ("old", "older", "used")
    }
    for name, hours in (("old", 2), ("older", 3), ("used", 4)):
        os.utime(folders[name], (0, time.time() - hours * 3600))
    with open_cache(tmp_path, fingerprint="used"):
        pass
    size = 4 * (RECORD_SIZE + 16)
    left: list[set[str]] = []
    for max_bytes in (3 * size, 3 * size - 1, size, 0):
        trim(tmp_path, max_bytes)
        left.append({name for name, folder in folders.items() if folder.exists()})
    assert left == [{"old", "older", "used"}, {"old", "used"}, {"used"}, set()]


def test_trim_takes_nothing_from_a_run_that_reads(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    with open_cache(tmp_path) as cache:
        trim(tmp_path, 0)
        assert (found := read(cache, DIGESTS[1])) is not None
        assert np.array_equal(found, FEATURES[1])


def test_a_folder_that_another_run_trims_meanwhile_is_no_error(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fill(tmp_path, range(2), fingerprint=name)
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    def keep_trimming() -> None:
        barrier.wait()
        try:
            for number in range(30):
                fill(tmp_path, range(2), fingerprint=str(number % 3))
                trim(tmp_path, 0)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=keep_trimming) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@contextlib.contextmanager
def without_merging() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "MAX_SEGMENTS", 1000)
        yield


def fill_many(cache_dir: Path) -> Path:
    """What more runs leave than are merged, each with one of DIGESTS."""
    with without_merging():
        for number in range(MAX_SEGMENTS + 1):
            folder = fill(cache_dir, range(number % 12, number % 12 + 1))
    return folder


def test_many_runs_leave_few_files(tmp_path: Path) -> None:
    folder = fill(tmp_path, range(1))
    for number in range(3 * MAX_SEGMENTS):
        fill(tmp_path, range(number % 12, number % 12 + 1))
        assert len(list(folder.glob("*.keys"))) <= MAX_SEGMENTS + 1
    assert readable(tmp_path) == list(range(12))


def test_merging_keeps_one_copy_of_what_is_whole(tmp_path: Path) -> None:
    folder = fill_many(tmp_path)
    damaged, cut, gone = sorted(folder.glob("*.rows"))[:3]
    damaged.write_bytes(bytes(RECORD_SIZE))
    os.truncate(cut, RECORD_SIZE - 1)
    gone.unlink()
    assert readable(tmp_path) == list(range(12))
    assert only(folder, "*.keys").stat().st_size == 12 * 16
    assert only(folder, "*.rows").stat().st_size == 12 * RECORD_SIZE
    assert len(list(folder.iterdir())) == 2


def test_large_segments_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_LARGE_BYTES", 7 * RECORD_SIZE)
    large = only(fill(tmp_path, range(4, 12)), "*.rows")
    folder = fill_many(tmp_path)
    assert readable(tmp_path) == list(range(12))
    assert large.exists()
    assert len(list(folder.iterdir())) == 4


def test_a_segment_that_a_run_writes_to_is_not_merged(tmp_path: Path) -> None:
    with open_cache(tmp_path) as writing:
        writing.write(DIGESTS[:2], FEATURES[:2])
        fill_many(tmp_path)
        readable(tmp_path)
        writing.write(DIGESTS[2:4], FEATURES[2:4])
        assert len(list(writing.folder.glob("*.keys"))) == 2
    sizes = sorted(path.stat().st_size for path in writing.folder.glob("*.keys"))
    assert sizes == [4 * 16, 12 * 16]


def test_a_run_that_reads_goes_on_while_another_merges(tmp_path: Path) -> None:
    folder = fill_many(tmp_path)
    with without_merging():
        reading = open_cache(tmp_path)
    merge_segments(folder, RECORD_SIZE)
    assert len(list(folder.glob("*.keys"))) == 1
    with reading:
        for row, digest in enumerate(DIGESTS):
            found = read(reading, digest)
            assert found is not None
            assert np.array_equal(found, FEATURES[row])


def test_what_is_merged_while_a_run_looks_for_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill_many(tmp_path)
    index = FeatureCache._index

    def index_after_a_merge(cache: FeatureCache, keys_path: Path) -> None:
        if len(list(folder.glob("*.keys"))) > 1:
            merge_segments(folder, RECORD_SIZE)
        index(cache, keys_path)

    monkeypatch.setattr(cache_module, "MAX_SEGMENTS", 1000)
    monkeypatch.setattr(FeatureCache, "_index", index_after_a_merge)
    assert readable(tmp_path) == list(range(12))


def test_runs_that_merge_and_write_at_once_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "MAX_SEGMENTS", 3)
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    def keep_running(number: int) -> None:
        barrier.wait()
        try:
            for at in range(number, 12, 4):
                for _ in range(6):
                    fill(tmp_path, range(at, at + 1))
                    assert at in readable(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=keep_running, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert readable(tmp_path) == list(range(12))


def test_a_merge_killed_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    num_survived = 0
    for moment in range(0, 2000, 3):
        folder = fill_many(tmp_path / str(moment))
        pid = os.fork()
        if pid == 0:
            _merge_and_die(folder, moment)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            num_survived += 1
        with without_merging():
            assert readable(tmp_path / str(moment)) == list(range(12))
        merge_segments(folder, RECORD_SIZE)
        assert readable(tmp_path / str(moment)) == list(range(12))
        assert not list(folder.glob("*.unfinished"))
        assert len(list(folder.glob("*.keys"))) <= 2
        if num_survived:
            break
    assert moment > 60
    assert num_survived == 1


def _merge_and_die(folder: Path, moment: int) -> NoReturn:
    """End this process, a fork, at a numbered call of a merge, or with 0 when it is done."""
    num_calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            nonlocal num_calls
            if num_calls == moment:
                os._exit(9)
            num_calls += 1
            return call(*arguments, **named)

        return wrapper

    try:
        for name in ("open", "replace", "unlink"):
            setattr(Path, name, counted(getattr(Path, name)))
        cache_module._is_whole = counted(cache_module._is_whole)
        merge_segments(folder, RECORD_SIZE)
        os._exit(0)
    finally:
        os._exit(1)


# One run over drawn images in a process of its own, which may end itself with SIGKILL after writing
# a number of bytes to the cache. It prints how many features came from the cache, and a digest of
# them all.
RUN = """
import hashlib, logging, os, signal, sys
from pathlib import Path
from finetune.data.cache import FeatureCache
from finetune.data.splits import Sample
from models.sources import EncodedImage
from finetune.probe.features import extract_features
from models.engine.openvino_engine import OpenVINOEngine
from models.prepared import read_prepared
from tests.support.images import draw_shape

folder, cache_dir = Path(sys.argv[1]), Path(sys.argv[2])
num_images, last_byte = int(sys.argv[3]), int(sys.argv[4])
logging.basicConfig(level=logging.WARNING)
prepared = read_prepared(folder)
engine = OpenVINOEngine(
    prepared.openvino_path,
    prepared.preprocess,
    precision="fp32",
    batch_size=4,
    num_streams=2,
    images_per_second=1.0,
)
samples = [
    Sample(str(index), 0, EncodedImage(draw_shape("circle", index, size=(64, 48))))
    for index in range(num_images)
]
write, num_written = os.write, 0

def write_and_die(descriptor, data):
    global num_written
    if 0 <= last_byte <= num_written + len(data):
        write(descriptor, data[: last_byte - num_written])
        os.kill(os.getpid(), signal.SIGKILL)
    num_written += len(data)
    return write(descriptor, data)

with FeatureCache(cache_dir, prepared.fingerprint, engine.info, engine.num_features) as cache:
    print("started", flush=True)
    if last_byte >= 0:
        os.write = write_and_die
    extracted = extract_features(
        samples, prepared.preprocess, engine, num_workers=2, description="test", cache=cache
    )
digest = hashlib.sha256(extracted.features.tobytes()).hexdigest()
print(cache.num_hits, digest, "torch" in sys.modules)
"""


def start_run(
    prepared: PreparedBackbone,
    cache_dir: Path,
    last_byte: int = -1,
    max_file_bytes: int | None = None,
) -> subprocess.Popen[str]:
    def limit_file_size() -> None:
        if max_file_bytes is not None:
            # As ENOSPC does, EFBIG stops a write after a part of it.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    command = [
        sys.executable,
        "-c",
        RUN,
        str(prepared.folder),
        str(cache_dir),
        str(NUM_IMAGES),
        str(last_byte),
    ]
    return subprocess.Popen(
        command,
        cwd=PROJECT_DIR,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit_file_size,
    )


@pytest.fixture(scope="module")
def undisturbed(prepared: PreparedBackbone, engine: OpenVINOEngine) -> str:
    """The digest of the features that a run without a cache gives."""
    extracted = extract_features(
        drawn_samples(NUM_IMAGES), prepared.preprocess, engine, num_workers=2, description="test"
    )
    return hashlib.sha256(extracted.features.tobytes()).hexdigest()


def test_after_runs_killed_at_any_moment_the_next_one_gives_the_same_features(
    prepared: PreparedBackbone, undisturbed: str, tmp_path: Path
) -> None:
    rows, keys = 32 * (4 * prepared.num_features + 4), 32 * 16
    moments = random.Random(5)
    in_rows, between, in_keys = moments.randrange(1, rows), rows, rows + moments.randrange(1, keys)
    killing_themselves = [
        start_run(prepared, tmp_path, last_byte) for last_byte in (in_rows, between, in_keys)
    ]
    for run in killing_themselves:
        run.communicate(timeout=HANG_SECONDS)
        assert run.returncode == -signal.SIGKILL
    for run in [start_run(prepared, tmp_path) for _ in range(2)]:
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(moments.uniform(0, 0.3))
        run.kill()
        run.communicate(timeout=HANG_SECONDS)
    finishing = start_run(prepared, tmp_path)
    said, errors = finishing.communicate(timeout=HANG_SECONDS)
    assert finishing.returncode == 0, errors
    num_hits, digest, has_torch = said.split()[1:]
    assert digest == undisturbed
    assert int(num_hits) >= (in_keys - rows) // 16 > 0
    assert has_torch == "False"


def test_a_full_disk_ends_the_caching_and_not_the_run(
    prepared: PreparedBackbone, undisturbed: str, tmp_path: Path
) -> None:
    # The first 32 rows fit, the next ones in part.
    limited = start_run(prepared, tmp_path, max_file_bytes=200_000)
    said, errors = limited.communicate(timeout=HANG_SECONDS)
    assert limited.returncode == 0, errors
    assert said.split()[1:3] == ["0", undisturbed]
    assert errors.count("cannot take more (File too large); this run goes on without it") == 1
    after = start_run(prepared, tmp_path)
    said, errors = after.communicate(timeout=HANG_SECONDS)
    assert (said.split()[1:3], errors) == (["32", undisturbed], "")
