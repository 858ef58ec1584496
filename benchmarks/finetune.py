"""Fine-tuning against peers and against its own bounds, alternating on the same images and weights.

python benchmarks/finetune.py --what peers       whole processes: seconds, memory, accuracy
python benchmarks/finetune.py --what engine      extraction against engine and decoder alone
python benchmarks/finetune.py --what growth      time and memory from 1,000 to 20,000 images
python benchmarks/finetune.py --what boundary    an epoch with and without kept activations

A quick check that it runs: --what peers --limit 120 --epochs 1 --repeats 1 --docs DIR

The peers are the extra "bench", best in an environment of their own (--peer-python):
uv venv .venv-bench
VIRTUAL_ENV=.venv-bench uv pip install -c constraints.txt -r pyproject.toml --extra bench
Fashion-MNIST needs Debian's dataset-fashion-mnist, the emoji npm; see benchmarks/images.py.

What it should show on 2 cores: a cold run of Graft at least 25 times as fast as 5 frozen epochs of
fastai and 15 times as the tutorial's loop, no less accurate; its second run within 6 s; extraction
at 85 % of what decoder and engine allow; time linear within 10 % and memory within 200 MB from
1,000 to 20,000 images; an epoch on kept activations 4 times as fast as with the frozen layers run.

A run replaces its section of docs/finetune-benchmark.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

# Run as a file, `import finetune` would find this file instead of the package.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.bounds import core_ms_to_decode, core_ms_to_run
from benchmarks.images import make_emoji, make_fashion_csvs, make_fashion_mnist, make_photos
from benchmarks.journal import Journal
from benchmarks.machine import describe_machine
from benchmarks.process import run_process
from benchmarks.report import (
    ANEW,
    KEPT,
    Measurement,
    report_boundary,
    report_engine,
    report_growth,
    report_peers,
)

ROOT = Path(__file__).resolve().parent.parent
BACKBONE = "tf_efficientnet_lite0"
GRAFT, GRAFT_AGAIN = "Graft", "Graft, second run"
FROZEN, FINE_TUNE = "fastai, frozen", "fastai, fine_tune"
TUTORIAL, TUTORIAL_32 = "PyTorch tutorial", "PyTorch tutorial, batch 32"
METHODS = {
    "graft": GRAFT,
    "fastai-frozen": FROZEN,
    "fastai-fine-tune": FINE_TUNE,
    "tutorial": TUTORIAL,
    "tutorial-32": TUTORIAL_32,
}
GROWTH_SIZES = (1_000, 2_000, 5_000, 10_000, 20_000)
BOUNDARIES = ("until:blocks.4", "until:blocks.5")
# Converting a network peaks for half a second, which sampling in 1 % of the time would often miss.
_GRAFT_SAMPLING_SHARE = 0.05
_PACKAGES = ("torch", "torchvision", "timm", "openvino", "pillow", "simplejpeg", "fastai")


def main() -> int:
    args = parse_arguments()
    command = shlex.join(["python", "benchmarks/finetune.py", *shown_arguments(args)])
    machine = describe_machine(args.peer_python, _PACKAGES, command)
    args.data_dir.mkdir(parents=True, exist_ok=True)
    args.docs.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.data_dir / f"measured-{args.what}.jsonl", Measurement, keep=args.resume)
    measure, report = {
        "peers": (measure_peers, report_peers),
        "engine": (measure_engine, report_engine),
        "growth": (measure_growth, report_growth),
        "boundary": (measure_boundary, report_boundary),
    }[args.what]
    try:
        measure(args, journal)
    except RuntimeError as error:
        print(f"error: {error}\n(--resume goes on from here)", file=sys.stderr)
        return 1
    report(list(journal.measured.values()), machine, args.docs)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--what", choices=("peers", "engine", "growth", "boundary"), default="peers"
    )
    parser.add_argument(
        "--peer-python", default=sys.executable, help="the interpreter that has fastai"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "graft-benchmark",
        help="images and the journal",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        default=ROOT / "docs",
        help="folder of finetune-benchmark.md and .png",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--fine-tune-repeats", type=int, default=1, help="of fastai's fine_tune, the slowest by far"
    )
    parser.add_argument("--epochs", type=int, default=5, help="of the peers")
    parser.add_argument("--workers", type=int, default=2, help="of the peers' data loaders")
    parser.add_argument(
        "--limit", type=int, help="about this many images a set, to try the benchmark itself"
    )
    parser.add_argument("--precision", help="of Graft's engine; else its own choice")
    parser.add_argument("--levels", help="as run.py takes it; else its default")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what an interrupted run, with the same options, has measured",
    )
    return parser.parse_args()


def shown_arguments(args: argparse.Namespace) -> list[str]:
    """The command as the report shows it, without the paths of this machine."""
    shown = ["--what", args.what, "--repeats", str(args.repeats)]
    if args.what == "peers":
        shown += [
            "--fine-tune-repeats",
            str(args.fine_tune_repeats),
            "--epochs",
            str(args.epochs),
            "--workers",
            str(args.workers),
        ]
        shown += ["--peer-python", ".venv-bench/bin/python"]
        shown += [] if args.methods == list(METHODS) else ["--methods", *args.methods]
    for name in ("limit", "precision", "levels"):
        value = getattr(args, name)
        shown += [] if value is None else [f"--{name}", str(value)]
    return shown


@dataclass(frozen=True)
class GraftRun:
    """A run of finetune/run.py in folders of its own, which stay until `scratch` goes."""

    data: Path
    scratch: Path
    options: tuple[str, ...] = ()

    def measure(self, dataset: str, method: str, repeat: int) -> Measurement:
        """The whole process; a second call finds the first one's cache warm."""
        folders = {"--cache-dir": "cache", "--output": "runs", "--repository": "checkpoints"}
        places = [
            part for flag, name in folders.items() for part in (flag, str(self.scratch / name))
        ]
        command = [
            sys.executable,
            "finetune/run.py",
            "--data",
            str(self.data),
            "--backbone",
            BACKBONE,
            "--name",
            "benchmark",
        ]
        finished = run_process(
            [*command, *places, *self.options], ROOT, sampling_share=_GRAFT_SAMPLING_SHARE
        )
        metrics = json.loads((self.newest / "metrics.json").read_text())
        return Measurement(
            dataset,
            method,
            repeat,
            seconds=finished.seconds,
            peak_bytes=finished.peak_bytes,
            accuracy=metrics["val"]["accuracy"],
            parts={name: metrics["seconds"][name] for name in ("features", "probe", "total")},
        )

    @property
    def newest(self) -> Path:
        """The folder of the last run."""
        return max(
            (self.scratch / "runs").glob("*/metrics.json"), key=lambda path: path.stat().st_mtime
        ).parent

    @property
    def checkpoint(self) -> Path:
        return self.scratch / "checkpoints" / "benchmark" / "1"


