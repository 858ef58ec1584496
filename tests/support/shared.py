"""What several test processes share: what is costly is made once, and some tests need the machine.

`make test` runs one process per core. All have the same home (tests/conftest.py), in which these
locks and folders are.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

# Far more than anything here takes on a slow and busy machine: it ends what hangs.
HANG_SECONDS = 900.0


def _lock_path(name: str) -> Path:
    return Path(os.environ["HOME"]) / f"{name}.lock"


@contextmanager
def locked(name: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of this name; several processes may, where all of them ask for it shared."""
    with _lock_path(name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Closing is not enough: a forked process that outlives the test holds the file, too.
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def machine(*, alone: bool) -> Iterator[None]:
    """Run beside the other processes' tests, or alone while they wait."""
    with ExitStack() as stack:
        # One that waits to be alone keeps the turnstile, so that no new test begins before it.
        with locked("turnstile"):
            stack.enter_context(locked("machine", shared=not alone))
        yield


def make_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, by the first process that asks for it."""
    folder = Path(os.environ["HOME"]) / "made-once" / name
    with locked(name):
        if not folder.is_dir():
            making = folder.with_name(f"{name}.making")
            making.mkdir(parents=True)
            make(making)
            making.rename(folder)
    return folder
