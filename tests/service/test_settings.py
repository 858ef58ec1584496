"""A wrong setting, by its value or its name, ends the service with one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.settings import Settings, find_misspelt

ROOT = Path(__file__).parents[2]


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
    ],
)
def test_a_name_that_is_nearly_a_settings_is_told(name: str, meant: str) -> None:
    assert find_misspelt([name, "PATH"]) == {name: meant}


def test_settings_and_other_peoples_variables_are_let_through() -> None:
    settings = [f"GRAFT_{name.upper()}" for name in Settings.model_fields if name != "checkpoints"]
    own = ["GRAFT_PARENT_PID", "GRAFT_IMAGE", "GRAFT_IMAGE_DIR", "GRAFT_IMAGE_FLAVOUR"]
    # What Kubernetes sets for Services called graft and graft-admin-token.
    of_kubernetes = ["GRAFT_PORT", "GRAFT_SERVICE_HOST", "GRAFT_PORT_3000_TCP_ADDR"]
    of_kubernetes += ["GRAFT_ADMIN_TOKEN_SERVICE_HOST", "GRAFT_DEVICE_PORT"]
    others = ["CHECKPOINTS", "CHECKPOINT", "DEVICE", "MAX_IMAGES", "API_TOKEN", "HOME"]
    assert find_misspelt([*settings, *own, *of_kubernetes, *others]) == {}


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
    assert ended.stderr == (
        "error: GRAFT_ADMIN_TOKN: there is no such setting; did you mean GRAFT_ADMIN_TOKEN? "
        "Rename it, or unset it; GRAFT_MAX_IMAGES=many: it must be an integer, at least 1\n"
    )
