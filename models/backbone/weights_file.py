"""What `--weights` names, and what a file is by its first bytes. Without torch, which is slow."""

from __future__ import annotations

from pathlib import Path

from models.errors import GraftError, describe_error

_SEPARATOR = "::"
_NUM_BYTES = 512
# What lies where weights should, by the first bytes in lower case, and what to do about it.
_FOREIGN = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights; `git lfs pull` fetches them"),
    (b"<!doctype html", "a web page (HTML), not weights; download the file itself"),
    (b"<html", "a web page (HTML), not weights; download the file itself"),
    (b"<?xml", "an XML answer, such as a storage server's error, not weights; download it again"),
    (b"{", "JSON, not weights; name the .safetensors or .pth file that it belongs to"),
    (b"\x89hdf\r\n", "an HDF5 file (Keras), not a state_dict of PyTorch"),
    (b"\x1f\x8b", "compressed by gzip; `gunzip` it first"),
    (b"\xfd7zxz", "compressed by xz; `unxz` it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; `unzstd` it first"),
)


class WeightsError(GraftError):
    """Pretrained weights that cannot be had, or that do not fit the network."""


def split_entry(weights: Path) -> tuple[Path, str]:
    """The file and the entry in it of `FILE` or `FILE::ENTRY`; the entry is "" where none is named.

    A file whose own name has `::` in it comes first.
    """
    if weights.exists():
        return weights, ""
    file, _, entry = str(weights).partition(_SEPARATOR)
    return Path(file), entry


def with_entry(path: Path, entry: str) -> str:
    """How `--weights` names `entry` of the file `path`."""
    return f"{path}{_SEPARATOR}{entry}"


def _describe_foreign(path: Path) -> str | None:
    """What `path` is instead of weights, and the way out; None where it may be weights.

    Raises OSError.
    """
    if path.is_dir():
        return "a folder; name the file of weights in it"
    with path.open("rb") as file:
        start = file.read(_NUM_BYTES)
    if not start:
        return "an empty file (0 bytes); copy or download it again"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for magic, what in _FOREIGN if text.startswith(magic)), None)


def check_weights_file(path: Path) -> None:
    """Raise WeightsError where `path`, by its first bytes, holds no weights."""
    try:
        foreign = _describe_foreign(path)
    except FileNotFoundError:
        raise WeightsError(f"{path}: there is no such weights file") from None
    except OSError as error:
        raise WeightsError(f"{path}: it cannot be read: {describe_error(error)}") from error
    if foreign is not None:
        raise WeightsError(f"{path}: it is {foreign}")


def is_safetensors(path: Path) -> bool:
    """Whether `path` is safetensors, by its name or its header: a length, then JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or start[8:] == b"{"
