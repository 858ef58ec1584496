"""What a run keeps so that it can be resumed, and how its options, images and curves are restored.

In the run's folder, `state/run.json` holds what was chosen before the training (which image is in
which split, the engine's precision), `state/training.safetensors` the gradient epochs
(`finetune/training/state.py`), and activations kept at the freeze boundary lie beside them. All of
it is removed when the run is done. Features and probe are not kept: they are in the cache, or are
computed again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune.command_line import parse_options
from finetune.config import Options
from finetune.data.splits import Sample, Splits
from models.checkpoint import CONFIG_FILE, list_versions
from models.errors import GraftError, describe_error, join_first
from models.files import remove_temporary, write_whole
from models.sources import SplitName

logger = logging.getLogger("graft.resume")

STATE_DIR = "state"
TRAINING_FILE = "training.safetensors"
METADATA_KEY = "graft"
_RUN_FILE = "run.json"
_LOCK_FILE = "lock"
_EVENT_FILES = "events.out.tfevents.*"
_KEPT = {
    "id",
    "folder",
    "fixed",
    "precision",
    "reason",
    "label_names",
    "splits",
    "unreadable",
    "digests",
}
# Flags that --resume takes: they change how long a run takes and what it needs, not its result.
_CHANGEABLE_OPTIONS = {"workers", "save_minutes", "cache_gb", "explain", "new_labels"}
# Where images are now: `restore_splits` finds them there, `keep_choices` compares digests.
_MOVABLE_OPTIONS = {"data", "data_root"}
# Options that may differ in a resumed run's config.yaml: no gradient step depends on them. The
# precision is fixed as it was resolved, the images as they are.
_FREE_OPTIONS = _CHANGEABLE_OPTIONS | {
    "data",
    "data_root",
    "val_fraction",
    "strict",
    "device",
    "precision",
    "output",
    "cache_dir",
    "cache",
    "coverage",
    "name",
    "repository",
    "preflight",
    "publish",
}


class ImagesGoneError(GraftError):
    """Images of the run are not where they were; the message has the ways out."""


@dataclass(frozen=True)
class Choices:
    """What a run chose before it trained: images, readable ones, precision and its reason.

    `fixed` are the options that must stay the same, as they were given; `digests` of the images'
    bytes are by their keys.
    """

    fixed: Mapping[str, Any]
    loaded: Splits
    readable: Splits
    precision: str
    reason: str
    digests: Mapping[str, bytes] = field(default_factory=dict)


def read_options(given: Options) -> Options:
    """The options of the run in `given.resume`, with what `given` may change.

    Relative paths mean what they meant then: the process changes to the folder in which the run was
    started. Raises GraftError where the folder is not a run's, where the run is done, and for every
    other option that differs.
    """
    assert given.resume is not None
    run_dir = given.resume
    if not run_dir.is_dir():
        raise GraftError(
            f"--resume {run_dir}: there is no such folder; it takes that of a run, such as "
            "runs/digits-20261123-045110"
        )
    if not (run_dir / "config.yaml").is_file():
        raise GraftError(
            f"--resume {run_dir}: no config.yaml in it; it takes the folder of a run, such as "
            "runs/digits-20261123-045110"
        )
    if (run_dir / "metrics.json").is_file():
        raise GraftError(
            f"--resume {run_dir}: that run is done, its results are in metrics.json; --config "
            f"{run_dir}/config.yaml repeats it"
        )
    its_own = parse_options(Options, ["--config", str(run_dir / "config.yaml")])
    contradictions = [
        f"--{name.replace('_', '-')} {getattr(given, name)}: the run in {run_dir} has "
        f"{getattr(its_own, name)}, and a resumed run goes on as it began; leave the flag out, or "
        "begin another run"
        for name in sorted(
            given.model_fields_set - {"resume"} - _CHANGEABLE_OPTIONS - _MOVABLE_OPTIONS
        )
        if getattr(given, name) != getattr(its_own, name)
    ]
    if contradictions:
        raise GraftError("\n".join(contradictions))
    changes = {name: getattr(given, name) for name in given.model_fields_set & _CHANGEABLE_OPTIONS}
    changes |= _read_moved(given, its_own)
    resumed = its_own.model_copy(update={**changes, "resume": run_dir.resolve()})
    kept = _read_kept(run_dir)
    if kept is None:
        logger.info("resuming %s: it ended before its training, and begins again", run_dir)
        return resumed
    logger.info("resuming %s", run_dir)
    check_fixed(run_dir, kept["fixed"], fix_options(its_own.model_dump(mode="json")))
    home = Path(kept["folder"])
    if home != Path.cwd() and home.is_dir():
        logger.info("relative paths are those of %s, where the run was started", home)
        os.chdir(home)
    return resumed.model_copy(update={"precision": kept["precision"]})


def _read_moved(given: Options, its_own: Options) -> dict[str, Any]:
    """Options of a run whose images lie elsewhere now: absolute, as the process changes folder."""
    moved: dict[str, Any] = {
        name: getattr(given, name) for name in given.model_fields_set & _MOVABLE_OPTIONS
    }
    if "data_root" in moved:
        moved["data_root"] = moved["data_root"].resolve()
    if "data" in moved:
        path = Path(moved["data"]).expanduser()
        if path.exists():
            moved["data"] = str(path.resolve())
        # The model is still the one that the run began.
        moved["name"] = its_own.model_name
    return moved


def restore_splits(run_dir: Path, splits: Splits, data: str | None = None) -> Splits | None:
    """The run's own splits, of the images in `splits`; None where it had not kept them.

    `data` is where they lie now, if elsewhere than when the run began; they keep their keys of
    then. Raises GraftError where an image is gone. Images that are new in the data are left out.
    """
    kept = _read_kept(run_dir)
    if kept is None:
        return None
    key_then = _keys_then(run_dir, data)
    images = {
        key_then(sample.key): sample.image for _, samples in splits.named() for sample in samples
    }
    gone = [key for split in kept["splits"].values() for key, *_ in split if key not in images]
    if gone:
        raise ImagesGoneError(
            f"--resume {run_dir}: images of the run are gone: {join_first(gone)}; bring them "
            "back, say --data NEW where they have moved, or begin another run"
        )

    def restore(split: SplitName) -> tuple[Sample, ...]:
        return tuple(
            Sample(key, splits.task.restore(label), images[key])
            for key, label in kept["splits"][split]
        )

    label_names = tuple(kept["label_names"])
    return replace(
        splits,
        label_names=label_names,
        train=restore("train"),
        val=restore("val"),
        test=restore("test"),
    )


def _keys_then(run_dir: Path, data: str | None) -> Callable[[str], str]:
    """Gives an image's key when the run began; a folder's keys begin with its path."""
    if data is None:
        return str
    its_own = parse_options(Options, ["--config", str(run_dir / "config.yaml")])
    now, then = (str(Path(each).expanduser()) for each in (data, its_own.data))
    return lambda key: then + key.removeprefix(now) if key.startswith(f"{now}/") else key


def keep_choices(run_dir: Path, choices: Choices) -> str:
    """Keep what a run chose before it trains; gives the first process's reason for the precision.

    Raises GraftError where a resumed run's images differ from those kept.
    """
    readable = {sample.key for _, samples in choices.readable.named() for sample in samples}
    unreadable = sorted(
        {sample.key for _, samples in choices.loaded.named() for sample in samples} - readable
    )
    digests = {key: digest.hex() for key, digest in choices.digests.items()}
    kept = _read_kept(run_dir)
    if kept is None:
        names: tuple[SplitName, ...] = ("train", "val", "test")
        chosen = {
            "id": uuid.uuid4().hex,
            "folder": str(Path.cwd()),
            "fixed": choices.fixed,
            "precision": choices.precision,
            "reason": choices.reason,
            "label_names": choices.loaded.label_names,
            "splits": {
                name: [[sample.key, sample.label] for sample in getattr(choices.loaded, name)]
                for name in names
            },
            "unreadable": unreadable,
            "digests": digests,
        }
        _write(run_dir / STATE_DIR / _RUN_FILE, json.dumps(chosen))
        return choices.reason
    if kept["unreadable"] != unreadable:
        changed = sorted(set(unreadable) ^ set(kept["unreadable"]))[0]
        raise GraftError(
            f"--resume {run_dir}: {changed}: whether it can be read has changed since the run "
            "began; put it back as it was"
        )
    if changed := sorted(
        key for key, digest in kept["digests"].items() if digests.get(key) != digest
    ):
        raise GraftError(
            f"--resume {run_dir}: images have changed since the run began: {join_first(changed)}; "
            "put them back as they were, or begin another run"
        )
    return str(kept["reason"])


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Lock a run for this process alone. Raises GraftError while another process has the lock."""
    folder = run_dir / STATE_DIR
    try:
        folder.mkdir(exist_ok=True)
        file = (folder / _LOCK_FILE).open("w")
    except OSError as error:
        raise GraftError(
            f"{folder}: {describe_error(error)}; a run must be able to write to its folder"
        ) from error
    with file:
        try:
            # A record lock: a `flock` would be held by a killed run's decoding processes, which
            # outlive it by seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise GraftError(
                    f"{run_dir}: another process is at work on this run; wait for it, or stop it"
                ) from None
            logger.warning(
                "%s: its file system has no locks (%s): do not resume this run while it runs",
                run_dir,
                error.strerror,
            )
        remove_temporary(run_dir)
        remove_temporary(folder)
        yield


