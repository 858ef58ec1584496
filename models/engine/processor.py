"""What this machine's processor is and can do."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path


def cpu_name() -> str:
    """The processor's own name, or the architecture where the system does not tell."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """What the processor can, in Linux' words ("avx2"); elsewhere nothing is known of it."""
    return frozenset(_cpuinfo("flags").split())


def _cpuinfo(field: str) -> str:
    """The first processor's `field` as Linux gives it; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def num_cpus() -> int:
    """The processors this process may use (a container's affinity counts, its quota does not)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@cache
def supports_vnni() -> bool:
    """Whether the CPU multiplies int8 by itself (VNNI or AMX); only Linux tells.

    OpenVINO's own INT8 capability says no more than that it can run int8, which CPUs without VNNI do hardly faster than floats.
    """
    return not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(cpu_flags())
