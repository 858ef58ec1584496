"""Measurements → docs/finetune-benchmark.md, a section each, and the plot beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import Machine
from benchmarks.sections import spread, write_section

_FILE = "finetune-benchmark.md"
_TITLE = (
    "# Fine-tuning, measured\n\n"
    "Written by `benchmarks/finetune.py`; every figure is a median, with the lowest and highest in "
    "brackets.\n"
)
_REFERENCE = "Graft"
KEPT, ANEW = "activations kept", "frozen layers run anew"


@dataclass(frozen=True)
class Measurement:
    """One whole process; `parts` are seconds, rates and the like that it is explained with."""

    dataset: str
    method: str
    repeat: int
    seconds: float
    peak_bytes: int
    accuracy: float
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.dataset, self.method, self.repeat

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        parts = "".join(f", {name} {value:.3g}" for name, value in self.parts.items())
        memory = f"{self.peak_bytes / 1e6:.0f} MB"
        return (
            f"{self.dataset}: {self.method} #{self.repeat + 1}: {self.seconds:.1f} s, {memory}, "
            f"accuracy {self.accuracy:.4f}{parts}"
        )


def report_peers(measured: Sequence[Measurement], machine: Machine, docs_dir: Path) -> None:
    datasets, methods = _names(measured, "dataset"), _names(measured, "method")
    lines = [
        "## Graft and its peers",
        "",
        "Whole processes on the same images, split, backbone (`tf_efficientnet_lite0`) and",
        "ImageNet weights, alternating. Peak memory is the process tree's, shared pages counted",
        "once. Graft's first run has an empty cache, its second the first's.",
    ]
    for dataset in datasets:
        rows = {
            method: found for method in methods if (found := _select(measured, dataset, method))
        }
        reference = rows.get(_REFERENCE, [])
        lines += [
            "",
            f"### {dataset}",
            "",
            "| | seconds | times Graft's | validation accuracy | peak MB | runs |",
            "|---|---|---|---|---|---|",
        ]
        for method, found in rows.items():
            ratio = (
                f"{_median(found, _seconds) / _median(reference, _seconds):.1f}"
                if reference
                else ""
            )
            cells = (
                _spread(found, _seconds, ".1f"),
                ratio,
                _spread(found, _accuracy, ".4f"),
                _spread(found, _peak_mb, ".0f"),
            )
            lines.append(f"| {method} | {' | '.join(cells)} | {len(found)} |")
    plot = docs_dir / "finetune-benchmark.png"
    draw_peers(measured, plot)
    lines += [
        "",
        f"![Seconds and accuracy of each]({plot.name})",
        "",
        machine.describe(with_peers=True),
    ]
    write_section(docs_dir / _FILE, _TITLE, "peers", lines)


def report_engine(measured: Sequence[Measurement], machine: Machine, docs_dir: Path) -> None:
    decode_ms, engine_ms, rate = (
        _parts_median(measured, name) for name in ("decode_ms", "engine_ms", "images_per_second")
    )
    bare = 1000 * machine.num_cpus / engine_ms
    bound = 1000 * machine.num_cpus / (decode_ms + engine_ms)
    lines = [
        "## Feature extraction and its bound",
        "",
        "JPEGs of 500x334 through a run with an empty cache, against the run's engine fed from",
        "memory and against the decoder on one thread.",
        "",
        "| | core-ms an image | images/s | extraction is |",
        "|---|---|---|---|",
        f"| decode alone | {decode_ms:.2f} | {1000 * machine.num_cpus / decode_ms:.0f} | |",
        f"| engine alone, fed from memory | {engine_ms:.2f} | {bare:.0f} "
        f"| {rate / bare:.1%} of it |",
        f"| bound: {machine.num_cpus} cores ÷ (decode + engine) | {decode_ms + engine_ms:.2f} "
        f"| {bound:.0f} | {rate / bound:.1%} of it |",
        f"| extraction | {1000 * machine.num_cpus / rate:.2f} | {rate:.0f} | |",
        "",
        machine.describe(with_peers=False),
    ]
    write_section(docs_dir / _FILE, _TITLE, "engine", lines)


def report_growth(measured: Sequence[Measurement], machine: Machine, docs_dir: Path) -> None:
    sizes = sorted({int(found.dataset) for found in measured})
    by_size = {size: [found for found in measured if int(found.dataset) == size] for size in sizes}
    features = {size: _parts_median(found, "features") for size, found in by_size.items()}
    per_image = {size: 1000 * seconds / size for size, seconds in features.items()}
    lines = [
        "## Growth with the number of images",
        "",
        "Fashion-MNIST, one in five images for validation, whole processes with an empty cache.",
        "",
        "| images | features, s | ms an image | against the median | probe, s | process, s "
        "| peak MB | accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    typical = median(per_image.values())
    for size, found in by_size.items():
        cells = (
            f"{features[size]:.1f}",
            f"{per_image[size]:.2f}",
            f"{per_image[size] / typical - 1:+.1%}",
            f"{_parts_median(found, 'probe'):.1f}",
            _spread(found, _seconds, ".1f"),
            _spread(found, _peak_mb, ".0f"),
            f"{_median(found, _accuracy):.4f}",
        )
        lines.append(f"| {size:,} | {' | '.join(cells)} |")
    peaks = [_median(found, _peak_mb) for found in by_size.values()]
    lines += [
        "",
        f"Peak memory varies by {max(peaks) - min(peaks):.0f} MB over all sizes.",
        "",
        machine.describe(with_peers=False),
    ]
    write_section(docs_dir / _FILE, _TITLE, "growth", lines)


def report_boundary(measured: Sequence[Measurement], machine: Machine, docs_dir: Path) -> None:
    lines = [
        "## Epochs on kept activations",
        "",
        "One epoch on the digits: training images/s with the activations at the freeze boundary",
        "kept, and with the frozen layers run again. The process includes computing what is kept.",
        "",
        "| --freeze | kept, images/s | anew, images/s | times as fast | kept, process s "
        "| anew, process s |",
        "|---|---|---|---|---|---|",
    ]
    for freeze in _names(measured, "dataset"):
        kept, anew = (_select(measured, freeze, method) for method in (KEPT, ANEW))
        speeds = [_parts_median(found, "images_per_second") for found in (kept, anew)]
        cells = (
            *(f"{speed:.0f}" for speed in speeds),
            f"{speeds[0] / speeds[1]:.1f}",
            *(_spread(found, _seconds, ".1f") for found in (kept, anew)),
        )
        lines.append(f"| {freeze} | {' | '.join(cells)} |")
    lines += ["", machine.describe(with_peers=False)]
    write_section(docs_dir / _FILE, _TITLE, "boundary", lines)


def draw_peers(measured: Sequence[Measurement], path: Path) -> None:
    """Seconds as logarithmic bars with the accuracy at their ends, a panel for each dataset."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    datasets, methods = _names(measured, "dataset"), _names(measured, "method")
    figure, axes = plt.subplots(
        1,
        len(datasets),
        figsize=(6.5 * len(datasets), 0.7 + 0.55 * len(methods)),
        squeeze=False,
        sharey=True,
    )
    for panel, dataset in zip(axes[0], datasets, strict=True):
        rows = {method: _select(measured, dataset, method) for method in methods}
        seconds = {method: _median(found, _seconds) for method, found in rows.items() if found}
        colors = ["tab:blue" if method.startswith(_REFERENCE) else "silver" for method in seconds]
        bars = panel.barh(list(seconds), list(seconds.values()), color=colors)
        labels = [
            f"{value:.1f} s, {_median(rows[method], _accuracy):.3f}"
            for method, value in seconds.items()
        ]
        panel.bar_label(bars, labels, padding=4, fontsize=9)
        panel.set(xscale="log", title=dataset, xlabel="seconds, and validation accuracy")
        panel.set_xlim(1, 12 * max(seconds.values()))
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _names(measured: Sequence[Measurement], attribute: str) -> list[str]:
    """The different values, in the order in which they first came; Graft's own first."""
    found = dict.fromkeys(getattr(measurement, attribute) for measurement in measured)
    return sorted(
        found,
        key=lambda name: (
            not name.startswith(_REFERENCE),
            name if name.startswith(_REFERENCE) else "",
        ),
    )


def _select(measured: Sequence[Measurement], dataset: str, method: str) -> list[Measurement]:
    return [found for found in measured if found.dataset == dataset and found.method == method]


def _seconds(measurement: Measurement) -> float:
    return measurement.seconds


def _accuracy(measurement: Measurement) -> float:
    return measurement.accuracy


def _peak_mb(measurement: Measurement) -> float:
    return measurement.peak_bytes / 1e6


def _median(found: Sequence[Measurement], value: Callable[[Measurement], float]) -> float:
    return median(map(value, found))


def _parts_median(found: Sequence[Measurement], name: str) -> float:
    return median(measurement.parts[name] for measurement in found)


def _spread(found: Sequence[Measurement], value: Callable[[Measurement], float], form: str) -> str:
    return spread(list(map(value, found)), form)
