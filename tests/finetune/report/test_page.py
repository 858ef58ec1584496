"""The report of a run holds what the run came to, in one file that loads and runs nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.auditing.findings import Audit, Finding
from finetune.evaluation.epoch import EpochMetrics
from finetune.report.charts import chart_losses, chart_scores
from finetune.report.page import write_report
from finetune.report.plots import Mistake
from finetune.report.result import Result
from finetune.tasks.multi_label import MULTI_LABEL
from tests.support.pages import ParsedPage
from tests.support.results import EPOCHS, make_result

KEY = "photos/'1\" onload=x\udcff.jpg"
MISTAKES = [Mistake(np.full((32, 32, 3), 90, np.uint8), "<b>cat</b>", "dog & hound", 0.87, KEY)]
RUN_DIR = Path("runs/my pets-1")


@pytest.fixture(scope="module")
def result() -> Result:
    return make_result()


@pytest.fixture(scope="module")
def tuned() -> Result:
    """Of a run that trained layers and published the probe."""
    return make_result(is_trained=True)


def write(result: Result, mistakes: list[Mistake] = MISTAKES) -> str:
    return write_report(
        result,
        mistakes,
        version=7,
        commands="make serve\ncurl -F images=@x.jpg 'http://localhost:3000/predict?model=pets'",
        run_dir=RUN_DIR,
    )


def read(result: Result, mistakes: list[Mistake] = MISTAKES) -> ParsedPage:
    return ParsedPage(write(result, mistakes))


@pytest.mark.parametrize("name", ["result", "tuned"])
def test_it_is_whole_and_loads_nothing(name: str, request: pytest.FixtureRequest) -> None:
    page = write(request.getfixturevalue(name))
    parsed = ParsedPage(page)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert not [attribute for _, attribute, _ in parsed.attributes if attribute.startswith("on")]
    assert parsed.loaded
    assert all(loaded.startswith("data:image/jpeg;base64,") for loaded in parsed.loaded)
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_it_says_what_the_run_came_to(result: Result) -> None:
    words = read(result).words
    metrics, interval = result.metrics["val"], result.metrics["val"].intervals["accuracy"]
    for part in (
        "pets, version 7",
        f"{metrics.score:.4f} ({interval.low:.3f} to {interval.high:.3f})",
        f"{result.calibrated['val'].after.error:.3f}",
        result.describe_answers(),
        "out-of-fold predictions of 180 training images",
        str(result.learning_curve)[1:],
        "<b>cat</b>",
        "dog & hound",
        "bf16: int8 would not pay",
        "freeze: backbone",
        result.audit.summary,
        "curl -F images=@x.jpg",
    ):
        assert part in words
    for part in ("Verdict", "publish.py", "published"):
        assert part not in words


def test_what_leaks_are_worth_stands_beside_the_score(result: Result) -> None:
    leak = Finding("exact_leak", "val", "dog & hound", "the same file", 1.0, result.splits.val[0])
    leaking = replace(result, audit=Audit((leak,), {"val": (0.9, 0.8)}, 10))
    expected = "the probe's val accuracy is 0.9000 with 1 image of another split, 0.8000 without."
    assert expected in read(leaking).words
    assert "Images leak" not in read(result).words


def test_both_candidates_stand_side_by_side(tuned: Result) -> None:
    parsed = read(tuned)
    assert str(tuned.verdict)[1:] in parsed.words
    assert "python finetune/publish.py 'runs/my pets-1' --which tuned" in parsed.words
    assert tuned.tuned is not None
    for title, candidate in (("probe, published", tuned.probe), ("fine-tuned", tuned.tuned)):
        val = candidate.metrics["val"]
        averages = " ".join(val.with_interval(name) for name in val.intervals)
        assert f"{title} val {averages} {val.loss:.4f}" in parsed.words
        after = candidate.calibrated["val"].after.error
        before = candidate.calibrated["val"].before.error
        assert f"{title} val {before:.3f} {after:.3f}" in parsed.words
        assert val.confusion is not None
        for count in val.confusion[val.confusion > 0]:
            assert str(count) in parsed.text
    assert parsed.values("class").count("matrix tall") == 2
    # Reliability of both, scores and losses by epoch, the learning curve.
    assert parsed.tags.count("svg") == 5
    assert parsed.words.count("Most confused") == 2


def test_the_other_candidate_is_named_by_the_command_that_publishes_it() -> None:
    published = make_result(is_trained=True, publish="tuned")
    words = read(published).words
    assert "--which probe" in words
    assert "fine-tuned, published" in words
    assert "probe, published" not in words


def test_every_epoch_can_be_read_off_the_charts(tuned: Result) -> None:
    words = read(tuned).words
    for epoch in EPOCHS:
        assert f"epoch {epoch.epoch}: val accuracy {epoch.val_score:.4f}" in words
        assert f"epoch {epoch.epoch}: val loss {epoch.val_loss:.4f}" in words
        if epoch.train_loss is not None:
            assert f"epoch {epoch.epoch}: train loss {epoch.train_loss:.4f}" in words
    assert words.count("the best epoch") == 3  # a point of each chart, and the legend


@pytest.mark.parametrize(
    "epochs",
    [
        EPOCHS[:1],
        EPOCHS[1:2],
        tuple(replace(epoch, train_loss=float("nan"), val_loss=float("inf")) for epoch in EPOCHS),
        tuple(replace(EPOCHS[1], epoch=number) for number in range(200)),
    ],
    ids=["no epoch", "one point", "nothing finite", "200 equal ones"],
)
def test_charts_of_epochs_draw_what_there_is(epochs: tuple[EpochMetrics, ...]) -> None:
    for chart in (
        chart_losses(epochs, 0),
        chart_scores(epochs, 0, 0.7, "accuracy"),
    ):
        assert "nan" not in chart
        assert "inf" not in chart
        check_charts(chart)


def test_what_shaped_the_published_model_is_listed_and_nothing_else() -> None:
    changed = {"balance": "weights", "ema": 0.99, "label_smoothing": 0.1}
    probe = make_result(is_trained=True, options=changed)
    assert probe.freeze == "backbone"
    assert probe.trained_with == "--balance weights"
    tuned = make_result(is_trained=True, publish="tuned", options=changed)
    assert tuned.freeze == "until:layer3"
    assert tuned.trained_with == "--balance weights --label-smoothing 0.1 --ema 0.99"
    for result in (probe, tuned):
        assert f"trained with {result.trained_with}" in read(result).words


def test_names_of_others_stay_text(tuned: Result) -> None:
    page = write(tuned)
    for part in ("<b>cat", "' onload", '" onload', "\udcff"):
        assert part not in page
    parsed = ParsedPage(page)
    assert "a|b \"'Ünï" in parsed.text
    assert KEY.replace("\udcff", "?") in parsed.values("title")
    page.encode()


def test_any_number_of_labels_an_image_has_no_matrix() -> None:
    result = make_result(task=MULTI_LABEL, is_trained=True)
    parsed = read(result)
    assert parsed.open == []
    assert "Confusion" not in parsed.words
    assert "labels" in parsed.words
    for part in ("mean average precision on val", "Labels On val, the hardest first."):
        assert part in parsed.words
    val = result.metrics["val"]
    assert val.with_interval("mean_average_precision") in parsed.words


@pytest.mark.parametrize("num_classes", [2, 31, 120])
def test_of_any_number_of_classes(num_classes: int) -> None:
    page = write(make_result(num_classes), [])
    parsed = ParsedPage(page)
    assert parsed.open == []
    assert any("matrix" in kind for kind in parsed.values("class")) == (num_classes <= 30)
    assert "Worst mistakes None on val" in parsed.words
    assert len(page) < 200_000


def test_charts_stay_inside_their_frame(tuned: Result) -> None:
    assert check_charts(write(tuned)) == 5


def check_charts(page: str) -> int:
    """Fails if a mark of an SVG is outside it; gives the number of charts."""
    charts = re.findall(r'<svg viewBox="0 0 (\d+) (\d+)"(.*?)</svg>', page, re.DOTALL)
    for width, height, marks in charts:
        assert "nan" not in marks
        across = re.findall(r' (?:cx|x|x1|x2)="([^"]+)"', marks)
        down = re.findall(r' (?:cy|y|y1|y2)="([^"]+)"', marks)
        for points in re.findall(r' points="([^"]*)"', marks):
            across += re.findall(r"([^ ,]+),", points)
            down += re.findall(r",([^ ,]+)", points)
        assert all(0 <= float(x) <= int(width) for x in across)
        assert all(0 <= float(y) <= int(height) for y in down)
    return len(charts)
