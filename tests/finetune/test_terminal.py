"""How a program ends, as the process that it is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.shared import HANG_SECONDS

ROOT = Path(__file__).parents[2]
# A signal that comes while a destructor runs, which Python would let the program do no more than
# mention.
PROGRAM = """
import os, signal, sys, time
from finetune.terminal import run_program

class Slow:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(0.01)

def work():
    slow = Slow()
    del slow
    for _ in range(100):
        time.sleep(0.01)

sys.exit(run_program(work))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_destructor_is_not_lost(number: signal.Signals) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(int(number))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (128 + number, "stopped; nothing was published\n")


# A thread of TensorBoard's writes the events; no file may be longer than 5,000 bytes.
WRITER = """
import resource, sys
from pathlib import Path
from finetune.monitor import Monitor
from finetune.terminal import run_program
from models.errors import GraftError, describe_error

resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

def work():
    monitor = Monitor(Path(sys.argv[1]))
    try:
        for step in range(1000):
            monitor.scalar("loss", 1.0, step)
            monitor.flush()
    except OSError as error:
        raise GraftError(describe_error(error)) from error

sys.exit(run_program(work))
"""


def test_events_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (2, "error: File too large\n")
