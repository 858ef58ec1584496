"""Every architecture of timm through Graft: built, converted, compared, trained for one step.

python benchmarks/backbones.py                              all; a later call goes on where it was
python benchmarks/backbones.py --family convnext --name '*tiny*'
python benchmarks/backbones.py --retry fault                try again what ended in this way
python benchmarks/backbones.py --report                     docs/backbones.md from its .jsonl

Weights are random, images small. Each architecture has a process of its own with limits of memory
and time, so that one that crashes costs its own row; the first of each family is also tried with
a size that it may not take.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import logging
import math
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

# Run as a file, `import finetune` would find benchmarks/finetune.py.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import timm
import torch
from PIL import Image

import finetune.training.inputs
from benchmarks.journal import Journal
from benchmarks.machine import describe_machine
from benchmarks.sections import write_section
from finetune.candidates import training_settings
from finetune.config import Options
from finetune.data.splits import Sample, Splits
from finetune.monitor import Monitor
from finetune.probe.solve import Probe
from finetune.training.boundary import FrozenPart, cut
from finetune.training.inputs import Normalise
from finetune.training.train import train
from models.backbone import build
from models.backbone.build import (
    Backbone,
    FeatureExtractor,
    build_backbone,
    build_from_config,
    timm_config,
)
from models.backbone.freezing import (
    freeze,
    parameter_groups,
    prove_frozen,
    set_train_mode,
    stages,
)
from models.backbone.memory import is_out_of_memory
from models.backbone.weights import read_state_dict
from models.checkpoint import WEIGHTS_FILE
from models.engine.engine import run
from models.engine.openvino_engine import OpenVINOEngine
from models.errors import GraftError
from models.images import Pixels
from models.prepared import write_prepared
from models.preprocess import Preprocess
from models.sources import EncodedImage

_ROOT = Path(__file__).resolve().parent.parent
_LABELS = ("a", "b", "c")
_SIZES = (64, 112, 128, 192, 224, 256)  # tried in this order, then the network's own
_LESS = 7  # pixels fewer than its own: a size that many networks do not take
_BOUND = 1e-3  # of the largest feature: fp32 in another order
_TOO_LARGE = 1200  # million parameters: not tried
_OUTCOMES = ("trained and served", "built", "refused", "too large", "fault")


@dataclass(frozen=True)
class Row:
    """What came of one architecture: `words` of a refusal, and the answer to an odd size."""

    family: str
    name: str
    outcome: str
    words: str = ""
    million_parameters: float = 0.0
    size: int = 0
    freeze: str = ""
    difference: float = 0.0
    seconds: float = 0.0
    odd_size: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.family, self.name, 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", default="*", help="a module of timm.models, or a pattern")
    parser.add_argument("--name", default="*", help="an architecture, or a pattern")
    parser.add_argument("--retry", choices=_OUTCOMES, help="try what ended in this way once more")
    parser.add_argument("--journal", type=Path, default=_ROOT / "docs" / "backbones.jsonl")
    parser.add_argument("--seconds", type=float, default=150, help="limit of an architecture")
    parser.add_argument("--memory-gb", type=float, default=12, help="limit of an architecture")
    parser.add_argument("--pause-while", type=Path, help="wait while this file exists")
    parser.add_argument("--build-only", action="store_true", help="without weights, in a second")
    parser.add_argument("--report", action="store_true", help="write docs/backbones.md and stop")
    args = parser.parse_args()
    args.journal.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.journal, Row, keep=True)
    if args.report:
        path = _ROOT / "docs" / "backbones.md"
        write_section(path, "# Backbones\n", "table", report(journal.compact()))
        return 0
    queue = [
        one
        for one in _in_turns(journal)
        if fnmatch.fnmatch(one[0], args.family) and fnmatch.fnmatch(one[1], args.name)
    ]
    torch.set_num_threads(1)
    for name in ("test_vit", "test_resnet"):
        _build_on_meta(name)  # imports of torch that a forked process need not repeat
    for family, name, is_first in queue:
        found = journal.measured.get((family, name, 0))
        again = args.retry or ("" if args.build_only else "built")
        if found is not None and found.outcome != again:
            continue
        while args.pause_while is not None and args.pause_while.exists():
            time.sleep(5)
        journal.add(_try_apart(family, name, is_first, args))
    return 0


def _in_turns(journal: Journal[Row]) -> list[tuple[str, str, bool]]:
    """Family, architecture and whether it is the first: every family's smallest, every next …"""
    turns = []
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        known = {name: journal.measured.get((family, name, 0)) for name in names}
        size = {name: row.million_parameters for name, row in known.items() if row is not None}
        names = sorted(names, key=lambda name: size.get(name, math.inf))
        refused = {name for name, row in known.items() if row and row.outcome == "refused"}
        names = [name for name in names if name not in refused] + sorted(refused)
        turns += [
            (number, size.get(name, math.inf), (family, name, number == 0))
            for number, name in enumerate(names)
        ]
    return [one for *_, one in sorted(turns)]


