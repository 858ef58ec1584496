"""Markdown of model cards and of TensorBoard's text tab, with names of others kept as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# What begins markup. An underscore within a word does not.
_MARKS = re.compile(r"[\\|*`\[\]]|(?<!\w)_|_(?!\w)")


def escape_markdown(text: str) -> str:
    """One line of text that is neither a tag nor the end of a table's cell."""
    line = " ".join(text.split())
    return _MARKS.sub(r"\\\g<0>", line).replace("<", "&lt;")


def tabulate_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as GitHub and TensorBoard read it; its cells are escaped."""
    lines = [_row(head), "|---" * len(head) + "|", *(_row(row) for row in rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escape_markdown(cell) for cell in cells)} |"
