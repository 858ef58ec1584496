"""What is known of the processor is what the system says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.engine.processor import cpu_flags, cpu_name, num_cpus, supports_vnni

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu sse4_2 avx512_vnni

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


@pytest.fixture(autouse=True)
def _forget_what_was_found() -> Iterator[None]:
    supports_vnni.cache_clear()
    yield
    supports_vnni.cache_clear()


def show_cpuinfo(cpuinfo: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(_: object) -> str:
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)


def test_linux_names_the_first_processor_and_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    show_cpuinfo(CPUINFO, monkeypatch)
    assert cpu_name() == "Some CPU @ 2.00GHz"
    assert cpu_flags() == {"fpu", "sse4_2", "avx512_vnni"}
    assert supports_vnni()


@pytest.mark.parametrize("cpuinfo", [None, "", "processor\t: 0\nflags\t: fpu avx2\n"])
def test_elsewhere_there_is_a_name_all_the_same_and_no_vnni(
    cpuinfo: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_cpuinfo(cpuinfo, monkeypatch)
    assert cpu_name()
    assert not supports_vnni()


def test_processors_are_those_that_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert num_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert num_cpus() == len(allowed)
