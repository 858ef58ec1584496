"""`--precision auto` takes the fastest precision that costs a probe no accuracy, and logs why.

What it chose for a source of images it chooses again.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.config import Options
from finetune.data.cache import digest_image
from finetune.data.splits import Splits, load_splits
from finetune.probe import precision
from finetune.probe.features import extract_features, extract_splits
from finetune.probe.precision import Chosen, PrecisionCheck, PrecisionSearch
from finetune.run import run
from models.checkpoint import load_checkpoint
from models.engine.engine import Features
from models.engine.openvino_engine import supports_bf16
from models.engine.processor import supports_vnni
from models.prepared import PreparedBackbone, read_prepared
from models.quantise import find_quantised
from models.sources import SplitName
from tests.conftest import SMALL_SIZE
from tests.support.images import draw_shape, write_class_folders

FLOAT = "bf16" if supports_bf16() else "fp32"
NUM_PER_CLASS = 140
needs_bf16 = pytest.mark.skipif(
    not supports_bf16(), reason="this CPU has no bf16, so that fp32 is all there is"
)


@pytest.fixture(scope="module")
def own_cache(
    small_levels_prepared: PreparedBackbone, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache with the converted backbone for these tests alone.

    Whoever quantises first decides which images it is calibrated on.
    """
    own = tmp_path_factory.mktemp("cache")
    shutil.copytree(
        small_levels_prepared.folder, own / "backbones" / small_levels_prepared.folder.name
    )
    return own


@pytest.fixture(scope="module")
def backbone(small_levels_prepared: PreparedBackbone, own_cache: Path) -> PreparedBackbone:
    return read_prepared(own_cache / "backbones" / small_levels_prepared.folder.name)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("data") / "shapes", NUM_PER_CLASS)


@pytest.fixture(autouse=True)
def _any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 is as accurate without VNNI, only slower."""
    monkeypatch.setattr(precision, "supports_vnni", lambda: True)


@pytest.fixture
def int8_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On few images, and on a machine where it is slower."""
    monkeypatch.setattr(precision, "INT8_MIN_SECONDS", 0.0)
    monkeypatch.setattr(precision, "_MAX_COMPARED_FRACTION", 0.7)
    monkeypatch.setattr(precision, "_is_faster", lambda engine, other: True)


@pytest.fixture
def forget(own_cache: Path) -> None:
    """Checks and features of the tests before; the quantised backbone stays."""
    for name in ("precision", "features"):
        shutil.rmtree(own_cache / name, ignore_errors=True)


def options_of(data: Path | str, own_cache: Path, **changes: Any) -> Options:
    return Options(
        data=str(data), cache_dir=own_cache, device="cpu", image_size=SMALL_SIZE, **changes
    )


def splits_of(options: Options) -> Splits:
    return load_splits(
        options.data,
        data_root=options.data_root,
        val_fraction=options.val_fraction,
        seed=options.seed,
    )


def digests_of(splits: Splits) -> dict[str, bytes]:
    return {
        sample.key: digest_image(sample.read())
        for _, samples in splits.named()
        for sample in samples
    }


def search(backbone: PreparedBackbone, options: Options, scratch: Path) -> PrecisionSearch:
    folder = (options.enabled_cache_dir or scratch) / "precision"
    name = precision.name_checks(backbone, options.device, options.source, splits_of(options))
    return PrecisionSearch(
        backbone=backbone,
        asked=options.precision,
        device=options.device,
        is_frozen=options.freeze == "backbone",
        num_workers=2,
        seed=options.seed,
        cache=options.feature_cache,
        checks_path=folder / name,
    )


def choose(
    backbone: PreparedBackbone, options: Options, scratch: Path, num_views: int = 1
) -> Chosen:
    splits = splits_of(options)
    chosen = search(backbone, options, scratch).choose_engine(splits, digests_of(splits), num_views)
    chosen.engine.close()
    return chosen


def check_against_fp32(
    backbone: PreparedBackbone, options: Options, scratch: Path, chosen: Chosen, features: Features
) -> PrecisionCheck | None:
    found = search(backbone, options, scratch)
    return found.check_against_fp32(chosen, splits_of(options), features)


