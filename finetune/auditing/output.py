"""Where an audit is written: a table and a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.auditing.findings import Audit
from finetune.auditing.page import write_page
from models.errors import GraftError, describe_error
from models.files import write_whole


def write_audit(found: Audit, folder: Path, stem: str, data: str) -> tuple[Path, Path]:
    """`<stem>.csv` and `<stem>.html` in `folder`; raises GraftError if they cannot be written."""
    table, page = folder / f"{stem}.csv", folder / f"{stem}.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(table, _write_text(found.to_csv()))
        write_whole(page, _write_text(write_page(found, data)))
    except OSError as error:
        raise GraftError(
            f"--output {folder}: {describe_error(error)}; make room, or name a folder that you can "
            "write to"
        ) from error
    return table, page


def _write_text(text: str) -> Callable[[Path], object]:
    # A path may hold bytes that are not text.
    return lambda path: path.write_text(text, encoding="utf-8", errors="surrogateescape")
