"""Every option once: its flag and YAML key, default, limits and help text.

A field is an option: `batch_size` is `--batch-size` and the key `batch_size` in a YAML file. Its
type and limits check it, and its docstring is its help.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.checkpoint import check_name
from models.engine.engine import Precision
from models.engine.processor import num_cpus
from models.errors import GraftError
from models.files import find_home
from models.preprocess import Fit
from models.sources import identify_source

Augment = Literal["none", "light", "flip"]
_GRADIENT_OPTIONS = ("label_smoothing", "mix", "ema", "gradual", "layer_decay")


@dataclass(frozen=True)
class CacheSettings:
    """Where features are kept between runs, and how many bytes of them."""

    folder: Path
    max_bytes: int


def _default_cache_dir() -> Path:
    """`graft` in XDG_CACHE_HOME or ~/.cache; for a user without a home, a folder in TMPDIR."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # Empty and relative ones are to be ignored (XDG Base Directory Specification).
    if Path(xdg).is_absolute():
        return Path(xdg) / "graft"
    return find_home() / ".cache" / "graft"


class ProgramOptions(BaseModel):
    """What a program is told; `positional` is the field that is given without a flag."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    program: ClassVar[str]
    positional: ClassVar[str | None] = None


class SharedOptions(ProgramOptions):
    """Options that all programs on images have: images, hardware and folders."""

    config: Path | None = Field(None, exclude=True)
    """YAML file of options, such as a run's config.yaml; flags override it"""

    data: str = Field("digits", min_length=1)
    """where the images are: a folder with train/ and val/ (and optionally test/), a folder of class
    folders, a CSV with path,label[,split] (or path,labels[,split], several separated by |),
    torchvision:NAME (such as torchvision:OxfordIIITPet), or digits"""

    data_root: Path = Path("data")
    """folder of the files of torchvision:NAME; what is there is not downloaded"""

    val_fraction: float = Field(0.2, gt=0, lt=1)
    """part of each class used for validation where the data has no val split"""

    new_split: bool = Field(False, exclude=True)
    """draw train and val anew where the data has no val split; otherwise images stay where the
    newest run on this data under --output had them, and only new images are drawn"""

    strict: bool = False
    """stop at an image or folder that cannot be read, which is otherwise left out, and at an image
    that leaks from one split to another"""

    image_size: int | None = Field(None, ge=32, le=1024)
    """side of the input crop in pixels; the backbone's own if not given"""

    stretch: bool = False
    """spread the values that an image of 16 bits a channel uses over the whole range, in training
    and in the service, such as those of a sensor of 12 bits, which are nearly black otherwise;
    images of 8 bits stay as they are"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train and compute features"""

    precision: Precision = "auto"
    """precision of the engine. auto: bf16 where the hardware has it, else fp32. A run also tries
    int8 (on CPUs with VNNI, --freeze backbone) where the features that are not in the cache take a
    minute or more to compute, and takes it where it loses at most 0.3 points of cross-validated
    accuracy; it takes fp32 where bf16 would lose more than 0.5"""

    workers: int = Field(num_cpus(), ge=1)
    """threads that decode images"""

    seed: int = Field(0, ge=0, lt=2**32)
    """seed of the split, the head and the order of the images"""

    output: Path = Path("runs")
    """folder of run folders: metrics, TensorBoard logs, config.yaml, splits.csv"""

    cache_dir: Path = _default_cache_dir()
    """folder in which converted backbones and features are kept between runs"""

    cache_gb: float = Field(20.0, ge=0, allow_inf_nan=False)
    """gigabytes of features that are kept; those used longest ago are removed first"""

    cache: bool = True
    """keep and use converted backbones and features; --no-cache computes everything anew"""

    @property
    def source(self) -> str:
        """What `data` names, the same from every working folder."""
        return identify_source(self.data, self.data_root)

    @property
    def enabled_cache_dir(self) -> Path | None:
        """`cache_dir`, or None with `--no-cache`."""
        return self.cache_dir if self.cache else None

    @property
    def feature_cache(self) -> CacheSettings | None:
        """Where features are kept, or None with `--no-cache`."""
        return CacheSettings(self.cache_dir, int(self.cache_gb * 1e9)) if self.cache else None

    def to_yaml(self) -> str:
        """The options as `--config` reads them."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class BackboneOptions(SharedOptions):
    """Options of programs that use one backbone."""

    backbone: str = "tf_efficientnet_lite0"
    """a timm name (resnet18), or package.module:callable that returns an nn.Module, images to
    features"""

    weights: Path | None = None
    """pretrained state_dict, .safetensors or .pth; FILE::ENTRY takes one of several in a file, such
    as last.pth::state_dict_ema; otherwise from a package or the Hugging Face hub"""

    pretrained: bool = True
    """start from pretrained weights; --no-pretrained starts from random ones"""


class Options(BackboneOptions):
    """Fine-tune a pretrained backbone on labelled images and publish a checkpoint for the service.

    Without options it fits scikit-learn's handwritten digits on an embedded backbone, offline.
    """

    program = "python finetune/run.py"

    freeze: str = "backbone"
    """backbone: only the head is trained, in seconds. until:NAME: everything up to and including
    module NAME is frozen. none: everything is trained"""

    epochs: int = Field(5, ge=1)
    """gradient epochs, where more than the head is trained"""

    batch_size: int = Field(32, ge=1)
    """images per gradient step"""

    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """peak learning rate of the head"""

    backbone_lr: float = Field(5e-4, gt=0, allow_inf_nan=False)
    """peak learning rate of the backbone"""

    weight_decay: float = Field(0.05, ge=0, allow_inf_nan=False)
    """AdamW's weight decay; biases and norm layers have none"""

    batch_norm: Literal["keep", "update"] = "keep"
    """statistics of BatchNorm layers that are trained. keep: the pretrained ones, as the solved
    head expects. update: the batches' (for images unlike the pretraining's, with large batches)"""

    balance: Literal["none", "weights", "sampler"] = "none"
    """for uneven classes. weights: every class weighs the same in the loss, also in the probe's.
    sampler: gradient epochs draw every class equally often, and the probe is weighted"""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """part of every label that gradient epochs spread over all classes; 0: off"""

    mix: Literal["none", "mixup", "cutmix", "both"] = "none"
    """gradient epochs train on blends of two images and their labels. mixup: weighted means of
    pixels (of activations, where those are kept at the freeze boundary). cutmix: a part of one
    image is pasted into the other. both: alternating"""

    ema: float = Field(0.0, ge=0, lt=1)
    """decay per step of an exponential moving average of the weights, such as 0.99; the average is
    validated and published; 0: off"""

    gradual: int = Field(0, ge=0)
    """gradual unfreezing: start with the head and the last unfrozen stage, and unfreeze one earlier
    stage every this many epochs; 0: everything is trained from the start"""

    layer_decay: float = Field(1.0, gt=0, le=1)
    """learning rate of each stage of the backbone relative to the next one's, such as 0.7; 1: the
    same for all"""

    head_init: str = "soft"
    """the head at the start of gradient epochs. soft: the probe's at the strongest regularisation,
    which leaves the layers below something to learn. probe: the probe's. zeros: all zeros.
    package.module:function: a function of yours, applied to the head by nn.Module.apply"""

    augment: Augment = "light"
    """light: shifted and scaled crops. flip: also mirrored (not for digits or letters). none: the
    plain crop"""

    views: int = Field(1, ge=1, le=100)
    """augmented views of each training image that are computed once and trained on, also by the
    probe; 1: the plain crop (gradient epochs use as many as there are epochs, at most four)"""

    levels: Literal["last", "auto"] = "auto"
    """what the probe's head reads. last: the network's last level. auto: the last one, the upper
    half, all, or all with a coarse grid of each, whichever has the least out-of-fold loss (the
    fewest of those that chance does not tell apart); for a little more time, more accuracy, most
    of all where images are unlike those of the pretraining"""

    fit: Literal["auto", Fit] = "crop"
    """how a picture becomes the square that the network sees. crop: as it was pretrained, mostly
    the middle 87.5 % of the shorter side. whole: all of the shorter side. squash: all of both
    sides, each to its own scale. pad: all of both, with a grey margin. auto: the one with the least
    out-of-fold loss on up to 1,000 images, crop where chance could explain the difference"""

    coverage: float = Field(0.95, gt=0, lt=1)
    """target coverage of the conformal label set; an answer is marked unsure unless its set
    contains exactly one label"""

    name: str | None = None
    """the model's name in the repository; otherwise made from --data"""

    repository: Path = Path("checkpoints")
    """folder in which the checkpoint is published, as <name>/<version>"""

    new_labels: bool = False
    """publish although the newest version of this model has other labels, which a server would swap
    to under its clients"""

    publish: Literal["auto", "probe", "tuned"] = "auto"
    """candidate to publish where layers are trained. auto: the fine-tuned one if it is better
    beyond chance on the validation images, else the probe. The other one is kept in the run's
    folder, and finetune/publish.py publishes it later"""

    save_minutes: float = Field(10.0, ge=0, allow_inf_nan=False)
    """minutes between two saves of gradient epochs for --resume; they are also saved after every
    epoch"""

    explain: Literal["auto", "yes", "no"] = "auto"
    """show where the network looked in its worst mistakes (Grad-CAM), and thumbnails in
    TensorBoard's projector. auto: after gradient epochs only; a probe needs no torch, whose import
    takes seconds"""

    preflight: bool = False
    """before gradient epochs, check that one batch can be learnt and that the disk has room, and
    print the device and the expected time"""

    resume: Path | None = Field(None, exclude=True)
    """folder of a run that was stopped or killed: continue it under its own options"""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        return None if name is None else check_name(name)

    @field_validator("head_init")
    @classmethod
    def _check_head_init(cls, head_init: str) -> str:
        is_function = re.fullmatch(r"[\w.]+:\w+", head_init)
        if head_init not in ("soft", "probe", "zeros") and not is_function:
            raise ValueError("it must be soft, probe, zeros or package.module:function")
        return head_init

    @model_validator(mode="after")
    def _check_freeze_backbone(self) -> Self:
        """Options of gradient epochs need gradient epochs; a resumed run has options of its own."""
        if self.freeze != "backbone" or self.resume is not None:
            return self
        hint = "say --freeze until:NAME or none"
        if self.head_init not in ("soft", "probe"):
            raise ValueError(
                f"--head-init {self.head_init}: --freeze backbone solves the head and starts from "
                f"none; {hint}"
            )
        if self.publish == "tuned":
            raise ValueError(
                "--publish tuned: --freeze backbone trains no layers, so the probe is the only "
                f"candidate; {hint}"
            )
        reason = f"and --freeze backbone has none; {hint}"
        if self.preflight:
            raise ValueError(f"--preflight: it tries gradient epochs, {reason}")
        if self.balance == "sampler":
            raise ValueError(
                f"--balance sampler: it draws the batches of gradient epochs, {reason}, "
                "or --balance weights"
            )
        for name in _GRADIENT_OPTIONS:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(f"{flag_of(name)} {value}: it is for gradient epochs, {reason}")
        return self

    @model_validator(mode="after")
    def _check_int8(self) -> Self:
        if self.precision == "int8" and self.freeze != "backbone":
            raise ValueError(
                "--precision int8: only with --freeze backbone, where the head is solved on the "
                "quantised features"
            )
        return self

    @model_validator(mode="after")
    def _check_mix(self) -> Self:
        if self.mix in ("cutmix", "both") and self.freeze.startswith("until:") and self.cache:
            raise ValueError(
                f"--mix {self.mix}: it pastes pixels, and --freeze {self.freeze} trains on "
                f"activations kept at {self.freeze.removeprefix('until:')}; say --mix mixup, which "
                "blends activations too, or --no-cache, which runs the frozen layers in each epoch"
            )
        if self.mix != "none" and self.batch_size == 1:
            raise ValueError(
                f"--mix {self.mix}: it blends the images of a batch, and --batch-size 1 has only "
                "one; say 2 or more"
            )
        return self

    @property
    def uses_all_levels(self) -> bool:
        """Whether the probe may read more than the last level."""
        return self.levels == "auto"

    @property
    def first_head(self) -> str:
        """The head that gradient epochs begin with, as logs and the report call it."""
        names = {"soft": "a soft head", "probe": "the probe's head"}
        return names.get(self.head_init, f"the head of --head-init {self.head_init}")

    @property
    def explains(self) -> bool:
        """Whether mistakes are explained by Grad-CAM and the projector gets thumbnails."""
        return self.explain == "yes" or (self.explain == "auto" and self.freeze != "backbone")

    @property
    def model_name(self) -> str:
        """`name`, or one made from `data`."""
        return self.name or name_of_data(self.data)


