"""Does every architecture of timm train and serve? The table of docs/backbones.md.

    python benchmarks/backbones.py [--only REGEX] [--seconds 280] [--journal backbones.jsonl]

Each architecture is built with random weights at the smallest size that it takes, trained for one
step, converted, and its served features are compared with torch's. Groups of architectures run in
processes of their own, each with a limit of time and memory. It stops after `--seconds`; the next
call continues after what the journal has, and the table is written anew each time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from models.backbone.build import Backbone, FeatureExtractor, build_backbone
from models.backbone.freezing import freeze, set_train_mode
from models.engine.engine import run
from models.errors import GraftError
from models.prepared import build_engine, write_prepared

SIZES = (64, 96, 128, 224, None)  # None: the network's own
NUM_IMAGES = 2
# Random networks amplify rounding: the tolerance relative to the largest feature.
TOLERANCE = 0.02
PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"


def main() -> None:
    arguments = parse_arguments()
    ends_at = time.monotonic() + arguments.seconds
    done = read_journal(arguments.journal)
    names = [name for name in timm.list_models() if re.search(arguments.only, name)]
    todo = [name for name in names if name not in done]
    while todo and time.monotonic() + arguments.limit < ends_at:
        group, todo = todo[: arguments.group], todo[arguments.group :]
        for row in run_group(group, ends_at, arguments):
            done[row["name"]] = row
            with arguments.journal.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['name']}: {row['outcome']} {row['words']}", flush=True)
    arguments.page.write_text(render_page(list(done.values()), len(timm.list_models())))
    print(f"{len(done)} of {len(names)} done; {arguments.page} is written")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="regular expression of names")
    parser.add_argument("--seconds", type=float, default=280, help="of the whole call")
    parser.add_argument("--limit", type=float, default=60, help="seconds of one architecture")
    parser.add_argument("--group", type=int, default=8, help="architectures of one process")
    parser.add_argument("--memory-gb", type=float, default=8, help="memory of one process")
    parser.add_argument("--max-parameters", type=float, default=350, help="in millions")
    parser.add_argument("--journal", type=Path, default=Path("backbones.jsonl"))
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser.parse_args()


def read_journal(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["name"]: row for row in rows}


def run_group(
    names: list[str], ends_at: float, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of a group; after a death or a limit the rest is left to the next group."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=try_group, args=(names, sender, arguments.memory_gb, arguments.max_parameters)
    )
    process.start()
    sender.close()
    rows = []
    for name in names:
        left = ends_at - time.monotonic()
        try:
            if receiver.poll(min(arguments.limit, left)):
                rows.append(receiver.recv())
                continue
            if left < arguments.limit:
                break
            rows.append(new_row(name, "over the limit", f"longer than {arguments.limit:.0f} s"))
        except EOFError:
            process.join()
            rows.append(new_row(name, "died", f"exit code {process.exitcode}"))
        break
    process.kill()
    process.join()
    return rows


def try_group(names: list[str], sender: Connection, memory_gb: float, millions: float) -> None:
    limit = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    for name in names:
        sender.send(try_one(name, millions))


def try_one(name: str, max_millions: float) -> dict[str, Any]:
    started = time.monotonic()
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        if millions > max_millions:
            row = new_row(name, "too large to try", f"{millions:.0f} M parameters")
        else:
            row = try_sizes(name) | {"millions": round(millions, 1)}
    except MemoryError:
        row = new_row(name, "too large to try", "out of the process's memory")
    # What this table is there to find.
    except Exception as error:
        words = (str(error).strip().splitlines() or [""])[0]
        is_memory = "alloc" in words
        outcome = "too large to try" if is_memory else "traceback"
        row = new_row(name, outcome, f"{type(error).__name__}: {words}"[:300])
    return row | {"seconds": round(time.monotonic() - started, 1)}


def try_sizes(name: str) -> dict[str, Any]:
    for size in SIZES:
        try:
            backbone = build_backbone(name, num_classes=3, pretrained=False, image_size=size)
        except GraftError as error:
            if str(error).startswith("--image-size"):
                continue
            return new_row(name, "refused", str(error))
        height, width = backbone.preprocess.height, backbone.preprocess.width
        words = f"{height} × {width}"
        try:
            check_serving(backbone, served_features(backbone))
            train_one_step(backbone)
        except GraftError as error:
            return new_row(name, "refused", str(error))
        return new_row(name, "trains and serves", words)
    raise AssertionError("the network's own size ends in another error")


def train_one_step(backbone: Backbone) -> None:
    """One step of all layers, as `--freeze none` trains them, and its gradients' presence."""
    model = backbone.model
    freezing = freeze(model, "none", backbone.classifier)
    set_train_mode(model, freezing, update_batch_norm=False)
    images, labels = images_of(backbone), torch.arange(NUM_IMAGES)
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    if backbone.head.weight.grad is None or not torch.isfinite(loss):
        raise ArithmeticError(f"a loss of {loss.item()} and no gradient of the head")


def served_features(backbone: Backbone) -> np.ndarray[Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        prepared = write_prepared(backbone, Path(folder) / "backbone")
        engine = build_engine(
            prepared.folder,
            prepared.preprocess,
            prepared.config,
            device="cpu",
            precision="fp32",
            batch_size=NUM_IMAGES,
            num_streams=1,
            images_per_second=1.0,
        )
        try:
            return run(engine, pixels_of(backbone))
        finally:
            engine.close()


def check_serving(backbone: Backbone, served: np.ndarray[Any, Any]) -> None:
    with torch.inference_mode():
        expected = FeatureExtractor(backbone.model.eval())(images_of(backbone)).numpy()
    scale = max(float(np.abs(expected).max()), 1e-6)
    worst = float(np.abs(served - expected).max()) / scale
    if not worst <= TOLERANCE:
        raise ArithmeticError(f"served features differ by {worst:.3f} of the largest")


def pixels_of(backbone: Backbone) -> np.ndarray[Any, np.dtype[np.uint8]]:
    shape = (NUM_IMAGES, backbone.preprocess.height, backbone.preprocess.width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def images_of(backbone: Backbone) -> torch.Tensor:
    mean, std = (torch.tensor(part) for part in (backbone.preprocess.mean, backbone.preprocess.std))
    images = (torch.from_numpy(pixels_of(backbone)).float() / 255 - mean) / std
    return images.permute(0, 3, 1, 2).contiguous()


def new_row(name: str, outcome: str, words: str) -> dict[str, Any]:
    return {"name": name, "outcome": outcome, "words": words, "millions": None}


def render_page(rows: list[dict[str, Any]], num_all: int) -> str:
    counts = Counter(row["outcome"] for row in rows)
    lines = [
        "# Backbones",
        "",
        f"{len(rows)} of the {num_all} architectures of timm {timm.__version__}, each with random",
        "weights, at the smallest of 64, 96, 128, 224 pixels and its own size that it takes:",
        "built, converted, its served features compared with torch's, and trained for one step.",
        "Made by `python benchmarks/backbones.py`, which continues where it stopped.",
        "",
        *(f"- {outcome}: {count}" for outcome, count in counts.most_common()),
        "",
        "| architecture | M parameters | outcome | size, or why |",
        "|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: str(row["name"])):
        words = " ".join(str(row["words"]).split()).replace("|", "\\|")
        lines.append(f"| {row['name']} | {row['millions'] or ''} | {row['outcome']} | {words} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
