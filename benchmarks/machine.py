"""Where and with what a benchmark ran, for the foot of each table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from models.engine.processor import cpu_flags, cpu_name, num_cpus

# The widest first: an engine in bf16 takes a third of one in fp32 on the same cores.
_VECTORS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 with bf16",
    "avx512f": "AVX-512",
    "avx2": "AVX2, no bf16",
}


@dataclass(frozen=True)
class Machine:
    """Where and how it was measured; `versions` are Graft's, `peer_versions` the peers'."""

    cpu: str
    vectors: str
    num_cpus: int
    versions: dict[str, str]
    peer_versions: dict[str, str]
    command: str

    def describe(self, *, with_peers: bool) -> str:
        listed = (
            [("Graft", self.versions), ("peers", self.peer_versions)]
            if with_peers
            else [("Graft", self.versions)]
        )
        lines = "; ".join(
            f"{who}: {', '.join(f'{name} {version}' for name, version in found.items())}"
            for who, found in listed
        )
        processor = f"{self.cpu} ({self.vectors}), {self.num_cpus} cores"
        return f"{processor}. {lines}.\n\n```\n{self.command}\n```\n"


def describe_machine(peer_python: str, packages: Sequence[str], command: str) -> Machine:
    """This machine, with the versions of `packages` in Graft's and in the peers' environment."""
    flags = cpu_flags()
    vectors = next((name for flag, name in _VECTORS.items() if flag in flags), "vectors unknown")
    return Machine(
        cpu_name(),
        vectors,
        num_cpus(),
        _versions(sys.executable, packages),
        _versions(peer_python, packages),
        command,
    )


def _versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "wanted = {n: found[n] for n in sys.argv[1:] if n in found}\n"
        "print(json.dumps({'Python': platform.python_version(), **wanted}))"
    )
    printed = subprocess.run(
        [python, "-c", code, *packages], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, str] = json.loads(printed)
    return found
