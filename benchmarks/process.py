"""Wall time, memory, processor time and open files of a process and its descendants."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_SAMPLE_SECONDS = 0.2
# Reading the memory of a process of gigabytes takes tens of milliseconds of a core, in which the
# process cannot map memory.
_SAMPLING_SHARE = 0.01


@dataclass(frozen=True)
class Finished:
    """A process that ended well."""

    seconds: float
    peak_bytes: int
    output: str


def run_process(
    command: Sequence[str | Path], cwd: Path, sampling_share: float = _SAMPLING_SHARE
) -> Finished:
    """Run `command` to its end; reading its memory takes at most `sampling_share` of the time.

    Raises RuntimeError with the end of its output if it fails.
    """
    # Nothing may look for weights on a hub: what is measured would then be the network.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        memory = MemorySampler(process.pid, sampling_share=sampling_share)
        memory.start()
        code = process.wait()
        seconds = time.perf_counter() - started
        memory.stop()
        out.seek(0)
        output = out.read()
    if code:
        raise RuntimeError(f"{' '.join(map(str, command))} exited {code}:\n{output[-3000:]}")
    return Finished(seconds, memory.peak_bytes, output)


class MemorySampler(threading.Thread):
    """Peak memory of a process tree: sampled PSS of the tree, or the root's VmHWM if that is more.

    PSS counts shared pages once. ru_maxrss would not do: a child inherits its parent's on Linux.
    """

    def __init__(
        self,
        pid: int,
        sample_seconds: float = _SAMPLE_SECONDS,
        sampling_share: float = _SAMPLING_SHARE,
    ) -> None:
        super().__init__(daemon=True)
        self._sample_seconds = sample_seconds
        self._sampling_share = sampling_share
        self._root = psutil.Process(pid)
        self._done = threading.Event()
        self.peak_bytes = 0
        self.samples: list[int] = []

    def run(self) -> None:
        pause = self._sample_seconds
        while not self._done.wait(pause):
            started = time.perf_counter()
            self.samples.append(tree_bytes(self._root.pid))
            self.peak_bytes = max(
                self.peak_bytes, self.samples[-1], _high_water_bytes(self._root.pid)
            )
            pause = max(
                self._sample_seconds, (time.perf_counter() - started) / self._sampling_share
            )

    def stop(self) -> None:
        self._done.set()
        self.join()


def tree_bytes(pid: int) -> int:
    """Memory of a process and its descendants; shared pages count once."""
    return sum(map(_memory_bytes, tree(pid)))


def tree_cpu_seconds(pid: int) -> float:
    """Processor time so far of a process and its living descendants."""
    seconds = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


def tree_descriptors(pid: int) -> int:
    """Open files and sockets of a process and its descendants."""
    count = 0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            count += process.num_fds()
    return count


def tree(pid: int) -> list[psutil.Process]:
    """A process and its living descendants; empty if it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory_bytes(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
        return int(getattr(info, "pss", info.rss))
    # Gone between listing and asking.
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _high_water_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
