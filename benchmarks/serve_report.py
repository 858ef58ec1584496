"""Write the figures of benchmarks/serve.py to docs/serve-benchmark.md, with plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figures, methods, middle, shown
from benchmarks.machine import Machine
from benchmarks.sections import write_section

_FILE = "serve-benchmark.md"
_TITLE = (
    "# Serving, measured\n\n"
    "Written by `benchmarks/serve.py`; every figure is a median, with the lowest and highest in "
    "brackets.\n"
)
_GRAFT = "Graft"
_IMAGES = "One JPEG of 500x334 or 640x427 a request, as a form upload"

Report = Callable[[Sequence[Figures], Machine, Path, str], None]


def report_peers(
    measured: Sequence[Figures], machine: Machine, docs_dir: Path, section: str
) -> None:
    clients, percents = _numbers(measured, "closed"), _numbers(measured, "open")
    in_int8 = section.endswith("int8")
    lines = [
        f"## Graft and its peers{', its engine in int8' if in_int8 else ''}",
        "",
        f"{_IMAGES}; the same weights (`tf_efficientnet_lite0`), images and {machine.num_cpus}",
        "cores, which the load generator shares. `torch` is what the documentation of the",
        "frameworks and of timm shows: float32, one worker. `tuned` is bf16, channels_last and a",
        "worker a core. `Graft's engine` is Graft's preprocess and OpenVINO in the peer's",
        "framework, also with a worker a core, so that only the framework differs. All but",
        "FastAPI batch up to 16. `recognised` is the fraction of images that get their own label:",
        "with other weights or another preprocess it would not be near 1. All have uvloop and",
        "httptools, which a plain install does not have.",
        "",
        "### Closed loop: requests/s by number of clients",
        "",
        _row(
            "",
            *map(str, clients),
            "Graft at 16 is times this",
            "recognised",
            "memory, MB",
            "ready after, s",
        ),
        _rule(5 + len(clients)),
    ]
    reference = middle(measured, "closed 16", _GRAFT, "per_second")
    for method in methods(measured):
        rates = [
            shown(measured, f"closed {number}", method, "per_second", ".1f") for number in clients
        ]
        own = middle(measured, "closed 16", method, "per_second")
        memory, start = (
            middle(measured, "server", method, name) for name in ("pss_bytes", "start_seconds")
        )
        recognised = middle(measured, "server", method, "recognised")
        cells = (
            _ratio(reference, own),
            _number(recognised, ".2f"),
            _number(memory, ".0f", 1e-6),
            _number(start, ".1f"),
        )
        lines.append(_row(method, *rates, *cells))
    lines += [
        "",
        "### Closed loop: p50 / p99 in ms",
        "",
        _row("", *map(str, clients), "p50 at 1 client, Graft's is"),
        _rule(2 + len(clients)),
    ]
    quick = middle(measured, "closed 1", _GRAFT, "p50_ms")
    for method in methods(measured):
        latencies = [_latencies(measured, f"closed {number}", method) for number in clients]
        own = middle(measured, "closed 1", method, "p50_ms")
        lines.append(_row(method, *latencies, _ratio(quick, own, ".2f")))
    if percents:
        lines += _open_table(measured, percents)
    broken = [
        f"{method} {count:.0f}"
        for method in methods(measured)
        if (count := _num_bad(measured, method))
    ]
    plot = docs_dir / f"serve-{section}.png"
    draw_peers(measured, clients, percents, plot)
    lines += ["", f"Not answered 2xx in closed loops, of all: {', '.join(broken) or 'none'}."]
    lines += [
        "",
        f"![Requests per second and latency of each]({plot.name})",
        "",
        machine.describe(with_peers=True),
    ]
    write_section(docs_dir / _FILE, _TITLE, section, lines)


def _open_table(measured: Sequence[Figures], percents: Sequence[int]) -> list[str]:
    rows = [
        _row(method, *(_open_cell(measured, f"open {percent}", method) for percent in percents))
        for method in methods(measured)
    ]
    return [
        "",
        "### Open loop: goodput as a share of what was offered, and p50 / p99 in ms",
        "",
        "Requests come at random, at a fraction of the most that the server reached in closed",
        "loops, whether or not others are answered. Latencies are those of good answers, from",
        "when the request was due.",
        "",
        _row("", *(f"{percent} %" for percent in percents)),
        _rule(1 + len(percents)),
        *rows,
    ]


def report_bound(
    measured: Sequence[Figures], machine: Machine, docs_dir: Path, section: str
) -> None:
    def cell(name: str, form: str) -> str:
        return shown(measured, "bound", _GRAFT, name, form)

    lines = [
        "## The service and its bound",
        "",
        f"{_IMAGES}. Each part is measured alone, before and after the service. An empty request",
        "is a GET that takes the whole way but has no image; the load generator's work counts,",
        "because it shares the cores. Fractions are of the bound of the same repeat.",
        "",
        _row("", "core-ms a request"),
        _rule(2),
        _row("decode", cell("decode_ms", ".2f")),
        _row("engine", cell("engine_ms", ".2f")),
        _row("empty HTTP request", cell("http_ms", ".3f")),
        "",
        _row("", "requests/s", "of the bound"),
        _rule(3),
        _row(f"bound: {machine.num_cpus} cores ÷ their sum", cell("bound_per_second", ".1f"), ""),
    ]
    lines += [
        _row(f"{count} clients", cell(f"per_second_{count}", ".1f"), cell(f"share_{count}", ".1%"))
        for count in (16, 64)
    ]
    lines += ["", machine.describe(with_peers=False)]
    write_section(docs_dir / _FILE, _TITLE, section, lines)


def report_models(
    measured: Sequence[Figures], machine: Machine, docs_dir: Path, section: str
) -> None:
    counts = _numbers(measured, "models")
    one = f"models {counts[0]}"
    rate, memory = (
        middle(measured, one, _GRAFT, name) or 0.0 for name in ("per_second", "idle_bytes")
    )
    head_bytes = middle(measured, one, _GRAFT, "head_bytes") or 0.0
    lines = [
        "## Many models on one backbone",
        "",
        f"{_IMAGES}, 16 clients that ask every model in turn. Memory is the process tree's when",
        f"the server is ready, shared pages counted once; a head is {head_bytes / 1e6:.2f} MB.",
        "",
        _row(
            "models",
            "requests/s",
            "of one model's",
            "p99, ms",
            "memory, MB",
            "a further model, MB",
            "under load, MB",
            "ready after, s",
        ),
        _rule(8),
    ]
    for count in counts:
        case = f"models {count}"
        own = middle(measured, case, _GRAFT, "per_second") or 0.0
        further = (
            ((middle(measured, case, _GRAFT, "idle_bytes") or 0.0) - memory) / (count - counts[0])
            if count > counts[0]
            else None
        )
        lines.append(
            _row(
                str(count),
                shown(measured, case, _GRAFT, "per_second", ".1f"),
                f"{own / rate:.1%}",
                shown(measured, case, _GRAFT, "p99_ms", ".0f"),
                _megabytes(measured, case, "idle_bytes"),
                _number(further, ".2f", 1e-6),
                _megabytes(measured, case, "loaded_bytes"),
                shown(measured, case, _GRAFT, "start_seconds", ".1f"),
            )
        )
    lines += ["", machine.describe(with_peers=False)]
    write_section(docs_dir / _FILE, _TITLE, section, lines)


def report_storm(
    measured: Sequence[Figures], machine: Machine, docs_dir: Path, section: str
) -> None:
    def cell(name: str, form: str) -> str:
        return shown(measured, "storm", _GRAFT, name, form)

    goodput, capacity = (
        middle(measured, "storm", _GRAFT, name) or 0.0 for name in ("per_second", "capacity")
    )
    plot = docs_dir / "serve-storm.png"
    draw_storm(measured, plot)
    lines = [
        "## A storm",
        "",
        f"{_IMAGES}, in an open loop at three times what 16 clients reach in a closed loop.",
        "Latencies are from when the request was due.",
        "",
        _row("", ""),
        _rule(2),
        _row("capacity, requests/s", cell("capacity", ".1f")),
        _row("offered, requests/s", cell("offered_per_second", ".1f")),
        _row("cores that the generator took of the server's", cell("client_cores", ".2f")),
        _row(
            "goodput, requests/s",
            f"{cell('per_second', '.1f')}, {goodput / capacity:.1%} of capacity",
        ),
        _row("refused (429, 503)", cell("num_refused", ".0f")),
        _row("failed in another way", cell("num_broken", ".0f")),
        _row("p50 / p99 of good answers, ms", f"{cell('p50_ms', '.0f')} / {cell('p99_ms', '.0f')}"),
        _row(
            "memory before, after a tenth of it, at its end, MB",
            ", ".join(
                _megabytes(measured, "storm", name)
                for name in ("before_bytes", "filled_bytes", "end_bytes")
            ),
        ),
        _row(
            "highest, and 1 s after it, MB",
            ", ".join(
                _megabytes(measured, "storm", name) for name in ("peak_bytes", "after_bytes")
            ),
        ),
        _row(
            "p50 at 1 client before, and from 1 s after, ms",
            f"{cell('before_p50_ms', '.1f')}, {cell('after_p50_ms', '.1f')}",
        ),
        _row("failed from 1 s after", cell("after_num_failed", ".0f")),
        "",
        f"![Good answers in each second]({plot.name})",
        "",
        machine.describe(with_peers=False),
    ]
    write_section(docs_dir / _FILE, _TITLE, section, lines)


def report_soak(
    measured: Sequence[Figures], machine: Machine, docs_dir: Path, section: str
) -> None:
    (found,) = measured
    requests, memory, descriptors = (
        found.series[name] for name in ("requests", "bytes", "descriptors")
    )
    # A tenth of it fills caches and pools; what comes after is growth.
    settled = next(index for index, done in enumerate(requests) if done >= requests[-1] / 10)
    plot = docs_dir / "serve-soak.png"
    draw_soak(found, plot)
    lines = [
        "## A soak",
        "",
        f"{_IMAGES}, 16 clients, {found.values['num_requests']:,.0f} requests in",
        f"{found.values['seconds']:.0f} s, of which {found.values['num_failed']:.0f} failed.",
        "",
        _row("", "at first", f"after {requests[settled]:,.0f}", "at the end", "growth after that"),
        _rule(5),
        _row(
            "memory, MB",
            *(f"{memory[index] / 1e6:.1f}" for index in (0, settled, -1)),
            f"{(memory[-1] - memory[settled]) / 1e6:+.1f}",
        ),
        _row(
            "open files",
            *(f"{descriptors[index]:.0f}" for index in (0, settled, -1)),
            f"{descriptors[-1] - descriptors[settled]:+.0f}",
        ),
        "",
        f"![Memory and open files]({plot.name})",
        "",
        machine.describe(with_peers=False),
    ]
    write_section(docs_dir / _FILE, _TITLE, section, lines)


def report_swaps(
    measured: Sequence[Figures], machine: Machine, docs_dir: Path, section: str
) -> None:
    def cell(name: str, form: str = ".0f") -> str:
        return shown(measured, "swaps", _GRAFT, name, form)

    lines = [
        "## New versions under load",
        "",
        f"{_IMAGES}, 8 clients that send without a pause while versions with different heads are",
        "published.",
        "",
        _row("", ""),
        _rule(2),
        _row("answered", cell("num_good")),
        _row("lost", cell("num_lost")),
        _row("scores that are not those of the version named", cell("num_mixed")),
        _row("swaps", cell("num_swaps")),
        _row("versions that answered", cell("num_versions")),
        _row("slowest from publication to service, s", cell("slowest_swap_seconds", ".1f")),
        "",
        machine.describe(with_peers=False),
    ]
    write_section(docs_dir / _FILE, _TITLE, section, lines)


REPORTS: dict[str, Report] = {
    "peers": report_peers,
    "bound": report_bound,
    "models": report_models,
    "storm": report_storm,
    "soak": report_soak,
    "swaps": report_swaps,
}


def draw_peers(
    measured: Sequence[Figures], clients: Sequence[int], percents: Sequence[int], path: Path
) -> None:
    """Requests/s at 16 clients as bars; p50 over the clients, and p99 over the load, as lines."""
    plt = _pyplot()
    names = methods(measured)
    figure, (bars, closed, opened) = plt.subplots(
        1, 3, figsize=(19, max(4.5, 0.4 * len(names))), width_ratios=(1.1, 1, 1)
    )
    rates = [middle(measured, "closed 16", name, "per_second") or 0.0 for name in names]
    drawn = bars.barh(
        names, rates, color=["tab:blue" if name == _GRAFT else "silver" for name in names]
    )
    bars.bar_label(drawn, [f"{rate:.0f}" for rate in rates], padding=4, fontsize=9)
    bars.invert_yaxis()
    bars.set(title="requests/s at 16 clients", xlim=(0, 1.12 * max(rates)))
    for index, name in enumerate(names):
        style = (
            {"color": "tab:blue", "lw": 3}
            if name == _GRAFT
            else {"color": plt.cm.tab20(index), "lw": 1.2}
        )
        closed.plot(
            clients,
            [middle(measured, f"closed {number}", name, "p50_ms") for number in clients],
            marker="o",
            label=name,
            **style,
        )
        opened.plot(
            percents,
            [middle(measured, f"open {percent}", name, "p99_ms") for percent in percents],
            marker="o",
            **style,
        )
    closed.set(
        title="p50 in ms, closed loop",
        xlabel="clients",
        xscale="log",
        yscale="log",
        xticks=clients,
        xticklabels=clients,
    )
    opened.set(
        title="p99 in ms of good answers, open loop",
        xlabel="% of its own capacity",
        yscale="log",
        xticks=percents,
    )
    closed.legend(fontsize=7)
    if not percents:
        figure.delaxes(opened)
    _save(figure, path)


def draw_storm(measured: Sequence[Figures], path: Path) -> None:
    """Good answers in each second, against the capacity; and the memory meanwhile."""
    plt = _pyplot()
    figure, (good, memory) = plt.subplots(1, 2, figsize=(14, 3.5), width_ratios=(1.5, 1))
    for found in measured:
        good.plot(found.series["good_by_second"], color="tab:blue", alpha=0.7)
        good.axhline(found.values["capacity"], color="gray", ls="--")
        good.axhline(found.values["offered_per_second"], color="tab:red", ls=":")
        sampled = found.series["bytes"]
        seconds = [
            found.values["storm_seconds"] * (index + 0.5) / len(sampled)
            for index in range(len(sampled))
        ]
        memory.plot(seconds, [value / 1e6 for value in sampled], color="tab:blue", alpha=0.7)
    good.set(
        title="good answers/s; dashed the capacity, dotted what was offered",
        xlabel="second of the storm",
        ylim=(0, None),
    )
    memory.set(title="memory, MB", xlabel="second of the storm", ylim=(0, None))
    _save(figure, path)


def draw_soak(found: Figures, path: Path) -> None:
    """Memory and open files over the requests."""
    plt = _pyplot()
    figure, (memory, descriptors) = plt.subplots(1, 2, figsize=(11, 3.5))
    memory.plot(found.series["requests"], [value / 1e6 for value in found.series["bytes"]])
    memory.set(title="memory, MB", xlabel="requests", ylim=(0, None))
    descriptors.plot(found.series["requests"], found.series["descriptors"])
    descriptors.set(title="open files", xlabel="requests", ylim=(0, None))
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    _pyplot().close(figure)


def _numbers(measured: Sequence[Figures], prefix: str) -> list[int]:
    """The numbers of the cases `<prefix> <number>`, in order."""
    return sorted(
        {int(found.case.split()[1]) for found in measured if found.case.startswith(f"{prefix} ")}
    )


def _num_bad(measured: Sequence[Figures], method: str) -> float:
    closed = [
        found for found in measured if found.method == method and found.case.startswith("closed ")
    ]
    return sum(found.values["num_refused"] + found.values["num_broken"] for found in closed)


def _latencies(measured: Sequence[Figures], case: str, method: str) -> str:
    p50, p99 = (middle(measured, case, method, name) for name in ("p50_ms", "p99_ms"))
    return f"{_number(p50, '.1f')} / {_number(p99, '.0f')}" if p50 is not None else ""


def _open_cell(measured: Sequence[Figures], case: str, method: str) -> str:
    good, offered = (
        middle(measured, case, method, name) for name in ("per_second", "offered_per_second")
    )
    return (
        f"{good / offered:.0%}, {_latencies(measured, case, method)}"
        if good is not None and offered
        else ""
    )


def _megabytes(measured: Sequence[Figures], case: str, name: str) -> str:
    return _number(middle(measured, case, _GRAFT, name), ".1f", 1e-6)


def _ratio(dividend: float | None, divisor: float | None, form: str = ".1f") -> str:
    return _number(dividend / divisor, form) if dividend is not None and divisor else ""


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else "–" if math.isnan(value) else format(value * factor, form)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(num_columns: int) -> str:
    return "|" + "---|" * num_columns
