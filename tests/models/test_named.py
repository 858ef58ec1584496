"""A user's own module is found in the current folder, before the folder of the program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import GraftError
from models.named import import_named, is_custom
from tests.support.shared import HANG_SECONDS

PROJECT_DIR = Path(__file__).parents[2]


def run_in(
    folder: Path, *arguments: str, python_path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(python_path or PROJECT_DIR)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


def test_a_users_module_hides_a_folder_of_the_program(tmp_path: Path) -> None:
    program = tmp_path / "program" / "run.py"
    (tmp_path / "program" / "data").mkdir(parents=True)
    (tmp_path / "program" / "data" / "__init__.py").touch()
    program.write_text(
        "from models.named import import_named\nprint(import_named('--backbone', 'data:build')())\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    (home / "data.py").write_text("def build():\n    import layers\n    return layers.NAME\n")
    (home / "layers.py").write_text("NAME = 'mine'\n")
    done = run_in(home, str(program))
    assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr


def test_a_run_finds_the_users_module_in_the_folder_it_is_started_from(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("def build():\n    raise RuntimeError('mine was called')\n")
    done = run_in(
        tmp_path,
        str(PROJECT_DIR / "finetune" / "run.py"),
        *("--data", "digits", "--backbone", "data:build", "--no-cache"),
    )
    assert done.returncode == 2
    assert "--backbone data:build: it raised RuntimeError: mine was called" in done.stderr
    assert f"{tmp_path / 'data.py'}:2" in done.stderr


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent_module:build", r"No module named 'absent_module'; .* from the current folder"),
        ("mine:absent", "module 'mine' has no attribute 'absent'"),
        ("mine:NUMBER", "it is of type int, and cannot be called"),
        ("broken:build", "importing it raised ZeroDivisionError"),
        ("leaving:build", "importing it raised SystemExit: 3"),
    ],
)
def test_a_name_that_cannot_be_imported_is_refused_with_its_flag(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("NUMBER = 1\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("mine", "broken", "leaving"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(GraftError, match=f"--head-init {name}: .*{reason}"):
        import_named("--head-init", name)


def test_timms_own_prefixes_are_not_taken_for_a_users_module() -> None:
    assert is_custom("mypackage.mymodule:build")
    assert not any(
        is_custom(name)
        for name in (
            "resnet18",
            "hf-hub:timm/resnet18.a1_in1k",
            "hf_hub:a/b",
            "local-dir:somewhere",
        )
    )
