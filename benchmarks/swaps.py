"""Publish version after version, each with another head, while clients send without a pause."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.checkpoints import Head, Measured, publish
from benchmarks.client import Client, encode_get, run_loop
from benchmarks.load import Requests

_NUM_CLIENTS = 8
_POLL_SECONDS = 0.05
_SERVED_WITHIN_SECONDS = 20.0
# Scores are rounded, and bf16 rounds differently in another batch; two heads differ by far more.
_SCORE_TOLERANCE = 0.02


@dataclass
class Swapped:
    """Outcomes of the requests; seconds from each publication until the version was listed.

    Lost: not answered 200. Mixed: labels or scores are not those of the version in the answer.
    """

    num_good: int = 0
    num_lost: int = 0
    num_mixed: int = 0
    by_version: Counter[int] = field(default_factory=Counter)
    swap_seconds: list[float] = field(default_factory=list)

    @property
    def num_done(self) -> int:
        return self.num_good + self.num_lost

    def to_values(self) -> dict[str, float]:
        return {
            "num_good": self.num_good,
            "num_lost": self.num_lost,
            "num_mixed": self.num_mixed,
            "num_versions": len(self.by_version),
            "num_swaps": len(self.swap_seconds),
            "slowest_swap_seconds": max(self.swap_seconds),
        }


def swap_under_load(
    url: str,
    requests: Requests,
    num_requests: int,
    measured: Measured,
    heads: Sequence[Head],
    model_dir: Path,
) -> Swapped:
    """Send `num_requests`, meanwhile publish all heads but the first at equal intervals.

    The first is served as version 1. Raises RuntimeError if a version is not served in time.
    """
    try:
        return run_loop(
            _swap(Client(url), requests.encode(), num_requests, measured, heads, model_dir)
        )
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


async def _swap(
    client: Client,
    encoded: Sequence[bytes],
    num_requests: int,
    measured: Measured,
    heads: Sequence[Head],
    model_dir: Path,
) -> Swapped:
    swapped = Swapped()
    expected = [head.scores(measured.features) for head in heads]
    turns = iter(range(num_requests))

    async def ask() -> None:
        for turn in turns:
            index = turn % len(encoded)
            status, body = await client.send(encoded[index])
            if status != 200:
                swapped.num_lost += 1
                continue
            answer = json.loads(body)
            version = answer["version"]
            swapped.num_good += 1
            swapped.by_version[version] += 1
            swapped.num_mixed += not _is_of(
                answer, heads[version - 1], expected[version - 1][index]
            )

    async def publish_all() -> None:
        for number, head in enumerate(heads[1:], start=1):
            while swapped.num_done < num_requests * number / len(heads):
                await asyncio.sleep(_POLL_SECONDS)
            path = await asyncio.to_thread(
                publish, model_dir.parent, model_dir.name, measured, head
            )
            published = time.perf_counter()
            await _until_served(client, int(path.name))
            swapped.swap_seconds.append(time.perf_counter() - published)

    async with asyncio.TaskGroup() as group:
        group.create_task(publish_all())
        for _ in range(_NUM_CLIENTS):
            group.create_task(ask())
    client.close()
    return swapped


def _is_of(answer: Any, head: Head, expected: npt.NDArray[np.float32]) -> bool:
    columns = {label: column for column, label in enumerate(head.label_names)}
    top = answer["predictions"][0]["top"]
    return all(
        one["label"] in columns
        and abs(one["score"] - expected[columns[one["label"]]]) < _SCORE_TOLERANCE
        for one in top
    )


async def _until_served(client: Client, version: int) -> None:
    end = time.monotonic() + _SERVED_WITHIN_SECONDS
    while time.monotonic() < end:
        status, body = await client.send(encode_get("/v1/models"))
        if status == 200 and any(
            model["version"] == version for model in json.loads(body)["models"]
        ):
            return
        await asyncio.sleep(_POLL_SECONDS)
    raise RuntimeError(
        f"version {version} is not served {_SERVED_WITHIN_SECONDS:g} s after its publication; "
        "does this service poll the repository?"
    )
