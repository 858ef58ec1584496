"""Where an audit is written: a table and a page."""

from __future__ import annotations

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
        for path, text in ((table, found.to_csv()), (page, write_page(found, data))):
            # A path may hold bytes that are not text.
            write_whole(path, text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise GraftError(
            f"--output {folder}: {describe_error(error)}; make room, or name a folder that you can "
            "write to"
        ) from error
    return table, page