def _try_apart(family: str, name: str, is_first: bool, args: argparse.Namespace) -> Row:
    """The row of an architecture, tried in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    scratch = Path(tempfile.mkdtemp(dir=_memory_folder()))
    started = time.perf_counter()
    process = context.Process(
        target=_send_row,
        args=(sender, int(args.memory_gb * 1e9), name, is_first, args.build_only, scratch),
    )
    process.start()
    sender.close()
    try:
        late = {"outcome": "too large", "words": f"not ready in {args.seconds:.0f} s"}
        found = receiver.recv() if receiver.poll(args.seconds) else late
    except EOFError:
        process.join()
        found = {"outcome": "fault", "words": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        shutil.rmtree(scratch, ignore_errors=True)
    return Row(family, name, seconds=round(time.perf_counter() - started, 1), **found)


def _memory_folder() -> str | None:
    """A folder in memory, where there is one: gigabytes are written and read once."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _send_row(sender: Any, memory_bytes: int, *what: Any) -> None:
    # Private memory that is written to, as far as the kernel can say it beforehand.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    sender.send(try_architecture(*what))


def try_architecture(name: str, is_first: bool, build_only: bool, scratch: Path) -> dict[str, Any]:
    """What a row says of it."""
    found: dict[str, Any] = {}
    try:
        found |= _build_on_meta(name)
        if found["million_parameters"] > _TOO_LARGE:
            return found | {"outcome": "too large", "words": "not tried"}
        if build_only:
            return found | {"outcome": "built"}
        _make_init_cheap()
        found["size"] = _smallest_size(name)
        if is_first:
            odd = timm.get_pretrained_cfg(name).input_size[1] - _LESS
            found["odd_size"] = f"{odd}: {_try_size(name, odd)}"
        backbone = build_backbone(
            name, num_classes=len(_LABELS), pretrained=False, image_size=found["size"]
        )
        found["difference"] = _compare(backbone, is_first, scratch)
        found["freeze"] = _freeze_until_last_stage(backbone)
        (_train_run if is_first else _train_step)(backbone, found["freeze"], scratch)
        found["outcome"] = "trained and served"
    except GraftError as error:
        found |= {"outcome": "refused", "words": str(error)}
    # What a user would see as a traceback.
    except BaseException as error:
        found |= {"outcome": "fault", "words": "".join(traceback.format_exception(error)[-4:])}
    if is_out_of_memory(RuntimeError(found.get("words", ""))):
        found |= {"outcome": "too large", "words": "out of memory"}
    if "Traceback" in found.get("odd_size", ""):
        found["outcome"] = "fault"
    return found


def _try_size(name: str, size: int) -> str:
    """What Graft says to a size of images."""
    try:
        build_backbone(name, num_classes=2, pretrained=False, image_size=size)
    except GraftError as error:
        return str(error)
    except Exception as error:
        return "".join(traceback.format_exception(error))
    return "works"


def _build_on_meta(name: str) -> dict[str, Any]:
    """Built without weights. Raises GraftError as `build_backbone` does."""
    with torch.device("meta"):
        model = build._create(name, None, pretrained=False)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    build._linear_classifier(name, model)
    return {"million_parameters": round(num_parameters / 1e6, 1)}


