"""Cost of a training step on the CPU: contiguous, channels_last, and with training/depthwise.py.

python benchmarks/training_step.py
python benchmarks/training_step.py --backbones convnext_atto --precision fp32

Every layer trains, on noise. Milliseconds an image of forward, backward and AdamW, the median of
--steps; the ways alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from statistics import median

# Run as a file, `import finetune` would find benchmarks/finetune.py.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import timm
import torch
from torch import nn

from benchmarks.machine import describe_machine
from finetune.training.depthwise import DepthwiseGradientsInFloat32

BACKBONES = (
    "tf_efficientnet_lite0",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "convnext_atto",
    "resnet18",
)
WAYS = {
    "torch's own order": (torch.contiguous_format, False),
    "channels_last": (torch.channels_last, False),
    "channels_last, depthwise gradients in fp32": (torch.channels_last, True),
}
_NUM_CLASSES = 10


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES))
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="of each way")
    args = parser.parse_args()
    print(
        f"| {args.precision}, ms an image | {' | '.join(WAYS)} | times as fast |\n"
        f"|---|{'---|' * (len(WAYS) + 1)}"
    )
    for name in args.backbones:
        torch.manual_seed(0)
        found = measure(timm.create_model(name, num_classes=_NUM_CLASSES), args)
        print(
            f"| {name} | {' | '.join(f'{ms:.1f}' for ms in found)} | {found[0] / found[-1]:.2f} |",
            flush=True,
        )
    print()
    print(
        describe_machine(
            sys.executable, ("torch", "timm"), "python benchmarks/training_step.py"
        ).describe(with_peers=False)
    )
    return 0


def measure(model: nn.Module, args: argparse.Namespace) -> list[float]:
    """Milliseconds an image of each way."""
    images = torch.randn(args.batch_size, 3, 224, 224)
    labels = torch.randint(0, _NUM_CLASSES, (args.batch_size,))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

    def step(memory_format: torch.memory_format, is_caught: bool) -> float:
        started = time.perf_counter()
        caught = DepthwiseGradientsInFloat32() if is_caught else contextlib.nullcontext()
        with caught, torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            logits = model(images.contiguous(memory_format=memory_format))
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    seconds: list[list[float]] = [[] for _ in WAYS]
    for _ in range(2):
        for way, found in zip(WAYS.values(), seconds, strict=True):
            # The optimizer's moments follow the order of the parameters.
            model.to(memory_format=way[0])
            optimizer.state.clear()
            step(*way)
            found += [step(*way) for _ in range(args.steps // 2)]
    return [1000 * median(found) / args.batch_size for found in seconds]


if __name__ == "__main__":
    sys.exit(main())
