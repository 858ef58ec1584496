"""The model card of a checkpoint: data, metrics, how far to trust them, how to call it."""

from __future__ import annotations

from finetune.evaluation.metrics import most_confused, tabulate
from finetune.report.result import Result

_RANDOM_WARNING = "> **No pretrained weights.** This backbone started from random values (`--no-pretrained`); do not expect it to be good.\n\n"


def write_card(result: Result, version: int) -> str:
    """Markdown with the front matter that model hubs read."""
    options, backbone, splits = result.options, result.backbone, result.splits
    averages = " | ".join(result.probe_metrics.NAMES.values())
    results = "\n".join(
        f"| {split} | {' | '.join(metrics.with_interval(name) for name in metrics.intervals)} | {metrics.loss:.4f} "
        f"| {metrics.num_images:,} |"
        for split, metrics in result.metrics.items()
    )
    words = splits.task.words
    head, *rows = tabulate(
        result.metrics.get("test", result.metrics["val"]), splits.label_names, words.label
    )
    per_class = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    verdict = "" if result.verdict is None else f"\n{result.verdict}.\n"
    leaks = "".join(f"\n**Images leak:** {line}.\n" for line in result.audit.describe_leaks())
    sizes = ", ".join(f"{len(samples):,} {split}" for split, samples in splits.named())
    license_line = f"license: {backbone.license}\n" if backbone.license else ""
    return f"""---
library_name: timm
pipeline_tag: image-classification
{license_line}---
# {options.model_name}, version {version}

{"" if backbone.is_pretrained else _RANDOM_WARNING}{words.classifier} of {len(rows)} {words.labels}, made by Graft.

| | |
|---|---|
| backbone | `{backbone.name}` |
| pretrained weights | {backbone.weights} |
| licence of the weights | {backbone.license or "not known; ask whoever made them"} |
| frozen | `--freeze {result.freeze}` |
| trained with | {result.trained_with} |
| data | `{options.data}`: {sizes} |
| audit of the data | {result.audit.summary} |
| input | {backbone.preprocess.width}x{backbone.preprocess.height}, {backbone.preprocess.interpolation} |
| engine at save time | {result.engine} |
| precision | {result.engine.precision}: {result.why_precision} |
| probe alone | val {result.metric_name} {result.probe_metrics.score:.4f} |

## Results

| split | {averages} | log loss | images |
|---{"|---" * len(result.probe_metrics.NAMES)}|---|---|
{results}

In brackets, 95 % intervals over resampled images.
{leaks}{verdict}
| {" | ".join(head)} |
{"|---" * len(head)}|
{per_class}
{_confused(result)}
## How far to trust it

On val, {result.describe_calibration()}. {result.describe_answers()}

Would more images help? On val, {result.learning_curve}.

## Use it

```
curl -F images=@photo.jpg 'http://localhost:3000/predict?model={options.model_name}'
```

```python
import timm

model = timm.create_model("local-dir:{options.repository}/{options.model_name}/{version}", pretrained=True)
```
"""


def _confused(result: Result) -> str:
    confusion, names = result.metrics["val"].confusion, result.splits.label_names
    if confusion is None:
        return ""
    pairs = (
        f"{names[true]} taken for {names[predicted]} ({count:,})"
        for true, predicted, count in most_confused(confusion, 5)
    )
    return f"\nMost confused on val: {'; '.join(pairs) or 'none'}.\n"