def trim_events(run_dir: Path) -> None:
    """Cut the event files back to where the state was saved, so that no step is in them twice."""
    sizes: Mapping[str, int] = _read_saved(run_dir, "events", {})
    for events in run_dir.glob(_EVENT_FILES):
        if events.name not in sizes:
            events.unlink()
        elif events.stat().st_size > sizes[events.name]:
            os.truncate(events, sizes[events.name])


def seconds_trained(run_dir: Path) -> float:
    """The seconds that earlier processes spent on the run's gradient epochs, by the saved state."""
    progress = _read_saved(run_dir, "progress", {})
    return float(progress.get("seconds_trained", 0))


def _read_saved(run_dir: Path, name: str, default: Any) -> Any:
    """A part of the training state that is not a tensor; `default` where it cannot be read."""
    path = run_dir / STATE_DIR / TRAINING_FILE
    if path.exists():
        with (
            contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, TypeError),
            safe_open(path, framework="np") as file,
        ):
            return json.loads(file.metadata()[METADATA_KEY])[name]
    return default


def event_sizes(run_dir: Path) -> dict[str, int]:
    """Flush the event files of a run to disk; gives their sizes in bytes, by name."""
    sizes = {}
    for path in run_dir.glob(_EVENT_FILES):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            sizes[path.name] = os.fstat(file.fileno()).st_size
    return sizes


