"""The report of a run holds what the run came to, as one file that loads nothing and runs nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from finetune.auditing.findings import Audit, Finding
from finetune.config import Options
from finetune.data.splits import Sample, Splits
from finetune.evaluation.class_metrics import evaluate_classes
from finetune.evaluation.comparison import Comparison, compare_accuracies
from finetune.evaluation.conformal import calibrate_probe
from finetune.evaluation.interval import Interval
from finetune.probe.learning_curve import measure_learning_curve
from finetune.probe.solve import Head, solve_probe
from finetune.report.card import write_card
from finetune.report.page import write_report
from finetune.report.plots import Mistake
from finetune.report.result import Result
from finetune.tasks.single_label import SINGLE_LABEL
from models.engine.engine import EngineInfo
from models.preprocess import Preprocess
from models.sources import EncodedImage

_VOID = {"meta", "img", "br"}


class Strict(HTMLParser):
    """Tags that are closed in their order, and what is said and loaded."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.loaded: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "srcset", "data", "action")
        ]
        assert tag != "script"
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def make_result(num_classes: int = 3, *, is_trained: bool = False) -> Result:
    generator = np.random.default_rng(0)
    centres = generator.normal(0, 2, (num_classes, 20))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % num_classes
        return (centres[labels] + generator.normal(0, 3, (count, 20))).astype(np.float32), labels

    (features, labels), (val_features, val_labels) = draw(60 * num_classes), draw(40 * num_classes)
    probe = solve_probe(features, labels, num_classes, seed=0)
    logits = probe.logits(val_features)
    metrics = evaluate_classes(logits, val_labels)
    calibration, calibrated = calibrate_probe(
        probe.out_of_fold_logits,
        probe.temperature,
        labels,
        {"val": logits},
        {"val": val_labels},
        0.9,
    )
    names = ("<b>cat</b>", "dog & hound", *(f"class {index}" for index in range(2, num_classes)))
    samples = tuple(
        Sample(f"photos/{index}.jpg", int(label), EncodedImage(b""))
        for index, label in enumerate(val_labels)
    )
    scores = compare_accuracies(logits, logits, val_labels)
    verdict = Comparison(scores, probe_seconds=1.5, train_seconds=60)
    backbone: Any = SimpleNamespace(
        name="resnet18",
        weights="a package",
        license="apache-2.0",
        is_pretrained=True,
        preprocess=Preprocess(height=224, width=224),
    )
    return Result(
        options=Options(
            data="photos/",
            name="pets",
            freeze="until:layer3" if is_trained else "backbone",
            coverage=0.9,
        ),
        splits=Splits(names, samples, samples),
        backbone=backbone,
        engine=EngineInfo("OpenVINO", "cpu", "bf16", 8, 2, 300.0),
        why_precision="int8 would not pay",
        head=Head(probe.weight, probe.bias),
        metrics={"val": metrics},
        calibration=calibration,
        calibrated=dict(calibrated),
        probe_metrics=metrics,
        l2=probe.l2,
        learning_curve=measure_learning_curve(
            features, labels, probe, val_features, val_labels, SINGLE_LABEL, seed=0
        ),
        val_logits=logits,
        val_features=val_features,
        audit=Audit((), {"val": (metrics.accuracy, metrics.accuracy)}, 100 * num_classes),
        best_epoch=3 if is_trained else None,
        verdict=verdict if is_trained else None,
        seconds={"probe": 1.5, "total": 4.6},
    )


@pytest.fixture(scope="module")
def result() -> Result:
    return make_result()


MISTAKES = [
    Mistake(
        np.full((32, 32, 3), 90, np.uint8),
        "<b>cat</b>",
        "dog & hound",
        0.87,
        "photos/'1\" onload=x.jpg",
    )
]


def read(result: Result, mistakes: list[Mistake] = MISTAKES) -> tuple[str, str, Strict]:
    page = write_report(
        result,
        mistakes,
        version=7,
        commands="make serve\ncurl -F images=@x.jpg 'http://localhost:3000/predict?model=pets'",
    )
    parsed = Strict(page)
    return page, " ".join(" ".join(parsed.text).split()), parsed


