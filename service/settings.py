"""Every limit and choice of the service, once: environment variable, default, check and meaning."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.allowed import describe_allowed
from models.engine.engine import Precision
from models.errors import GraftError
from models.images import MAX_PIXELS

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveSeconds = Annotated[float, Gt(0)]
NonNegativeSeconds = Annotated[float, Ge(0)]

# Kubernetes sets these for a Service called graft, and for others whose name begins so.
_OF_KUBERNETES = re.compile(r"GRAFT_(\w+_)?(SERVICE_(HOST|PORT)|PORT(_\d+_(TCP|UDP|SCTP)\w*)?)\w*")
_PROJECT_DIR = Path(__file__).resolve().parent.parent
_MIN_TOKEN_CHARACTERS = 8
_KEEP_ALIVE_VARIABLE = "GRAFT_KEEP_ALIVE_SECONDS"
# Variables of Graft that are no settings and may be there too: what the service tells its own
# processes, what deploy/compose.yaml reads, what tests and benchmarks read.
OTHER_VARIABLES = frozenset(
    {
        "GRAFT_PARENT_PID",
        "GRAFT_IMAGE",
        "GRAFT_CLIENT_VENV",
        "GRAFT_FUZZ_REQUESTS",
        "GRAFT_IMAGE_DIR",
        "GRAFT_IMAGE_FLAVOUR",
        "GRAFT_IMAGE_MUTATIONS",
        "GRAFT_KILLS",
        "GRAFT_PEER_CHECKPOINT",
        "GRAFT_PEER_ENGINE",
        "GRAFT_PEER_WORKERS",
    }
)
# Words for what other servers call otherwise, where no setting's name is near.
_MEANT_BY_WORD = {
    "TOKEN": "GRAFT_API_TOKEN or GRAFT_ADMIN_TOKEN",
    "AUTH": "GRAFT_API_TOKEN or GRAFT_ADMIN_TOKEN",
    "KEY": "GRAFT_API_TOKEN or GRAFT_ADMIN_TOKEN",
    "SECRET": "GRAFT_API_TOKEN or GRAFT_ADMIN_TOKEN",
    "PASSWORD": "GRAFT_API_TOKEN or GRAFT_ADMIN_TOKEN",
    "HOST": "BENTOML_HOST",
    "PORT": "BENTOML_PORT",
    "MODEL": "CHECKPOINTS",
    "REPOSITORY": "CHECKPOINTS",
}


def _default_checkpoints_dir() -> Path:
    """`checkpoints/` of the working directory, else the one beside the code, as in a Bento."""
    here = Path("checkpoints")
    return here if here.is_dir() else _PROJECT_DIR / "checkpoints"


class Settings(BaseSettings):
    """Read from the environment: `GRAFT_` and the field's name in capitals, or the alias."""

    model_config = SettingsConfigDict(
        env_prefix="GRAFT_", frozen=True, use_attribute_docstrings=True
    )

    checkpoints: Path = Field(
        default_factory=_default_checkpoints_dir, validation_alias="CHECKPOINTS"
    )
    """The repository: <checkpoints>/<name>/<version>/. The newest version of every model is served,
    or what its rollout.json says."""

    poll_seconds: NonNegativeSeconds = 1.0
    """How often the repository is read for new versions; 0: only at the start."""

    api_token: SecretStr | None = None
    """If set, predictions and lists need `Authorization: Bearer <token>`; health and metrics do
    not."""

    admin_token: SecretStr | None = None
    """Needed to load, unload and change rollouts over HTTP; without it that is switched off."""

    access_log: bool = True
    """One line of JSON per request on standard output, health checks excepted."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What runs the backbones; auto takes CUDA where there is a device and torch, else the CPU."""

    precision: Precision | None = None
    """Precision of the engines; by default what each checkpoint recorded, where this device can."""

    max_body_bytes: PositiveInt = 32 * 2**20
    """Largest request body; more is answered 413."""

    max_buffered_bytes: PositiveInt = 512 * 2**20
    """Bodies of all requests together that are held in memory; more is answered 429."""

    max_images: PositiveInt = 64
    """Most images in one request; more is answered 413."""

    max_pixels: PositiveInt = MAX_PIXELS
    """Most pixels of one image, read from its header before anything is decoded. Runs have the same
    limit and read this variable too."""

    max_queue_images: PositiveInt = 1024
    """Images accepted at once per backbone; more is answered 429."""

    deadline_seconds: PositiveSeconds = 10.0
    """Time from a complete request to its answer; a request that cannot make it is answered 429
    at once."""

    header_seconds: PositiveSeconds = 30.0
    """Time in which a request's headers must have arrived, from its first byte or from the
    beginning of the connection; else 408."""

    body_seconds: PositiveSeconds = 30.0
    """Time in which a request's body must have arrived; else 408."""

    cached_images: NonNegativeInt = 0
    """Images whose features are kept, for images that come again; 5 KB each, per backbone.
    0: none."""

    tracing: bool = False
    """OpenTelemetry spans for every request, sent where BentoML's `tracing` configuration says."""

    drain_seconds: NonNegativeSeconds = 1.0
    """Time between SIGTERM, when /readyz turns to 503, and the end of accepting connections."""

    shutdown_seconds: PositiveSeconds = 30.0
    """The process ends at the latest this long after SIGTERM."""

    @field_validator("api_token", "admin_token")
    @classmethod
    def _check_token(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not (
            len(token.get_secret_value()) >= _MIN_TOKEN_CHARACTERS
            and token.get_secret_value().isprintable()
        ):
            raise ValueError(
                f"a token is at least {_MIN_TOKEN_CHARACTERS} printable characters, for example "
                "from `openssl rand -hex 16`"
            )
        return token

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.max_images > self.max_queue_images:
            raise ValueError(
                f"GRAFT_MAX_IMAGES={self.max_images} is more than "
                f"GRAFT_MAX_QUEUE_IMAGES={self.max_queue_images}: such a request could never be "
                "accepted"
            )
        return self


def load_settings() -> Settings:
    """The settings from the environment.

    Raises GraftError with the variable, its value and what is allowed, and for a variable that
    begins as settings do and is none.
    """
    wrong = [
        f"{name}: there is no such setting; did you mean {meant}? Rename it, or unset it"
        for name, meant in find_unknown(os.environ).items()
    ]
    # That of Kubernetes is an address, tcp://10.0.0.1:3000.
    if (port := os.environ.get("GRAFT_PORT", "")).isdigit():
        wrong.append(
            f"GRAFT_PORT={port}: there is no such setting; did you mean BENTOML_PORT? Rename it, "
            "or unset it"
        )
    if _KEEP_ALIVE_VARIABLE in os.environ:
        raise GraftError(
            f"{_KEEP_ALIVE_VARIABLE}={os.environ[_KEEP_ALIVE_VARIABLE]} is no setting any more; "
            "unset it and start with `bentoml serve --timeout-keep-alive SECONDS`, whole seconds"
        )
    try:
        settings = Settings()
    except ValidationError as error:
        wrong += [_describe(one) for one in error.errors()]
    if wrong:
        raise GraftError("; ".join(wrong))
    return settings


def find_unknown(names: Iterable[str]) -> dict[str, str]:
    """Variables called as if they were settings: name → the nearest setting's variable."""
    settings = {name.upper(): _variable(name) for name in Settings.model_fields}
    known = {*settings.values(), *OTHER_VARIABLES, _KEEP_ALIVE_VARIABLE}
    unknown: dict[str, str] = {}
    for name in sorted(names):
        upper = name.upper()
        if upper in known or not upper.startswith("GRAFT") or _OF_KUBERNETES.fullmatch(upper):
            continue
        rest = upper.removeprefix("GRAFT").lstrip("_-")
        if close := difflib.get_close_matches(rest, settings, n=1, cutoff=0.8):
            unknown[name] = settings[close[0]]
        # GRAFTON=… may be another program's.
        elif upper.startswith("GRAFT_"):
            by_word = (meant for word, meant in _MEANT_BY_WORD.items() if word in rest)
            (nearest,) = difflib.get_close_matches(rest, settings, n=1, cutoff=0)
            unknown[name] = next(by_word, settings[nearest])
    return unknown


def _variable(field: str) -> str:
    return "CHECKPOINTS" if field == "checkpoints" else f"GRAFT_{field.upper()}"


def _describe(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    variable = _variable(name.lower())
    if problem["type"] != "value_error":
        message = f"it must be {describe_allowed(Settings.model_fields[name.lower()])}"
    return f"{variable}={'…' if 'token' in name else problem['input']}: {message}"
