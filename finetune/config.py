"""Every option once: flag, YAML key, default, check and help text."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from models.allowed import describe_allowed
from models.checkpoint import check_name
from models.engine.engine import Precision
from models.engine.processor import num_cpus
from models.errors import GraftError


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graft"


class SharedOptions(BaseSettings):
    """What every program of this room is told about images, hardware and folders."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    config: Annotated[
        Path | None,
        Field(
            exclude=True, description="YAML file of options, such as a run's config.yaml; flags win"
        ),
    ] = None
    data: Annotated[
        str,
        Field(
            min_length=1,
            description="where the images are: a folder with train/ and val/ (and perhaps test/), a folder of class folders, a CSV with "
            "path,label[,split] (or path,labels[,split], several with | between), torchvision:NAME (such as "
            "torchvision:OxfordIIITPet), or digits",
        ),
    ] = "digits"
    data_root: Annotated[
        Path,
        Field(
            description="where torchvision:NAME keeps its files, and looks for them without a network"
        ),
    ] = Path("data")
    val_fraction: Annotated[
        float,
        Field(
            gt=0, lt=1, description="share of each class set aside where the data has no val split"
        ),
    ] = 0.2
    new_split: Annotated[
        bool,
        Field(
            exclude=True,
            description="draw train and val anew where the data has no val split; else images stay where the newest run on this data under "
            "--output had them, and only new ones are drawn",
        ),
    ] = False
    strict: Annotated[
        bool,
        Field(
            description="stop on an unreadable image, which is else left out, and on one that leaks from one split to another"
        ),
    ] = False
    image_size: Annotated[
        int | None,
        Field(
            ge=32, le=1024, description="side of the input crop in pixels; else the backbone's own"
        ),
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Field(description="where to train and compute features")
    ] = "auto"
    precision: Annotated[
        Precision,
        Field(
            description="of the engine; auto: bf16 where the hardware has it, else fp32. A run takes int8 (CPU) where it saves time and "
            "cross-validation loses at most 0.3 points by it, and fp32 where bf16 would lose more than 0.5"
        ),
    ] = "auto"
    workers: Annotated[int, Field(ge=1, description="threads that decode images")] = num_cpus()
    seed: Annotated[
        int, Field(ge=0, lt=2**32, description="of the split, the head and the order of the images")
    ] = 0
    output: Annotated[
        Path,
        Field(
            description="folder of run folders: metrics, TensorBoard logs, config.yaml, splits.csv"
        ),
    ] = Path("runs")
    cache_dir: Annotated[
        Path, Field(description="converted backbones and features are kept here between runs")
    ] = _default_cache_dir()
    cache_gb: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="features used longest ago are removed above this many gigabytes",
        ),
    ] = 20.0
    cache: Annotated[bool, Field(description="--no-cache computes everything anew")] = True

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and the file only: a shell's NAME or DATA must not become an option."""
        return (init_settings,)

    @property
    def source(self) -> str:
        """What `data` names, wherever it is said from."""
        return source_of(self.data, self.data_root)

    def to_yaml(self) -> str:
        """The options as `--config` reads them back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class BackboneOptions(SharedOptions):
    """Those of programs that work with one backbone."""

    backbone: Annotated[
        str,
        Field(
            description="a timm name (resnet18), or package.module:callable that returns an nn.Module, images to features"
        ),
    ] = "tf_efficientnet_lite0"
    weights: Annotated[
        Path | None,
        Field(
            description="pretrained state_dict, .safetensors or .pth; else from a package or the Hugging Face hub"
        ),
    ] = None
    pretrained: Annotated[
        bool, Field(description="--no-pretrained starts from random weights, knowingly")
    ] = True


class Options(BackboneOptions):
    """Fine-tune a pretrained backbone on labelled images and publish a checkpoint for the service.

    Without options it fits scikit-learn's handwritten digits on an embedded backbone, with no network.
    """

    model_config = SettingsConfigDict(cli_prog_name="python finetune/run.py")

    freeze: Annotated[
        str,
        Field(
            description="backbone: only the head trains, in seconds. until:NAME: all up to and including module NAME stays. "
            "none: all of it trains"
        ),
    ] = "backbone"
    epochs: Annotated[
        int, Field(ge=1, description="gradient epochs, where something besides the head trains")
    ] = 5
    batch_size: Annotated[int, Field(ge=1, description="images per gradient step")] = 32
    lr: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="peak learning rate of the head")
    ] = 1e-3
    backbone_lr: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="peak learning rate of the backbone")
    ] = 5e-4
    weight_decay: Annotated[
        float,
        Field(
            ge=0, allow_inf_nan=False, description="AdamW's, on weights but not on biases and norms"
        ),
    ] = 0.05
    batch_norm: Annotated[
        Literal["keep", "update"],
        Field(
            description="statistics of BatchNorm layers that train: keep the pretrained ones, as the solved head expects, or update them "
            "(for images far from the pretraining's, with large batches)"
        ),
    ] = "keep"
    balance: Annotated[
        Literal["none", "weights", "sampler"],
        Field(
            description="for uneven classes. weights: the loss weighs each class the same, the probe's too. sampler: gradient epochs draw "
            "them equally often, and the probe is weighted"
        ),
    ] = "none"
    label_smoothing: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="part of every label that gradient epochs spread over all classes; 0: off",
        ),
    ] = 0.0
    mix: Annotated[
        Literal["none", "mixup", "cutmix", "both"],
        Field(
            description="gradient epochs learn from blends of two images and of their labels. mixup: one fades into the other (or their "
            "activations do, where they are kept at the freeze boundary). cutmix: a part of one is pasted into the other. both: by turns"
        ),
    ] = "none"
    ema: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="decay of a moving average of the weights over the steps, such as 0.99: the average is validated and published; "
            "0: off",
        ),
    ] = 0.0
    gradual: Annotated[
        int,
        Field(
            ge=0,
            description="of what is not frozen, head and last stage train first, and every so many epochs the stage before them joins; 0: "
            "all of it from the start",
        ),
    ] = 0
    layer_decay: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="rate of each stage of the backbone over that of the next one, such as 0.7; 1: all have the same",
        ),
    ] = 1.0
    head_init: Annotated[
        str,
        Field(
            description="what the head is when gradient epochs begin. soft: solved as the probe's, but held so short that it leaves the "
            "layers below something to learn. probe: as the probe solved it. zeros: nothing. package.module:function: as your function "
            "leaves it, which nn.Module.apply calls with it"
        ),
    ] = "soft"
    augment: Annotated[
        Literal["none", "light", "flip"],
        Field(
            description="light: shifted and scaled crops. flip: mirrored too (not for digits or letters). none: the plain crop"
        ),
    ] = "light"
    views: Annotated[
        int,
        Field(
            ge=1,
            description="augmented views of each training image that are computed once and learnt from, by the probe too; 1: the plain "
            "crop (and for training past the probe, as many as there are epochs, four at most)",
        ),
    ] = 1
    coverage: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="the service marks an answer unsure where the labels that would hold the true one this often are none or several",
        ),
    ] = 0.95
    name: Annotated[
        str | None,
        Field(description="the model's name in the repository; else made from the data's"),
    ] = None
    repository: Annotated[
        Path, Field(description="where the checkpoint is published, as <name>/<version>")
    ] = Path("checkpoints")
    publish: Annotated[
        Literal["auto", "probe", "tuned"],
        Field(
            description="which candidate is published where layers were trained. auto: the tuned one where it is "
            "better beyond chance on the validation images, else the probe. The other is kept in the run's folder; "
            "finetune/publish.py publishes it later"
        ),
    ] = "auto"
    save_minutes: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="gradient epochs are saved for --resume this often, and after each epoch",
        ),
    ] = 10.0
    explain: Annotated[
        Literal["auto", "yes", "no"],
        Field(
            description="pictures of where the network looked for its worst mistakes (Grad-CAM), and thumbnails in TensorBoard's "
            "projector. auto: after gradient epochs; a probe would take seconds longer, for it needs no torch"
        ),
    ] = "auto"
    preflight: Annotated[
        bool,
        Field(
            description="before gradient epochs: must one batch be learnt, is there disk enough, on which device, and how long will it take"
        ),
    ] = False
    resume: Annotated[
        Path | None,
        Field(
            exclude=True,
            description="folder of a run that was stopped or killed: goes on with it under its own options",
        ),
    ] = None

    @field_validator("name")
    @classmethod
    def _name_fits_a_folder(cls, name: str | None) -> str | None:
        return None if name is None else check_name(name)

    @field_validator("head_init")
    @classmethod
    def _head_init_is_known(cls, head_init: str) -> str:
        if head_init not in ("soft", "probe", "zeros") and not re.fullmatch(
            r"[\w.]+:\w+", head_init
        ):
            raise ValueError("it must be soft, probe, zeros or package.module:function")
        return head_init

    @model_validator(mode="after")
    def _head_init_has_epochs_to_begin(self) -> Self:
        if (
            self.head_init not in ("soft", "probe")
            and self.freeze == "backbone"
            and self.resume is None
        ):
            raise ValueError(
                f"--head-init {self.head_init}: --freeze backbone solves the head, from no beginning; say --freeze until:NAME or none"
            )
        return self

    @model_validator(mode="after")
    def _int8_fits_the_policy(self) -> Self:
        if self.precision == "int8" and self.freeze != "backbone":
            raise ValueError(
                "--precision int8: only with --freeze backbone, where the head is solved on the quantised features"
            )
        return self

    @model_validator(mode="after")
    def _tuned_candidate_needs_trained_layers(self) -> Self:
        if self.publish == "tuned" and self.freeze == "backbone" and self.resume is None:
            raise ValueError(
                "--publish tuned: --freeze backbone trains no layers, so the probe is the only candidate; "
                "say --freeze until:NAME or none"
            )
        return self

    @model_validator(mode="after")
    def _gradient_epochs_are_there_where_they_are_spoken_of(self) -> Self:
        if self.freeze != "backbone" or self.resume is not None:
            return self
        way_out = "--freeze backbone has none; say --freeze until:NAME or none"
        if self.preflight:
            raise ValueError(f"--preflight: it tries gradient epochs, and {way_out}")
        if self.balance == "sampler":
            raise ValueError(
                f"--balance sampler: it draws the batches of gradient epochs, and {way_out}, or --balance weights"
            )
        for name in ("label_smoothing", "mix", "ema", "gradual", "layer_decay"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{_flag(name)} {getattr(self, name)}: it is for gradient epochs, and {way_out}"
                )
        return self

    @model_validator(mode="after")
    def _there_is_something_to_mix(self) -> Self:
        if self.mix in ("cutmix", "both") and self.freeze.startswith("until:") and self.cache:
            raise ValueError(
                f"--mix {self.mix}: it pastes pixels, and --freeze {self.freeze} learns from activations kept at {self.freeze[6:]}; "
                "say --mix mixup, which blends activations too, or --no-cache, which runs the frozen layers anew in each epoch"
            )
        if self.mix != "none" and self.batch_size == 1:
            raise ValueError(
                f"--mix {self.mix}: it blends the images of a batch, and --batch-size 1 has only one; say 2 or more"
            )
        return self

    @property
    def first_head(self) -> str:
        """What gradient epochs begin with, in words."""
        return {"soft": "a soft head", "probe": "the probe's head"}.get(
            self.head_init, f"the head of --head-init {self.head_init}"
        )

    @property
    def explains(self) -> bool:
        """Whether seconds are spent on pictures of where the network looked, and on thumbnails."""
        return self.explain == "yes" or (self.explain == "auto" and self.freeze != "backbone")

    @property
    def model_name(self) -> str:
        """`name`, or one made from the data: its last part in lower case, other characters as `-`."""
        return self.name or name_of_data(self.data)


class CompareOptions(SharedOptions):
    """Compare pretrained backbones on your images: cross-validated accuracy of a probe against speed on this machine."""

    model_config = SettingsConfigDict(cli_prog_name="python finetune/compare.py")

    backbones: Annotated[
        str,
        Field(
            description="comma-separated timm names, or installed: all whose weights a package or the hub's local cache has"
        ),
    ] = "installed"


class AuditOptions(BackboneOptions):
    """Look for what is wrong with labelled images: broken and misnamed files, duplicates within and across splits, wrong labels, odd ones.

    It trains nothing, changes no image, and leaves a CSV and a page of thumbnails.
    """

    model_config = SettingsConfigDict(cli_prog_name="python finetune/audit.py")

    output: Annotated[
        Path, Field(description="folder of the CSV and of the page of thumbnails")
    ] = Path("runs")
    min_images: Annotated[
        int, Field(ge=1, description="a class with fewer images than this in train is named")
    ] = 10


def source_of(data: str, data_root: Path) -> str:
    """What `--data` names, by its whole path or, where it is none, together with the folder that keeps its files."""
    path = Path(data).expanduser()
    return str(path.resolve()) if path.exists() else f"{data} {data_root.resolve()}"


def name_of_data(data: str) -> str:
    """A model's name made from `--data`: its last part in lower case, other characters as `-`."""
    last = data.rpartition(":")[2].rstrip("/")
    stem = Path(last).resolve().stem if last.endswith(".csv") else Path(last).resolve().name
    made = "".join(
        char if char.isascii() and char.isalnum() else "-" for char in stem.lower()
    ).strip("-")
    if not made:
        raise GraftError(f"--data {data}: no name can be made from it with a-z and 0-9; say --name")
    return check_name(made[:63])