def test_it_is_whole_and_loads_nothing(result: Result) -> None:
    page, _, parsed = read(result)
    assert parsed.open == []
    assert parsed.loaded
    assert all(loaded.startswith("data:image/jpeg;base64,") for loaded in parsed.loaded)
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_it_says_what_the_run_came_to(result: Result) -> None:
    _, text, _ = read(result)
    metrics, interval = result.metrics["val"], result.metrics["val"].intervals["accuracy"]
    for part in (
        "pets, version 7",
        f"{metrics.accuracy:.4f} ({interval.low:.3f} to {interval.high:.3f})",
        f"{result.calibrated['val'].after.error:.3f}",
        f"at least {result.calibration.threshold:.3f}",
        "out-of-fold predictions of 180 training images",
        str(result.learning_curve)[1:],
        "<b>cat</b>",
        "dog & hound",
        "bf16: int8 would not pay",
        "freeze: backbone",
        result.audit.summary,
        "curl -F images=@x.jpg",
    ):
        assert part in text
    assert "Verdict" not in text


def test_what_leaks_are_worth_stands_beside_the_score(result: Result) -> None:
    told = "the probe's val accuracy is 0.9000 with 1 image of another split, 0.8000 without."
    leak = Finding("exact_leak", "val", "dog & hound", "the same file", 1.0, result.splits.val[0])
    leaking = replace(result, audit=Audit((leak,), {"val": (0.9, 0.8)}, 10))
    assert told in read(leaking)[1]
    assert told in write_card(leaking, 7)
    assert "Images leak" not in read(result)[1] + write_card(result, 7)


def test_a_verdict_is_told_where_layers_trained(result: Result) -> None:
    trained = make_result(is_trained=True)
    _, text, _ = read(trained)
    assert str(trained.verdict)[1:] in text
    assert str(trained.verdict) in write_card(trained, 7)
    assert trained.freeze == "backbone"


def test_what_shaped_the_published_model_is_told_and_nothing_else(result: Result) -> None:
    assert "| trained with | the default options |" in write_card(result, 7)
    options = Options(
        freeze="until:layer3", balance="weights", ema=0.99, label_smoothing=0.1, name="pets"
    )
    tied = replace(make_result(is_trained=True), options=options)
    assert tied.trained_with == "--balance weights"
    assert tied.verdict is not None
    scores = replace(tied.verdict.scores, interval=Interval(0.1, 0.2))
    won = replace(tied, verdict=replace(tied.verdict, scores=scores))
    assert won.trained_with == "--balance weights --label-smoothing 0.1 --ema 0.99"
    assert won.trained_with in write_card(won, 7)
    assert won.trained_with in read(won)[1]


def test_names_of_others_stay_text(result: Result) -> None:
    page, _, _ = read(result)
    assert "<b>cat" not in page
    assert "' onload" not in page
    assert '" onload' not in page


@pytest.mark.parametrize("num_classes", [2, 31, 120])
def test_of_any_number_of_classes(num_classes: int) -> None:
    page, text, parsed = read(make_result(num_classes), [])
    assert parsed.open == []
    assert ("class='matrix" in page) == (num_classes <= 30)
    assert "Worst mistakes None on val" in text
    assert len(page) < 200_000


def test_charts_stay_inside_their_frame(result: Result) -> None:
    page, _, _ = read(result)
    charts = re.findall(r'<svg viewBox="0 0 (\d+) (\d+)".*?</svg>', page)
    assert len(charts) == 2
    for found in re.finditer(r'<svg viewBox="0 0 (\d+) (\d+)"(.*?)</svg>', page):
        width, height = int(found[1]), int(found[2])
        assert "nan" not in found[3]
        assert all(
            0 <= float(x) <= width for x in re.findall(r' (?:cx|x|x1|x2)="([-\d.]+)"', found[3])
        )
        assert all(
            0 <= float(y) <= height for y in re.findall(r' (?:cy|y|y1|y2)="([-\d.]+)"', found[3])
        )


def test_the_card_shares_it(result: Result) -> None:
    card = write_card(result, 7)
    interval = result.metrics["val"].intervals["accuracy"]
    for part in (
        f"({interval.low:.3f} to {interval.high:.3f})",
        "calibration error",
        "An answer is unsure where",
        str(result.learning_curve),
    ):
        assert part in card
    shown = replace(result, probe_metrics=result.metrics["val"])
    assert "Most confused on val" in write_card(shown, 7)
