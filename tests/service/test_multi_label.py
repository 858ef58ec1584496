"""A multi-label model on the real server.

Every protocol gives each label's own probability, and which of them reach their thresholds.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from models.checkpoint import CheckpointError, check_golden, load_checkpoint, logits
from models.engine.engine import run
from models.prepared import build_engine
from models.scores import sigmoid
from tests.support.images import draw_image
from tests.support.servers import LABELS, RunningServer, change_config, copy_checkpoint, serve

THRESHOLDS = [0.9, 0.02, 0.5]
IMAGES = [draw_image(label, seed=11) for label in ("green", "blue")]
V2 = "/v2/models/tags"


@pytest.fixture(scope="module")
def tags(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of three colours, as a multi-label one."""
    folder = copy_checkpoint(colors, tmp_path_factory.mktemp("tags") / "checkpoints", "tags", 1)

    def change(config: dict[str, Any]) -> None:
        del config["graft"]["conformal"]
        config["graft"] |= {"task": "multi-label", "thresholds": THRESHOLDS}

    change_config(folder, change)
    return folder


@pytest.fixture(scope="module")
def scores(tags: Path) -> np.ndarray:
    """The checkpoint's scores of IMAGES, without a server."""
    checkpoint = load_checkpoint(tags)
    engine = build_engine(
        tags, checkpoint.preprocess, checkpoint.config, device="cpu", precision="auto"
    )
    features = run(engine, np.stack([checkpoint.preprocess(image) for image in IMAGES]))
    engine.close()
    return sigmoid(logits(checkpoint, features) / np.float32(checkpoint.temperature))


