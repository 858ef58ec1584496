"""The report of a run: one HTML file that holds everything and loads nothing, for a phone or a desk, light or dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

from finetune.evaluation.metrics import most_confused, tabulate
from finetune.report.charts import chart_learning_curve, chart_reliability
from finetune.report.plots import Mistake
from finetune.report.result import Result
from models.preprocess import Pixels
from models.sources import SplitName

# A matrix of more classes is too wide to read; the most confused pairs are listed in any case.
_MAX_MATRIX = 30
_MAX_PAIRS = 12

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1f2933; --faint: #616e7c; --line: #d9dee4; --ground: #fff; --card: #f5f7fa; --accent: #0b69a3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --faint: #9aa5b1; --line: #323f4b; --ground: #14191f; --card: #1f2933; --accent: #4aa8e0; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0; line-height: 1.2; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.2rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
p { margin: .5rem 0; }
.faint, th, figcaption { color: var(--faint); }
.warning { color: #c4441c; font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.3; }
.tile span { display: block; color: var(--faint); font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 1.2rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
.numbers td { white-space: nowrap; }
.words td + td { overflow-wrap: anywhere; }
th { font-weight: 500; font-size: .85rem; }
.matrix td { text-align: center; vertical-align: middle; padding: 0; min-width: 2.3rem; height: 2.1rem; border: 1px solid var(--ground);
  background: color-mix(in srgb, var(--accent) calc(var(--share) * 100%), var(--card)); }
.matrix .deep { color: var(--ground); }
.matrix th { text-align: right; vertical-align: middle; white-space: nowrap; border: 0; padding: 0 .6rem 0 0; }
.matrix thead th { text-align: center; padding: 0; }
.tall thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: right; padding: .4rem 0 0; }
.matrix thead td { background: none; }
svg { display: block; width: 100%; height: auto; margin: .75rem 0; }
svg text { fill: var(--faint); font-size: 11px; }
svg .grid { stroke: var(--line); }
svg .dashed, svg .whisker { stroke: var(--faint); }
svg .dashed { stroke-dasharray: 4 4; }
svg .bar { fill: var(--accent); opacity: .75; }
svg .dot { fill: var(--accent); }
svg .ring { fill: var(--ground); stroke: var(--faint); stroke-width: 1.5; }
svg .line { fill: none; stroke: var(--accent); stroke-width: 2; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { display: block; width: 100%; border-radius: .35rem; margin-bottom: .25rem; }
figcaption { font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere; }
figcaption b { color: var(--ink); font-weight: 600; }
pre { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; overflow-x: auto; }
"""


