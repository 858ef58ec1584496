"""Settings from the environment: what is refused, with the variable, its value and the way out."""

from __future__ import annotations

import pytest

from models.errors import GraftError
from service.settings import Settings, load_settings


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