@pytest.fixture(scope="module")
def server(
    tags: Path, colors: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """It also serves a single-label model on the same backbone."""
    copy_checkpoint(colors, tags.parent.parent, "colors", 1)
    with serve(
        tmp_path_factory.mktemp("log") / "log", {"CHECKPOINTS": str(tags.parent.parent)}
    ) as running:
        yield running


def ask(client: httpx.Client, path: str, body: object) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def predict(client: httpx.Client, **parameters: str | int) -> Any:
    response = client.post(
        "/predict",
        params=parameters,
        files=[("images", (f"{index}.jpg", one)) for index, one in enumerate(IMAGES)],
    )
    assert response.status_code == 200, response.text
    return response.json()


def inputs() -> list[dict[str, Any]]:
    return [
        {
            "name": "image",
            "shape": [2],
            "datatype": "BYTES",
            "data": [base64.b64encode(image).decode() for image in IMAGES],
        }
    ]


def test_predict_names_the_labels_that_reach_their_thresholds(
    client: httpx.Client, scores: np.ndarray
) -> None:
    for entry, row in zip(predict(client, model="tags")["predictions"], scores, strict=True):
        assert set(entry) == {"labels", "top"}
        assert {one["label"]: one["score"] for one in entry["top"]} == pytest.approx(
            dict(zip(LABELS, row, strict=True)), abs=2e-3
        )
        assert [one["score"] for one in entry["top"]] == sorted(
            (one["score"] for one in entry["top"]), reverse=True
        )
        named = {
            name
            for name, score, threshold in zip(LABELS, row, THRESHOLDS, strict=True)
            if score >= threshold
        }
        assert {one["label"] for one in entry["labels"]} == named
    assert abs(scores.sum(axis=1) - 1).min() > 0.05  # they are not a softmax


def test_top_k_shortens_the_list_and_not_the_answer(client: httpx.Client) -> None:
    whole, short = (
        predict(client, model="tags", **more)["predictions"] for more in ({}, {"top_k": 1})
    )
    assert [entry["labels"] for entry in whole] == [entry["labels"] for entry in short]
    assert [len(entry["top"]) for entry in (*whole, *short)] == [3, 3, 1, 1]


def test_models_of_both_tasks_are_asked_at_once(client: httpx.Client) -> None:
    answers = {
        answer["model"]: answer["predictions"][0]
        for answer in predict(client, model="all")["models"]
    }
    assert answers["colors"]["label"] == "green"
    assert "unsure" in answers["colors"]
    assert answers["tags"] == predict(client, model="tags")["predictions"][0]


def test_the_list_of_models_has_the_thresholds(client: httpx.Client) -> None:
    models = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
    assert models["tags"]["thresholds"] == pytest.approx(THRESHOLDS)
    assert (
        models["tags"]["coverage"],
        models["tags"]["threshold"],
        models["colors"]["thresholds"],
    ) == (None, None, None)


def test_tensorflow_rows_and_columns(client: httpx.Client, scores: np.ndarray) -> None:
    images = [{"b64": base64.b64encode(image).decode()} for image in IMAGES]
    rows = ask(client, "/v1/models/tags:predict", {"instances": images})["predictions"]
    for row, expected in zip(rows, scores, strict=True):
        assert row == {
            "classes": LABELS,
            "scores": pytest.approx(expected.tolist(), abs=2e-3),
            "present": (expected >= THRESHOLDS).tolist(),
        }
    columns = ask(client, "/v1/models/tags:predict", {"inputs": images})["outputs"]
    assert columns == {
        name: [row[name] for row in rows] for name in ("classes", "scores", "present")
    }
    outputs = client.get("/v1/models/tags/metadata").json()["metadata"]["signature_def"][
        "signature_def"
    ]["serving_default"]["outputs"]
    assert {name: output["dtype"] for name, output in outputs.items()} == {
        "classes": "DT_STRING",
        "scores": "DT_FLOAT",
        "present": "DT_BOOL",
    }


def test_open_inference(client: httpx.Client, scores: np.ndarray) -> None:
    outputs = {
        output["name"]: output
        for output in ask(client, f"{V2}/infer", {"inputs": inputs()})["outputs"]
    }
    assert outputs["probabilities"]["data"] == pytest.approx(scores.ravel().tolist(), abs=2e-3)
    present = (scores >= THRESHOLDS).ravel().tolist()
    assert outputs["present"] == {
        "name": "present",
        "datatype": "BOOL",
        "shape": [2, 3],
        "data": present,
    }
    assert all(type(value) is bool for value in outputs["present"]["data"])
    metadata = client.get(V2).json()["outputs"]
    assert [(one["name"], one["datatype"], one["shape"]) for one in metadata] == [
        ("probabilities", "FP32", [-1, 3]),
        ("present", "BOOL", [-1, 3]),
    ]


def test_tritons_client_reads_the_binary_answer(server: RunningServer, scores: np.ndarray) -> None:
    with triton.InferenceServerClient(urlsplit(server.url).netloc) as client:
        image = triton.InferInput("image", [2], "BYTES")
        image.set_data_from_numpy(np.array(IMAGES, object))
        answer = client.infer("tags", [image])
        assert answer.as_numpy("present").tolist() == (scores >= THRESHOLDS).tolist()
        best = client.infer(
            "tags", [image], outputs=[triton.InferRequestedOutput("probabilities", class_count=1)]
        )
    assert [
        text.decode().rpartition(":")[2] for text in best.as_numpy("probabilities").ravel()
    ] == ["green", "blue"]


@pytest.mark.parametrize(
    ("model", "output"), [("tags", "label"), ("tags", "score"), ("colors", "present")]
)
def test_an_output_of_the_other_task_is_refused(
    client: httpx.Client, model: str, output: str
) -> None:
    response = client.post(
        f"/v2/models/{model}/infer", json={"inputs": inputs(), "outputs": [{"name": output}]}
    )
    assert response.status_code == 400
    assert f"this model has no {output!r}; it has " in response.json()["error"]


def test_hugging_face(client: httpx.Client, scores: np.ndarray) -> None:
    image = base64.b64encode(IMAGES[0]).decode()
    answer = ask(
        client, "/hf/tags", {"inputs": image, "parameters": {"function_to_apply": "sigmoid"}}
    )
    assert {one["label"]: one["score"] for one in answer} == pytest.approx(
        dict(zip(LABELS, scores[0], strict=True)), abs=2e-3
    )
    for model, function in (("tags", "softmax"), ("colors", "sigmoid")):
        refused = client.post(
            f"/hf/{model}", json={"inputs": image, "parameters": {"function_to_apply": function}}
        )
        assert refused.status_code == 400
        assert f"function_to_apply={function}: this model's is" in refused.json()["error"]


def test_the_description_has_the_answers_shape(client: httpx.Client) -> None:
    schemas = client.get("/docs.json").json()["components"]["schemas"]
    shapes = schemas["PredictResponse"]["properties"]["predictions"]["items"]["anyOf"]
    assert {"$ref": "#/components/schemas/MultiLabelPrediction"} in shapes
    assert set(schemas["MultiLabelPrediction"]["required"]) == {"labels", "top"}


def test_golden_images_may_not_move_all_labels_at_once(tags: Path) -> None:
    """Softmax ignores what all logits of an image have in common, sigmoid does not."""
    checkpoint = load_checkpoint(tags)
    moved = checkpoint.golden.logits + np.float32(np.ptp(checkpoint.golden.logits))
    check_golden(checkpoint, checkpoint.golden.logits)
    check_golden(replace(checkpoint, task="single-label"), moved)
    with pytest.raises(CheckpointError, match="golden images"):
        check_golden(checkpoint, moved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": [0.5, 0.5]}, "there are 2 thresholds, its labels are 3"),
        ({"thresholds": [0.5, 0.5, 1.5]}, "a threshold of 1.5;"),
        ({"thresholds": [0.5, 0.5, float("nan")]}, "a threshold of nan;"),
        ({"task": "detection"}, "task 'detection'; this Graft knows single-label and multi-label"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    tags: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = copy_checkpoint(tags, tmp_path, "tags", 1)
    change_config(folder, lambda config: config["graft"].update(changes))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)
