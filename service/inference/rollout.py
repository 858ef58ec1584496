"""Which versions of a model are served to whom: `<repository>/<name>/rollout.json`.

It is written by hand or over HTTP. Without it the newest good version answers everything. A version
is named by its number, by a label, or as `latest`:

    {"default": "stable", "labels": {"stable": 3}, "canary": {"version": 4, "share": 0.05},
     "shadow": 5}
"""

from __future__ import annotations

import json
import random
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import GraftError
from models.files import write_whole

ROLLOUT_FILE = "rollout.json"
LATEST = "latest"
_MAX_BYTES = 64 * 1024

Version = Annotated[int, Field(ge=1, strict=True)]
Label = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.-]{0,62}$")]


class Canary(BaseModel):
    """A version that answers a random share of the requests that ask for no version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Version
    share: float = Field(gt=0, le=1, description="Of the requests that name no version.")


class Rollout(BaseModel):
    """Who gets which version of one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default: Version | Label = Field(
        default=LATEST,
        description="What a request that names no version gets: latest, a label, a version.",
    )
    labels: dict[Label, Version] = Field(
        default_factory=dict, max_length=100, description="Names for versions, to ask for them by."
    )
    canary: Canary | None = None
    shadow: Version | None = Field(
        default=None, description="Is asked too, its answers are compared and counted, never sent."
    )
    loaded: frozenset[Version] = Field(
        default=frozenset(),
        description="Served to those who ask by number, though nothing else refers to it.",
    )
    unloaded: frozenset[Version] = Field(
        default=frozenset(), description="Never served: `latest` is the newest of the others."
    )

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        if LATEST in self.labels:
            raise ValueError(
                "the label 'latest' is the newest version and cannot be set; "
                "unload what must not be it"
            )
        if (
            isinstance(self.default, str)
            and self.default != LATEST
            and self.default not in self.labels
        ):
            labels = ", ".join(self.labels) or "there is none"
            raise ValueError(
                f"default is {self.default!r}, which is not one of the labels ({labels})"
            )
        if gone := sorted(self.named_versions & self.unloaded):
            raise ValueError(
                f"version {gone[0]} is unloaded and still referred to; "
                "point default, labels, canary or shadow elsewhere first"
            )
        return self

    @property
    def named_versions(self) -> frozenset[int]:
        """The versions that must be loaded, whichever is the newest."""
        named = {*self.labels.values(), *self.loaded}
        if isinstance(self.default, int):
            named.add(self.default)
        if self.canary is not None:
            named.add(self.canary.version)
        if self.shadow is not None:
            named.add(self.shadow)
        return frozenset(named)

    def resolve(self, version: str, latest: int) -> int | None:
        """The version that a number, a label or `latest` stands for, None where there is none.

        "" stands for the default, or for the canary by its share of chance.
        """
        if not version:
            if self.canary is not None and random.random() < self.canary.share:
                return self.canary.version
            version = str(self.default)
        if version == LATEST:
            return latest
        if version.isascii() and version.isdigit():
            return int(version[:10])
        return self.labels.get(version)

    def patched(self, patch: Mapping[str, Any]) -> Rollout:
        """With a JSON merge patch (RFC 7396) applied; raises GraftError if that is invalid."""
        return _validate(_merge(self.model_dump(mode="json"), patch), "the rollout")


def read_rollout(folder: Path) -> Rollout:
    """The rollout of the model in `folder`, the default one where there is no file.

    Raises GraftError where the file is invalid, or no file.
    """
    path = folder / ROLLOUT_FILE
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # To read a pipe would wait without end.
            raise GraftError(f"{ROLLOUT_FILE} is no file; put a JSON file there, or remove it")
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return Rollout()
    except OSError as error:
        raise GraftError(f"{ROLLOUT_FILE} cannot be read: {error.strerror}") from error
    try:
        content = json.loads(text) if len(text) <= _MAX_BYTES else None
    except (ValueError, RecursionError) as error:
        raise GraftError(f"{ROLLOUT_FILE} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise GraftError(f"{ROLLOUT_FILE} is not one JSON object of at most {_MAX_BYTES} bytes")
    return _validate(content, ROLLOUT_FILE)


def write_rollout(folder: Path, rollout: Rollout) -> None:
    """Write it whole or not at all. Raises OSError where the repository cannot be written."""
    text = rollout.model_dump_json(indent=2, exclude_defaults=True) + "\n"
    write_whole(folder / ROLLOUT_FILE, text)


def _validate(content: Mapping[str, Any], what: str) -> Rollout:
    try:
        # As JSON, so that lists are taken for sets and numbers stay strict.
        return Rollout.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise GraftError(
            f"{what}: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None


def _merge(target: object, patch: object) -> Any:
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged
