"""The model card of a checkpoint: data, metrics, how far to trust them, how to call it."""

from __future__ import annotations

from finetune.calibration import describe_calibration, describe_unsure
from finetune.result import Result

_RANDOM_WARNING = (
    "> **No pretrained weights.** This backbone started from random values (`--no-pretrained`); do not expect it to be good.\n\n"
)


def write_card(result: Result, version: int) -> str:
    """Markdown with the front matter that model hubs read."""
    options, backbone, splits = result.options, result.backbone, result.splits
    results = "\n".join(
        f"| {split} | {' | '.join(metrics.with_interval(name) for name in metrics.intervals)} | {metrics.loss:.4f} "
        f"| {metrics.confusion.sum():,} |"
        for split, metrics in result.metrics.items()
    )
    shown = result.metrics.get("test", result.metrics["val"])
    per_class = "\n".join(
        f"| {name} | {shown.precision[label]:.3f} | {shown.recall[label]:.3f} | {shown.f1[label]:.3f} | {shown.support[label]:,} |"
        for label, name in enumerate(splits.label_names)
    )
    confused = "; ".join(
        f"{splits.label_names[true]} taken for {splits.label_names[predicted]} ({count:,})"
        for true, predicted, count in result.metrics["val"].most_confused(5)
    )
    verdict = "" if result.verdict is None else f"\n{result.verdict}.\n"
    sizes = ", ".join(f"{len(samples):,} {split}" for split, samples in splits.named())
    license_line = f"license: {backbone.license}\n" if backbone.license else ""
    return f"""---
library_name: timm
pipeline_tag: image-classification
{license_line}---
# {options.model_name}, version {version}

{"" if backbone.is_pretrained else _RANDOM_WARNING}An image classifier of {len(splits.label_names)} classes, made by Graft.

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
| probe alone | val accuracy {result.probe_metrics.accuracy:.4f} |

## Results

| split | accuracy | balanced accuracy | macro F1 | log loss | images |
|---|---|---|---|---|---|
{results}

In brackets, 95 % intervals over resampled images.
{verdict}
| class | precision | recall | F1 | images |
|---|---|---|---|---|
{per_class}

Most confused on val: {confused or "none"}.

## How far to trust it

On val, {describe_calibration(result.calibration, result.calibrated["val"])}. {describe_unsure(result.calibration)}

Would more images help? On val, {result.learning_curve}.

## Use it

```
curl -F images=@photo.jpg 'http://localhost:3000/predict?model={options.model_name}'
```

```python
model = timm.create_model("local-dir:{options.repository}/{options.model_name}/{version}", pretrained=True)
```
"""
