"""Audit labelled images: broken files, missing classes, duplicates, leaks, wrong labels, outliers.

python finetune/audit.py --data photos/             a table, a CSV and a page of thumbnails
python finetune/audit.py --data photos/ --strict    fails if an image leaks between splits

Nothing is trained or changed. A run audits its images in the same way.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finetune.auditing.findings import WORDING, Audit
from finetune.auditing.inspection import inspect
from finetune.auditing.output import write_audit
from finetune.command_line import parse_options
from finetune.config import AuditOptions, name_of_data
from finetune.data.lasting_split import load_lasting_splits
from finetune.probe.features import extract_splits, open_engine, prepare, prepare_meanwhile
from finetune.probe.solve import solve_probe
from finetune.terminal import run_program
from finetune.unused import warn_if_nothing_is_stretched, warn_if_unused
from models.errors import GraftError
from models.files import scratch_folder

logger = logging.getLogger("graft.audit")

# Findings of a kind in the terminal; the CSV has all.
_NUM_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    return run_program(
        lambda: audit(
            parse_options(AuditOptions, list(sys.argv[1:] if arguments is None else arguments))
        )
    )


def audit(options: AuditOptions) -> Audit:
    """Print what is wrong with the images of `--data`, and write a CSV and a page beside the runs.

    Under `--strict` raises GraftError if a folder cannot be read and, after all is written, if an
    image leaks or cannot be read.
    """
    warn_if_unused(options)
    # A run's features of all levels are in the cache; the last one's are what is audited by.
    with prepare_meanwhile(options, all_levels=True):
        loaded, duplicates = load_lasting_splits(
            options.data,
            data_root=options.data_root,
            val_fraction=options.val_fraction,
            seed=options.seed,
            runs_dir=None if options.new_split else options.output,
            cache_dir=options.enabled_cache_dir,
            num_workers=options.workers,
            strict=options.strict,
            check=False,
        )
    warn_if_nothing_is_stretched(options, loaded)
    with scratch_folder() as scratch:
        backbone = prepare(
            options.backbone,
            loaded.train,
            options,
            scratch,
            weights=options.weights,
            pretrained=options.pretrained,
            all_levels=True,
        )
        engine = open_engine(backbone, options.device, options.precision)
        splits, features = extract_splits(
            loaded,
            backbone,
            engine,
            num_workers=options.workers,
            cache=options.feature_cache,
            unreadable="ignored",
        )
        engine.close()
    features = {split: rows[:, : backbone.num_features] for split, rows in features.items()}
    labels = splits.labels(splits.train)
    if np.count_nonzero(splits.count_labels(splits.train)) < splits.task.min_labels:
        raise GraftError(
            f"--data {options.data}: fewer than {splits.task.min_labels} "
            f"{splits.task.words.labels} have images to train on that can be read"
        )
    probe = solve_probe(
        features["train"],
        labels,
        len(splits.label_names),
        task=splits.task,
        seed=options.seed,
    )
    found = inspect(
        loaded,
        splits,
        features,
        probe,
        duplicates,
        backbone.preprocess,
        min_images=options.min_images,
    )
    paths = write_audit(found, options.output, f"audit-{name_of_data(options.data)}", options.data)
    _print(found, paths, options)
    if options.strict:
        found.refuse_leaks()
        if broken := found.of_kind("unreadable"):
            raise GraftError(
                f"{len(broken)} unreadable (--strict makes that an error; the table above names "
                "them)"
            )
    return found


def _print(found: Audit, paths: tuple[Path, Path], options: AuditOptions) -> None:
    for kind, wording in WORDING.items():
        findings = found.of_kind(kind)
        if not findings:
            continue
        print(f"\n{wording.heading}: {len(findings):,}")
        split_width = max(len(finding.split) for finding in findings)
        label_width = min(24, max(len(finding.label) for finding in findings[:_NUM_SHOWN]))
        for finding in findings[:_NUM_SHOWN]:
            score = "      " if finding.score is None else f"{finding.score:6.3f}"
            where = "" if finding.sample is None else f"{finding.sample.key}: "
            print(
                f"  {score}  {finding.split:<{split_width}}  {finding.label:<{label_width}}  "
                f"{where}{finding.detail}"
            )
        if len(findings) > _NUM_SHOWN:
            print(f"  and {len(findings) - _NUM_SHOWN:,} more in {paths[0]}")
    print(
        f"\naudit of {found.summary}",
        *(f"audit: {line}" for line in found.describe_leaks()),
        sep="\n",
    )
    print(f"\n  table  {paths[0]}\n  page   {paths[1]}\n")
    if any(finding.split != "test" for finding in found.of_kind("missing_class")):
        print(
            "Next: add images of the classes that a split lacks, or put all images into one folder "
            "of class folders, and Graft splits them."
        )
    else:
        print(f"Next:\n  python finetune/run.py --data {shlex.quote(options.data)}")


if __name__ == "__main__":
    sys.exit(main())
