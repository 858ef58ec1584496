"""The checkpoint: the folder that passes from fine-tuning to serving.

Nothing here needs torch, and nothing in the folder is a pickle. A repository is
`<root>/<name>/<version>/` with versions 1, 2, 3 …; a version is written whole or not at all, and
never changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from models.errors import GraftError, describe_error
from models.files import (
    check_writable,
    describe_write_error,
    make_readable,
    move_whole,
    remove_temporary,
    temporary_folder,
)
from models.image_folder import is_printable
from models.preprocess import Preprocess

# Of a head on the last level, and of one on all levels, which stands in a file of its own.
FORMAT_VERSIONS = (1, 2)
WEIGHTS_FILE = "model.safetensors"
LEVEL_HEAD_FILE = "head.safetensors"
CONFIG_FILE = "config.json"
GOLDEN_FILE = "golden.npz"
OPENVINO_FILE = "backbone.xml"
CARD_FILE = "README.md"
# A write takes seconds: a temporary folder of this age is what a killed one left.
_ABANDONED_SECONDS = 3600
_VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,8}")
# What asks every model, in the place of a name.
ALL_MODELS = "all"
ALL_IS_RESERVED = "model=all asks every model of a service; give this one another name"
_FINGERPRINT_PATTERN = re.compile(r"[0-9a-f]{64}")
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")

Array = np.ndarray[Any, Any]
# One class per image, or any number of labels per image; as `config.json` names them.
Task = Literal["single-label", "multi-label"]


class CheckpointError(GraftError):
    """A checkpoint that cannot be read, is incomplete, or gives other logits than at save time."""


class UnreadableError(CheckpointError):
    """Files that the system does not give now (EMFILE, ESTALE, EACCES): later it may."""


@dataclass(frozen=True)
class Golden:
    """Encoded images, and the logits `float32 [N,C]` (before temperature) of them at save time."""

    images: tuple[bytes, ...]
    logits: npt.NDArray[np.float32]


@dataclass(frozen=True)
class LevelHead:
    """A head on several levels: weight `[C,K]` for the first K columns of features, bias `[C]`."""

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: the head's arrays are read, the backbone is left to the engine.

    The head is the one that answers: that on all levels where there is one, else the network's own.
    """

    path: Path
    name: str
    version: int
    task: Task
    architecture: str
    label_names: tuple[str, ...]
    preprocess: Preprocess
    fingerprint: str
    temperature: float
    # Of the conformal sets: the coverage that was asked for, and the least score of a label in a
    # set. None in checkpoints without sets.
    coverage: float | None
    threshold: float | None
    # [C], the least score at which an image has a label; None in single-label checkpoints.
    thresholds: npt.NDArray[np.float32] | None
    head_weight: npt.NDArray[np.float32]  # [C,K], for the first K columns of features
    head_bias: npt.NDArray[np.float32]  # [C]
    golden: Golden
    metrics: Mapping[str, Any]
    engine: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def openvino_path(self) -> Path:
        return self.path / OPENVINO_FILE


def fingerprint(
    architecture: str,
    tensors: Mapping[str, Array],
    preprocess: Preprocess,
    engine_artefact: str = "float",
) -> str:
    """Hash a backbone: architecture, tensors (parameters and buffers), preprocess and artefact.

    `engine_artefact` is "float" where the tensors say it all, at any float precision; else the hash
    of the IR (a quantised backbone, a user's own network).
    """
    digest = hashlib.sha256()
    described = {
        "architecture": architecture,
        "preprocess": preprocess.to_dict(),
        "engine": engine_artefact,
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"\n{name} {tensor.dtype} {tensor.shape} ".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def list_names(repository: Path) -> list[str]:
    """The names of a repository's models that have at least one version, or cannot be read.

    Raises OSError where the repository itself cannot be read.
    """
    if not repository.is_dir():
        return []
    # Others are not looked into: lost+found of an ext4 volume is root's alone.
    names = (path.name for path in repository.iterdir() if NAME_PATTERN.fullmatch(path.name))
    return sorted(name for name in names if _may_have_versions(repository, name))


def list_versions(repository: Path, name: str) -> list[int]:
    """A model's published versions, in order; a version's folder that cannot be read is one.

    Raises OSError where the model's folder cannot be read.
    """
    folder = repository / name
    if not folder.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in folder.iterdir()
        if _VERSION_PATTERN.fullmatch(path.name) and _may_be_version(path)
    )