def _smallest_size(name: str) -> int:
    """The first of _SIZES that it takes without weights, else its own."""
    cfg = timm.get_pretrained_cfg(name)
    model = None
    for size in (size for size in _SIZES if size < cfg.input_size[1]):
        try:
            with torch.device("meta"), torch.inference_mode():
                if model is None or cfg.fixed_input_size:
                    model = timm.create_model(name, **build._model_args(name, size)).eval()
                model(torch.zeros(2, 3, size, size))
            return size
        # timm's networks check their input in ways of their own.
        except Exception:
            continue
    return int(cfg.input_size[1])


def _make_init_cheap() -> None:
    """Random weights are copied from one table: drawing them is half of a large network's time."""
    tables = torch.randn(1 << 20), torch.rand(1 << 20).clamp(1e-4, 1 - 1e-4)

    def copy(table: torch.Tensor, tensor: Any) -> Any:
        num_copies = -(-tensor.numel() // len(table))
        return tensor.copy_(table.repeat(num_copies)[: tensor.numel()].reshape(tensor.shape))

    def normal(tensor: Any, mean: float = 0, std: float = 1, **_: Any) -> Any:
        return copy(tables[0], tensor).mul_(std).add_(mean)

    def uniform(tensor: Any, low: float = 0, high: float = 1, **_: Any) -> Any:
        return copy(tables[1], tensor).mul_(high - low).add_(low)

    torch.Tensor.normal_ = normal  # type: ignore[method-assign,assignment]
    torch.Tensor.uniform_ = uniform  # type: ignore[method-assign,assignment]


def _unsettle(model: torch.nn.Module) -> None:
    """Move what starts at 0, 1 or 1e-6, so that every layer has a part in the features."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape) * 0.5)


def _compare(backbone: Backbone, is_rebuilt: bool, scratch: Path) -> float:
    """The engine's features of two images against torch's: the largest difference, relative."""
    _unsettle(backbone.model)
    preprocess, network = backbone.preprocess, FeatureExtractor(backbone.model.eval())
    shape = (2, preprocess.height, preprocess.width, 3)
    crops = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with torch.inference_mode():
        images = _images(crops, preprocess)
        features, logits = network(images), backbone.model(images)
        assert torch.allclose(backbone.head(features), logits, rtol=1e-3, atol=1e-3)
    prepared = write_prepared(backbone, scratch / "prepared")
    # Without a search for the best batch.
    engine = _engine(prepared.openvino_path, preprocess, precision="fp32")
    served = run(engine, crops)
    engine.close()
    if is_rebuilt:  # as the engine on CUDA does
        with torch.device("meta"):
            tensors = read_state_dict(prepared.folder / WEIGHTS_FILE)
            build_from_config(timm_config(backbone), tensors)
    shutil.rmtree(prepared.folder)
    expected = features.numpy()
    largest = float(np.abs(expected).max())
    assert 0 < largest < np.inf, f"features up to {largest}"
    difference = float(np.abs(served - expected).max()) / largest
    assert difference < _BOUND, f"features differ by {difference} of the largest"
    return difference


_engine = partial(OpenVINOEngine, batch_size=1, num_streams=1, images_per_second=1.0)


def _images(crops: Pixels, preprocess: Preprocess) -> torch.Tensor:
    normalise = Normalise(preprocess, torch.device("cpu"), torch.contiguous_format)
    return normalise(torch.from_numpy(crops))


def _freeze_until_last_stage(backbone: Backbone) -> str:
    """The policy that leaves the last stage that has weights to train."""
    names = stages(backbone.model, backbone.classifier)
    heavy = [
        number
        for number, name in enumerate(names)
        if any(p.ndim > 1 for p in backbone.model.get_submodule(name).parameters())
    ]
    return f"until:{names[heavy[-1] - 1]}" if heavy and heavy[-1] else "none"


def _train_step(backbone: Backbone, policy: str, scratch: Path) -> None:
    """One step from activations at the boundary, or from images where it cannot be cut there."""
    model, preprocess = backbone.model, backbone.preprocess
    freezing = freeze(model, policy, backbone.classifier)
    shape = (len(_LABELS), preprocess.height, preprocess.width, 3)
    images = _images(np.random.default_rng(1).integers(0, 256, shape, np.uint8), preprocess)
    rest = cut(model, freezing, images) if freezing.frozen_modules else None
    network, inputs = (model, images) if rest is None else (rest, images)
    if rest is not None:
        with torch.no_grad():
            inputs = FrozenPart(model, rest.boundary)(images)
        rest.open()
    set_train_mode(model, freezing, update_batch_norm=False)
    groups = parameter_groups(
        model, backbone.classifier, head_lr=1e-3, backbone_lr=1e-3, weight_decay=0.05
    )
    optimizer = torch.optim.AdamW(groups)
    loss = torch.nn.functional.cross_entropy(network(inputs), torch.arange(len(_LABELS)))
    torch.autograd.backward(loss)
    optimizer.step()
    assert loss.isfinite(), f"the loss is {loss}"
    prove_frozen(model, freezing)


def _train_run(backbone: Backbone, policy: str, scratch: Path) -> None:
    """An epoch of one step, as a run does it, with the frozen part in the engine."""
    options = Options(
        freeze=policy, epochs=1, batch_size=3, workers=1, augment="none", preflight=False
    )
    samples = tuple(
        Sample(f"{number}", number, EncodedImage(_draw(number))) for number in range(len(_LABELS))
    )
    weight, bias = (t.detach().numpy().copy() for t in (backbone.head.weight, backbone.head.bias))
    start = Probe(weight, bias, 1.0, np.zeros((0, len(_LABELS)), np.float32), 1.0)
    (scratch / "run").mkdir()
    splits, monitor = Splits(_LABELS, samples, samples), Monitor(scratch / "run")
    with mock.patch.object(finetune.training.inputs, "OpenVINOEngine", _engine):
        train(backbone, splits, start, training_settings(options), monitor, scratch)


def _draw(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def report(rows: Sequence[Row]) -> list[str]:
    """A table of the families, what was refused in which words, and the answers to odd sizes."""
    rows = sorted(rows, key=lambda row: (row.family, row.name))
    families = {family: timm.list_models(module=family) for family in timm.list_modules()}
    lines = [
        f"| family | architectures | {' | '.join(_OUTCOMES)} | size |",
        f"|---|---|{'---|' * len(_OUTCOMES)}---|",
    ]
    total: Counter[str] = Counter()
    for family, names in families.items():
        found = [row for row in rows if row.family == family and row.name in names]
        counts = Counter(row.outcome for row in found)
        counts["architectures"] = len(names)
        total += counts
        lines.append(_table_row(family, counts, _sizes(found)))
    lines.append(_table_row("all", total, ""))
    refused: dict[str, list[str]] = {}
    for row in rows:
        if row.outcome in ("refused", "fault"):
            words = f"{row.outcome}: {row.words.replace(row.name, 'NAME')}"
            refused.setdefault(words, []).append(row.name)
    lines += ["", "What was refused, in which words:", ""]
    lines += [f"- {_as_text(words)}: {', '.join(names)}" for words, names in refused.items()]
    large = [
        f"{row.name} ({row.million_parameters:,.0f} million parameters, {row.words})"
        for row in rows
        if row.outcome == "too large"
    ]
    lines += ["", f"Too large or too slow for this machine: {', '.join(large) or 'none'}.", ""]
    lines += ["| one of each family | what `--image-size` says |", "|---|---|"]
    lines += [f"| {row.name} | {_as_text(row.odd_size)} |" for row in rows if row.odd_size]
    machine = describe_machine(
        sys.executable, ("torch", "timm", "openvino"), "python benchmarks/backbones.py"
    )
    return [*lines, "", machine.describe(with_peers=False)]


def _table_row(family: str, counts: Counter[str], sizes: str) -> str:
    cells = [counts["architectures"], *(counts[outcome] for outcome in _OUTCOMES)]
    return f"| {family} | {' | '.join(map(str, cells))} | {sizes} |"


def _sizes(rows: Sequence[Row]) -> str:
    """The smallest sizes that work, and how many architectures have each as theirs."""
    counts = Counter(row.size for row in rows if row.outcome == "trained and served")
    return ", ".join(f"{size} ({count})" for size, count in sorted(counts.items()))


def _as_text(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
