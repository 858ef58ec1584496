"""How accurate a default run is, and what it costs, on five sets of images.

python benchmarks/accuracy.py                      all sets, the default against --levels last
python benchmarks/accuracy.py --sets digits stamps

Whole processes, each once with an empty cache and once more with the first's. All sets have splits
of their own or one drawn by the seed, so that every method learns from and is measured on the same
images.

Fashion-MNIST needs Debian's dataset-fashion-mnist, the stamps tuxpaint-stamps-default, the clip art
openclipart-png (or --root, where they are unpacked), the emoji npm; see benchmarks/images.py.

What it should show: of the default run against --levels last, the log loss lower on each set (or
equal within its interval), the mean accuracy two points higher, no set 0.3 points lower; a first
run at most 1.2 times as long.

A run replaces its section of docs/accuracy-benchmark.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

# Run as a file, `import finetune` would find this file instead of the package.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.figures import Figures, methods, middle, shown
from benchmarks.images import make_clip_art, make_emoji, make_fashion_mnist, make_stamps
from benchmarks.journal import Journal
from benchmarks.machine import Machine, describe_machine
from benchmarks.process import run_process
from benchmarks.sections import write_section

ROOT = Path(__file__).resolve().parent.parent
LAST, DEFAULT = "last level", "default"
OPTIONS = {LAST: ("--levels", "last"), DEFAULT: ()}
SETS: dict[str, Callable[[argparse.Namespace], Path]] = {
    "digits": lambda _: Path("digits"),
    "fashion-mnist": lambda args: make_fashion_mnist(args.data_dir, num_train=3000, num_val=1000),
    "emoji": lambda args: make_emoji(args.data_dir),
    "stamps": lambda args: make_stamps(args.data_dir, args.root),
    "clip-art": lambda args: make_clip_art(args.data_dir, args.root),
}
_FILE = "accuracy-benchmark.md"
_TITLE = (
    "# Accuracy, measured\n\n"
    "Written by `benchmarks/accuracy.py`; times are medians, with the lowest and highest in "
    "brackets.\n"
)
_PACKAGES = ("torch", "timm", "openvino", "pillow", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--root", type=Path, default=Path("/"), help="where packages are unpacked")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "graft-benchmark",
        help="images and the journal",
    )
    parser.add_argument(
        "--docs", type=Path, default=ROOT / "docs", help="folder of accuracy-benchmark.md"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what an interrupted run has measured"
    )
    args = parser.parse_args()
    args.data_dir.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.data_dir / "measured-accuracy.jsonl", Figures, keep=args.resume)
    for repeat in range(args.repeats):
        for name in args.sets:
            data = SETS[name](args)
            for method in args.methods:
                if (name, method, repeat) not in journal:
                    journal.add(measure(name, data, method, repeat))
    command = ["python", "benchmarks/accuracy.py", "--repeats", str(args.repeats)]
    machine = describe_machine(sys.executable, _PACKAGES, shlex.join(command))
    report(list(journal.measured.values()), machine, args.docs)
    return 0


def measure(name: str, data: Path, method: str, repeat: int) -> Figures:
    """Two whole processes, the second with the first one's cache."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"--cache-dir": "cache", "--output": "runs", "--repository": "checkpoints"}
        places = [part for flag, to in folders.items() for part in (flag, f"{scratch}/{to}")]
        command = [
            *(sys.executable, "finetune/run.py", "--data", str(data), "--name", "benchmark"),
            *(*places, *OPTIONS[method]),
        ]
        first, second = (run_process(command, ROOT) for _ in range(2))
        newest = max(Path(scratch, "runs").glob("*/metrics.json"))
        metrics = json.loads(newest.read_text())
    val = metrics["val"]
    low, high = val["intervals"]["accuracy"]
    return Figures(
        name,
        method,
        repeat,
        {
            "accuracy": val["accuracy"],
            "low": low,
            "high": high,
            "loss": val["loss"],
            "num_images": val["num_images"],
            "first_seconds": first.seconds,
            "second_seconds": second.seconds,
            "peak_mb": first.peak_bytes / 1e6,
        },
    )


def report(measured: Sequence[Figures], machine: Machine, docs_dir: Path) -> None:
    sets = list(dict.fromkeys(found.case for found in measured))
    lines = [
        "## The default and a head on the last level",
        "",
        "| images | method | val accuracy | 95 % | log loss | first run, s | second run, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in sets:
        for method in methods(measured):
            low, high = (middle(measured, case, method, name) for name in ("low", "high"))
            cells = (
                shown(measured, case, method, "accuracy", ".4f"),
                f"{low:.3f} to {high:.3f}",
                shown(measured, case, method, "loss", ".4f"),
                shown(measured, case, method, "first_seconds", ".1f"),
                shown(measured, case, method, "second_seconds", ".1f"),
            )
            lines.append(f"| {case} | {method} | {' | '.join(cells)} |")
    lines += [
        "",
        *(
            f"- {method}: mean accuracy {_mean(measured, sets, method, 'accuracy'):.4f}, mean log "
            f"loss {_mean(measured, sets, method, 'loss'):.4f}"
            for method in methods(measured)
        ),
        "",
        machine.describe(with_peers=False),
    ]
    write_section(docs_dir / _FILE, _TITLE, "levels", lines)


def _mean(measured: Sequence[Figures], sets: Sequence[str], method: str, name: str) -> float:
    return mean(middle(measured, case, method, name) or 0.0 for case in sets)


if __name__ == "__main__":
    sys.exit(main())
