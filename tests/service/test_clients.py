"""Clients that people have, each in a process of its own, against the real server.

Those that are not installed are skipped. Java, Node and Go are Debian's `openjdk-17-jdk-headless`,
`nodejs` (18 or newer) and `golang-go`; an old urllib3 and httpx with HTTP/2 need an environment of
their own:

    python3 -m venv .venv-clients
    .venv-clients/bin/pip install 'requests<2.33' urllib3==1.24.3 'httpx[http2]<0.29'
    GRAFT_CLIENT_VENV=$PWD/.venv-clients make test ARGS="tests/service/test_clients.py -rs"
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.images import draw_image
from tests.support.servers import RunningServer, copy_checkpoint, serve
from tests.support.shared import HANG_SECONDS

PROGRAMS = Path(__file__).resolve().parents[1] / "support" / "clients"
OLD_PYTHON = "GRAFT_CLIENT_VENV"
CURL = ["curl", "--silent", "--show-error", "--header", "Content-Type: image/jpeg", "URL"]
CURL_BODY = [*CURL, "--data-binary", "@IMAGE"]
# What is run, and how many answers it prints: one for each way that it sends the image.
CLIENTS: dict[str, tuple[list[str], int]] = {
    "curl --http1.0": ([*CURL_BODY, "--http1.0"], 1),
    "curl --http1.1": ([*CURL_BODY, "--http1.1"], 1),
    "curl --http1.1, chunked": (
        [*CURL_BODY, "--http1.1", "--header", "Transfer-Encoding: chunked"],
        1,
    ),
    "curl --http2": ([*CURL_BODY, "--http2"], 1),
    "curl --http2, chunked": (
        [*CURL_BODY, "--http2", "--header", "Transfer-Encoding: chunked"],
        1,
    ),
    "curl --http2, 100-continue": ([*CURL_BODY, "--http2", "--header", "Expect: 100-continue"], 1),
    "curl --http2, form": (
        ["curl", "--silent", "--show-error", "URL", "--http2", "--form", "images=@IMAGE"],
        1,
    ),
    "Java's HttpClient": (["java", "PostImage.java", "URL", "IMAGE"], 4),
    "Node's fetch": (["node", "post_image.mjs", "URL", "IMAGE"], 3),
    "Go's net/http": (["go", "run", "post_image.go", "URL", "IMAGE"], 4),
    "requests": ([sys.executable, "post_requests.py", "URL", "IMAGE"], 3),
    "requests, urllib3 1.24": ([OLD_PYTHON, "post_requests.py", "URL", "IMAGE"], 3),
    "aiohttp": ([sys.executable, "post_aiohttp.py", "URL", "IMAGE"], 6),
    "httpx": ([sys.executable, "post_httpx.py", "URL", "IMAGE"], 3),
    "httpx, http2=True": ([OLD_PYTHON, "post_httpx.py", "URL", "IMAGE"], 3),
    "tritonclient": ([sys.executable, "post_triton.py", "URL", "IMAGE"], 3),
}


@pytest.fixture(scope="module")
def server(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    copy_checkpoint(colors, folder / "checkpoints", "colors", 1)
    with serve(folder / "log", {"CHECKPOINTS": str(folder / "checkpoints")}) as running:
        yield running


def find_program(name: str) -> str:
    if name == OLD_PYTHON:
        folder = os.environ.get(OLD_PYTHON)
        if folder is None:
            pytest.skip(f"{OLD_PYTHON} is not set")
        return f"{folder}/bin/python"
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.mark.parametrize("client", CLIENTS)
def test_each_client_gets_the_label(server: RunningServer, tmp_path: Path, client: str) -> None:
    command, num_answers = CLIENTS[client]
    # Not ASCII, which clients write into forms in different ways.
    image = tmp_path / "кошка.jpg"
    image.write_bytes(draw_image("green", size=(1600, 1200)))
    program, *arguments = command
    placed = [
        argument.replace("URL", f"{server.url}/predict").replace("IMAGE", str(image))
        for argument in arguments
    ]
    done = subprocess.run(
        [find_program(program), *placed],
        cwd=PROGRAMS,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["predictions"][0].get("label") for answer in answers] == ["green"] * num_answers
