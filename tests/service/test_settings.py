"""Settings from the environment: what is refused, with the variable, its value and the way out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import GraftError
from service.settings import OTHER_VARIABLES, Settings, find_unknown, load_settings

ROOT = Path(__file__).parents[2]


def test_every_setting_says_what_it_is_for() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert len(field.description) > 20, name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GRAFT_MAX_IMAGES", "0", "GRAFT_MAX_IMAGES=0: it must be a whole number from 1 up"),
        ("GRAFT_MAX_IMAGES", "2000", "more than GRAFT_MAX_QUEUE_IMAGES=1024"),
        ("GRAFT_DEADLINE_SECONDS", "0", "GRAFT_DEADLINE_SECONDS=0: it must be a number above 0"),
        ("GRAFT_CACHED_IMAGES", "-1", "it must be a whole number from 0 up"),
        ("GRAFT_DEVICE", "tpu", "GRAFT_DEVICE=tpu: it must be auto, cpu or cuda"),
        ("GRAFT_TRACING", "perhaps", "GRAFT_TRACING=perhaps: it must be true or false"),
        ("GRAFT_API_TOKEN", "secret", "GRAFT_API_TOKEN=…: a token is at least 8 printable"),
        (
            "GRAFT_PORT",
            "3410",
            "GRAFT_PORT=3410: there is no such setting; did you mean BENTOML_PORT",
        ),
        ("GRAFT_FAST_MODE", "1", "GRAFT_FAST_MODE: there is no such setting; did you mean GRAFT_"),
        ("GRAFT_KEEP_ALIVE_SECONDS", "75", "bentoml serve --timeout-keep-alive SECONDS"),
    ],
)
def test_what_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(GraftError) as refused:
        load_settings()
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GRAFT_ADMIN_TOKN", "GRAFT_ADMIN_TOKEN"),
        ("graft_admin_tokn", "GRAFT_ADMIN_TOKEN"),
        ("GRAFT_APITOKEN", "GRAFT_API_TOKEN"),
        ("GRAFT_MAX_PIXEL", "GRAFT_MAX_PIXELS"),
        ("GRAFT_MAXIMAGES", "GRAFT_MAX_IMAGES"),
        ("GRAFT_DEVICES", "GRAFT_DEVICE"),
        ("GRAFTDEVICE", "GRAFT_DEVICE"),
        ("GRAFT-DEVICE", "GRAFT_DEVICE"),
        ("GRAFT_POLL_SECOND", "GRAFT_POLL_SECONDS"),
        ("GRAFT_PRECISON", "GRAFT_PRECISION"),
        ("GRAFT_BODY_BYTES", "GRAFT_MAX_BODY_BYTES"),
        ("GRAFT_CHECKPOINTS", "CHECKPOINTS"),
        ("GRAFT_CHECKPOINT", "CHECKPOINTS"),
        ("GRAFT_API_KEY", "GRAFT_API_TOKEN or GRAFT_ADMIN_TOKEN"),
        ("GRAFT_AUTH_TOKEN", "GRAFT_API_TOKEN or GRAFT_ADMIN_TOKEN"),
        ("GRAFT_TOKENS", "GRAFT_API_TOKEN or GRAFT_ADMIN_TOKEN"),
        ("GRAFT_HOST", "BENTOML_HOST"),
        ("GRAFT_MODEL_DIR", "CHECKPOINTS"),
        ("GRAFT_SHUTDOWN_TIMEOUT", "GRAFT_SHUTDOWN_SECONDS"),
    ],
)
def test_a_name_that_is_no_settings_is_told_with_the_nearest(name: str, meant: str) -> None:
    assert find_unknown([name, "PATH"]) == {name: meant}


def test_settings_and_other_peoples_variables_are_let_through() -> None:
    settings = [f"GRAFT_{name.upper()}" for name in Settings.model_fields if name != "checkpoints"]
    own = ["GRAFT_PARENT_PID", "GRAFT_IMAGE", "GRAFT_IMAGE_DIR", "GRAFT_IMAGE_FLAVOUR"]
    # What Kubernetes sets for Services called graft and graft-admin-token.
    of_kubernetes = ["GRAFT_PORT", "GRAFT_SERVICE_HOST", "GRAFT_PORT_3000_TCP_ADDR"]
    of_kubernetes += ["GRAFT_ADMIN_TOKEN_SERVICE_HOST", "GRAFT_DEVICE_PORT"]
    others = ["CHECKPOINTS", "CHECKPOINT", "DEVICE", "MAX_IMAGES", "API_TOKEN", "HOME"]
    assert find_unknown([*settings, *own, *of_kubernetes, *others]) == {}
    assert find_unknown(OTHER_VARIABLES) == {}


def test_variables_that_something_here_reads_are_known() -> None:
    read = set()
    for folder in ("benchmarks", "deploy", "finetune", "models", "service", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            read |= set(re.findall(r'environ(?:\.get\(|\[)\s*"(GRAFT_[A-Z_]+)"', text))
            read |= set(re.findall(r'_VARIABLE = "(GRAFT_[A-Z_]+)"', text))
    assert len(read) > 8
    assert find_unknown(read) == {}


def test_a_wrong_setting_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    wrong = {"GRAFT_ADMIN_TOKN": "secret-secret", "GRAFT_MAX_IMAGES": "many"}
    ended = subprocess.run(
        [Path(sys.executable).with_name("bentoml"), "serve", "--port", "6401"],
        cwd=ROOT,
        env={**os.environ, "CHECKPOINTS": str(tmp_path), "BENTOML_DO_NOT_TRACK": "True", **wrong},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert (
        "error: GRAFT_ADMIN_TOKN: there is no such setting; did you mean GRAFT_ADMIN_TOKEN? "
        "Rename it, or unset it; GRAFT_MAX_IMAGES=many: it must be a whole number"
    ) in ended.stderr
