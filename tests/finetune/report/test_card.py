"""The model card holds what the report holds, as Markdown that model hubs read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.plugin_util import markdown_to_safe_html

from finetune.auditing.findings import Audit, Finding
from finetune.report.candidate import CandidateName
from finetune.report.card import write_card
from finetune.report.result import Result
from finetune.tasks.multi_label import MULTI_LABEL
from tests.support.pages import ParsedPage
from tests.support.results import EPOCHS, make_result

RUN_DIR = Path("runs/my pets-1")


@pytest.fixture(scope="module")
def result() -> Result:
    return make_result()


def test_it_says_how_good_the_model_is_and_how_it_was_made(result: Result) -> None:
    card = write_card(result, 7, RUN_DIR)
    assert card.startswith("---\nlibrary_name: timm\n")
    interval = result.metrics["val"].intervals["accuracy"]
    for part in (
        "# pets, version 7",
        f"({interval.low:.3f} to {interval.high:.3f})",
        "calibration error",
        "An answer is unsure where",
        str(result.learning_curve),
        "| trained with | the default options |",
        "Most confused on val: ",
        'timm.create_model("local-dir:checkpoints/pets/7", pretrained=True)',
    ):
        assert part in card
    assert "publish.py" not in card


def test_what_leaks_are_worth_stands_beside_the_score(result: Result) -> None:
    leak = Finding("exact_leak", "val", "dog & hound", "the same file", 1.0, result.splits.val[0])
    leaking = replace(result, audit=Audit((leak,), {"val": (0.9, 0.8)}, 10))
    expected = "the probe's val accuracy is 0.9000 with 1 image of another split, 0.8000 without."
    assert expected in write_card(leaking, 7, RUN_DIR)
    assert "Images leak" not in write_card(result, 7, RUN_DIR)


@pytest.mark.parametrize(("publish", "other"), [("probe", "tuned"), ("tuned", "probe")])
def test_both_candidates_of_a_run_are_compared(publish: CandidateName, other: str) -> None:
    result = make_result(is_trained=True, publish=publish)
    card = write_card(result, 7, RUN_DIR)
    assert str(result.verdict) in card
    assert f"`python finetune/publish.py 'runs/my pets-1' --which {other}`" in card
    for candidate, title in zip(result.candidates, ("probe", "fine-tuned"), strict=True):
        mark = ", this one" if candidate is result.chosen else ""
        val = candidate.metrics["val"]
        averages = " | ".join(val.with_interval(name) for name in val.intervals)
        assert f"| {title}{mark} | val | {averages} |" in card
        assert f"Most confused on val, {title}: " in card
    for epoch in EPOCHS:
        assert f"{epoch.val_loss:.4f} | {epoch.val_score:.4f} |" in card
    assert "| 3, the best | 0.3000 | 0.6200 | 0.8500 |" in card


def test_of_many_epochs_some_are_listed_and_the_best_one() -> None:
    result = make_result(is_trained=True)
    assert result.tuned is not None
    epochs = tuple(replace(EPOCHS[1], epoch=number) for number in range(200))
    tuned = replace(result.tuned, epochs=epochs, best_epoch=77)
    card = write_card(replace(result, tuned=tuned), 7, RUN_DIR)
    assert 20 <= card.count("| 0.7000 | 0.7500 |") <= 21
    assert "| 77, the best |" in card
    assert "\n| 199 |" in card


def test_names_of_others_stay_text(result: Result) -> None:
    card = write_card(result, 7, RUN_DIR)
    for part in ("<b>", "a|b"):
        assert part not in card
    words = ParsedPage(markdown_to_safe_html(card)).text
    for name in ("<b>cat</b>", "dog & hound", "a|b \"'Ünï"):
        assert name in words


def test_any_number_of_labels_an_image_has_no_confused_pairs() -> None:
    card = write_card(make_result(task=MULTI_LABEL, is_trained=True), 7, RUN_DIR)
    assert "Most confused" not in card
    assert "| label | precision | recall | F1 | average precision | images |" in card


def test_what_shaped_the_model_is_listed() -> None:
    changed = {"balance": "weights", "ema": 0.99, "label_smoothing": 0.1}
    expected: dict[CandidateName, str] = {
        "probe": "--balance weights",
        "tuned": "--balance weights --label-smoothing 0.1 --ema 0.99",
    }
    for publish, flags in expected.items():
        result = make_result(is_trained=True, publish=publish, options=changed)
        assert f"| trained with | {flags} |" in write_card(result, 7, RUN_DIR)
