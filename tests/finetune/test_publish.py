"""Both candidates of a run can be published: one by the run, the other later."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune import publish
from finetune.run import main as run_main
from finetune.run import run
from models.checkpoint import check_golden, list_versions, load_checkpoint, logits
from models.prepared import build_engine
from tests.support.images import write_noise_folders
from tests.support.tiny import options

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = ("model.safetensors", "backbone.xml", "backbone.bin", "golden.npz")


def run_tiny(folder: Path, **changes: Any) -> Path:
    """One run on noise; gives its folder. The model is called tiny."""
    data = write_noise_folders(folder / "data", 12, brighter=30)
    run(
        options(
            **{
                "data": str(data),
                "backbone": "tests.support.tiny:build_trunk",
                "epochs": 3,
                # Epochs are easily better than zeros, so that the candidates differ.
                "head_init": "zeros",
                "batch_norm": "keep",
                "explain": "no",
                "name": "tiny",
                "output": folder / "runs",
                "repository": folder / "checkpoints",
                "cache_dir": folder / "cache",
                **changes,
            }
        )
    )
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run_tiny(folder, publish="tuned")
    return folder


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """The folder of a run that published its tuned candidate, with the repository in it."""
    shutil.copytree(_finished, tmp_path / "run")
    (run_dir,) = (tmp_path / "run" / "runs").iterdir()
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace(str(_finished), str(tmp_path / "run")))
    return run_dir


def repository_of(run_dir: Path) -> Path:
    return run_dir.parents[1] / "checkpoints"


def read_graft(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    graft: dict[str, Any] = config["graft"]
    return graft


def assert_serves_as_saved(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    engine = build_engine(folder, checkpoint.preprocess, checkpoint.config, device="cpu")
    crops = np.stack([checkpoint.preprocess(image) for image in checkpoint.golden.images])
    check_golden(checkpoint, logits(checkpoint, engine.submit(list(crops)).result()))
    engine.close()


@pytest.mark.parametrize(("asked", "other"), [("probe", "tuned"), ("tuned", "probe")])
def test_a_run_publishes_the_candidate_asked_for_and_keeps_the_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, asked: str, other: str
) -> None:
    with caplog.at_level(logging.INFO, "graft"):
        run_dir = run_tiny(tmp_path, publish=asked)
    published, kept = tmp_path / "checkpoints" / "tiny" / "1", run_dir / "candidates" / other / "1"
    assert list_versions(run_dir / "candidates", asked) == []
    assert f"the {other} candidate is kept in {kept}" in caplog.text
    assert f"finetune/publish.py {run_dir} --which {other} publishes it" in caplog.text
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["published"] == asked
    assert f"--publish {asked}: " in (published / "README.md").read_text()
    weights = {
        name: load_file(folder / "model.safetensors")
        for name, folder in ((asked, published), (other, kept))
    }
    differing = {
        key
        for key, tensor in weights["probe"].items()
        if not np.array_equal(tensor, weights["tuned"][key])
    }
    assert "head.weight" in differing
    assert ("backbone.tail.0.weight" in differing) == (metrics["training"]["best_epoch"] > 0)
    assert not [key for key in differing if key.startswith("backbone.stem")]
    for name, folder in ((asked, published), (other, kept)):
        graft = read_graft(folder)
        assert graft["candidate"] == name
        assert graft["freeze"] == ("backbone" if name == "probe" else "until:stem")
        assert graft["metrics"]["val"] == metrics["candidates"][name]["val"]
        assert graft["temperature"] == metrics["candidates"][name]["calibration"]["temperature"]
        assert_serves_as_saved(folder)


def test_a_run_publishes_its_verdict_by_default(tmp_path: Path) -> None:
    run_dir = run_tiny(tmp_path)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    names = {"probe": "probe", "fine-tuned": "tuned"}
    assert metrics["published"] == names[metrics["verdict"]["published"]]
    assert read_graft(tmp_path / "checkpoints" / "tiny" / "1")["candidate"] == metrics["published"]
    (kept,) = (run_dir / "candidates").iterdir()
    assert kept.name != metrics["published"]


def test_both_candidates_are_in_metrics_json_with_the_epochs(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    probe, tuned = metrics["candidates"]["probe"], metrics["candidates"]["tuned"]
    assert probe["val"]["accuracy"] == metrics["probe"]["accuracy"]
    assert tuned["val"] == metrics["val"]
    assert (probe["epochs"], probe["best_epoch"]) == ([], None)
    assert [epoch["epoch"] for epoch in tuned["epochs"]] == [0, 1, 2, 3]
    assert tuned["epochs"][0]["train_loss"] is None
    assert all(epoch["train_loss"] > 0 for epoch in tuned["epochs"][1:])
    best = tuned["epochs"][tuned["best_epoch"]]
    assert best["val_score"] == max(epoch["val_score"] for epoch in tuned["epochs"])


def test_the_other_candidate_is_published_later_as_the_next_version(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish.main([str(finished), "--which", "probe"]) == 0
    repository = repository_of(finished)
    version, kept = repository / "tiny" / "2", finished / "candidates" / "probe" / "1"
    assert capsys.readouterr().out == f"{version}\n"
    for name in FILES:
        assert (version / name).read_bytes() == (kept / name).read_bytes()
    assert read_graft(version) == read_graft(kept)
    assert read_graft(version)["candidate"] == "probe"
    card = (version / "README.md").read_text()
    assert "# tiny, version 2\n" in card
    assert f'"local-dir:{repository}/tiny/2"' in card
    assert "predict?model=tiny'" in card
    assert "| frozen | `--freeze backbone` |" in card
    assert_serves_as_saved(version)


def test_the_newest_version_is_not_published_again(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = repository_of(finished)
    assert publish.main([str(finished), "--which", "tuned"]) == 0
    assert capsys.readouterr().out == f"{repository / 'tiny' / '1'}\n"
    assert list_versions(repository, "tiny") == [1]


def test_going_back_and_forth_makes_a_version_each_time(finished: Path) -> None:
    repository = repository_of(finished)
    for which in ("probe", "tuned", "probe"):
        assert publish.main([str(finished), "--which", which]) == 0
    assert list_versions(repository, "tiny") == [1, 2, 3, 4]
    found = [
        read_graft(repository / "tiny" / str(version))["candidate"] for version in (1, 2, 3, 4)
    ]
    assert found == ["tuned", "probe", "tuned", "probe"]
    weights = [(repository / "tiny" / version / FILES[0]).read_bytes() for version in "1234"]
    assert weights[0] == weights[2] != weights[1] == weights[3]


@pytest.mark.parametrize("which", ["probe", "tuned"])
def test_either_candidate_goes_to_another_repository(
    finished: Path, tmp_path: Path, which: str
) -> None:
    other = tmp_path / "other"
    assert publish.main([str(finished), "--which", which, "--repository", str(other)]) == 0
    assert list_versions(other, "tiny") == [1]
    assert read_graft(other / "tiny" / "1")["candidate"] == which
    assert list_versions(repository_of(finished), "tiny") == [1]


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert publish.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_impossible_publications_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no config.yaml in it" in refuse(capsys, tmp_path, "--which", "probe")
    repository = repository_of(finished)
    moved = repository.rename(tmp_path / "moved")
    message = refuse(capsys, finished, "--which", "probe")
    assert f"{repository / 'tiny'}: none of its versions is of {finished}" in message
    message = refuse(capsys, finished, "--which", "tuned", "--repository", tmp_path / "new")
    assert "--which tuned: " in message
    assert "no version of it is left" in message
    moved.rename(repository)
    kept = finished / "candidates" / "probe" / "1" / "model.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    message = refuse(capsys, finished, "--which", "probe")
    assert "model.safetensors is not the file that was published" in message
    (finished / "metrics.json").unlink()
    message = refuse(capsys, finished, "--which", "probe")
    assert "this run is not finished; go on with it first\n  python" in message
    assert list_versions(repository, "tiny") == [1]


def test_a_run_that_trained_no_layers_has_one_candidate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_tiny(tmp_path, freeze="backbone", head_init="soft")
    assert not (run_dir / "candidates").exists()
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert (metrics["published"], metrics["candidates"]) == ("probe", None)
    message = refuse(capsys, run_dir, "--which", "tuned")
    assert "no candidate is kept there; a run with --freeze backbone has its probe alone" in message


def test_a_run_stopped_after_it_kept_a_candidate_keeps_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("finetune.run.publish_chosen", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tmp_path, publish="probe")
    (run_dir,) = (tmp_path / "runs").iterdir()
    kept = run_dir / "candidates" / "tuned" / "1"
    # In one process, OpenVINO gives each graph another name, which is in the XML.
    same = [name for name in FILES if name != "backbone.xml"]
    before = {name: (kept / name).read_bytes() for name in same}
    assert list_versions(tmp_path / "checkpoints", "tiny") == []
    assert run_main(["--resume", str(run_dir)]) == 0
    assert list_versions(run_dir / "candidates", "tuned") == [1]
    assert {name: (kept / name).read_bytes() for name in same} == before
    assert list_versions(tmp_path / "checkpoints", "tiny") == [1]


def test_help_and_missing_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert "RUN: it is needed, a path" in refuse(capsys, "--which", "tuned")
    assert "--which: it is needed, probe or tuned" in refuse(capsys, "runs/one")
    with pytest.raises(SystemExit):
        publish.main(["--help"])
    said = capsys.readouterr().out
    assert "--which {probe,tuned}" in said
    assert "--repository PATH" in said
