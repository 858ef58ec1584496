"""The report of a run: one HTML file that loads nothing, for a phone or a desk, light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from finetune.evaluation.metrics import Metrics, most_confused, tabulate
from finetune.report.candidate import Candidate
from finetune.report.charts import (
    chart_learning_curve,
    chart_losses,
    chart_reliability,
    chart_scores,
)
from finetune.report.plots import Mistake
from finetune.report.result import Result
from finetune.report.side_by_side import (
    candidate_title,
    command_to_publish,
    tabulate_calibration,
    tabulate_results,
)
from finetune.tasks.task import Words
from finetune.templates import image_uri, render
from models.sources import SplitName

# A matrix of more classes is too wide to read; the most confused pairs are listed in any case.
_MAX_MATRIX = 30
# Two matrices of more classes do not fit side by side.
_MAX_MATRIX_OF_PAIR = 10
_MAX_PAIRS = 12
_QUALITY = 85


@dataclass(frozen=True)
class _Confusion:
    """`rows` of a name and (count, fraction of the row) cells; none where there are too many."""

    label_names: Sequence[str]
    rows: list[tuple[str, list[tuple[int, float]]]]
    pairs: list[tuple[str, str, str]]

    @property
    def is_tall(self) -> bool:
        """Whether the names above the columns have to be turned."""
        return max(map(len, self.label_names)) > 3


@dataclass(frozen=True)
class _CandidateView:
    """What the report shows of each candidate, side by side."""

    title: str
    is_published: bool
    reliability_chart: Markup
    confusion: _Confusion | None
    classes_head: tuple[str, ...]
    classes: list[tuple[str, ...]]


@dataclass(frozen=True)
class _MistakeView:
    true: str
    predicted: str
    score: str
    key: str
    short_key: str
    uris: list[str]


def write_report(
    result: Result,
    mistakes: Sequence[Mistake],
    *,
    version: int,
    commands: str,
    run_dir: Path,
) -> str:
    """The page's text; `commands` are those that serve the model and ask it."""
    splits, chosen = result.splits, result.chosen
    sizes = ", ".join(f"{len(samples):,} {split}" for split, samples in splits.named())
    title = f"{result.options.model_name}, version {version}"
    words, label_names = splits.task.words, splits.label_names
    results_head, results = tabulate_results(result.candidates, chosen)
    calibration_head, calibration_rows = tabulate_calibration(result.candidates, chosen)
    return render(
        "report/report.html.j2",
        title=title,
        about=(
            f"{len(label_names)} {words.labels_of_images} of {result.options.data} "
            f"({sizes} images) on {chosen.backbone.name}, --freeze {result.options.freeze}"
        ),
        is_pretrained=chosen.backbone.is_pretrained,
        tiles=_tiles(chosen, result.seconds["total"]),
        verdict=None if result.verdict is None else _sentence(str(result.verdict)),
        publish_other=command_to_publish(run_dir, result.candidates, chosen),
        epoch_charts=_epoch_charts(result.tuned, result.probe_metrics.score, result.metric_name),
        results_head=results_head,
        results=results,
        leaks=result.audit.describe_leaks(),
        probe_alone=(
            f"val {result.metric_name} {result.probe_metrics.score:.4f}"
            if result.tuned is None
            else None
        ),
        calibration=(
            f"{_sentence(chosen.calibrated['val'].describe())} "
            f"{chosen.calibration.describe_answers()}"
        ),
        calibration_head=calibration_head,
        calibration_rows=calibration_rows,
        learning_curve=_sentence(str(result.learning_curve)),
        learning_curve_chart=chart_learning_curve(result.learning_curve),
        candidates=[
            _view_candidate(candidate, candidate is chosen, label_names, words)
            for candidate in result.candidates
        ],
        label_names_fit_twice=len(label_names) <= _MAX_MATRIX_OF_PAIR,
        labels_heading=words.labels.capitalize(),
        classes_split=_headline_split(chosen.metrics),
        mistakes=[_view_mistake(mistake) for mistake in mistakes],
        has_heat_maps=any(mistake.heat_map is not None for mistake in mistakes),
        making=_making(result),
        has_findings=bool(result.audit.findings),
        options=result.options.to_yaml(),
        commands=commands,
    )


