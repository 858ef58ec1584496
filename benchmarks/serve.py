"""The service against peers and its own bounds: same weights, JPEGs and cores, load from a process.

python benchmarks/serve.py --what peers     requests/s and latency, closed and open loops
python benchmarks/serve.py --what peers --precision int8      the same, Graft's engine in int8
python benchmarks/serve.py --what bound     against decode + engine + an empty request, each alone
python benchmarks/serve.py --what models    1, 8 and 64 models on one backbone: speed and memory
python benchmarks/serve.py --what storm     three times the capacity for a minute
python benchmarks/serve.py --what soak      100,000 requests: memory and open files
python benchmarks/serve.py --what swaps     10,000 requests through 20 new versions

A quick check that it runs: --what peers --frameworks bento --seconds 2 --repeats 1 --docs DIR

The peers are the extra "bench", best in an environment of their own (--peer-python):
uv venv .venv-bench
VIRTUAL_ENV=.venv-bench uv pip install -c constraints.txt -r pyproject.toml --extra bench
wrk, which runs the closed loops, is Debian's package of that name. Server and generator share the
cores.

What it should show on 2 cores, tf_efficientnet_lite0, JPEGs of 500 to 640 pixels: at 16 clients 5
times the requests/s of BentoML's idiomatic service and of LitServe, 6 times in int8, and 1.5 times
if they have Graft's engine; at 1 client 0.3 of their p50; 85 % of what decode, engine and an empty
request allow.

A run replaces its section of docs/serve-benchmark.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.bounds import core_ms_to_decode, core_ms_to_run
from benchmarks.checkpoints import (
    Head,
    Measured,
    draw_head,
    measure_backbone,
    publish,
    recognising_head,
)
from benchmarks.client import Client, run_loop
from benchmarks.figures import Figures
from benchmarks.images import make_request_images
from benchmarks.journal import Journal
from benchmarks.load import (
    Requests,
    check_wrk,
    closed_loop,
    good_by_second,
    open_loop,
    summarize,
    write_bodies,
)
from benchmarks.machine import describe_machine
from benchmarks.process import MemorySampler, tree_bytes, tree_cpu_seconds, tree_descriptors
from benchmarks.serve_report import REPORTS
from benchmarks.servers import ROOT, Launch, Server, serve
from benchmarks.swaps import swap_under_load
from models.engine.processor import num_cpus

BACKBONE = "tf_efficientnet_lite0"
NAME = "benchmark"
GRAFT = "Graft"
FRAMEWORKS = {
    "bento": "BentoML, batchable",
    "bento-depends": "BentoML, depends",
    "litserve": "LitServe",
    "fastapi": "FastAPI, threads",
}
ENGINES = {"torch": "torch", "tuned": "torch, tuned", "graft": "Graft's engine"}
CLIENTS = (1, 4, 16, 64)
OPEN_PERCENTS = (50, 80, 120)
MODEL_COUNTS = (1, 8, 64)
NUM_IMAGES = 32
DEFAULTS = {"storm_seconds": 60.0, "num_requests": None, "num_swaps": 20, "num_classes": 100}
STORM_FACTOR = 3
_LEAST_RECOGNISED = 0.9
_SETTLE_SECONDS = 1.0
_PACKAGES = (
    "bentoml",
    "litserve",
    "fastapi",
    "uvicorn",
    "uvloop",
    "torch",
    "timm",
    "openvino",
    "pillow",
    "simplejpeg",
)


def main() -> int:
    # A stopped benchmark ends its servers: the exit unwinds through their context managers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args = parse_arguments()
    command = shlex.join(["python", "benchmarks/serve.py", *shown_arguments(args)])
    machine = describe_machine(args.peer_python, _PACKAGES, command)
    args.data_dir.mkdir(parents=True, exist_ok=True)
    args.docs.mkdir(parents=True, exist_ok=True)
    journal = Journal(
        args.data_dir / f"served-{args.what}-{args.precision}.jsonl", Figures, keep=args.resume
    )
    measure = {
        "peers": measure_peers,
        "bound": measure_bound,
        "models": measure_models,
        "storm": measure_storm,
        "soak": measure_soak,
        "swaps": measure_swaps,
    }[args.what]
    try:
        check_wrk()
        measure(args, journal)
    except RuntimeError as error:
        print(f"error: {error}\n(--resume goes on from here)", file=sys.stderr)
        return 1
    section = args.what if args.precision == "auto" else f"{args.what}-{args.precision}"
    REPORTS[args.what](list(journal.measured.values()), machine, args.docs, section)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=tuple(REPORTS), default="peers")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="the interpreter that has the peers"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "graft-benchmark",
        help="folder of images, converted backbones and the journal",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        default=ROOT / "docs",
        help="folder of serve-benchmark.md and its plots",
    )
    parser.add_argument("--frameworks", nargs="*", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="of the peers"
    )
    parser.add_argument(
        "--peer-workers",
        type=int,
        help="of each peer; else one for torch, one a core for the others",
    )
    parser.add_argument(
        "--clients", nargs="+", type=int, default=list(CLIENTS), help="of the closed loops"
    )
    parser.add_argument(
        "--open",
        nargs="*",
        type=int,
        default=list(OPEN_PERCENTS),
        help="of the open loops, in %% of the server's capacity",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "int8"),
        default="auto",
        help="of Graft's engine",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of each load; the storm's is --storm-seconds"
    )
    parser.add_argument("--storm-seconds", type=float)
    parser.add_argument(
        "--num-requests", type=int, help="of the soak (100,000) and of the swaps (10,000)"
    )
    parser.add_argument("--num-swaps", type=int)
    parser.add_argument("--num-classes", type=int, help="of the models and of the versions")
    parser.set_defaults(**DEFAULTS)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what an interrupted run, with the same options, has measured",
    )
    return parser.parse_args()


def shown_arguments(args: argparse.Namespace) -> list[str]:
    """The command as the report shows it, without the paths of this machine."""
    shown = ["--what", args.what, "--repeats", str(args.repeats), "--seconds", f"{args.seconds:g}"]
    if args.what == "peers":
        shown += ["--peer-python", ".venv-bench/bin/python"]
        shown += [] if args.frameworks == list(FRAMEWORKS) else ["--frameworks", *args.frameworks]
        shown += [] if args.engines == list(ENGINES) else ["--engines", *args.engines]
        shown += [] if args.clients == list(CLIENTS) else ["--clients", *map(str, args.clients)]
        shown += [] if args.open == list(OPEN_PERCENTS) else ["--open", *map(str, args.open)]
        shown += [] if args.peer_workers is None else ["--peer-workers", str(args.peer_workers)]
    shown += [] if args.precision == "auto" else ["--precision", args.precision]
    for name in ("num_requests", "num_swaps", "num_classes", "storm_seconds"):
        value = getattr(args, name)
        shown += [] if value == DEFAULTS[name] else [f"--{name.replace('_', '-')}", f"{value:g}"]
    return shown


@dataclass(frozen=True)
class Bench:
    """What the modes share: images, a backbone with their features, and a checkpoint to serve."""

    folder: Path
    measured: Measured
    num_classes: int

    @cached_property
    def body_paths(self) -> tuple[Path, ...]:
        return write_bodies(self.measured.images, self.folder / "bodies")

    @cached_property
    def requests(self) -> Requests:
        return Requests(self.body_paths)

    @cached_property
    def image_paths(self) -> list[Path]:
        folder = self.folder / "images"
        folder.mkdir(exist_ok=True)
        for index, image in enumerate(self.measured.images):
            (folder / f"{index:03d}.jpg").write_bytes(image)
        return sorted(folder.glob("*.jpg"))

    @cached_property
    def checkpoint(self) -> Path:
        """The only version of the only model in a repository of its own."""
        return publish(
            self.folder / "checkpoints",
            NAME,
            self.measured,
            recognising_head(self.measured, prefix=NAME),
        )

    def draw_head(self, prefix: str, seed: int) -> Head:
        return draw_head(self.measured, num_classes=self.num_classes, prefix=prefix, seed=seed)

    def log_path(self, method: str) -> Path:
        return self.folder / f"{method.replace(' ', '-').replace(',', '')}.log"

    @contextmanager
    def serve_graft(self, repository: Path) -> Iterator[Server]:
        with serve(launch_graft(repository), self.log_path(GRAFT)) as server:
            yield server


@contextmanager
def prepare(args: argparse.Namespace) -> Iterator[Bench]:
    images = make_request_images(args.data_dir, count=NUM_IMAGES)
    measured = measure_backbone(
        BACKBONE, images, precision=args.precision, cache_dir=args.data_dir / "cache"
    )
    # Beside the cache, from which checkpoints have hard links.
    with tempfile.TemporaryDirectory(dir=args.data_dir, prefix="serve-") as folder:
        yield Bench(Path(folder), measured, args.num_classes)


def launch_graft(repository: Path) -> Launch:
    bentoml = str(Path(sys.executable).with_name("bentoml"))
    environment = {"CHECKPOINTS": str(repository), "GRAFT_DRAIN_SECONDS": "0.2"}
    return Launch(
        (bentoml, "serve", ".", "--host", "127.0.0.1", "--port", "{port}"), "/readyz", environment
    )


def launch_peer(framework: str, engine: str, checkpoint: Path, args: argparse.Namespace) -> Launch:
    environment = {"GRAFT_PEER_CHECKPOINT": str(checkpoint), "GRAFT_PEER_ENGINE": engine}
    if args.peer_workers is not None:
        environment["GRAFT_PEER_WORKERS"] = str(args.peer_workers)
    if framework in ("bento", "bento-depends"):
        bentoml = str(Path(args.peer_python).with_name("bentoml"))
        target = f"benchmarks.peers.serve_{framework.replace('-', '_')}:Classify"
        return Launch(
            (bentoml, "serve", target, "--host", "127.0.0.1", "--port", "{port}"),
            "/readyz",
            environment,
        )
    return Launch(
        (args.peer_python, f"benchmarks/peers/serve_{framework}.py", "{port}"),
        "/health",
        environment,
    )


def measure_peers(args: argparse.Namespace, journal: Journal[Figures]) -> None:
    """Alternate between servers: closed loops, then open ones at fractions of their capacity."""
    combined = [(framework, engine) for engine in args.engines for framework in args.frameworks]
    with prepare(args) as bench:
        launches = {GRAFT: launch_graft(bench.checkpoint.parents[1])} | {
            f"{FRAMEWORKS[framework]}; {ENGINES[engine]}": launch_peer(
                framework, engine, bench.checkpoint, args
            )
            for framework, engine in combined
        }
        for repeat in range(args.repeats):
            for method, launch in launches.items():
                if ("server", method, repeat) in journal:
                    continue
                with serve(launch, bench.log_path(method)) as server:
                    for figures in measure_server(server, bench, method, repeat, args):
                        journal.add(figures)


def measure_server(
    server: Server, bench: Bench, method: str, repeat: int, args: argparse.Namespace
) -> Iterator[Figures]:
    """All loads on one server. The case "server" comes last: a journal with it has them all."""
    recognised = recognised_fraction(server, bench)
    warm_up(server, bench.requests, args.seconds)
    capacity = 0.0
    for num_clients in args.clients:
        found = closed_loop(
            server.url, bench.requests, num_clients=num_clients, seconds=args.seconds
        )
        capacity = max(capacity, found["per_second"])
        yield Figures(f"closed {num_clients}", method, repeat, found)
        settle(server, bench.requests)
    for percent in args.open if capacity else ():
        sent = open_loop(
            server.url,
            bench.requests,
            per_second=capacity * percent / 100,
            seconds=args.seconds,
            seed=repeat,
        )
        yield Figures(f"open {percent}", method, repeat, summarize(sent, args.seconds))
        settle(server, bench.requests)
    memory = float(tree_bytes(server.pid))
    values = {
        "capacity": capacity,
        "pss_bytes": memory,
        "start_seconds": server.start_seconds,
        "recognised": recognised,
    }
    yield Figures("server", method, repeat, values)


def warm_up(server: Server, requests: Requests, seconds: float) -> None:
    closed_loop(server.url, requests, num_clients=16, seconds=max(2.0, seconds / 2))
    settle(server, requests)


def settle(server: Server, requests: Requests) -> None:
    """Wait until requests that wrk left unfinished are answered; queues are first in, first out."""
    run_loop(ask_all(server.url, requests.encode()[:1]))
    time.sleep(_SETTLE_SECONDS)


def recognised_fraction(server: Server, bench: Bench) -> float:
    """The fraction of images that get their own label from `recognising_head`.

    Another decoder and resize may confuse similar images. Raises RuntimeError if it is so low that
    the weights or the preprocess must differ.
    """
    answers = run_loop(ask_all(server.url, bench.requests.encode()))
    if any(status != 200 for status, _ in answers):
        raise RuntimeError(
            f"{server.url} answered {Counter(status for status, _ in answers)}, "
            f"first {answers[0][1][:500]!r}"
        )
    labels = [best_label(json.loads(body)) for _, body in answers]
    recognised = sum(label == f"{NAME}-{index}" for index, label in enumerate(labels)) / len(labels)
    if recognised < _LEAST_RECOGNISED:
        raise RuntimeError(
            f"{server.url} recognises {recognised:.0%} of the images, less than "
            f"{_LEAST_RECOGNISED:.0%}: it has other weights or another preprocess"
        )
    return recognised


async def ask_all(url: str, encoded: Sequence[bytes]) -> list[tuple[int, bytes]]:
    client = Client(url)
    answers = [await client.send(request) for request in encoded]
    client.close()
    return answers


def best_label(answer: Any) -> str:
    """The label of one image, however a framework wraps it."""
    if isinstance(answer, list):
        return best_label(answer[0])
    label: str = answer["label"] if "label" in answer else best_label(answer["predictions"])
    return label


def measure_bound(args: argparse.Namespace, journal: Journal[Figures]) -> None:
    """Core time of each part of a request, measured alone, against what the service reaches."""
    with prepare(args) as bench:
        for repeat in range(args.repeats):
            if ("bound", GRAFT, repeat) in journal:
                continue
            values = {}
            before = core_ms_of_parts(bench)
            with bench.serve_graft(bench.checkpoint.parents[1]) as server:
                values["http_ms"] = core_ms_of_empty_request(server, args.seconds)
                warm_up(server, bench.requests, args.seconds)
                for num_clients in (16, 64):
                    found = closed_loop(
                        server.url, bench.requests, num_clients=num_clients, seconds=args.seconds
                    )
                    values[f"per_second_{num_clients}"] = found["per_second"]
            # Before and after, because the speed of a shared machine changes within minutes.
            after = core_ms_of_parts(bench)
            values |= {name: (before[name] + after[name]) / 2 for name in before}
            values["bound_per_second"] = (
                1000 * num_cpus() / (values["decode_ms"] + values["engine_ms"] + values["http_ms"])
            )
            values |= {
                f"share_{count}": values[f"per_second_{count}"] / values["bound_per_second"]
                for count in (16, 64)
            }
            journal.add(Figures("bound", GRAFT, repeat, values))


def core_ms_of_parts(bench: Bench) -> dict[str, float]:
    return {
        "decode_ms": core_ms_to_decode(bench.checkpoint, bench.image_paths),
        "engine_ms": core_ms_to_run(bench.checkpoint, bench.image_paths),
    }


def core_ms_of_empty_request(server: Server, seconds: float) -> float:
    """GET /livez: all of a request but its image, and the generator's work, as in every load."""
    before = tree_cpu_seconds(server.pid)
    found = closed_loop(server.url, Requests((), ("/livez",)), num_clients=16, seconds=seconds)
    cpu_seconds = tree_cpu_seconds(server.pid) - before + found["client_cpu_seconds"]
    return 1000 * cpu_seconds / found["num_answers"]


