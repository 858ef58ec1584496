"""Gradient epochs start from the probe's head, zeros, or what a user's function makes of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.command_line import parse_options
from finetune.config import Options
from finetune.probe.solve import Probe, soften
from finetune.run import run
from finetune.training.head import start_head
from models.errors import GraftError
from tests.support.images import write_noise_folders
from tests.support.tiny import (
    LABELS,
    Recorder,
    build,
    draw_splits,
    options,
    probe_of,
    snapshot,
    train_tiny,
)

FUNCTIONS = """
import torch
from torch import nn

def small(module):
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.constant_(module.bias, 0.5)

def in_place(module):
    module.weight.fill_(2)
    module.bias.zero_()

def fails(module):
    raise KeyError("no such prior")

def wider(module):
    module.weight = nn.Parameter(torch.zeros(7, 8))

def infinite(module):
    module.weight.fill_(float("inf"))

def without_bias(module):
    module.bias = None

number = 3
"""


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of the user's own, in the current folder."""
    (tmp_path / "my_heads.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield "my_heads"
    sys.modules.pop("my_heads", None)


def test_the_probes_head_is_copied() -> None:
    backbone, probe = build(), probe_of(build())
    nn.init.constant_(backbone.head.weight, 9)
    start_head(backbone, probe, "probe")
    assert torch.equal(backbone.head.weight, torch.from_numpy(probe.weight))
    assert torch.equal(backbone.head.bias, torch.from_numpy(probe.bias))


def test_zeros_and_functions_set_the_head_and_nothing_else() -> None:
    backbone = build()
    before = snapshot(backbone)
    start_head(backbone, probe_of(backbone), "zeros")
    assert not backbone.head.weight.any()
    assert not backbone.head.bias.any()
    start_head(backbone, probe_of(backbone), "my_heads:in_place")
    assert (backbone.head.weight == 2).all()
    torch.manual_seed(0)
    start_head(backbone, probe_of(backbone), "my_heads:small")
    assert 0 < backbone.head.weight.std() < 0.02
    assert (backbone.head.bias == 0.5).all()
    after = snapshot(backbone)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fails",
            r"--head-init my_heads:fails: it raised KeyError: 'no such prior' "
            r"\(.*my_heads.py:15\); it is given an nn.Linear",
        ),
        (
            "wider",
            r"--head-init my_heads:wider: it leaves weight \[7, 8\] and bias \[3\], not \[3, 8\] "
            r"and \[3\]",
        ),
        ("without_bias", r"it leaves weight \[3, 8\] and bias None, not \[3, 8\] and \[3\]"),
        (
            "infinite",
            r"--head-init my_heads:infinite: it leaves NaN or infinite values in the head",
        ),
    ],
)
def test_errors_of_a_users_function_are_described(name: str, message: str) -> None:
    with pytest.raises(GraftError, match=message):
        start_head(build(), probe_of(build()), f"my_heads:{name}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--head-init", "xavier"],
            "--head-init xavier: it must be soft, probe, zeros or package.module:function",
        ),
        (
            ["--head-init", "zeros", "--freeze", "backbone"],
            "--head-init zeros: --freeze backbone solves the head and starts from none; say",
        ),
    ],
)
def test_impossible_head_inits_are_refused_with_the_options(flags: list[str], message: str) -> None:
    with pytest.raises(GraftError, match=message):
        parse_options(Options, ["--freeze", "none", *flags])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_heads:small",
            "--head-init no_heads:small: No module named 'no_heads'; package.module:callable "
            "must be importable",
        ),
        ("my_heads:smal", "--head-init my_heads:smal: module 'my_heads' has no attribute 'smal'"),
        ("my_heads:number", "--head-init my_heads:number: it is of type int, and cannot be called"),
    ],
)
def test_a_missing_function_is_an_error_before_any_work(
    tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(GraftError, match=message):
        run(
            Options(
                data=str(tmp_path / "nowhere"),
                freeze="none",
                head_init=name,
                output=tmp_path / "runs",
            )
        )
    assert not (tmp_path / "runs").exists()


def test_epochs_begin_from_the_head_that_was_asked_for(tmp_path: Path) -> None:
    """Of zeros, the loss is that of guessing; and the seed alone says what a function draws."""
    curves = []
    for name in ("zeros", "my_heads:small", "my_heads:small"):
        backbone, monitor = build(), Recorder(tmp_path)
        train_tiny(
            backbone,
            draw_splits(),
            probe_of(backbone),
            options(head_init=name, epochs=1),
            monitor,
            tmp_path,
        )
        monitor.close()
        curves.append(monitor.curves)
    assert curves[0]["epoch/val_loss"][0][1] == pytest.approx(
        torch.tensor(float(len(LABELS))).log().item(), abs=1e-4
    )
    assert curves[1]["train/loss"] == curves[2]["train/loss"]
    assert curves[1]["epoch/val_loss"][0] != curves[0]["epoch/val_loss"][0]


@pytest.mark.parametrize(
    ("given", "describe_error"),
    [
        ("my_heads:small", "the head of --head-init my_heads:small"),
        ("soft", "a soft head"),
        ("probe", "the probe's head"),
    ],
)
def test_a_whole_run_logs_and_reports_its_first_head(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    describe_error: str,
) -> None:
    softened: list[Probe] = []

    def note(probe: Probe, *on: Any) -> Probe:
        softened.append(soften(probe, *on))
        return softened[-1]

    monkeypatch.setattr("finetune.candidates.soften", note)
    data = write_noise_folders(tmp_path / "noise", 8)
    folders = {
        "output": tmp_path / "runs",
        "repository": tmp_path / "checkpoints",
        "data_root": tmp_path,
    }
    with caplog.at_level("INFO", "graft"):
        run(
            options(
                data=str(data),
                backbone="tests.support.tiny:build_trunk",
                head_init=given,
                epochs=1,
                batch_norm="keep",
                **folders,
            )
        )
    assert f"epoch 0, {describe_error}: val loss" in caplog.text
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert "training began from" in (run_dir / "report.html").read_text()
    assert f"head_init: {given}" in (run_dir / "config.yaml").read_text()
    assert len(softened) == (given == "soft")