def _headline_split(metrics: Mapping[SplitName, Metrics]) -> SplitName:
    return "test" if "test" in metrics else "val"


def _tiles(chosen: Candidate, total_seconds: float) -> list[tuple[str, str, str]]:
    """Headline figures: value, name, note."""
    split = _headline_split(chosen.metrics)
    metrics, calibrated = chosen.metrics[split], chosen.calibrated[split]
    averages = [
        (
            f"{getattr(metrics, name):.1%}",
            f"{shown} on {split}",
            f"95%: {metrics.intervals[name].low:.1%} to {metrics.intervals[name].high:.1%}",
        )
        for name, shown in metrics.NAMES.items()
    ]
    error = (
        f"{calibrated.after.error:.3f}",
        "calibration error",
        f"{calibrated.before.error:.3f} before temperature",
    )
    engine = f"{chosen.engine.precision} on {chosen.engine.device}"
    return [*averages, error, *calibrated.figures, (f"{total_seconds:.1f} s", "whole run", engine)]


def _epoch_charts(tuned: Candidate | None, probe_score: float, metric_name: str) -> list[Markup]:
    if tuned is None or not tuned.epochs:
        return []
    best_epoch = tuned.best_epoch or 0
    return [
        chart_scores(tuned.epochs, best_epoch, probe_score, metric_name),
        chart_losses(tuned.epochs, best_epoch),
    ]


def _view_candidate(
    candidate: Candidate, is_published: bool, label_names: Sequence[str], words: Words
) -> _CandidateView:
    val, split = candidate.calibrated["val"], _headline_split(candidate.metrics)
    shown, confusion = candidate.metrics[split], candidate.metrics["val"].confusion
    head, *rows = tabulate(shown, label_names, words.label)
    return _CandidateView(
        title=candidate_title(candidate),
        is_published=is_published,
        reliability_chart=chart_reliability(val.before, val.after, words),
        confusion=None if confusion is None else _view_confusion(confusion, label_names),
        classes_head=head,
        classes=[rows[label] for label in np.argsort(shown.f1, kind="stable")],
    )


def _view_confusion(confusion: npt.NDArray[np.int64], label_names: Sequence[str]) -> _Confusion:
    pairs = [
        (label_names[true], label_names[predicted], f"{count:,}")
        for true, predicted, count in most_confused(confusion, _MAX_PAIRS)
    ]
    fractions = confusion / confusion.sum(axis=1, keepdims=True).clip(min=1)
    rows = [
        (name, list(zip(map(int, counts), map(float, row), strict=True)))
        for name, counts, row in zip(label_names, confusion, fractions, strict=True)
    ]
    return _Confusion(label_names, rows if len(label_names) <= _MAX_MATRIX else [], pairs)


def _view_mistake(mistake: Mistake) -> _MistakeView:
    crops = (crop for crop in (mistake.crop, mistake.heat_map) if crop is not None)
    return _MistakeView(
        true=mistake.true,
        predicted=mistake.predicted,
        score=f"{mistake.score:.0%}",
        key=mistake.key,
        # The file's name and its folder's.
        short_key="/".join(mistake.key.split("/")[-2:]),
        uris=[image_uri(crop, "JPEG", _QUALITY) for crop in crops],
    )


def _making(result: Result) -> list[tuple[str, str]]:
    """How the published model was made: name and value."""
    backbone, preprocess = result.backbone, result.backbone.preprocess
    began = [] if result.tuned is None else [("training began from", result.options.first_head)]
    return [
        ("backbone", backbone.name),
        ("pretrained weights", backbone.weights),
        ("licence of the weights", backbone.license or "not known; ask whoever made them"),
        ("frozen", f"--freeze {result.freeze}"),
        ("trained with", result.trained_with),
        *began,
        ("data", result.options.data),
        ("audit of the data", result.audit.summary),
        (
            "input",
            f"{preprocess.width}x{preprocess.height}, {preprocess.interpolation}, fit "
            f"{result.probe.backbone.fit}",
        ),
        ("engine", str(result.engine)),
        ("precision", f"{result.engine.precision}: {result.why_precision}"),
        ("probe", f"L2 {result.l2:.0e}"),
        ("seconds", ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())),
    ]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
