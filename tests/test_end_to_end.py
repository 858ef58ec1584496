"""Folder → checkpoint → HTTP: the service gives every image the scores that evaluation gave it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests

from models import checkpoint as checkpoints
from models.engine.engine import run
from models.prepared import build_engine
from models.scores import softmax
from tests.support.images import SHAPES, draw_shape, write_class_folders
from tests.support.servers import serve
from tests.support.shared import HANG_SECONDS

ROOT = Path(__file__).parent.parent
NUM_CLIENTS = 32


@pytest.mark.usefixtures("prepared")
def test_folder_to_prediction(tmp_path: Path, cache_dir: Path) -> None:
    data = write_class_folders(tmp_path / "shapes", 16)
    folders = (
        "--output",
        tmp_path / "runs",
        "--repository",
        tmp_path / "checkpoints",
        "--cache-dir",
        cache_dir,
    )
    command = [sys.executable, ROOT / "finetune" / "run.py", "--data", data, *folders]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr

    checkpoint = checkpoints.load_checkpoint(tmp_path / "checkpoints" / "shapes" / "1")
    kinds = ("JPEG", "PNG", "WEBP", "BMP")
    good = [draw_shape(SHAPES[seed % 3], 1000 + seed, kinds[seed % 4]) for seed in range(48)]
    engine = build_engine(checkpoint.path, checkpoint.preprocess, checkpoint.config, device="cpu")
    features = run(engine, np.stack([checkpoint.preprocess(image) for image in good]))
    engine.close()
    scores = softmax(checkpoints.logits(checkpoint, features) / checkpoint.temperature)
    broken = [
        b"",
        b"hello",
        good[0][:300],
        good[1][: len(good[1]) // 2],
        b"\xff\xd8\xff" + os.urandom(500),
        b"<svg></svg>",
    ]

    with serve(tmp_path / "serve.log", {"CHECKPOINTS": str(tmp_path / "checkpoints")}) as server:

        def ask(number: int) -> tuple[int, requests.Response]:
            """Send a broken image every third time, else a form and a raw body in turn."""
            if number % 3 == 2:
                return -1, requests.post(
                    f"{server.url}/predict",
                    files={"images": ("x.jpg", broken[number % len(broken)])},
                    timeout=HANG_SECONDS,
                )
            index = number % len(good)
            if number % 3:
                return index, requests.post(
                    f"{server.url}/predict?top_k=3",
                    files={"images": ("x", good[index])},
                    timeout=HANG_SECONDS,
                )
            headers = {"Content-Type": "image/jpeg"}
            return index, requests.post(
                f"{server.url}/predict?top_k=3",
                data=good[index],
                headers=headers,
                timeout=HANG_SECONDS,
            )

        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            answers = list(clients.map(ask, range(9 * NUM_CLIENTS)))

    assert {index for index, _ in answers} == {-1, *range(len(good))} - {
        index for index in range(len(good)) if index % 3 == 2
    }
    for index, answer in answers:
        if index < 0:
            assert 400 <= answer.status_code < 500, answer.text
            assert answer.json()["error"]["message"]
            continue
        assert answer.status_code == 200, answer.text
        (prediction,) = answer.json()["predictions"]
        assert prediction["label"] == checkpoint.label_names[scores[index].argmax()]
        by_label = {entry["label"]: entry["score"] for entry in prediction["top"]}
        np.testing.assert_allclose(
            [by_label[name] for name in checkpoint.label_names], scores[index], atol=1e-3
        )
