"""The processor of this machine: its name, its number of cores, what it supports."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system gives none."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The processor's features as Linux names them ("avx2"); empty on other systems."""
    return frozenset(_cpuinfo("flags").split())


def num_cpus() -> int:
    """How many processors this process may use, by its affinity, not by a container's quota."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@cache
def supports_vnni() -> bool:
    """Whether the CPU has instructions for int8 products (VNNI or AMX); False but on Linux.

    OpenVINO's capability INT8 says only that it runs int8, which is hardly faster than floats on
    CPUs without VNNI.
    """
    return not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(cpu_flags())


def _cpuinfo(field: str) -> str:
    # Of the first processor.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
