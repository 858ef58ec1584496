"""How a picture becomes a square is chosen by what tells the classes apart, and served the same."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from finetune.config import Options
from finetune.probe.fit import choose
from finetune.run import run
from models.checkpoint import load_checkpoint
from models.preprocess import Fit
from models.scores import Floats
from tests.conftest import SMALL_SIZE
from tests.support.servers import serve
from tests.support.shared import HANG_SECONDS

COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200)}


def noisy(mean: float, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(mean, 0.3, 200).astype(np.float32)


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ({"crop": noisy(0.5, 0)}, "crop"),
        ({"crop": noisy(0.5, 0), "whole": noisy(0.5, 1)}, "crop"),
        ({"crop": noisy(0.5, 0), "whole": noisy(0.3, 1)}, "whole"),
        ({"crop": noisy(0.5, 0), "whole": noisy(0.7, 1)}, "crop"),
        # By a little, and on every image.
        ({"crop": noisy(0.5, 0), "pad": noisy(0.5, 0) - 0.01}, "pad"),
        # By more on average, through one image alone.
        ({"crop": noisy(0.5, 0), "pad": noisy(0.5, 0) - 9 * (np.arange(200) == 7)}, "crop"),
        ({"crop": noisy(0.5, 0), "squash": noisy(0.4, 1), "pad": noisy(0.2, 2)}, "pad"),
    ],
)
def test_the_pretrainings_fit_stays_unless_another_is_better_beyond_chance(
    losses: dict[Fit, Floats], chosen: Fit
) -> None:
    assert choose(losses) == chosen


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 4:1 whose class is a patch at their edge, which a centre crop cuts off."""
    root = tmp_path_factory.mktemp("wide")
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for index in range(40):
            pixels = generator.integers(90, 160, (40, 160, 3)).astype(np.uint8)
            left = 2 if index % 2 else 132
            pixels[6:34, left : left + 26] = colour
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def options_of(data: Path, tmp_path: Path, cache_dir: Path, fit: str) -> Options:
    return Options.model_validate(
        {
            "data": str(data),
            "output": tmp_path / "runs",
            "repository": tmp_path / "checkpoints",
            "cache_dir": cache_dir,
            "image_size": SMALL_SIZE,
            "fit": fit,
            "workers": 2,
        }
    )


def test_what_a_crop_would_cut_off_is_seen_in_training_and_in_the_service(
    wide: Path, tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "graft"):
        cropped = load_checkpoint(run(options_of(wide, tmp_path, cache_dir, "crop")))
    assert (
        "audit: the crop cuts off 20 % or more of a side of 80 images; see run.py --fit"
        in caplog.messages
    )
    fitted = load_checkpoint(run(options_of(wide, tmp_path, cache_dir, "auto")))
    accuracies = {}
    for path in (tmp_path / "runs").iterdir():
        metrics = json.loads((path / "metrics.json").read_text())
        accuracies[metrics["fit"]["chosen"]] = metrics["val"]["accuracy"]
        if metrics["fit"]["losses"]:
            assert metrics["fit"]["losses"].keys() == {"crop", "whole", "squash", "pad"}
    (chosen,) = accuracies.keys() - {"crop"}
    assert chosen in ("squash", "pad")
    assert accuracies[chosen] == 1
    assert accuracies["crop"] < 0.9
    assert fitted.fingerprint != cropped.fingerprint
    assert fitted.preprocess.crop_fraction == 1.0
    assert fitted.config["pretrained_cfg"]["crop_pct"] == 1.0
    assert fitted.config["pretrained_cfg"]["crop_mode"] == fitted.preprocess.crop_mode
    assert fitted.preprocess.crop_mode == {"squash": "squash", "pad": "border"}[chosen]
    assert f", fit {chosen} |" in (fitted.path / "README.md").read_text()
    name, version = fitted.path.parent.name, fitted.path.name
    with serve(tmp_path / "log", {"CHECKPOINTS": str(tmp_path / "checkpoints")}) as server:
        for label in COLOURS:
            for file in ("0.png", "1.png"):
                answer = httpx.post(
                    f"{server.url}/predict?model={name}&version={version}",
                    files={"images": (wide / label / file).read_bytes()},
                    timeout=HANG_SECONDS,
                ).json()
                assert answer["predictions"][0]["label"] == label


def test_of_square_pictures_only_more_or_less_of_them_is_tried(
    tmp_path: Path, cache_dir: Path
) -> None:
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(12):
            pixels = generator.integers(0, 40, (40, 40, 3)) + np.array(colour)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / name / f"{index}.png")
    run(options_of(tmp_path / "data", tmp_path, cache_dir, "auto"))
    (path,) = (tmp_path / "runs").glob("*/metrics.json")
    assert json.loads(path.read_text())["fit"]["losses"].keys() == {"crop", "whole"}


def test_trained_layers_see_what_the_probe_saw(wide: Path, tmp_path: Path, cache_dir: Path) -> None:
    options = options_of(wide, tmp_path, cache_dir, "squash")
    trained = options.model_copy(
        update={"freeze": "until:blocks.6", "epochs": 1, "publish": "tuned", "explain": "no"}
    )
    checkpoint = load_checkpoint(run(trained))
    assert (checkpoint.preprocess.crop_mode, checkpoint.preprocess.crop_fraction) == ("squash", 1.0)