def write_report(
    result: Result, mistakes: Sequence[Mistake], *, version: int, commands: str
) -> str:
    """The page's text; `commands` are those that serve the model and ask it."""
    options = result.options
    title = f"{options.model_name}, version {version}"
    sections = [_head(result, title), _tiles(result)]
    if result.verdict is not None:
        sections.append(_section("Verdict", f"<p>{escape(_sentence(str(result.verdict)))}</p>"))
    sections += [
        _section("Results", _results(result)),
        _section("Calibration", _calibration(result)),
        _section(
            "Would more images help?",
            f"<p>{escape(_sentence(str(result.learning_curve)))}</p>",
            chart_learning_curve(result.learning_curve),
        ),
        *_confusion_section(result),
        _section(
            result.splits.task.words.labels.capitalize(),
            _classes(result),
        ),
        _section("Worst mistakes", _mistakes(mistakes)),
        _section(
            "How it was made",
            _making(result),
            f"<details><summary>All options</summary><pre>{escape(options.to_yaml())}</pre></details>",
        ),
        _section("Serve it and ask", f"<pre>{escape(commands)}</pre>"),
    ]
    # The policy lets a browser prove that nothing is loaded from anywhere.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
{"".join(sections)}
</html>
"""


def _head(result: Result, title: str) -> str:
    splits, options = result.splits, result.options
    sizes = ", ".join(f"{len(samples):,} {split}" for split, samples in splits.named())
    classes = splits.task.words.labels_of_images
    about = f"{len(splits.label_names)} {classes} of {options.data} ({sizes} images) on {result.backbone.name}, --freeze {options.freeze}"
    warning = (
        ""
        if result.backbone.is_pretrained
        else "<p class='warning'>No pretrained weights: the backbone started from random values.</p>"
    )
    return f"<h1>{escape(title)}</h1><p class='faint'>{escape(about)}</p>{warning}"


def _tiles(result: Result) -> str:
    split: SplitName = "test" if "test" in result.metrics else "val"
    metrics, calibrated = result.metrics[split], result.calibrated[split]
    tiles = [
        (
            f"{getattr(metrics, name):.1%}",
            f"{shown} on {split}",
            f"95%: {metrics.intervals[name].low:.1%} to {metrics.intervals[name].high:.1%}",
        )
        for name, shown in metrics.NAMES.items()
    ]
    tiles.append(
        (
            f"{calibrated.after.error:.3f}",
            "calibration error",
            f"{calibrated.before.error:.3f} before temperature",
        )
    )
    tiles += calibrated.figures
    tiles += [
        (
            f"{result.seconds['total']:.1f} s",
            "the whole run",
            f"{result.engine.precision} on {result.engine.device}",
        ),
    ]
    drawn = (
        f"<div class='tile'><span>{name}</span><b>{value}</b><span>{below}</span></div>"
        for value, name, below in tiles
    )
    return f"<div class='tiles'>{''.join(drawn)}</div>"


def _results(result: Result) -> str:
    rows = [
        (
            split,
            *(metrics.with_interval(name) for name in metrics.intervals),
            f"{metrics.loss:.4f}",
            f"{metrics.num_images:,}",
        )
        for split, metrics in result.metrics.items()
    ]
    alone = f"val {result.metric_name} {result.probe_metrics.score:.4f}"
    note = f"In brackets, 95 % intervals over resampled images. The probe alone: {alone}."
    head = ("split", *result.probe_metrics.NAMES.values(), "log loss", "images")
    leaks = "".join(
        f"<p class='warning'>Images leak: {escape(line)}.</p>"
        for line in result.audit.describe_leaks()
    )
    return f"{_table(head, rows)}{leaks}<p class='faint'>{note}</p>"


def _calibration(result: Result) -> str:
    val = result.calibrated["val"]
    rows = [
        (split, f"{one.before.error:.3f}", f"{one.after.error:.3f}", *one.columns.values())
        for split, one in result.calibrated.items()
    ]
    head = ("split", "error before temperature", "error", *val.columns)
    legend = "<p class='faint'>On val: bars are after temperature, rings before; on the dashed line, scores are what they say.</p>"
    summary = escape(f"{_sentence(result.describe_calibration())} {result.describe_answers()}")
    chart = chart_reliability(val.before, val.after, result.splits.task.words)
    return f"<p>{summary}</p>{_table(head, rows)}{chart}{legend}"


def _confusion_section(result: Result) -> list[str]:
    confusion = result.metrics["val"].confusion
    if confusion is None:
        return []
    return [_section("Confusion", _confusion(confusion, result.splits.label_names))]


def _confusion(confusion: npt.NDArray[np.int64], label_names: Sequence[str]) -> str:
    pairs = [
        (label_names[true], label_names[predicted], f"{count:,}")
        for true, predicted, count in most_confused(confusion, _MAX_PAIRS)
    ]
    listed = _table(("true", "answered", "images"), pairs) if pairs else "<p>No mistake on val.</p>"
    if len(label_names) > _MAX_MATRIX:
        return listed
    heads = "".join(f"<th>{escape(name)}</th>" for name in label_names)
    rows = []
    for true, name in enumerate(label_names):
        total = max(int(confusion[true].sum()), 1)
        cells = (_cell(int(count), int(count) / total) for count in confusion[true])
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    kind = "matrix tall" if max(map(len, label_names)) > 3 else "matrix"
    matrix = f"<div class='wide'><table class='{kind}'><thead><tr><td></td>{heads}</tr></thead>{''.join(rows)}</table></div>"
    return f"<p class='faint'>On val: rows are true labels, columns answers.</p>{matrix}<h3>Most confused</h3>{listed}"


def _cell(count: int, share: float) -> str:
    return (
        f"<td{' class=deep' if share > 0.55 else ''} style='--share:{share:.3f}'>{count or ''}</td>"
    )


def _classes(result: Result) -> str:
    split: SplitName = "test" if "test" in result.metrics else "val"
    shown, word = result.metrics[split], result.splits.task.words.label
    head, *rows = tabulate(shown, result.splits.label_names, word)
    table = _table(head, (rows[label] for label in np.argsort(shown.f1, kind="stable")))
    return f"<p class='faint'>On {split}, the hardest first.</p>{table}"


def _mistakes(mistakes: Sequence[Mistake]) -> str:
    if not mistakes:
        return "<p>None on val.</p>"
    drawn = (
        f"<figure>{_pictures(mistake)}<figcaption><b>{escape(mistake.true)}</b>, answered "
        f"<b>{escape(mistake.predicted)}</b> at {mistake.score:.0%}<br>{escape(_shorten(mistake.key))}</figcaption></figure>"
        for mistake in mistakes
    )
    words = "The wrong answers of highest score on val, as the model sees the images."
    if any(mistake.looked_at is not None for mistake in mistakes):
        words += " Below each, where it looked: the redder a place, the more it spoke for the wrong answer (Grad-CAM)."
    return f"<p class='faint'>{words}</p><div class='pictures'>{''.join(drawn)}</div>"


def _shorten(key: str) -> str:
    """A file's name and its folder's."""
    return "/".join(key.split("/")[-2:])


def _pictures(mistake: Mistake) -> str:
    crops = (crop for crop in (mistake.crop, mistake.looked_at) if crop is not None)
    return "".join(
        f"<img alt='' title='{escape(mistake.key)}' src='{_to_uri(crop)}'>" for crop in crops
    )


def _to_uri(crop: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(crop).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _making(result: Result) -> str:
    backbone, preprocess = result.backbone, result.backbone.preprocess
    rows = [
        ("backbone", backbone.name),
        ("pretrained weights", backbone.weights),
        ("licence of the weights", backbone.license or "not known; ask whoever made them"),
        ("frozen", f"--freeze {result.freeze}"),
        ("trained with", result.trained_with),
        *(
            [("training began from", result.options.first_head)]
            if result.best_epoch is not None
            else []
        ),
        ("data", result.options.data),
        ("audit of the data", result.audit.summary),
        ("input", f"{preprocess.width}x{preprocess.height}, {preprocess.interpolation}"),
        ("engine", str(result.engine)),
        ("precision", f"{result.engine.precision}: {result.why_precision}"),
        ("probe", f"L2 {result.l2:.0e}"),
        ("seconds", ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())),
    ]
    beside = "<p class='faint'>Every finding, with its picture: <a href='audit.html'>audit.html</a>, beside this page.</p>"
    return _table((), rows) + (beside if result.audit.findings else "")


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    heads = (
        f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr></thead>"
        if head
        else ""
    )
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    kind = "numbers" if head else "words"
    return f"<div class='wide'><table class='{kind}'>{heads}{body}</table></div>"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