def _may_have_versions(repository: Path, name: str) -> bool:
    try:
        return bool(list_versions(repository, name))
    except OSError:
        return True


def _may_be_version(folder: Path) -> bool:
    try:
        return (folder / CONFIG_FILE).is_file()
    except OSError:
        return True


def check_name(name: str) -> str:
    """Return a name that can be a folder and a part of a URL; raise GraftError for any other."""
    if not NAME_PATTERN.fullmatch(name):
        raise GraftError(
            f"--name {name!r}: a model's name is 1 to 63 of a-z 0-9 _ . -, "
            "the first a letter or a digit"
        )
    if name == ALL_MODELS:
        raise GraftError(f"--name {name!r}: {ALL_IS_RESERVED}")
    return name


def check_repository(repository: Path, name: str, num_bytes: int = 0) -> None:
    """Raise GraftError where no version of `name` with `num_bytes` could be written.

    `publish` would say so at the end of a run; this is for its beginning.
    """
    try:
        check_writable(repository / name, num_bytes)
    except OSError as error:
        raise GraftError(
            f"--repository {repository}: {describe_error(error)}; name a folder that you can "
            "write to, with room for the checkpoint"
        ) from error


def publish(
    repository: Path,
    name: str,
    *,
    state: Mapping[str, Array],
    config: Mapping[str, Any],
    golden: Golden,
    level_head: LevelHead | None = None,
    write_engine: Callable[[Path], None],
    card: Callable[[int], str],
) -> Path:
    """Write a checkpoint as the next version of `name` and return its folder.

    `config` is the whole `config.json`; the hashes of the other files are added to its "graft"
    section. `level_head` is written beside the weights. `write_engine` writes the IR to the path
    that it is given; `card` gives the model card of a version. Raises GraftError where the disk is
    full or not writable; nothing is left then.
    """
    check_name(name)
    folder = repository / name
    try:
        with temporary_folder(folder) as temporary:
            remove_temporary(folder, older_than_seconds=_ABANDONED_SECONDS)
            save_file(dict(state), temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            if level_head is not None:
                head = {"weight": level_head.weight, "bias": level_head.bias}
                save_file(head, temporary / LEVEL_HEAD_FILE)
            _write_golden(temporary / GOLDEN_FILE, golden)
            write_engine(temporary / OPENVINO_FILE)
            hashes = {path.name: hash_file(path) for path in sorted(temporary.iterdir())}
            whole = {**config, "graft": {**config["graft"], "files": hashes}}
            (temporary / CONFIG_FILE).write_text(
                json.dumps(whole, indent=2) + "\n", encoding="utf-8"
            )
            version = (list_versions(repository, name) or [0])[-1] + 1
            (temporary / CARD_FILE).write_text(card(version), encoding="utf-8")
            # safetensors writes 0600, and the service may run as another user.
            for path in temporary.iterdir():
                make_readable(path)
            # Another run may have published this version meanwhile.
            while not move_whole(temporary, folder / str(version)):
                version += 1
                (temporary / CARD_FILE).write_text(card(version), encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise GraftError(
            f"the checkpoint could not be written to {folder}: "
            f"{describe_write_error(error, folder)}; nothing was published"
        ) from error
    return folder / str(version)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a version folder `<repository>/<name>/<version>`: format, hashes, head.

    Raises CheckpointError, and its UnreadableError where that is not the files' fault. The golden
    images are for `check_golden`, which needs an engine's logits.
    """
    try:
        checkpoint = _read(path)
        _check_shapes(checkpoint)
    except CheckpointError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        SafetensorError,
    ) as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
        may_pass = isinstance(error, OSError) and not is_missing
        raise (UnreadableError if may_pass else CheckpointError)(
            f"{path}: not a checkpoint that can be read: {type(error).__name__}: {error}"
        ) from error
    return checkpoint


def logits(checkpoint: Checkpoint, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The head's logits, before temperature: features `[B,F]` → `float32 [B,C]`."""
    columns = features[:, : checkpoint.head_weight.shape[1]]
    return np.asarray(columns @ checkpoint.head_weight.T + checkpoint.head_bias, np.float32)


def read_level_head(path: Path) -> LevelHead | None:
    """The head on all levels in a version's folder, None where there is none."""
    file = path / LEVEL_HEAD_FILE
    if not file.exists():
        return None
    tensors = load_file(file)
    return LevelHead(tensors["weight"], tensors["bias"])


def check_golden(checkpoint: Checkpoint, computed: npt.NDArray[np.float32]) -> None:
    """Raise CheckpointError unless `computed`, the golden images' logits now, are those of save
    time.

    Another CPU or precision moves logits a little (bf16 rounds at 2^-8); other weights or another
    preprocessing move them a lot. Names of labels that were swapped are not seen. The largest
    difference may be 5 % of the logits' spread. Of single-label logits each image's mean is left
    out, which softmax ignores.
    """
    expected, found = checkpoint.golden.logits, computed
    if checkpoint.task == "single-label":
        expected, found = (
            values - values.mean(axis=1, keepdims=True) for values in (expected, found)
        )
    spread = float(np.ptp(expected)) or 1.0
    drift = float(np.abs(expected - found).max()) / spread
    if not drift <= 0.05:
        raise CheckpointError(
            f"{checkpoint.path}: its golden images give other logits here than when it was saved "
            f"({drift:.0%} of their spread, 5% is allowed): its files or this "
            "machine's libraries do not fit; publish it again from the training run"
        )


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(path: Path) -> None:
    """Raise CheckpointError for what is no file: to read a pipe would wait without end."""
    for one in path.iterdir():
        if one.exists() and not one.is_file() and not one.is_dir():
            raise CheckpointError(
                f"{path}: {one.name} is a pipe, socket or device; put the file itself there"
            )


def _read(path: Path) -> Checkpoint:
    _check_files(path)
    config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    graft = config["graft"]
    _check_format(path, graft)
    with safe_open(path / WEIGHTS_FILE, framework="np") as tensors:
        head = LevelHead(
            tensors.get_tensor(f"{graft['head']}.weight"),
            tensors.get_tensor(f"{graft['head']}.bias"),
        )
    if graft["format_version"] == 2:
        head = read_level_head(path) or head
    coverage, threshold = _read_conformal(graft)
    task = _read_task(graft)
    return Checkpoint(
        path=path,
        name=path.parent.name,
        version=int(path.name),
        task=task,
        architecture=_read_text(config, "architecture"),
        label_names=_read_label_names(config),
        preprocess=Preprocess.from_dict(graft["preprocess"]),
        fingerprint=_read_fingerprint(graft),
        temperature=_read_temperature(graft),
        coverage=coverage,
        threshold=threshold,
        thresholds=_read_thresholds(graft) if task == "multi-label" else None,
        head_weight=head.weight,
        head_bias=head.bias,
        golden=_read_golden(path / GOLDEN_FILE),
        metrics=_read_section(graft, "metrics"),
        engine=_read_section(graft, "engine"),
        config=config,
    )


def _check_format(path: Path, graft: Mapping[str, Any]) -> None:
    if graft["format_version"] not in FORMAT_VERSIONS:
        raise CheckpointError(
            f"{path}: format {graft['format_version']}, this Graft reads the formats "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}"
        )
    for file_name, expected in graft["files"].items():
        if "/" in file_name or hash_file(path / file_name) != expected:
            raise CheckpointError(
                f"{path}: {file_name} is not the file that was published (its hash differs)"
            )


def _check_shapes(checkpoint: Checkpoint) -> None:
    num_classes, path = len(checkpoint.label_names), checkpoint.path
    head = checkpoint.head_weight.shape, checkpoint.head_bias.shape
    # The widths that the engine's features may be read in.
    sets = checkpoint.config.get("levels", {"last": checkpoint.config["num_features"]})
    if head not in [((num_classes, width), (num_classes,)) for width in sets.values()]:
        raise CheckpointError(
            f"{path}: the head is {checkpoint.head_weight.shape}, its labels are {num_classes}"
        )
    if checkpoint.thresholds is not None and checkpoint.thresholds.shape != (num_classes,):
        raise CheckpointError(
            f"{path}: there are {len(checkpoint.thresholds)} thresholds, "
            f"its labels are {num_classes}"
        )


def _read_text(section: Mapping[str, Any], name: str) -> str:
    value = section[name]
    if not isinstance(value, str) or not is_printable(value):
        raise ValueError(f"{name} is {_shown(value)}; it must be printable text")
    return value


def _read_label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config["label_names"]
    if not isinstance(names, list):
        raise ValueError(f"label_names is {_shown(names)}; it must be a list of names")
    for name in names:
        if not isinstance(name, str) or not is_printable(name):
            raise ValueError(f"label_names has {_shown(name)}; a name must be printable text")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"label_names has {_shown(twice[0])} more than once; each must be unique")
    return tuple(names)


