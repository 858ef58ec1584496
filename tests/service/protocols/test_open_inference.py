"""The Open Inference Protocol on the real server.

Triton's own client, JSON as the specification writes it, and bad requests.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from models.checkpoint import CONFIG_FILE
from models.preprocess import Preprocess
from tests.support.images import draw_image
from tests.support.servers import LABELS, RunningServer, copy_checkpoint, serve
from tests.support.shared import HANG_SECONDS

MAX_IMAGES = 8
MAX_BODY_BYTES = 8_000_000
TOKEN = "a token for tests"
HEADER_LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/colors/infer"


@dataclass(frozen=True)
class Endpoint:
    server: RunningServer
    preprocess: Preprocess


@pytest.fixture(scope="module")
def endpoint(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Versions 1 and 2 of one model, of which 1 is stable, behind a token."""
    folder = tmp_path_factory.mktemp("open_inference")
    for version in (1, 2):
        copy_checkpoint(colors, folder / "checkpoints", "colors", version)
    (folder / "checkpoints" / "colors" / "rollout.json").write_text('{"labels": {"stable": 1}}')
    env = {
        "CHECKPOINTS": str(folder / "checkpoints"),
        "GRAFT_MAX_IMAGES": str(MAX_IMAGES),
        "GRAFT_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
        "GRAFT_MAX_PIXELS": "1000000",
        "GRAFT_API_TOKEN": TOKEN,
    }
    config = json.loads((colors / CONFIG_FILE).read_text())
    with serve(folder / "log", env) as running:
        yield Endpoint(running, Preprocess.from_dict(config["graft"]["preprocess"]))


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=endpoint.server.url, timeout=HANG_SECONDS, headers=token()
    ) as client:
        yield client


@pytest.fixture
def tritons(endpoint: Endpoint) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(urlsplit(endpoint.server.url).netloc) as client:
        yield client


def token() -> dict[str, str]:
    """A new dict each time: Triton's client adds its own headers to it."""
    return {"Authorization": f"Bearer {TOKEN}"}


def probabilities(client: httpx.Client, *images: bytes) -> np.ndarray:
    """What /predict says, in the order of the labels."""
    body = client.post("/predict", files=[("images", ("x.jpg", image)) for image in images]).json()
    scores = [{one["label"]: one["score"] for one in entry["top"]} for entry in body["predictions"]]
    return np.array([[one[label] for label in LABELS] for one in scores])


def files_input(
    *images: bytes, shape: list[int] | None = None, binary: bool = True
) -> triton.InferInput:
    elements = np.array(
        images if binary else [base64.b64encode(image) for image in images], np.object_
    )
    tensor = triton.InferInput("image", shape or [len(images)], "BYTES")
    return tensor.set_data_from_numpy(elements.reshape(shape or [-1]), binary_data=binary)