def find_published(
    repository: Path, model_name: str, run_id: str | None, candidate: str | None = None
) -> Path | None:
    """The newest version that the run with this id published, of one candidate or any."""
    if run_id is None:
        return None
    for version in reversed(list_versions(repository, model_name)):
        path = repository / model_name / str(version)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            graft = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))["graft"]
            # Graft 0.1 named no candidate.
            is_candidate = candidate in (None, graft.get("candidate", candidate))
            if graft.get("run_id") == run_id and is_candidate:
                return path
    return None


def read_id(run_dir: Path) -> str | None:
    """The run's own id, whatever its folder is called; None before `keep_choices`."""
    kept = _read_kept(run_dir)
    return None if kept is None else str(kept["id"])


def fix_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of all options as JSON values, those that a resumed run must not change, by their flags."""
    return {
        f"--{name.replace('_', '-')}": value
        for name, value in values.items()
        if name not in _FREE_OPTIONS
    }


def check_fixed(
    run_dir: Path, then: Mapping[str, Any], now: Mapping[str, Any], otherwise: str = ""
) -> None:
    """Raise GraftError for the first value that is not what it was; `otherwise` adds a way out."""
    for name, value in now.items():
        if then.get(name) != value:
            raise GraftError(
                f"--resume {run_dir}: {name} was {then.get(name)} when the run began, and is "
                f"{value} now; put it back (an option in {run_dir / 'config.yaml'}), or begin "
                f"another run{otherwise}"
            )


def is_resumable(run_dir: Path) -> bool:
    return (run_dir / STATE_DIR / TRAINING_FILE).is_file()


def remove_state(run_dir: Path) -> None:
    shutil.rmtree(run_dir / STATE_DIR, ignore_errors=True)


def resume_command(run_dir: Path) -> str:
    """The command that goes on with a run."""
    script = Path(__file__).with_name("run.py")
    typed = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return shlex.join([Path(sys.executable).name, str(typed), "--resume", str(run_dir)])


def _read_kept(run_dir: Path) -> Any | None:
    path = run_dir / STATE_DIR / _RUN_FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(kept, dict) or not kept.keys() >= _KEPT:
            raise ValueError("its entries are not those of a run")
        return kept
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise GraftError(
            f"{path}: it cannot be read: {error}; remove {path.parent}, and --resume begins again"
        ) from error


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise GraftError(f"{path}: it cannot be written: {error.strerror}") from error
