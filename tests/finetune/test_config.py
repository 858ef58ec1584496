"""What options say of themselves: the model's name, the cache's folder."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config import Options
from models.errors import GraftError


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("digits", "digits"),
        ("photos/", "photos"),
        ("/somewhere/My Photos (2024)", "my-photos--2024"),
        ("torchvision:OxfordIIITPet", "oxfordiiitpet"),
        ("lists/birds.csv", "birds"),
        ("photos.v2", "photos-v2"),
        ("Vögel", "v-gel"),
        ("x" * 80, "x" * 63),
    ],
)
def test_the_models_name_is_made_from_the_data(data: str, name: str) -> None:
    assert Options(data=data).model_name == name


def test_the_folder_here_gives_its_own_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path / "birds")
    assert Options(data=".").model_name == "birds"
    assert Options(data=".", name="other").model_name == "other"


def test_the_cache_is_where_the_system_keeps_caches(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    program = "from finetune.config import Options; print(Options().cache_dir)"
    assert run_python(program, XDG_CACHE_HOME="/somewhere").stdout == "/somewhere/graft\n"


def test_data_that_no_name_can_be_made_from_asks_for_one() -> None:
    with pytest.raises(GraftError, match="say --name"):
        _ = Options(data="Фото").model_name