def _read_fingerprint(graft: Mapping[str, Any]) -> str:
    value = graft["fingerprint"]
    if not isinstance(value, str) or not _FINGERPRINT_PATTERN.fullmatch(value):
        raise ValueError(f"fingerprint is {_shown(value)}; it must be 64 of 0-9 a-f")
    return value


def _read_temperature(graft: Mapping[str, Any]) -> float:
    temperature = float(graft["temperature"])
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be a number above 0")
    return temperature


def _read_section(graft: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part that is shown over HTTP."""
    section = graft[name]
    if not isinstance(section, dict):
        raise ValueError(f"{name} is {_shown(section)}; it must be a JSON object")
    try:
        json.dumps(section, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half of a surrogate pair, which is no text") from error
    return section


def _shown(value: object) -> str:
    return ascii(value)[:100]


def _read_conformal(graft: Mapping[str, Any]) -> tuple[float | None, float | None]:
    if "conformal" not in graft:
        return None, None
    coverage, threshold = (float(graft["conformal"][name]) for name in ("coverage", "threshold"))
    if not (0 < coverage < 1 and 0 <= threshold <= 1):
        raise ValueError(
            f"coverage {coverage} and threshold {threshold}; both must be fractions, from 0 to 1"
        )
    return coverage, threshold


def _read_task(graft: Mapping[str, Any]) -> Task:
    # The first checkpoints do not name their task.
    task: Task = graft.get("task", "single-label")
    if task not in get_args(Task):
        raise ValueError(f"task {task!r}; this Graft knows {' and '.join(get_args(Task))}")
    return task


def _read_thresholds(graft: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    thresholds = np.array(graft["thresholds"], np.float32)
    outside = thresholds[~((thresholds >= 0) & (thresholds <= 1))]
    if outside.size:
        raise ValueError(f"a threshold of {outside[0]:g}; it must be a fraction, from 0 to 1")
    return thresholds


def _write_golden(path: Path, golden: Golden) -> None:
    images = {
        f"image_{index}": np.frombuffer(image, np.uint8)
        for index, image in enumerate(golden.images)
    }
    with path.open("wb") as file:
        np.savez(file, logits=golden.logits, **images)  # type: ignore[arg-type]


def _read_golden(path: Path) -> Golden:
    with np.load(path, allow_pickle=False) as stored:
        images = tuple(stored[f"image_{index}"].tobytes() for index in range(len(stored.files) - 1))
        return Golden(images, stored["logits"])