def pixels_input(pixels: np.ndarray, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput(
        "pixels", list(pixels.shape), "UINT8" if pixels.dtype == np.uint8 else "FP32"
    )
    return tensor.set_data_from_numpy(pixels, binary_data=binary)


def check_error(response: httpx.Response, status: int, *words: str) -> None:
    """The protocol's error, with these words in its message."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    for word in words:
        assert word in response.json()["error"]


def test_health_and_metadata_with_tritons_client(
    tritons: triton.InferenceServerClient, endpoint: Endpoint
) -> None:
    assert tritons.is_server_live()
    assert tritons.is_server_ready()
    assert tritons.is_model_ready("colors", headers=token())
    assert tritons.is_model_ready("colors", "1", headers=token())
    assert not tritons.is_model_ready("colors", "9", headers=token())
    assert not tritons.is_model_ready("cats", headers=token())
    assert "binary_tensor_data" in tritons.get_server_metadata(headers=token())["extensions"]
    metadata = tritons.get_model_metadata("colors", headers=token())
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == (
        "colors",
        ["1", "2"],
        "graft_checkpoint",
    )
    shapes = {
        tensor["name"]: (tensor["datatype"], tensor["shape"])
        for tensor in metadata["inputs"] + metadata["outputs"]
    }
    assert shapes["image"] == ("BYTES", [-1])
    assert shapes["pixels"] == (
        "UINT8",
        [-1, endpoint.preprocess.height, endpoint.preprocess.width, 3],
    )
    assert shapes["probabilities"] == ("FP32", [-1, 3])


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_files_with_tritons_client(
    tritons: triton.InferenceServerClient, client: httpx.Client, binary: bool, shape: list[int]
) -> None:
    images = [draw_image("blue", seed=5), draw_image("green", seed=5)]
    result = tritons.infer(
        "colors",
        [files_input(*images, shape=shape, binary=binary)],
        request_id="seven",
        headers=token(),
    )
    assert result.get_response()["id"] == "seven"
    assert (result.get_response()["model_name"], result.get_response()["model_version"]) == (
        "colors",
        "2",
    )
    assert result.as_numpy("label").tolist() == [b"blue", b"green"]
    wanted = probabilities(client, *images)
    assert result.as_numpy("probabilities") == pytest.approx(wanted, abs=1e-6)
    assert result.as_numpy("score") == pytest.approx(wanted.max(axis=1), abs=1e-6)
    assert result.as_numpy("probabilities").dtype == np.float32


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_pixels_with_tritons_client(
    tritons: triton.InferenceServerClient,
    client: httpx.Client,
    endpoint: Endpoint,
    binary: bool,
    dtype: type,
) -> None:
    images = [draw_image("red", seed=6), draw_image("blue", seed=6)]
    pixels: npt.NDArray[Any] = np.stack([endpoint.preprocess(image) for image in images])
    pixels = pixels.astype(dtype)
    if dtype is np.float32:
        # As a resize leaves them: they are rounded, and clipped at both ends.
        pixels += np.where(pixels == 255, 20, np.where(pixels == 0, -20, 0.25)).astype(np.float32)
    result = tritons.infer("colors", [pixels_input(pixels, binary)], headers=token())
    assert result.as_numpy("label").tolist() == [b"red", b"blue"]
    assert result.as_numpy("probabilities") == pytest.approx(
        probabilities(client, *images), abs=1e-6
    )


def test_outputs_are_chosen_one_by_one(
    tritons: triton.InferenceServerClient,
) -> None:
    outputs = [
        triton.InferRequestedOutput("score", binary_data=False),
        triton.InferRequestedOutput("label", binary_data=True),
    ]
    result = tritons.infer(
        "colors", [files_input(draw_image("red"))], outputs=outputs, headers=token()
    )
    score, label = result.get_response()["outputs"]
    assert (score["name"], score["datatype"], len(score["data"])) == ("score", "FP32", 1)
    assert (label["name"], label["datatype"], label["parameters"]) == (
        "label",
        "BYTES",
        {"binary_data_size": 7},
    )
    assert result.as_numpy("label").tolist() == [b"red"]


@pytest.mark.parametrize("binary", [True, False])
def test_classification(
    tritons: triton.InferenceServerClient, client: httpx.Client, binary: bool
) -> None:
    image = draw_image("green")
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)]
    result = tritons.infer(
        "colors", [files_input(image, image)], outputs=outputs, headers=token()
    ).as_numpy("probabilities")
    assert result.shape == (2, 2)
    texts = [text.decode() if binary else text for text in result[0]]
    value, index, label = texts[0].split(":")
    assert (index, label) == ("1", "green")
    assert float(value) == pytest.approx(probabilities(client, image).max(), abs=1e-6)
    assert float(value) > float(texts[1].split(":")[0])


@pytest.mark.parametrize(
    ("version", "number"), [("1", "1"), ("stable", "1"), ("2", "2"), ("latest", "2")]
)
def test_every_version(tritons: triton.InferenceServerClient, version: str, number: str) -> None:
    result = tritons.infer(
        "colors", [files_input(draw_image("red"))], model_version=version, headers=token()
    )
    assert result.get_response()["model_version"] == number


def test_json_as_the_specification_writes_it(client: httpx.Client) -> None:
    encoded = base64.b64encode(draw_image("blue")).decode()
    for data, shape in (([encoded], [1]), ([encoded], [1, 1]), ([[encoded]], [1, 1])):
        tensor = {"name": "image", "shape": shape, "datatype": "BYTES", "data": data}
        response = client.post(
            INFER, json={"id": "1", "inputs": [tensor], "outputs": [{"name": "label"}]}
        )
        assert response.headers["content-type"] == "application/json"
        assert response.json() == {
            "model_name": "colors",
            "model_version": "2",
            "id": "1",
            "outputs": [{"name": "label", "datatype": "BYTES", "shape": [1], "data": ["blue"]}],
        }


@pytest.mark.parametrize("request_id", ["", "\0", "\N{SNOWMAN}", "\ud800", "x" * 10_000])
def test_any_id_comes_back(client: httpx.Client, request_id: str) -> None:
    body = json.dumps(
        {"id": request_id, "inputs": [image_tensor()], "outputs": [{"name": "label"}]}
    )
    assert client.post(INFER, content=body).json()["id"] == request_id


def test_nested_pixels(client: httpx.Client, endpoint: Endpoint) -> None:
    pixels = endpoint.preprocess(draw_image("green"))
    tensor = {
        "name": "pixels",
        "shape": [1, *pixels.shape],
        "datatype": "UINT8",
        "data": [pixels.tolist()],
    }
    labels = client.post(INFER, json={"inputs": [tensor]}).json()["outputs"][0]
    assert (labels["name"], labels["data"]) == ("label", ["green"])


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_tritons_client_may_compress(tritons: triton.InferenceServerClient, algorithm: str) -> None:
    result = tritons.infer(
        "colors",
        [files_input(draw_image("blue"))],
        headers=token(),
        request_compression_algorithm=algorithm,
    )
    assert result.as_numpy("label").tolist() == [b"blue"]


def test_tritons_client_reads_the_errors(tritons: triton.InferenceServerClient) -> None:
    good = draw_image("red")
    with pytest.raises(InferenceServerException, match=r"\[400\] image\[1\]: not an image"):
        tritons.infer("colors", [files_input(good, b"no image")], headers=token())
    with pytest.raises(InferenceServerException, match=r"\[413\] image\[0\].*1200x1000"):
        tritons.infer(
            "colors", [files_input(draw_image("red", size=(1200, 1000)))], headers=token()
        )
    with pytest.raises(InferenceServerException, match=r"\[413\] .*GRAFT_MAX_IMAGES"):
        tritons.infer("colors", [files_input(*[good] * (MAX_IMAGES + 1))], headers=token())
    with pytest.raises(InferenceServerException, match=r"\[404\] no model 'cats'"):
        tritons.infer("cats", [files_input(good)], headers=token())
    with pytest.raises(InferenceServerException, match=r"\[404\] no model 'all'"):
        tritons.infer("all", [files_input(good)], headers=token())
    with pytest.raises(InferenceServerException, match=r"\[404\] there is nothing here"):
        tritons.get_model_config("colors", headers=token())
    with pytest.raises(InferenceServerException, match=r"\[401\] send the token"):
        tritons.infer("colors", [files_input(good)])


def image_tensor(**changed: Any) -> dict[str, Any]:
    encoded = base64.b64encode(draw_image("red", size=(32, 32))).decode()
    return {"name": "image", "shape": [1], "datatype": "BYTES", "data": [encoded], **changed}


def pixels_tensor(**changed: Any) -> dict[str, Any]:
    return {
        "name": "pixels",
        "shape": [1, 224, 224, 3],
        "datatype": "FP32",
        "data": [7.5] * (224 * 224 * 3),
        **changed,
    }


HUGE = 10**30


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ({}, ["inputs.0.name"]),
        (image_tensor(name="input_1"), ["inputs.0.name", "'image' or 'pixels'"]),
        (image_tensor(name=7), ["inputs.0.name"]),
        (image_tensor(shape=1), ["inputs.0.shape"]),
        (image_tensor(shape=[]), ["shape []"]),
        (image_tensor(shape=[-1]), ["shape [-1]"]),
        (image_tensor(shape=[1, -1]), ["shape [1, -1]"]),
        (image_tensor(shape=[0], data=[]), ["no image"]),
        (image_tensor(shape=[1.0]), ["inputs.0.shape.0", "integer"]),
        (image_tensor(shape=["1"]), ["inputs.0.shape.0"]),
        (image_tensor(shape=[True]), ["inputs.0.shape.0"]),
        (image_tensor(shape=[1] * 1000), ["inputs.0.shape"]),
        (image_tensor(shape=[1, 2]), ["shape [1, 2]"]),
        (image_tensor(shape=[1, HUGE]), ["shape"]),
        (image_tensor(shape=[2]), ["shape [2] has 2 elements, data has 1"]),
        (image_tensor(data=["", ""]), ["shape [1] has 1 elements, data has 2"]),
        (image_tensor(datatype="UINT8"), ["image is UINT8"]),
        (image_tensor(datatype="bytes"), ["inputs.0.datatype", "'BYTES'"]),
        (image_tensor(datatype="FP16"), ["inputs.0.datatype"]),
        (image_tensor(data=None), ["neither data nor"]),
        (image_tensor(data="Zm9v"), ["inputs.0.data", "list"]),
        (image_tensor(data={"0": "Zm9v"}), ["inputs.0.data", "list"]),
        (image_tensor(data=[7]), ["not a text"]),
        (image_tensor(data=[None]), ["not a text"]),
        (image_tensor(data=[["Zm9v"]]), ["not a text"]),
        (image_tensor(data=["/etc/passwd#"]), ["image[0] is not base64"]),
        (image_tensor(data=["http://127.0.0.1/x.jpg"]), ["image[0] is not base64", "not fetched"]),
        (image_tensor(data=["Zm9v"]), ["image[0]: not an image"]),
        (image_tensor(data=[""]), ["image[0]: the file is empty"]),
        (image_tensor(parameters={"binary_data_size": 4}), ["both data and"]),
        (
            image_tensor(data=None, parameters={"binary_data_size": 4}),
            ["binary_data_size is 4", HEADER_LENGTH],
        ),
        (image_tensor(data=None, parameters={"binary_data_size": -1}), ["binary_data_size is -1"]),
        (
            image_tensor(data=None, parameters={"binary_data_size": HUGE}),
            ["binary_data_size is 1000"],
        ),
        (image_tensor(data=None, parameters={"binary_data_size": "0"}), ["binary_data_size is 0"]),
        (
            image_tensor(data=None, parameters={"binary_data_size": False}),
            ["binary_data_size is False"],
        ),
        (
            image_tensor(parameters={"shared_memory_region": "x", "shared_memory_byte_size": 4}),
            ["no shared memory"],
        ),
        (image_tensor(parameters=[]), ["inputs.0.parameters"]),
        (pixels_tensor(shape=[1, 3, 224, 224]), ["[1, 3, 224, 224]", "[1, 224, 224, 3]"]),
        (pixels_tensor(shape=[1, 224, 224]), ["[1, 224, 224, 3]"]),
        (pixels_tensor(shape=[1, HUGE, HUGE, 3]), ["[1, 224, 224, 3]"]),
        (pixels_tensor(shape=[224, 224, 3]), ["GRAFT_MAX_IMAGES"]),
        (pixels_tensor(shape=[HUGE, 224, 224, 3]), ["GRAFT_MAX_IMAGES"]),
        (pixels_tensor(datatype="BYTES"), ["pixels are BYTES"]),
        (pixels_tensor(data=[7]), ["has 150528 elements, data has 1"]),
        (pixels_tensor(data=[]), ["data has 0"]),
        (pixels_tensor(data=[[7.5] * 224 * 3] * 224), ["not nested"]),
        (pixels_tensor(data=[[]] * 150528), ["not nested"]),
        (pixels_tensor(data=[[[[7, 7, 7]] * 224] * 224] * 2), ["data has 301056"]),
        (pixels_tensor(data=[[[[7, 7, [7]]] * 224] * 224]), ["not a number"]),
        (pixels_tensor(data=[*[[[[7, 7, 7]] * 224] * 223], 7]), ["not nested"]),
        (pixels_tensor(data=["7"] * 150528), ["not a number"]),
        (pixels_tensor(data=[*[7] * 150527, None]), ["not a number"]),
        (pixels_tensor(data=[*[7] * 150527, True]), ["not a number"]),
        (pixels_tensor(data=[*[7] * 150527, 10**400]), ["out of range"]),
        (pixels_tensor(data=[0.5] * 150528), ["look normalised"]),
        (pixels_tensor(data=[*[-2.1] * 150527, 2.6]), ["look normalised"]),
        (pixels_tensor(datatype="UINT8"), ["not a number of type UINT8"]),
        (pixels_tensor(datatype="UINT8", data=[*[7] * 150527, 256]), ["out of range"]),
        (pixels_tensor(datatype="UINT8", data=[*[7] * 150527, -1]), ["out of range"]),
        (pixels_tensor(datatype="UINT8", data=[*[7] * 150527, 10**400]), ["out of range"]),
    ],
)
def test_a_bad_tensor(client: httpx.Client, tensor: dict[str, Any], words: list[str]) -> None:
    status = 413 if "GRAFT_MAX_IMAGES" in words else 400
    check_error(client.post(INFER, json={"inputs": [tensor]}), status, *words)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"id": 7}, ["id:"]),
        ({"inputs": []}, ["inputs", "at least 1"]),
        ({"inputs": [image_tensor(), image_tensor()]}, ["inputs", "at most 1"]),
        ({"inputs": {"image": image_tensor()}}, ["inputs", "list"]),
        ({"inputs": None}, ["inputs", "list"]),
        (
            {"parameters": {"binary_data_output": "yes"}},
            ["binary_data_output is not true or false"],
        ),
        ({"parameters": 1}, ["parameters"]),
        ({"outputs": {}}, ["outputs"]),
        ({"outputs": ["label"]}, ["outputs.0"]),
        ({"outputs": [{"name": "logits"}]}, ["outputs.0.name", "'probabilities'"]),
        ({"outputs": [{"name": "label"}, {"name": "label"}]}, ["wanted twice"]),
        (
            {"outputs": [{"name": "label", "parameters": {"binary_data": 1}}]},
            ["binary_data is not true or false"],
        ),
        (
            {"outputs": [{"name": "label", "parameters": {"classification": 2}}]},
            ["'probabilities', not 'label'"],
        ),
        (
            {"outputs": [{"name": "probabilities", "parameters": {"classification": 0}}]},
            ["whole number from 1 up"],
        ),
        (
            {"outputs": [{"name": "probabilities", "parameters": {"classification": 1.5}}]},
            ["whole number from 1 up"],
        ),
        (
            {"outputs": [{"name": "probabilities", "parameters": {"shared_memory_region": "x"}}]},
            ["no shared memory"],
        ),
    ],
)
def test_a_bad_request(client: httpx.Client, changed: dict[str, Any], words: list[str]) -> None:
    check_error(client.post(INFER, json={"inputs": [image_tensor()], **changed}), 400, *words)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_no_pixels(client: httpx.Client, number: str) -> None:
    text = json.dumps({"inputs": [pixels_tensor()]}).replace("7.5", number, 1)
    check_error(client.post(INFER, content=text), 400, "Na" if number == "NaN" else "nfinit")
    tensor = {**pixels_tensor(data=None), "parameters": {"binary_data_size": 4 * 150528}}
    data = np.array([float(number), *[7.5] * 150527], "<f4").tobytes()
    check_error(post_binary(client, tensor, data), 400, "NaN or infinite")


def post_binary(
    client: httpx.Client, tensor: dict[str, Any], data: bytes, **headers: Any
) -> httpx.Response:
    text = json.dumps(
        {"inputs": [{key: value for key, value in tensor.items() if value is not None}]}
    ).encode()
    return client.post(
        INFER, content=text + data, headers={HEADER_LENGTH: str(len(text)), **headers}
    )


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([1], b""),
        ([1], b"\1"),
        ([1], b"\5\0\0\0abc"),
        ([1], b"\xff\xff\xff\xffabc"),
        ([1], b"\1\0\0\0ab"),
        ([2], b"\3\0\0\0abc"),
        ([1], b"\1\0\0\0a\1\0\0\0b"),
        ([2], b"\1\0\0\0a\1\0\0"),
    ],
)
def test_bad_binary_files(client: httpx.Client, shape: list[int], data: bytes) -> None:
    tensor = image_tensor(data=None, shape=shape, parameters={"binary_data_size": len(data)})
    check_error(post_binary(client, tensor, data), 400, "after its length in 4 bytes")


def test_bad_binary_sizes(client: httpx.Client) -> None:
    tensor = image_tensor(data=None, parameters={"binary_data_size": 5})
    check_error(
        post_binary(client, tensor, b"\1\0\0\0ab"), 400, "binary_data_size is 5, and 6 bytes"
    )
    check_error(
        post_binary(client, image_tensor(), b"more"), 400, "binary_data_size is 0, and 4 bytes"
    )
    pixels = pixels_tensor(data=None, datatype="UINT8", parameters={"binary_data_size": 10})
    check_error(post_binary(client, pixels, b"0123456789"), 400, "150528 bytes, not 10")
    for length in ("-1", "x", "", "1e3", "99999999", "9" * 5000, "\N{SUPERSCRIPT TWO}"):
        response = post_binary(
            client, tensor, b"\1\0\0\0a", **{HEADER_LENGTH: length.encode("latin-1")}
        )
        check_error(response, 400, HEADER_LENGTH)
    check_error(post_binary(client, tensor, b"\1\0\0\0a", **{HEADER_LENGTH: "0"}), 400, "not JSON")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"null", 400),
        (b"[" * 2_000_000, 413),
        (b'{"inputs":' * 100_000, 413),
        (b'{"inputs":' * 900, 400),
        (b"{" + b",".join(b'"%d":1' % number for number in range(500_000)) + b"}", 413),
        (b'{"inputs": [' + b"{}," * 200_000 + b"{}]}", 400),
        (b"1," * 1_500_000, 413),
        (b" " * (MAX_BODY_BYTES + 1), 413),
    ],
    ids=[
        "empty",
        "null",
        "deep lists",
        "deeper objects",
        "deep objects",
        "many keys",
        "many inputs",
        "many numbers",
        "long",
    ],
)
def test_hostile_json(client: httpx.Client, body: bytes, status: int) -> None:
    check_error(client.post(INFER, content=body), status)


def test_paths_and_methods_answer_in_the_protocols_shape(client: httpx.Client) -> None:
    check_error(client.get(INFER), 405, "POST")
    check_error(client.get("/v2/repository/index"), 404)
    check_error(client.get("/v2/models/colors/versions/9"), 404, "'9'")
    check_error(client.get("/v2/models/colors/versions/9/ready"), 404, "'9'")


def test_the_server_never_failed(client: httpx.Client, endpoint: Endpoint) -> None:
    assert client.get("/readyz").status_code == 200
    assert "Traceback" not in endpoint.server.log()
