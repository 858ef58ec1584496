"""Who may import whom, between rooms and between a room's folders; and what works without torch.

docs/architecture.md shows the same table to readers.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The rooms that each room may import.
ROOMS = {"models": set[str](), "finetune": {"models"}, "service": {"models"}}
# Folders and root files of each room, from the top down. Each imports only from rows below its
# own, not from its neighbours in the row. docs/architecture.md shows the same rows.
LAYERS: dict[str, list[set[str]]] = {
    "models": [
        {"prepare_ahead", "quantise"},
        {"prepared"},
        {"backbone", "engine", "checkpoint"},
        {"named", "preprocess", "sources", "scores", "allowed"},
        {"image_folder", "images"},
        {"files"},
        {"errors"},
    ],
    "finetune": [
        {"run", "compare", "audit", "publish"},
        {"candidates", "unused"},
        {"report"},
        {"auditing", "training"},
        {"resume", "probe"},
        {"data"},
        {"tasks"},
        {"evaluation", "command_line"},
        {"config", "monitor", "terminal", "templates", "timer"},
    ],
    "service": [
        {"app"},
        {"openapi"},
        {"protocols"},
        {"web"},
        {"inference"},
        {"engine", "tasks"},
        {"errors", "lifeline", "metrics", "settings"},
    ],
}


def python_files(room: str) -> list[Path]:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    return files


@cache
def imported_modules(path: Path) -> frozenset[str]:
    """Full names of what the file imports; of `from a import b` both `a` and `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def imported_files(path: Path) -> set[Path]:
    """The files of the rooms among what the file imports."""
    candidates = {ROOT / Path(*name.split(".")) for name in imported_modules(path)}
    files = {name.with_suffix(".py") for name in candidates}
    return {file for file in files if file.is_file() and file.relative_to(ROOT).parts[0] in ROOMS}


def unit(path: Path) -> str:
    """The folder of the room that the file stands in, or its own name at the room's root."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def upward_imports(room: str) -> Iterator[str]:
    heights = {name: height for height, row in enumerate(reversed(LAYERS[room])) for name in row}
    for path in python_files(room):
        if unit(path) == "__init__":
            continue
        assert unit(path) in heights, f"{path} has no place in LAYERS of {__file__}"
        for imported in imported_files(path):
            if imported.relative_to(ROOT).parts[0] != room or unit(imported) == unit(path):
                continue
            if heights[unit(imported)] >= heights[unit(path)]:
                yield f"{path.relative_to(ROOT)} imports {imported.relative_to(ROOT)}"


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_what_it_may(room: str) -> None:
    others = set(ROOMS) - ROOMS[room] - {room} | {"tests", "benchmarks", "deploy"}
    broken = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files(room)
        for name in imported_modules(path)
        if name.split(".")[0] in others
    }
    assert not broken


@pytest.mark.parametrize("room", ROOMS)
def test_folders_import_only_what_is_below_them(room: str) -> None:
    assert not list(upward_imports(room))


def test_no_file_imports_itself_through_others() -> None:
    graph = {path: imported_files(path) - {path} for room in ROOMS for path in python_files(room)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = [str(path.relative_to(ROOT)) for path in error.args[1]]
        raise AssertionError(f"a circle of imports: {' ← '.join(circle)}") from None


def test_architecture_shows_the_layers() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for room, rows in LAYERS.items():
        table = text.partition(f"<!-- layers: {room} -->\n```\n")[2].partition("```")[0]
        shown = [set(line.partition("│")[0].split()) for line in table.splitlines()]
        assert shown == rows, f"docs/architecture.md, layers of {room}"


def test_programs_hide_no_other_module() -> None:
    """Python searches the folder of a program first, so that finetune/html.py would be `html`."""
    names = {unit(path) for path in python_files("finetune")}
    packages = set(packages_distributions())
    assert not names & (set(sys.stdlib_module_names) | packages)


def test_only_backbone_knows_timm() -> None:
    knowing = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in python_files(room)
        if any(name.split(".")[0] == "timm" for name in imported_modules(path))
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
