"""A backbone prepared in a second process while the run reads its images.

Importing torch and timm keeps one core busy for seconds.
"""

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
    all_levels: bool = False,
) -> Iterator[None]:
    """Prepare the backbone while the body runs; at its end the cache has it.

    Nothing is done where the cache has it already, where its weights would be downloaded, or where
    this process has imported torch. Errors are left to `prepare_backbone`, which tries again.
    """
    given = {
        "name": name,
        "weights": weights,
        "pretrained": pretrained,
        "image_size": image_size,
        "cache_dir": cache_dir,
        "all_levels": all_levels,
    }
    if (
        "torch" in sys.modules
        or find_missing(name, weights, pretrained, image_size, cache_dir, all_levels) is None
    ):
        yield
        return
    logger.info("converting %s for this machine (once) …", name)
    # -P: a folder models/ where the user stands is not imported instead of ours.
    command = [sys.executable, "-P", "-m", "models.prepare_ahead", json.dumps(given, default=str)]
    # In a session of its own, so that Ctrl-C reaches this process alone.
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            yield
            process.wait()
        finally:
            process.terminate()


def main(given: dict[str, Any]) -> int:
    """Prepare the backbone; 0 where the cache has it now, else 1, without a message."""
    # Collecting cycles takes one second of importing torch and timm.
    gc.disable()
    # Exit by an exception, so that unfinished files are removed.
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
    # Skip the interpreter's cleanup, which the run would wait for.
    os._exit(main(json.loads(sys.argv[1])))
