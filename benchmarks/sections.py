"""A page of results in sections; a benchmark replaces the section that it measures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median


def write_section(path: Path, title: str, name: str, lines: Sequence[str]) -> None:
    """Replace the section of that name, or append it to the page; a new page gets `title`."""
    text = path.read_text() if path.exists() else title
    section = f"<!-- {name} -->\n" + "\n".join(lines).strip() + f"\n<!-- /{name} -->"
    pattern = re.compile(f"<!-- {name} -->.*<!-- /{name} -->", re.DOTALL)
    replaced = (
        pattern.sub(lambda _: section, text)
        if pattern.search(text)
        else f"{text.rstrip()}\n\n{section}"
    )
    path.write_text(replaced.rstrip() + "\n")
    print(f"\n{section}\n\n{path}")


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the range where there is one to show."""
    shown, low, high = (format(value, form) for value in (median(values), min(values), max(values)))
    return shown if low == high else f"{shown} ({low}–{high})"
