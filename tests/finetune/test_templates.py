"""Pages come from templates wherever a program is started, and values are text in them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
import pytest

from finetune.templates import image_uri, render
from tests.conftest import RunPython


def test_a_template_is_found_from_any_folder(run_python: RunPython, tmp_path: Path) -> None:
    code = (
        "import os; os.chdir(os.environ['ELSEWHERE']); "
        "from finetune.auditing.findings import Audit; "
        "from finetune.auditing.page import write_page; "
        "print(write_page(Audit((), {}, 0), 'photos')[:15])"
    )
    done = run_python(code, ELSEWHERE=str(tmp_path))
    assert (done.stdout, done.returncode) == ("<!doctype html>\n", 0), done.stderr


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="title"):
        render("auditing/page.html.j2")


def test_an_image_becomes_a_data_uri() -> None:
    crop = np.zeros((8, 8, 3), np.uint8)
    encodings: tuple[Literal["JPEG", "WEBP"], ...] = ("JPEG", "WEBP")
    for encoding in encodings:
        uri = image_uri(crop, encoding, 80)
        assert uri.startswith(f"data:image/{encoding.lower()};base64,")