def measure_peers(args: argparse.Namespace, journal: Journal[Measurement]) -> None:
    weights = args.data_dir / f"{BACKBONE}.safetensors"
    run_process([sys.executable, "benchmarks/peers/weights.py", BACKBONE, weights], ROOT)
    sets = make_sets(args)
    for repeat in range(max(args.repeats, args.fine_tune_repeats)):
        for dataset, data in sets.items():
            for method in args.methods:
                num_repeats = (
                    args.fine_tune_repeats if METHODS[method] == FINE_TUNE else args.repeats
                )
                if repeat >= num_repeats or (dataset, METHODS[method], repeat) in journal:
                    continue
                for measurement in measure_method(method, dataset, data, weights, repeat, args):
                    journal.add(measurement)


def make_sets(args: argparse.Namespace) -> dict[str, Path]:
    num_train, num_val = (
        (3_000, 1_000) if args.limit is None else (args.limit * 3 // 4, args.limit // 4)
    )
    return {
        f"Fashion-MNIST {num_train:,} + {num_val:,}": make_fashion_mnist(
            args.data_dir, num_train=num_train, num_val=num_val
        ),
        "Emoji" if args.limit is None else f"Emoji {args.limit}": make_emoji(
            args.data_dir, limit=args.limit
        ),
    }


def measure_method(
    method: str, dataset: str, data: Path, weights: Path, repeat: int, args: argparse.Namespace
) -> Iterator[Measurement]:
    """One process, or Graft's two: the first with an empty cache, the second with the first's."""
    if method == "graft":
        with tempfile.TemporaryDirectory() as scratch:
            run = GraftRun(data, Path(scratch), run_options(args))
            # The second first in the journal would let a resumed run miss the first.
            first, second = (run.measure(dataset, name, repeat) for name in (GRAFT, GRAFT_AGAIN))
        yield from (second, first)
        return
    peer = {
        "fastai-frozen": ("fastai_learner.py", "--recipe", "fit_one_cycle"),
        "fastai-fine-tune": ("fastai_learner.py", "--recipe", "fine_tune"),
        "tutorial": ("torch_loop.py",),
        "tutorial-32": ("torch_loop.py", "--batch-size", "32", "--lr", "0.008"),
    }[method]
    settings = [
        "--backbone",
        BACKBONE,
        "--epochs",
        str(args.epochs),
        "--workers",
        str(args.workers),
        "--seed",
        str(repeat),
    ]
    command = [
        args.peer_python,
        f"benchmarks/peers/{peer[0]}",
        *peer[1:],
        "--data",
        data,
        "--weights",
        weights,
        *settings,
    ]
    finished = run_process(command, ROOT)
    accuracy = json.loads(finished.output.splitlines()[-1])["accuracy"]
    yield Measurement(
        dataset, METHODS[method], repeat, finished.seconds, finished.peak_bytes, accuracy
    )


def run_options(args: argparse.Namespace) -> tuple[str, ...]:
    """Those of run.py that were given here."""
    given = {name: getattr(args, name) for name in ("precision", "levels")}
    return tuple(
        part for name, value in given.items() if value is not None for part in (f"--{name}", value)
    )


def measure_engine(args: argparse.Namespace, journal: Journal[Measurement]) -> None:
    """Extraction within a run, then the checkpoint's engine alone, then the decoder alone."""
    num_photos = args.limit or 4_000
    photos = make_photos(args.data_dir, count=num_photos)
    for repeat in range(args.repeats):
        if ("photos", "extraction", repeat) in journal:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            run = GraftRun(photos, Path(scratch), ("--device", "cpu", *run_options(args)))
            extraction = run.measure("photos", "extraction", repeat)
            engine_ms = core_ms_to_run(run.checkpoint, sorted(photos.rglob("*.jpg")))
            decode_ms = core_ms_to_decode(run.checkpoint, sorted(photos.rglob("*.jpg")))
        seconds = extraction.parts["features"]
        parts = {
            "images_per_second": num_photos / seconds,
            "engine_ms": engine_ms,
            "decode_ms": decode_ms,
        }
        journal.add(
            Measurement(
                "photos",
                "extraction",
                repeat,
                extraction.seconds,
                extraction.peak_bytes,
                extraction.accuracy,
                parts,
            )
        )


def measure_growth(args: argparse.Namespace, journal: Journal[Measurement]) -> None:
    """Cold runs at each size, alternating between the sizes."""
    sizes = GROWTH_SIZES if args.limit is None else (args.limit, 2 * args.limit)
    csvs = make_fashion_csvs(args.data_dir, sizes)
    for repeat in range(args.repeats):
        for size, path in csvs.items():
            if (str(size), GRAFT, repeat) in journal:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                journal.add(
                    GraftRun(path, Path(scratch), run_options(args)).measure(
                        str(size), GRAFT, repeat
                    )
                )


def measure_boundary(args: argparse.Namespace, journal: Journal[Measurement]) -> None:
    """One epoch on the digits, with and without kept activations at the freeze boundary."""
    for repeat in range(args.repeats):
        for freeze in BOUNDARIES:
            for method, option in ((KEPT, "--cache"), (ANEW, "--no-cache")):
                if (freeze, method, repeat) in journal:
                    continue
                with tempfile.TemporaryDirectory() as scratch:
                    run = GraftRun(
                        Path("digits"),
                        Path(scratch),
                        ("--freeze", freeze, "--epochs", "1", option, *run_options(args)),
                    )
                    measured = run.measure(freeze, method, repeat)
                    journal.add(
                        replace(
                            measured,
                            parts={
                                **measured.parts,
                                "images_per_second": _training_speed(run.newest),
                            },
                        )
                    )


def _training_speed(run_dir: Path) -> float:
    """Images/s of the last epoch, from the run's TensorBoard log."""
    accumulator = EventAccumulator(str(run_dir))
    accumulator.Reload()
    return float(accumulator.Scalars("train/images_per_second")[-1].value)


if __name__ == "__main__":
    sys.exit(main())
