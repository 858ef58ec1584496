"""Which version a rollout resolves to, which rollouts are invalid, and that its file is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.errors import GraftError
from service.inference.rollout import ROLLOUT_FILE, Canary, Rollout, read_rollout, write_rollout


def test_without_a_file_the_newest_answers(tmp_path: Path) -> None:
    rollout = read_rollout(tmp_path)
    assert rollout == Rollout()
    assert [rollout.resolve(version, 7) for version in ("", "latest", "7", "3")] == [7, 7, 7, 3]
    assert rollout.resolve("stable", 7) is None


def test_a_label_a_number_and_the_default() -> None:
    rollout = Rollout(default="stable", labels={"stable": 3, "old": 1})
    assert [rollout.resolve(version, 7) for version in ("", "stable", "old", "latest", "5")] == [
        3,
        3,
        1,
        7,
        5,
    ]
    assert Rollout(default=2).resolve("", 7) == 2
    assert rollout.named_versions == {1, 3}


def test_the_canary_gets_its_share_of_requests_that_name_no_version() -> None:
    rollout = Rollout(canary=Canary(version=8, share=0.25))
    answers = [rollout.resolve("", 7) for _ in range(4000)]
    assert set(answers) == {7, 8}
    assert 800 < answers.count(8) < 1200
    assert {rollout.resolve("latest", 7) for _ in range(100)} == {7}
    assert {Rollout(canary=Canary(version=8, share=1)).resolve("", 7) for _ in range(100)} == {8}


def test_a_merge_patch_sets_and_removes() -> None:
    rollout = Rollout().patched(
        {
            "labels": {"stable": 3, "old": 1},
            "default": "stable",
            "canary": {"version": 4, "share": 0.1},
        }
    )
    assert rollout.canary == Canary(version=4, share=0.1)
    changed = rollout.patched({"labels": {"old": None}, "canary": {"share": 0.5}})
    assert changed.labels == {"stable": 3}
    assert changed.canary == Canary(version=4, share=0.5)
    assert changed.patched({"canary": None, "default": None, "labels": None}) == Rollout()


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ({"default": "stable"}, "not one of the labels"),
        ({"default": 0}, "default"),
        ({"default": "No Label!"}, "default"),
        ({"labels": {"latest": 3}}, "latest"),
        ({"labels": {"1": 3}}, "labels"),
        ({"labels": {"stable": "3"}}, "labels.stable"),
        ({"labels": {"stable": True}}, "labels.stable"),
        ({"labels": []}, "labels"),
        ({"canary": {"version": 3, "share": 0}}, "canary.share"),
        ({"canary": {"version": 3, "share": 1.5}}, "canary.share"),
        ({"canary": {"version": 3}}, "canary.share"),
        ({"shadow": -1}, "shadow"),
        ({"shade": 3}, "shade"),
        ({"labels": {"stable": 3}, "unloaded": [3]}, "version 3 is unloaded and still referred to"),
    ],
)
def test_an_invalid_rollout_is_refused_with_the_reason(
    patch: dict[str, object], reason: str
) -> None:
    with pytest.raises(GraftError, match=reason):
        Rollout().patched(patch)


def test_it_is_written_and_read_back_and_leaves_no_other_file(tmp_path: Path) -> None:
    rollout = Rollout(
        default="stable",
        labels={"stable": 3},
        shadow=5,
        loaded=frozenset({2}),
        unloaded=frozenset({9}),
    )
    write_rollout(tmp_path, rollout)
    assert read_rollout(tmp_path) == rollout
    assert [path.name for path in tmp_path.iterdir()] == [ROLLOUT_FILE]
    # People read it too: defaults are left out.
    assert json.loads((tmp_path / ROLLOUT_FILE).read_text()).keys() == {
        "default",
        "labels",
        "shadow",
        "loaded",
        "unloaded",
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"default": {}}',
        '"' + "x" * 100_000 + '"',
        "\xff",
        "[" * 50_000,
        '{"labels": {"a": 1e400}}',
    ],
)
def test_an_invalid_file_raises_the_reason(tmp_path: Path, text: str) -> None:
    (tmp_path / ROLLOUT_FILE).write_text(text)
    with pytest.raises(GraftError, match=ROLLOUT_FILE):
        read_rollout(tmp_path)
