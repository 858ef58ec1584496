"""`python finetune/compare.py` measures backbones, logs those it cannot, and recommends one."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from finetune.compare import Comparison, compare, main, recommend, wilson_interval
from finetune.config import CompareOptions
from finetune.report.plots import MeasuredBackbone, draw_backbones
from models.errors import GraftError
from models.prepared import PreparedBackbone
from tests.support.images import SHAPES, write_class_folders

NUM_PER_CLASS = 10
NETWORK = """
from torch import nn

def build():
    trunk = nn.Sequential(
        nn.Conv2d(3, 4, 9, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    trunk.pretrained_cfg = {"input_size": (3, 48, 48)}
    return trunk
"""


def candidate(
    name: str, accuracy: float, low: float, high: float, images_per_second: float
) -> MeasuredBackbone:
    return MeasuredBackbone(name, accuracy, low, high, images_per_second, "fp32")


@dataclass(frozen=True)
class Compared:
    """A comparison, what it printed and logged, and the file of its plot."""

    comparison: Comparison
    printed: str
    said: str
    data: Path
    plot: Path


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("compared") / "my shapes", NUM_PER_CLASS)


@pytest.fixture(scope="module")
def own_network(
    tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The name of a tiny network in the user's own module."""
    package = tmp_path_factory.mktemp("own") / "graftcompared"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "net.py").write_text(NETWORK)
    patch.syspath_prepend(package.parent)
    yield "graftcompared.net:build"
    for name in ("graftcompared.net", "graftcompared"):
        sys.modules.pop(name, None)


def options(data: Path, backbones: str, output: Path, cache_dir: Path) -> CompareOptions:
    return CompareOptions(
        data=str(data), backbones=backbones, output=output, cache_dir=cache_dir, precision="fp32"
    )


@pytest.fixture(scope="module")
def compared(
    prepared: PreparedBackbone,
    data: Path,
    own_network: str,
    cache_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Compared:
    """The embedded backbone, one without weights, one that does not exist, and the user's own."""
    output = tmp_path_factory.mktemp("output")
    backbones = f"tf_efficientnet_lite0, resnet18,resnet81,{own_network}"
    printed, said = io.StringIO(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        patch.setattr(
            "finetune.compare.logger.warning", lambda message, *parts: said.append(message % parts)
        )
        comparison = compare(options(data, backbones, output, cache_dir))
    return Compared(
        comparison, printed.getvalue(), "\n".join(said), data, output / "compare-my-shapes.png"
    )


def test_backbones_come_in_order_of_accuracy_with_their_intervals(compared: Compared) -> None:
    first, second = compared.comparison.candidates
    assert (first.name, second.name) == ("tf_efficientnet_lite0", "graftcompared.net:build")
    assert first.accuracy > 0.8 > second.accuracy
    num_images = len(SHAPES) * NUM_PER_CLASS - len(SHAPES) * 2  # less the validation split
    for found in (first, second):
        assert (found.low, found.high) == wilson_interval(
            round(found.accuracy * num_images), num_images
        )
        assert found.precision == "fp32"
    assert second.images_per_second > first.images_per_second


def test_a_backbone_that_cannot_be_had_is_named_and_left_out(compared: Compared) -> None:
    lines = compared.said.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("left out: --backbone resnet18: no pretrained weights could be had")
    assert lines[1].startswith("left out: --backbone resnet81: ")
    assert "did you mean" in lines[1]
    assert "resnet" not in compared.printed


def test_the_table_has_a_line_for_each_and_marks_one(compared: Compared) -> None:
    lines = compared.printed.splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("backbone"))
    assert lines[header].split() == [
        "backbone",
        "accuracy",
        "95%",
        "interval",
        "images/s",
        "precision",
    ]
    rows = lines[header + 1 : header + 3]
    for row, found in zip(rows, compared.comparison.candidates, strict=True):
        assert row.split()[:5] == [
            found.name,
            f"{found.accuracy:.4f}",
            f"{found.low:.4f}",
            "to",
            f"{found.high:.4f}",
        ]
        assert ("<- recommended" in row) == (found == compared.comparison.recommended)
    assert compared.printed.count("<- recommended") == 1


def test_the_next_command_is_one_that_a_shell_takes(compared: Compared) -> None:
    last = compared.printed.strip().splitlines()[-1].strip()
    recommended = compared.comparison.recommended.name
    assert last == f"python finetune/run.py --data '{compared.data}' --backbone {recommended}"


def test_the_plot_is_a_png_that_says_where_it_is(compared: Compared) -> None:
    assert str(compared.plot) in compared.printed
    with Image.open(compared.plot) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300


def test_the_recommended_one_stands_out_in_the_plot() -> None:
    candidates = [candidate("one", 0.9, 0.8, 0.95, 100), candidate("two", 0.8, 0.7, 0.9, 50)]
    pictures = [draw_backbones(candidates, recommended) for recommended in candidates]
    assert pictures[0].png != pictures[1].png
    with Image.open(io.BytesIO(pictures[0].png)) as image:
        assert image.size == (pictures[0].width, pictures[0].height)


def test_the_fastest_within_the_best_ones_reach_is_recommended() -> None:
    best = candidate("best", 0.95, 0.92, 0.97, 10)
    within = candidate("within", 0.94, 0.91, 0.95, 50)
    slow = candidate("slow", 0.94, 0.91, 0.96, 40)
    beyond = candidate("beyond", 0.91, 0.88, 0.9499, 500)
    assert recommend([beyond, slow, within, best]) == within
    assert recommend([beyond, best]) == best
    assert recommend([beyond]) == beyond


@pytest.mark.parametrize(
    ("num_right", "num_images", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_the_interval_is_wilsons(num_right: int, num_images: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17, 1998, table I, method 3; the last mirrors 0 of 29."""
    assert wilson_interval(num_right, num_images) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_holds_its_share_to_the_last_bit() -> None:
    for num_images in range(1, 300):
        assert wilson_interval(num_images, num_images)[1] == 1
        assert wilson_interval(0, num_images)[0] == 0


def test_no_measurable_backbone_is_an_error(data: Path, cache_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        GraftError, match="--backbones: none of them could be measured; the lines above say why"
    ):
        compare(options(data, "resnet81,nowhere.net:build", tmp_path, cache_dir))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_ends_with_2_and_a_message(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(data), "--backbones", "resnet81", "--output", str(tmp_path)]) == 2
    assert "error: --backbones: none of them could be measured" in capsys.readouterr().err
    assert main(["--data", str(data), "--image-size", "3"]) == 2
    assert "error: --image-size 3: " in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_an_error_in_words(
    data: Path, own_network: str, cache_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(GraftError, match=r"--output .*runs: "):
        compare(options(data, own_network, tmp_path / "runs", cache_dir))