def measure_models(args: argparse.Namespace, journal: Journal[Figures]) -> None:
    """One server for each number of models, all asked in turn."""
    with prepare(args) as bench:
        names = [f"model-{index:02d}" for index in range(max(MODEL_COUNTS))]
        heads = {name: bench.draw_head(name, seed) for seed, name in enumerate(names)}
        for name, head in heads.items():
            publish(bench.folder / "all", name, bench.measured, head)
        for repeat in range(args.repeats):
            for count in MODEL_COUNTS:
                case = f"models {count}"
                if (case, GRAFT, repeat) in journal:
                    continue
                repository = bench.folder / f"models-{count}"
                for name in names[:count]:
                    shutil.copytree(
                        bench.folder / "all" / name,
                        repository / name,
                        copy_function=os.link,
                        dirs_exist_ok=True,
                    )
                requests = replace(
                    bench.requests,
                    targets=tuple(f"/predict?model={name}" for name in names[:count]),
                )
                with bench.serve_graft(repository) as server:
                    idle_bytes = float(tree_bytes(server.pid))
                    warm_up(server, requests, args.seconds)
                    found = closed_loop(server.url, requests, num_clients=16, seconds=args.seconds)
                    values = {
                        "loaded_bytes": float(tree_bytes(server.pid)),
                        "start_seconds": server.start_seconds,
                    }
                head_bytes = float(heads[names[0]].num_bytes)
                journal.add(
                    Figures(
                        case,
                        GRAFT,
                        repeat,
                        {**found, **values, "idle_bytes": idle_bytes, "head_bytes": head_bytes},
                    )
                )
                shutil.rmtree(repository)


