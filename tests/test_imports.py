"""Who may import whom: `models` neither room, `finetune` and `service` only `models`; and what must not need torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"models": {"finetune", "service"}, "finetune": {"service"}, "service": {"finetune"}}


def imported_packages(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_room_imports_only_what_it_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    broken = {path.name: imported_packages(path) & FORBIDDEN[room] for path in files}
    assert not {name: rooms for name, rooms in broken.items() if rooms}


def test_only_backbone_knows_timm() -> None:
    knowing = {
        str(path.relative_to(ROOT))
        for room in FORBIDDEN
        for path in (ROOT / room).rglob("*.py")
        if "timm" in imported_packages(path)
    }
    assert knowing == {"models/backbone/build.py"}


@pytest.mark.parametrize(
    "module",
    [
        "service.app",
        "finetune.run",
        "models.preprocess",
        "models.engine.engine",
        "models.checkpoint",
        "models.prepared",
    ],
)
def test_importable_where_torch_is_not(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
