"""A backbone prepared in a process of its own, while the run reads its images: importing torch and timm keeps one core busy for seconds."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Run as a file, Python would look for modules in models/; the project's root is what is meant.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from models.prepared import find_missing, prepare_backbone

logger = logging.getLogger("graft.prepare_ahead")


@contextlib.contextmanager
def prepare_ahead(
    name: str,
    *,
    weights: Path | None,
    pretrained: bool,
    image_size: int | None,
    cache_dir: Path | None,
) -> Iterator[None]:
    """Within it the backbone is being prepared, and at its end it is in the cache, as `prepare_backbone` puts it there.

    Nothing is done where that has it, where weights would be downloaded, or where torch is loaded already. What goes wrong is left to
    `prepare_backbone`, which tries again and tells of it.
    """
    given = {
        "name": name,
        "weights": weights,
        "pretrained": pretrained,
        "image_size": image_size,
        "cache_dir": cache_dir,
    }
    if (
        "torch" in sys.modules
        or find_missing(name, weights, pretrained, image_size, cache_dir) is None
    ):
        yield
        return
    logger.info("converting %s for this machine (once) …", name)
    command = [sys.executable, __file__, json.dumps(given, default=str)]
    # In a session of its own, Ctrl-C is this process's to answer.
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            yield
            process.wait()
        finally:
            process.terminate()


def main(given: dict[str, Any]) -> int:
    """Give 0 where the backbone is in the cache; what is wrong is said by the process that asked."""
    # Looking for cycles in what torch and timm leave is a second of their import.
    gc.disable()
    # So that what it has begun to write goes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    weights, cache_dir = given.pop("weights"), Path(given.pop("cache_dir"))
    try:
        prepare_backbone(
            **given,
            weights=None if weights is None else Path(weights),
            cache_dir=cache_dir,
            scratch_dir=cache_dir,
        )
    except Exception:
        return 1
    return 0


if __name__ == "__main__":
    # Without the exit's own work, which the other process would wait for.
    os._exit(main(json.loads(sys.argv[1])))