def forbid_comparing(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(*_: Any, **__: Any) -> None:
        raise AssertionError("features were computed for a comparison")

    monkeypatch.setattr(precision, "extract_features", compare)


@pytest.mark.usefixtures("int8_is_tried", "forget")
def test_int8_is_refused_where_it_costs_accuracy_and_not_tried_again(
    backbone: PreparedBackbone,
    own_cache: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # No probe reaches it: what int8 costs here depends on the processor, and one without VNNI lost
    # nothing.
    monkeypatch.setattr(precision, "_INT8_TOLERANCE", -1.0)
    options = options_of(shapes, own_cache)
    with caplog.at_level("INFO", "graft"):
        first = choose(backbone, options, tmp_path)
    assert first.engine.info.precision == FLOAT
    assert first.backbone == backbone
    assert re.match(r"int8 costs accuracy \(cross-validated [01]\.\d{4}, ", first.reason)
    assert f"precision {FLOAT}: {first.reason}" in caplog.messages
    forbid_comparing(monkeypatch)
    again = choose(backbone, options, tmp_path)
    assert (again.engine.info.precision, again.reason) == (FLOAT, first.reason)


@pytest.mark.usefixtures("int8_is_tried", "forget")
def test_int8_is_taken_where_it_keeps_accuracy_and_stays_as_the_folder_grows(
    backbone: PreparedBackbone,
    own_cache: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    options = options_of(
        data, own_cache, output=tmp_path / "runs", repository=tmp_path / "checkpoints"
    )
    first = load_checkpoint(run(options))
    for seed in range(NUM_PER_CLASS, NUM_PER_CLASS + 5):
        (data / "circle" / f"{seed}.jpeg").write_bytes(draw_shape("circle", seed))
    forbid_comparing(monkeypatch)
    second = load_checkpoint(run(options))
    quantised = find_quantised(backbone)
    assert quantised is not None
    assert first.fingerprint == second.fingerprint == quantised.fingerprint != backbone.fingerprint
    assert first.engine["precision"] == second.engine["precision"] == "int8"
    for path in (tmp_path / "runs").iterdir():
        found = json.loads((path / "metrics.json").read_text())
        assert found["precision"]["chosen"] == "int8"
        assert (
            f"int8 keeps accuracy (cross-validated {1:.4f}, {FLOAT}" in found["precision"]["reason"]
        )
        assert found["val"]["accuracy"] >= 0.97
    card = (second.path / "README.md").read_text()
    assert "| precision | int8: int8 keeps accuracy" in card


@pytest.mark.usefixtures("forget")
def test_few_images_are_not_quantised(
    backbone: PreparedBackbone,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = Path(shutil.copytree(backbone.folder, tmp_path / "cache" / "backbones" / "alone"))
    forbid_comparing(monkeypatch)
    chosen = choose(read_prepared(alone), options_of(shapes, tmp_path / "cache"), tmp_path)
    assert chosen.engine.info.precision == FLOAT
    seconds = 3 * NUM_PER_CLASS / chosen.engine.info.images_per_second
    assert chosen.reason == (
        f"int8 is tried where computing features takes 60 s or more; {3 * NUM_PER_CLASS} images "
        f"that are not in the cache take about {seconds:.0f} s"
    )
    assert [path.name for path in alone.parent.iterdir()] == ["alone"]
    assert not (tmp_path / "cache" / "precision").exists()


@pytest.mark.usefixtures("int8_is_tried", "forget")
def test_images_in_the_cache_do_not_count(
    backbone: PreparedBackbone,
    own_cache: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = options_of(shapes, own_cache)
    engine = backbone.open_engine("cpu", "auto")
    splits = splits_of(options)
    extract_splits(
        splits, backbone, engine, num_workers=2, cache=options.feature_cache, only=("train",)
    )
    engine.close()
    forbid_comparing(monkeypatch)
    seconds = len(splits.val) / engine.info.images_per_second
    monkeypatch.setattr(precision, "INT8_MIN_SECONDS", 1.01 * seconds)
    chosen = choose(backbone, options, tmp_path)
    assert chosen.engine.info.precision == FLOAT
    assert f"; {len(splits.val)} images that are not in the cache take" in chosen.reason
    monkeypatch.setattr(precision, "INT8_MIN_SECONDS", 0.99 * seconds)
    with pytest.raises(AssertionError, match="computed for a comparison"):
        choose(backbone, options, tmp_path)


@pytest.mark.usefixtures("int8_is_tried", "forget")
def test_each_view_of_a_training_image_counts(
    backbone: PreparedBackbone,
    own_cache: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_comparing(monkeypatch)
    options = options_of(shapes, own_cache)
    splits = splits_of(options)
    num_images = 3 * len(splits.train) + len(splits.val)
    monkeypatch.setattr(precision, "INT8_MIN_SECONDS", 1e6)
    reason = choose(backbone, options, tmp_path, num_views=3).reason
    assert f"; {num_images:,} images that are not in the cache" in reason


@pytest.mark.usefixtures("int8_is_tried", "forget")
def test_int8_is_not_taken_where_it_is_not_faster(
    backbone: PreparedBackbone,
    own_cache: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_comparing(monkeypatch)
    monkeypatch.setattr(precision, "_is_faster", lambda engine, other: False)
    chosen = choose(backbone, options_of(shapes, own_cache), tmp_path)
    assert chosen.engine.info.precision == FLOAT
    assert chosen.reason.startswith("int8 is not faster here (int8 ")


@pytest.mark.usefixtures("int8_is_tried", "forget")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"freeze": "until:blocks.4"}, "int8 is for --freeze backbone"),
        ({"cache": False}, "int8 is for backbones that are kept"),
    ],
)
def test_where_int8_cannot_be_it_is_said(
    backbone: PreparedBackbone,
    own_cache: Path,
    shapes: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    reason: str,
) -> None:
    chosen = choose(backbone, options_of(shapes, own_cache, **changes), tmp_path)
    assert chosen.engine.info.precision == FLOAT
    assert chosen.reason.startswith(reason)


@pytest.mark.usefixtures("int8_is_tried", "forget")
def test_a_cpu_without_vnni_does_not_try_int8(
    backbone: PreparedBackbone,
    own_cache: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "supports_vnni", lambda: False)
    chosen = choose(backbone, options_of(shapes, own_cache), tmp_path)
    assert (chosen.engine.info.precision, chosen.reason) == (
        FLOAT,
        "this CPU has no VNNI, without which int8 gains little",
    )


def test_vnni_is_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text
    told = [
        "flags\t\t: fpu avx2 avx512f",
        "flags\t\t: fpu avx2 avx_vnni",
        "flags\t\t: fpu avx512_vnni amx_int8",
        "Features: asimddp",
    ]
    for said, expected in zip(told, (False, True, True, False), strict=True):
        monkeypatch.setattr(
            Path,
            "read_text",
            lambda path, text=said: text if str(path) == "/proc/cpuinfo" else read_text(path),
        )
        supports_vnni.cache_clear()
        assert supports_vnni() is expected
    supports_vnni.cache_clear()


@pytest.mark.usefixtures("forget")
def test_what_is_asked_for_is_not_questioned(
    backbone: PreparedBackbone,
    own_cache: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_comparing(monkeypatch)
    options = options_of(shapes, own_cache, precision="fp32")
    chosen = choose(backbone, options, tmp_path)
    assert (chosen.engine.info.precision, chosen.reason) == ("fp32", "--precision fp32")
    features = np.zeros((0, 1280), np.float32)
    assert check_against_fp32(backbone, options, tmp_path, chosen, features) is None


@needs_bf16
@pytest.mark.usefixtures("forget")
def test_bf16_that_costs_accuracy_gives_way_to_fp32_and_stays_away(
    backbone: PreparedBackbone,
    own_cache: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A bf16 that loses everything, as that of a network with values beyond its reach would."""
    precisions: list[str] = []

    def extract(
        splits: Splits, on: PreparedBackbone, engine: Any, *rest: Any, **named: Any
    ) -> tuple[Splits, dict[SplitName, Features]]:
        precisions.append(engine.info.precision)
        readable, features = extract_splits(splits, on, engine, *rest, **named)
        if engine.info.precision == "bf16":
            for found in features.values():
                found[:] = np.random.default_rng(0).permutation(found)
        return readable, features

    monkeypatch.setattr(precision, "extract_splits", extract)
    monkeypatch.setattr(precision, "_CHECK_SECONDS", 30.0)
    options = options_of(
        shapes, own_cache, output=tmp_path / "runs", repository=tmp_path / "checkpoints"
    )
    with caplog.at_level("INFO", "graft"):
        first = load_checkpoint(run(options))
    assert precisions == ["bf16", "fp32"]
    assert first.engine["precision"] == "fp32"
    assert first.config["graft"]["metrics"]["val"]["accuracy"] >= 0.97
    said = next(message for message in caplog.messages if message.startswith("precision fp32: "))
    assert "bf16 costs accuracy (cross-validated 0." in said
    run(options)
    assert precisions[2:] == ["fp32"]


@needs_bf16
@pytest.mark.usefixtures("forget")
def test_without_the_cache_a_check_holds_for_one_run(
    backbone: PreparedBackbone,
    own_cache: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "_CHECK_SECONDS", 30.0)
    monkeypatch.setattr(precision, "_MAX_COMPARED", 100)
    options = options_of(shapes, own_cache, cache=False)
    chosen, splits = choose(backbone, options, tmp_path), splits_of(options)
    noise = (
        np.random.default_rng(0)
        .normal(size=(len(splits.train), chosen.engine.num_features))
        .astype(np.float32)
    )
    check = check_against_fp32(backbone, options, tmp_path, chosen, noise)
    assert check is not None
    assert not check.holds
    assert choose(backbone, options, tmp_path).engine.info.precision == "fp32"
    assert choose(backbone, options, tmp_path / "another run").engine.info.precision == "bf16"
    assert not (own_cache / "precision").exists()


@needs_bf16
@pytest.mark.usefixtures("forget")
def test_what_a_few_images_speak_against_is_decided_by_many(
    backbone: PreparedBackbone,
    own_cache: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = options_of(shapes, own_cache, cache=False)
    chosen, splits = choose(backbone, options, tmp_path), splits_of(options)
    compared: list[int] = []
    compare = precision._compare

    def compare_worse_at_first(*arguments: Any, **options: Any) -> PrecisionCheck:
        check = compare(*arguments, **options)
        compared.append(len(arguments[2]))
        return replace(check, holds=False) if len(compared) == 1 else check

    monkeypatch.setattr(precision, "_compare", compare_worse_at_first)
    monkeypatch.setattr(
        precision, "_CHECK_SECONDS", 120 / (chosen.engine.info.images_per_second / 2)
    )
    features = extract_features(
        splits.train, backbone.preprocess, chosen.engine, num_workers=2, description=""
    ).features
    check = check_against_fp32(backbone, options, tmp_path, chosen, features)
    assert check is not None
    assert check.holds
    assert compared[0] in (119, 120)
    assert compared[1:] == [len(splits.train)]
    assert f"on {len(splits.train)} training images" in check.reason


@needs_bf16
@pytest.mark.usefixtures("forget")
def test_bf16_that_keeps_accuracy_is_compared_once(
    backbone: PreparedBackbone,
    own_cache: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "_CHECK_SECONDS", 30.0)
    options = options_of(
        shapes, own_cache, output=tmp_path / "runs", repository=tmp_path / "checkpoints"
    )
    for number in range(2):
        if number:
            forbid_comparing(monkeypatch)
        assert load_checkpoint(run(options)).engine["precision"] == "bf16"
    said = [
        json.loads((path / "metrics.json").read_text())
        for path in sorted((tmp_path / "runs").iterdir())
    ]
    reasons = [metrics["precision"]["reason"] for metrics in said]
    assert (
        "bf16 keeps accuracy (cross-validated 1.0000, fp32 1.0000, on 336 training images)"
        in reasons[0]
    )
    assert reasons[1].endswith(reasons[0].rpartition("; ")[2])


@needs_bf16
@pytest.mark.usefixtures("forget")
def test_too_few_images_say_nothing_of_bf16(
    backbone: PreparedBackbone,
    own_cache: Path,
    tmp_path: Path,
) -> None:
    data = write_class_folders(tmp_path / "few", 10)
    options = options_of(data, own_cache)
    chosen, splits = choose(backbone, options, tmp_path), splits_of(options)
    features = np.zeros((len(splits.train), 1280), np.float32)
    assert check_against_fp32(backbone, options, tmp_path, chosen, features) is None


@pytest.mark.usefixtures("int8_is_tried", "forget")
def test_damaged_checks_are_made_again(
    backbone: PreparedBackbone, own_cache: Path, shapes: Path, tmp_path: Path
) -> None:
    options = options_of(shapes, own_cache)
    first = choose(backbone, options, tmp_path)
    (path,) = (own_cache / "precision").iterdir()
    for damage in ("[{}]", "{"):
        path.write_text(damage)
        again = choose(backbone, options, tmp_path)
        assert (again.engine.info.precision, again.reason) == (
            first.engine.info.precision,
            first.reason,
        )
