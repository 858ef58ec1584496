"""Records of benchmarks/serve.py, one for each load on each server, and figures over repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.sections import spread


@dataclass(frozen=True)
class Figures:
    """`values` by name, with their units in the names; `series` are drawn."""

    case: str
    method: str
    repeat: int
    values: dict[str, float]
    series: dict[str, list[float]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.case, self.method, self.repeat

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        return f"{self.case}: {self.method} #{self.repeat + 1}: {values}"


def methods(measured: Sequence[Figures]) -> list[str]:
    """Every method, in the order in which they first came."""
    return list(dict.fromkeys(found.method for found in measured))


def values(measured: Sequence[Figures], case: str, method: str, name: str) -> list[float]:
    """One value over all repeats."""
    return [
        found.values[name] for found in measured if found.case == case and found.method == method
    ]


def middle(measured: Sequence[Figures], case: str, method: str, name: str) -> float | None:
    """The median over the repeats, None where it was not measured."""
    found = values(measured, case, method, name)
    return median(found) if found else None


def shown(measured: Sequence[Figures], case: str, method: str, name: str, form: str) -> str:
    """The median and the range, as a table's cell."""
    found = values(measured, case, method, name)
    return spread(found, form) if found else ""