def measure_storm(args: argparse.Namespace, journal: Journal[Figures]) -> None:
    """Three times the capacity: goodput, latency and memory during the storm and after it."""
    with prepare(args) as bench:
        for repeat in range(args.repeats):
            if ("storm", GRAFT, repeat) in journal:
                continue
            with bench.serve_graft(bench.checkpoint.parents[1]) as server:
                warm_up(server, bench.requests, args.seconds)
                quiet = closed_loop(
                    server.url, bench.requests, num_clients=1, seconds=args.seconds / 2
                )
                capacity = closed_loop(
                    server.url, bench.requests, num_clients=16, seconds=args.seconds
                )["per_second"]
                settle(server, bench.requests)
                before = float(tree_bytes(server.pid))
                # Reading it stops the process for a moment, so not often.
                memory = MemorySampler(server.pid, sample_seconds=1.0)
                memory.start()
                offered, cpu_seconds = STORM_FACTOR * capacity, time.process_time()
                sent = open_loop(
                    server.url,
                    bench.requests,
                    per_second=offered,
                    seconds=args.storm_seconds,
                    seed=repeat,
                )
                cpu_seconds = time.process_time() - cpu_seconds
                memory.stop()
                time.sleep(_SETTLE_SECONDS)
                after = closed_loop(
                    server.url, bench.requests, num_clients=1, seconds=args.seconds / 2
                )
                values = {
                    **summarize(sent, args.storm_seconds),
                    "capacity": capacity,
                    "client_cores": cpu_seconds / args.storm_seconds,
                    "storm_seconds": args.storm_seconds,
                    "before_bytes": before,
                    # By then queued images, bodies and connections are as many as they get.
                    "filled_bytes": float(memory.samples[len(memory.samples) // 10]),
                    "end_bytes": float(memory.samples[-1]),
                    "peak_bytes": float(memory.peak_bytes),
                    "after_bytes": float(tree_bytes(server.pid)),
                    "before_p50_ms": quiet["p50_ms"],
                    "after_p50_ms": after["p50_ms"],
                    "after_num_failed": after["num_refused"] + after["num_broken"],
                }
            series = {
                "good_by_second": good_by_second(sent, math.ceil(args.storm_seconds)),
                "bytes": [float(sample) for sample in memory.samples],
            }
            journal.add(Figures("storm", GRAFT, repeat, values, series))


def measure_soak(args: argparse.Namespace, journal: Journal[Figures]) -> None:
    """Many requests at 16 clients; memory and open files are read in pauses. It runs only once."""
    num_requests = args.num_requests or 100_000
    if ("soak", GRAFT, 0) in journal:
        return
    with prepare(args) as bench, bench.serve_graft(bench.checkpoint.parents[1]) as server:
        warm_up(server, bench.requests, args.seconds)
        series: dict[str, list[float]] = {"requests": [], "bytes": [], "descriptors": []}
        num_done = num_failed = 0.0
        started = time.perf_counter()
        while True:
            series["requests"].append(num_done)
            series["bytes"].append(float(tree_bytes(server.pid)))
            series["descriptors"].append(float(tree_descriptors(server.pid)))
            if num_done >= num_requests:
                break
            found = closed_loop(
                server.url, bench.requests, num_clients=16, seconds=4 * args.seconds
            )
            num_done += found["num_answers"]
            num_failed += found["num_refused"] + found["num_broken"]
            print(f"{num_done:.0f} requests, {series['bytes'][-1] / 1e6:.0f} MB", flush=True)
            settle(server, bench.requests)
        values = {
            "num_requests": num_done,
            "num_failed": num_failed,
            "seconds": time.perf_counter() - started,
        }
    journal.add(Figures("soak", GRAFT, 0, values, series))


def measure_swaps(args: argparse.Namespace, journal: Journal[Figures]) -> None:
    """Publish version after version under load; each has another head, so that a mix would show."""
    num_requests = args.num_requests or 10_000
    for repeat in range(args.repeats):
        if ("swaps", GRAFT, repeat) in journal:
            continue
        with prepare(args) as bench:
            repository = bench.folder / "swapped"
            heads = [
                bench.draw_head(f"v{version}", version) for version in range(1, args.num_swaps + 2)
            ]
            publish(repository, NAME, bench.measured, heads[0])
            with bench.serve_graft(repository) as server:
                warm_up(server, bench.requests, args.seconds)
                swapped = swap_under_load(
                    server.url,
                    bench.requests,
                    num_requests,
                    bench.measured,
                    heads,
                    repository / NAME,
                )
        series = {"swap_seconds": swapped.swap_seconds}
        journal.add(Figures("swaps", GRAFT, repeat, swapped.to_values(), series))


if __name__ == "__main__":
    sys.exit(main())
