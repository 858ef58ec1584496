"""The model card of a checkpoint: data, metrics, how far to trust them, how to call it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finetune.evaluation.epoch import EpochMetrics
from finetune.evaluation.metrics import most_confused, tabulate
from finetune.report.candidate import Candidate
from finetune.report.markdown import escape_markdown, tabulate_markdown
from finetune.report.result import Result
from finetune.report.side_by_side import candidate_title, command_to_publish, tabulate_results

_MAX_PAIRS = 5
# Of more epochs, some are left out of the card; the report draws them all.
_MAX_EPOCHS = 20
_RANDOM_WARNING = (
    "> **No pretrained weights.** This backbone started from random values (`--no-pretrained`); "
    "do not expect it to be good.\n\n"
)


def write_card(result: Result, version: int, run_dir: Path) -> str:
    """Markdown with the front matter that model hubs read, of the result's chosen candidate."""
    model_name, repository = result.options.model_name, result.options.repository
    backbone, words = result.backbone, result.splits.task.words
    license_line = f"license: {backbone.license}\n" if backbone.license else ""
    warning = "" if backbone.is_pretrained else _RANDOM_WARNING
    head, rows = tabulate_results(result.candidates, result.chosen, "this one")
    leaks = "".join(f"\n**Images leak:** {line}.\n" for line in result.audit.describe_leaks())
    return f"""---
library_name: timm
pipeline_tag: image-classification
{license_line}---
# {model_name}, version {version}

{warning}{words.classifier} of {len(result.splits.label_names)} {words.labels}, made by Graft.

{_describe_making(result)}

## Results

{tabulate_markdown(head, rows)}

In brackets, 95 % intervals over resampled images.
{leaks}{_describe_verdict(result, run_dir)}
{_tabulate_classes(result)}
{_describe_confusion(result)}
## How far to trust it

On val, {result.describe_calibration()}. {result.describe_answers()}

Would more images help? On val, {result.learning_curve}.

## Use it

```
curl -F images=@photo.jpg 'http://localhost:3000/predict?model={model_name}'
```

```python
import timm

model = timm.create_model("local-dir:{repository}/{model_name}/{version}", pretrained=True)
```
"""


def place_card(card: str, repository: Path, name: str, version: int) -> str:
    """The card with the place and the name that a checkpoint has, whatever it said before."""
    for pattern, placed in (
        (r"^# .*, version \d+$", f"# {name}, version {version}"),
        (r"/predict\?model=[^'&]*'", f"/predict?model={name}'"),
        (r'"local-dir:[^"]*"', f'"local-dir:{repository}/{name}/{version}"'),
    ):
        literal = placed.replace("\\", r"\\")
        card = re.sub(pattern, literal, card, count=1, flags=re.MULTILINE)
    return card


def _describe_making(result: Result) -> str:
    """A table of two columns; its values are markup."""
    backbone, preprocess = result.backbone, result.backbone.preprocess
    sizes = ", ".join(f"{len(samples):,} {split}" for split, samples in result.splits.named())
    facts = {
        "backbone": f"`{backbone.name}`",
        "pretrained weights": backbone.weights,
        "licence of the weights": backbone.license or "not known; ask whoever made them",
        "frozen": f"`--freeze {result.freeze}`",
        "trained with": result.trained_with,
        "data": f"`{result.options.data}`: {sizes}",
        "audit of the data": result.audit.summary,
        "input": f"{preprocess.width}x{preprocess.height}, {preprocess.interpolation}, fit "
        f"{result.probe.backbone.fit}",
        "engine at save time": result.engine,
        "precision": f"{result.engine.precision}: {result.why_precision}",
        "probe alone": f"val {result.metric_name} {result.probe_metrics.score:.4f}",
    }
    if result.chosen.levels is not None and result.chosen.last_metrics is not None:
        facts["levels"] = (
            f"{result.chosen.levels.chosen} ({result.head.weight.shape[1]:,} features); a head on "
            f"the last level alone, which timm reads, has val {result.metric_name} "
            f"{result.chosen.last_metrics.score:.4f}"
        )
    return "\n".join(("| | |", "|---|---|", *(f"| {name} | {facts[name]} |" for name in facts)))


def _describe_verdict(result: Result, run_dir: Path) -> str:
    """What the other candidate of the run was, and how to publish it."""
    if result.tuned is None or result.verdict is None:
        return ""
    command = command_to_publish(run_dir, result.candidates, result.chosen)
    return f"""
This is the {candidate_title(result.chosen)} model of a run that made and compared two:
{result.verdict}.

To publish the other one: `{command}`

{_tabulate_epochs(result.tuned.epochs, result.best_epoch, result.metric_name)}"""


def _tabulate_epochs(
    epochs: Sequence[EpochMetrics], best_epoch: int | None, metric_name: str
) -> str:
    if not epochs:
        return ""
    places = np.linspace(0, len(epochs) - 1, min(len(epochs), _MAX_EPOCHS)).round().astype(int)
    shown = [
        epoch for place, epoch in enumerate(epochs) if place in places or epoch.epoch == best_epoch
    ]
    rows = [
        (
            f"{epoch.epoch}, the best" if epoch.epoch == best_epoch else f"{epoch.epoch}",
            "" if epoch.train_loss is None else f"{epoch.train_loss:.4f}",
            f"{epoch.val_loss:.4f}",
            f"{epoch.val_score:.4f}",
        )
        for epoch in shown
    ]
    return tabulate_markdown(("epoch", "train loss", "val loss", f"val {metric_name}"), rows) + "\n"


def _tabulate_classes(result: Result) -> str:
    metrics = result.metrics.get("test", result.metrics["val"])
    head, *rows = tabulate(metrics, result.splits.label_names, result.splits.task.words.label)
    return tabulate_markdown(head, rows)


def _describe_confusion(result: Result) -> str:
    """The most confused pairs, of each candidate where there are two."""
    lines = []
    for candidate in result.candidates:
        pairs = _confused_pairs(candidate, result.splits.label_names)
        if pairs is not None:
            of_which = "" if result.tuned is None else f", {candidate_title(candidate)}"
            lines.append(f"\nMost confused on val{of_which}: {'; '.join(pairs) or 'none'}.\n")
    return "".join(lines)


def _confused_pairs(candidate: Candidate, label_names: Sequence[str]) -> list[str] | None:
    """None if the task has no confusion matrix."""
    confusion = candidate.metrics["val"].confusion
    if confusion is None:
        return None
    names = [escape_markdown(name) for name in label_names]
    return [
        f"{names[true]} taken for {names[predicted]} ({count:,})"
        for true, predicted, count in most_confused(confusion, _MAX_PAIRS)
    ]