AnyOptions = TypeVar("AnyOptions", bound=SharedOptions)


def parse_options(kind: type[AnyOptions], arguments: list[str]) -> AnyOptions:
    """Options of a kind from flags, over those of `--config FILE` (the config.yaml of a run), over the defaults.

    Raises GraftError with every option that is wrong; `--help` prints and exits as usual.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", type=Path)
    try:
        config_path = finder.parse_known_args(arguments)[0].config
        from_file = {} if config_path is None else _read_config(kind, config_path)
        return CliApp.run(kind, cli_args=arguments, cli_exit_on_error=False, **from_file)
    except ValidationError as error:
        raise GraftError(
            "\n".join(_describe(kind, problem) for problem in error.errors())
        ) from None
    except (SettingsError, argparse.ArgumentError) as error:
        raise GraftError(
            _describe_flag(kind, str(error).removeprefix("error parsing CLI: "))
        ) from None


def _read_config(kind: type[SharedOptions], path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise GraftError(
            f"--config {path}: {error.strerror}; it takes a YAML file, such as the config.yaml of a run"
        ) from error
    except UnicodeDecodeError as error:
        raise GraftError(
            f"--config {path}: it is not text in UTF-8; it takes a YAML file, such as the config.yaml of a run"
        ) from error
    except yaml.YAMLError as error:
        raise GraftError(f"--config {path}: not YAML that can be read: {error}") from error
    if not isinstance(loaded, dict):
        raise GraftError(
            f"--config {path}: it must hold one `option: value` a line, as the config.yaml of a run does"
        )
    unknown = sorted(str(key) for key in loaded if key not in kind.model_fields)
    if unknown:
        raise GraftError(
            f"--config {path}: unknown options {', '.join(unknown)}; known are {', '.join(kind.model_fields)}"
        )
    return loaded


def _describe(kind: type[SharedOptions], problem: Any) -> str:
    """A value that does not fit, in the house's words."""
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    flag = _flag(name)
    if problem["type"] == "value_error":
        return message if message.startswith(flag) else f"{flag} {problem['input']}: {message}"
    if problem["type"] == "string_too_short":
        return f"{flag} {problem['input']!r}: it must not be empty"
    return f"{flag} {problem['input']}: it must be {describe_allowed(kind.model_fields[name])}"


