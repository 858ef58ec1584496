"""What was measured is written at once, so that --resume continues a benchmark of hours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from models.files import write_whole


class Entry(Protocol):
    """A benchmark's dataclass: what it measured, with case, method and repeat as the key."""

    @property
    def key(self) -> tuple[str, str, int]: ...

    def to_dict(self) -> dict[str, Any]: ...


E = TypeVar("E", bound=Entry)


class Journal(Generic[E]):
    """Entries of one kind, a line of JSON each."""

    def __init__(self, path: Path, kind: type[E], *, keep: bool) -> None:
        self._path = path
        if not keep:
            path.unlink(missing_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.measured = {found.key: found for found in (kind(**json.loads(line)) for line in lines)}

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key in self.measured

    def add(self, entry: E) -> None:
        self.measured[entry.key] = entry
        with self._path.open("a") as file:
            file.write(json.dumps(entry.to_dict()) + "\n")
        print(entry, flush=True)

    def compact(self) -> list[E]:
        """Write the last entry of each key alone, in order; gives them."""
        entries = [self.measured[key] for key in sorted(self.measured)]
        lines = [json.dumps(entry.to_dict()) + "\n" for entry in entries]
        write_whole(self._path, "".join(lines))
        return entries
