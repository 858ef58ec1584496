"""How many of the faults planted in real images finetune/audit.py finds, and its false alarms.

python benchmarks/audit.py                  the digits, Fashion-MNIST (3,000 + 1,000), the emoji
python benchmarks/audit.py --sets digits    the embedded digits alone, no network or package needed

Fashion-MNIST needs Debian's dataset-fashion-mnist, the emoji npm; see benchmarks/images.py.

What it should show on each set: all exact copies, broken files and the missing class; at least 90 %
of the near copies, with at most 1 % of the images falsely called copies; at least 60 % of the
flipped labels in the first 10 % of the ranking.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Run as a file, `import finetune` would find benchmarks/finetune.py.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.faults import Faults, plant_faults
from benchmarks.images import make_emoji, make_fashion_mnist
from finetune.audit import audit
from finetune.auditing.findings import Audit
from finetune.config import AuditOptions
from finetune.data.splits import load_splits

SETS: dict[str, Callable[[Path], str]] = {
    "digits": lambda data_dir: "digits",
    "fashion-mnist": lambda data_dir: str(
        make_fashion_mnist(data_dir, num_train=3_000, num_val=1_000)
    ),
    "emoji": lambda data_dir: str(make_emoji(data_dir)),
}


@dataclass(frozen=True)
class Score:
    """Fractions of the planted faults that were found.

    `false_alarms`: the fraction of all images that were called near copies but were not planted.
    """

    exact: float
    near: float
    false_alarms: float
    flipped: float
    broken: float
    is_class_found: bool


def score(found: Audit, faults: Faults) -> Score:
    """Compare an audit of `faults.folder` with the faults planted there."""

    def pairs(*kinds: str) -> set[frozenset[Path]]:
        both = (
            (finding.sample, finding.other) for finding in found.findings if finding.kind in kinds
        )
        return {
            frozenset((Path(sample.key), Path(other[2].key)))
            for sample, other in both
            if sample is not None and other is not None
        }

    def share(planted: dict[Path, Path], found: set[frozenset[Path]]) -> float:
        return sum(frozenset(pair) in found for pair in planted.items()) / len(planted)

    near = pairs("near_leak", "near_duplicate")
    known = {frozenset(pair) for pair in faults.near.items()}
    num_train = sum(1 for path in (faults.folder / "train").rglob("*") if path.is_file())
    labels = [finding for finding in found.of_kind("wrong_label") if finding.split == "train"][
        : num_train // 10
    ]
    first = {Path(finding.sample.key) for finding in labels if finding.sample is not None}
    broken = {
        Path(finding.sample.key)
        for finding in found.of_kind("unreadable")
        if finding.sample is not None
    }
    return Score(
        exact=share(faults.exact, pairs("exact_leak", "exact_duplicate")),
        near=share(faults.near, near),
        false_alarms=len(near - known) / found.num_images,
        flipped=len(first & faults.flipped) / len(faults.flipped),
        broken=len(broken & faults.broken) / len(faults.broken),
        is_class_found=[
            (finding.split, finding.label) for finding in found.of_kind("missing_class")
        ]
        == [("val", faults.missing)],
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "graft-benchmark",
        help="where the images are made",
    )
    parser.add_argument("--output", type=Path, help="keeps the pages and tables here")
    args = parser.parse_args()
    rows = []
    for name in args.sets:
        with tempfile.TemporaryDirectory() as scratch:
            splits = load_splits(
                SETS[name](args.data_dir), data_root=Path("data"), val_fraction=0.25, seed=0
            )
            faults = plant_faults(splits, Path(scratch) / name)
            started = time.perf_counter()
            found = audit(
                AuditOptions(data=str(faults.folder), output=args.output or Path(scratch))
            )
            rows.append((name, found, score(found, faults), time.perf_counter() - started))
    print(
        "\n| images | exact | near | false alarms | flipped labels | broken | class | with leaks "
        "| without | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, found, scored, seconds in rows:
        whole, clean = found.scores["val"]
        cells = [
            f"{value:.1%}"
            for value in (
                scored.exact,
                scored.near,
                scored.false_alarms,
                scored.flipped,
                scored.broken,
            )
        ]
        accuracy = f"{whole:.4f} | {'' if clean is None else f'{clean:.4f}'}"
        is_found = "found" if scored.is_class_found else "not found"
        print(
            f"| {name}, {found.num_images:,} | {' | '.join(cells)} | {is_found} | {accuracy} "
            f"| {seconds:.1f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