def _describe_flag(kind: type[SharedOptions], message: str) -> str:
    """What argparse says of flags that it cannot take apart, with the way out."""
    if message.startswith("unrecognized arguments: "):
        words = message.split()[2:]
        unknown = [word.partition("=")[0] for word in words if word.startswith("-")]
        if not unknown:
            return f"{words[0]}: it belongs to no option; options are given as --name VALUE, --help lists them"
        switches = [
            f"no_{name}" for name, field in kind.model_fields.items() if field.annotation is bool
        ]
        known = [_flag(name) for name in (*kind.model_fields, *switches)]
        return "\n".join(
            f"{flag}: there is no such option; {_guess(flag, known)}--help lists them"
            for flag in unknown
        )
    if found := re.match(r"argument --([\w-]+)(/\S+)?: (.*)", message):
        name = found[1].replace("-", "_")
        if found[2]:
            return f"--{found[1]}: it takes no value; say --{found[1]} or {found[2][1:]}"
        return f"--{found[1]}: it needs a value, {describe_allowed(kind.model_fields[name])}"
    return f"{message}; --help lists the options"


def _guess(flag: str, known: list[str]) -> str:
    close = [other for other in known if other.startswith(flag)] or difflib.get_close_matches(
        flag, known, n=1, cutoff=0.7
    )
    return f"did you mean {close[0]}? " if close else ""


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
