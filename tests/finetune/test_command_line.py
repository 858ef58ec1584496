"""Options come from flags, then the file, then the defaults; errors name the flag."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune.command_line import parse_options
from finetune.config import AuditOptions, CompareOptions, Options, SharedOptions, flag_of
from finetune.probe.precision import INT8_MIN_SECONDS
from models.errors import GraftError


def parse(arguments: str) -> Options:
    return parse_options(Options, arguments.split())


def write_config(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_without_flags_the_defaults_hold() -> None:
    options = parse_options(Options, [])
    assert options == Options()
    assert (options.data, options.backbone, options.freeze, options.model_name) == (
        "digits",
        "tf_efficientnet_lite0",
        "backbone",
        "digits",
    )
    assert (options.output, options.repository) == (Path("runs"), Path("checkpoints"))


def test_flags_of_every_kind_are_read() -> None:
    options = parse(
        "--data photos/ --data-root d --val-fraction 0.3 --strict --backbone resnet18 "
        "--weights w.pth --no-pretrained --image-size 96 --freeze until:layer3 --epochs 7 "
        "--batch-size 16 --lr 0.01 --backbone-lr 1e-5 --weight-decay 0 --batch-norm update "
        "--augment flip --device cpu --precision fp32 --workers 3 --seed 9 --name cats --output o "
        "--repository r --cache-dir c --no-cache --coverage 0.9"
    )
    expected = {
        "data": "photos/",
        "data_root": Path("d"),
        "val_fraction": 0.3,
        "strict": True,
        "backbone": "resnet18",
        "weights": Path("w.pth"),
        "pretrained": False,
        "image_size": 96,
        "freeze": "until:layer3",
        "epochs": 7,
        "batch_size": 16,
        "lr": 0.01,
        "backbone_lr": 1e-5,
        "weight_decay": 0,
        "batch_norm": "update",
        "augment": "flip",
        "device": "cpu",
        "precision": "fp32",
        "workers": 3,
        "seed": 9,
        "name": "cats",
        "output": Path("o"),
        "repository": Path("r"),
        "cache_dir": Path("c"),
        "cache": False,
        "coverage": 0.9,
    }
    dumped = options.model_dump()
    assert {name: dumped[name] for name in expected} == expected
    assert parse_options(Options, ["--no-strict", "--pretrained"]) == Options(
        strict=False, pretrained=True
    )
    assert parse_options(Options, ["--lr=0.5"]).lr == 0.5


def test_a_runs_config_reads_back_as_the_same_options(tmp_path: Path) -> None:
    options = parse(
        "--data photos/ --freeze until:layer3 --lr 0.01 --no-pretrained --image-size 96 --seed 3 "
        "--name cats"
    )
    path = write_config(tmp_path / "config.yaml", options.to_yaml())
    again = parse_options(Options, ["--config", str(path)])
    assert again.model_dump() == options.model_dump()
    assert "config" not in yaml.safe_load(path.read_text())
    assert again.to_yaml() == options.to_yaml()


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.yaml", "lr: 0.5\nepochs: 9\nstrict: true\n")
    options = parse_options(Options, ["--epochs", "2", f"--config={path}", "--no-strict"])
    assert (options.lr, options.epochs, options.strict, options.seed) == (0.5, 2, False, 0)


def test_an_empty_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="it must hold one `option: value` a line"):
        parse_options(Options, ["--config", str(write_config(tmp_path / "config.yaml", ""))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lernrate: 0.5\nlr: 1\n", "unknown options lernrate; known are .*data.*, lr, "),
        ("- lr\n", "it must hold one `option: value` a line"),
        ("lr: [", "while parsing"),
        ("lr: fast\n", "^--lr fast: "),
        ("epochs: 0\n", "^--epochs 0: "),
        ("name: Not A Name\n", "^--name 'Not A Name': a model's name is"),
        ("freeze: [a]\n", "^--freeze .*: it must be text$"),
        ("strict: perhaps\n", "^--strict perhaps: it must be true or false$"),
        ("output: 3\n", "^--output 3: it must be a path$"),
        ("epochs: 1\nlr: 0.1\nepochs: 2\n", "epochs stands in it twice, again in line 3$"),
        ("config: other.yaml\n", "config: a file cannot name another; leave it out$"),
        ("epochs: true\n", "epochs: true: it must be a whole number from 1 up$"),
        ("epochs: 1:30\n", "^--epochs 1:30: it must be a whole number from 1 up$"),
        (f"epochs: {5000 * '1'}\n", "it is not valid YAML: Exceeds the limit"),
        (3000 * "[", "it is nested too deeply; it takes a YAML file"),
        ("weights: ''\n", "^--weights '': it must not be empty$"),
    ],
)
def test_errors_in_a_file_name_the_option(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(GraftError, match=message):
        parse_options(Options, ["--config", str(write_config(tmp_path / "config.yaml", text))])


def test_a_config_that_cannot_be_read_is_named_once(tmp_path: Path) -> None:
    for name, message in (
        ("gone.yaml", "No such file or directory"),
        ("", "Is a directory"),
        ("binary.yaml", "it is not text in UTF-8"),
    ):
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(
            GraftError, match=rf"^--config {tmp_path / name}: {message}; it takes a YAML file"
        ) as caught:
            parse_options(Options, ["--config", str(tmp_path / name)])
        assert str(caught.value).count(str(tmp_path)) == 1
        assert "Errno" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--val-fraction 0", "--val-fraction 0: it must be a number above 0 and below 1$"),
        ("--val-fraction 1", "--val-fraction 1: it must be a number above 0 and below 1$"),
        ("--val-fraction half", "--val-fraction half: it must be a number above 0 and below 1$"),
        ("--epochs 0", "--epochs 0: it must be a whole number from 1 up$"),
        ("--epochs 1.5", "--epochs 1.5: it must be a whole number from 1 up$"),
        ("--batch-size -1", "--batch-size -1: "),
        ("--lr 0", "--lr 0: "),
        ("--lr nan", "--lr nan: "),
        ("--weight-decay -0.1", "--weight-decay -0.1: "),
        ("--cache-gb inf", "--cache-gb inf: it must be a number from 0 up$"),
        ("--image-size 16", "--image-size 16: it must be a whole number from 32 to 1024$"),
        ("--workers 0", "--workers 0: "),
        ("--device tpu", "--device tpu: it must be auto, cpu or cuda$"),
        ("--precision fp64", "--precision fp64: it must be auto, fp32, "),
        ("--augment heavy", "--augment heavy: it must be none, light or flip$"),
        ("--data=", "--data '': it must not be empty$"),
        ("--output=", "--output '': it must not be empty$"),
        ("--repository=", "--repository '': it must not be empty$"),
        ("--cache-dir=", "--cache-dir '': it must not be empty$"),
        ("--backbone=", "--backbone '': it must not be empty$"),
        ("--config=", "--config '': it must not be empty$"),
        ("--views 1000000000", "--views 1000000000: it must be a whole number from 1 to 100$"),
        ("--fit middle", "--fit middle: it must be auto, crop, whole, squash or pad$"),
        ("--name Cats", "--name 'Cats': a model's name is"),
        ("--name ..", r"--name '\.\.': a model's name is"),
    ],
)
def test_a_bad_value_is_named_by_its_flag(arguments: str, message: str) -> None:
    with pytest.raises(GraftError, match=f"^{message}"):
        parse(arguments)


def test_all_bad_values_are_reported_together() -> None:
    with pytest.raises(GraftError) as caught:
        parse("--epochs 0 --lr -1 --device tpu")
    assert {line.split()[0] for line in str(caught.value).splitlines()} == {
        "--epochs",
        "--lr",
        "--device",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epoch 3", "--epoch: there is no such option; did you mean --epochs? --help lists them"),
        (
            "--batch_size=3",
            "--batch_size: there is no such option; did you mean --batch-size? --help lists them",
        ),
        (
            "--val 0.3",
            "--val: there is no such option; did you mean --val-fraction? --help lists them",
        ),
        (
            "--nocache",
            "--nocache: there is no such option; did you mean --no-cache? --help lists them",
        ),
        ("--learning-rate 1", "--learning-rate: there is no such option; --help lists them"),
        ("-e 3", "-e: there is no such option; --help lists them"),
        (
            "photos/ --lr 1",
            "photos/: it belongs to no option; options are given as --name VALUE, "
            "--help lists them",
        ),
        ("--epochs", "--epochs: it needs a value, a whole number from 1 up"),
        ("--data --strict", "--data: it needs a value, text"),
        ("--config", "--config: it needs a value, a path"),
        ("--strict=perhaps", "--strict: it takes no value; say --strict or --no-strict"),
        ("--help=1", "--help: it takes no value"),
    ],
)
def test_a_flag_that_cannot_be_parsed_is_explained_in_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GraftError) as caught:
        parse(arguments)
    assert str(caught.value) == message
    assert capsys.readouterr() == ("", "")


def read_help(
    kind: type[SharedOptions], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        parse_options(kind, ["--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", [Options, CompareOptions, AuditOptions])
def test_help_explains_every_option(
    kind: type[SharedOptions],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = " ".join(read_help(kind, capsys, monkeypatch).split())
    for name, field in kind.model_fields.items():
        assert f" {flag_of(name)} " in shown.replace(",", " ")
        assert field.description
        assert " ".join(field.description.split()) in shown


def test_help_states_limits_and_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = read_help(Options, capsys, monkeypatch)
    assert "images per gradient step (a whole number from 1 up; default: 32)" in shown
    assert "--device {auto,cpu,cuda}" in shown
    assert "--cache, --no-cache " in shown
    assert "(default: on)" in shown
    assert shown.startswith("usage: python finetune/run.py ")


def test_help_states_the_rule_for_int8() -> None:
    assert INT8_MIN_SECONDS == 60
    description = str(Options.model_fields["precision"].description)
    assert "take a minute or more to compute" in " ".join(description.split())


def test_the_shells_variables_do_not_become_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in Options.model_fields:
        monkeypatch.setenv(name, "7")
        monkeypatch.setenv(name.upper(), "7")
    (tmp_path / ".env").write_text("NAME=leak\nSEED=7\n")
    monkeypatch.chdir(tmp_path)
    assert parse_options(Options, []) == Options()
    assert (Options().seed, Options().name, Options().data) == (0, None, "digits")


def test_of_a_flag_that_is_given_twice_the_first_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert parse("--data a --lr 0.1 --data b --lr 0.1").data == "b"
    assert caplog.messages == ["--data a has no effect: --data b comes after it"]