class CompareOptions(SharedOptions):
    """Compare pretrained backbones on your images: accuracy of a probe against images/s here."""

    program = "python finetune/compare.py"

    backbones: str = "installed"
    """comma-separated timm names, or installed: all whose weights are in a package or in the hub's
    local cache"""


class AuditOptions(BackboneOptions):
    """Find broken and misnamed files, duplicates, leaks, wrong labels and outliers among images.

    It trains nothing and changes no image; it writes a CSV and a page of thumbnails.
    """

    program = "python finetune/audit.py"

    output: Path = Path("runs")
    """folder of the CSV and of the page of thumbnails"""

    min_images: int = Field(10, ge=1)
    """classes with fewer training images than this are reported"""


class PublishOptions(ProgramOptions):
    """Publish a candidate of a finished run that trained layers, as the next version of its model.

    Such a run has two candidates, the probe and the fine-tuned one. It published one of them and
    kept the other in its folder.
    """

    program = "python finetune/publish.py"
    positional = "run"

    run: Path
    """folder of the run"""

    which: Literal["probe", "tuned"]
    """candidate to publish"""

    repository: Path | None = None
    """folder in which the version is published; the run's own if not given"""

    new_labels: bool = False
    """publish although the newest version of this model has other labels"""


def flag_of(name: str) -> str:
    """`batch_size` → `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def name_of_data(data: str) -> str:
    """A model's name from `--data`: its last part in lower case, other characters as `-`.

    Raises GraftError where nothing is left.
    """
    last = data.rpartition(":")[2].rstrip("/")
    path = Path(last).resolve()
    stem = path.stem if last.endswith(".csv") else path.name
    name = "".join(
        char if char.isascii() and char.isalnum() else "-" for char in stem.lower()
    ).strip("-")
    if not name:
        raise GraftError(f"--data {data}: no name can be made from it with a-z and 0-9; say --name")
    return check_name(name[:63])
