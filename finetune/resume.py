"""A run that ended before its time → its options, its images and its place in the curves; and what a run keeps so that this can be done.

In the run's folder, `state/run.json` holds what was chosen before the training (which image is in which split, the engine's precision),
`state/training.safetensors` the gradient epochs (`finetune/training/state.py`), and activations kept at the freeze boundary lie beside them. All
of it goes when the run is done. What is not kept is in the cache, or is computed again: features and probe.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune.config import Options, parse_options
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
# Flags that --resume takes: they change how long a run takes and what it needs, not what it comes to.
_CHANGEABLE_OPTIONS = {"workers", "save_minutes", "cache_gb", "explain"}
# What may be another in a resumed run's config.yaml, for no gradient step depends on it. The precision is fixed as it was resolved, the
# images as they are.
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
}


@dataclass(frozen=True)
class Choices:
    """What a run chose before it trained: its images, those that could be read, and the engine's precision with its reason.

    `digests` of the images' bytes are by their keys; `options` are as they were given.
    """

    options: Options
    loaded: Splits
    readable: Splits
    precision: str
    reason: str
    digests: Mapping[str, bytes] = field(default_factory=dict)


def read_options(options: Options) -> Options:
    """The options of the run in `options.resume`, which says no more than this but for what changes no outcome.

    Relative paths mean what they meant then: the process goes to the folder in which the run was started.
    Raises GraftError where the folder is no run's, where the run is done, and for every flag that contradicts it.
    """
    assert options.resume is not None
    run_dir = options.resume
    if not (run_dir / "config.yaml").is_file():
        raise GraftError(
            f"--resume {run_dir}: no config.yaml in it; it takes the folder of a run, such as runs/digits-20261123-045110"
        )
    if (run_dir / "metrics.json").is_file():
        raise GraftError(
            f"--resume {run_dir}: that run is done, its metrics.json says how; --config {run_dir}/config.yaml repeats it"
        )
    its_own = parse_options(Options, ["--config", str(run_dir / "config.yaml")])
    contradictions = [
        f"--{name.replace('_', '-')} {getattr(options, name)}: the run in {run_dir} has {getattr(its_own, name)}, and a resumed run goes "
        "on as it began; leave the flag out, or begin another run"
        for name in sorted(options.model_fields_set - {"resume"} - _CHANGEABLE_OPTIONS)
        if getattr(options, name) != getattr(its_own, name)
    ]
    if contradictions:
        raise GraftError("\n".join(contradictions))
    changes = {
        name: getattr(options, name) for name in options.model_fields_set & _CHANGEABLE_OPTIONS
    }
    resumed = its_own.model_copy(update={**changes, "resume": run_dir.resolve()})
    kept = _read_kept(run_dir)
    if kept is None:
        logger.info("resuming %s: it had not come to its training, and begins again", run_dir)
        return resumed
    logger.info("resuming %s", run_dir)
    check_fixed(run_dir, kept["fixed"], fix_options(its_own))
    home = Path(kept["folder"])
    if home != Path.cwd() and home.is_dir():
        logger.info("relative paths are those of %s, where the run was started", home)
        os.chdir(home)
        sys.path.append(str(home))  # the user's own modules
    return resumed.model_copy(update={"precision": kept["precision"]})


def restore_splits(run_dir: Path, splits: Splits) -> Splits | None:
    """The run's own splits, from the images that its data has now; None where it had kept none.

    Raises GraftError where an image is gone. What is new in the data is left out.
    """
    kept = _read_kept(run_dir)
    if kept is None:
        return None
    images = {sample.key: sample.image for _, samples in splits.named() for sample in samples}
    gone = [key for split in kept["splits"].values() for key, *_ in split if key not in images]
    if gone:
        raise GraftError(
            f"--resume {run_dir}: images of the run are gone: {join_first(gone)}; bring them back, or begin another run"
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


def keep_choices(run_dir: Path, choices: Choices) -> str:
    """Keep what a run chose before it trains, and give the reason of its precision; a resumed run's must be what they were.

    Raises GraftError where they are not.
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
            "fixed": fix_options(choices.options),
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
            f"--resume {run_dir}: {changed}: whether it can be read has changed since the run began; put it back as it was"
        )
    if changed := sorted(
        key for key, digest in kept["digests"].items() if digests.get(key) != digest
    ):
        raise GraftError(
            f"--resume {run_dir}: images have changed since the run began: {join_first(changed)}; put them back as they were, or begin "
            "another run"
        )
    return str(kept["reason"])


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold a run's state folder for this process alone. Raises GraftError while another one does."""
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
            # A record lock, not `flock`: a killed run's decoding processes, which outlive it by seconds, would hold that.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise GraftError(
                f"{run_dir}: another process is at work on this run; wait for it, or stop it"
            ) from None
        remove_temporary(run_dir)
        remove_temporary(folder)
        yield


def trim_events(run_dir: Path) -> None:
    """Cut the event files back to where the saved state was written, so that steps that come again are not there twice."""
    sizes: Mapping[str, int] = _read_saved(run_dir, "events", {})
    for events in run_dir.glob(_EVENT_FILES):
        if events.name not in sizes:
            events.unlink()
        elif events.stat().st_size > sizes[events.name]:
            os.truncate(events, sizes[events.name])


def seconds_trained(run_dir: Path) -> float:
    """By the saved state, what all processes before this one have spent on its gradient epochs."""
    progress = _read_saved(run_dir, "progress", {})
    return float(progress.get("seconds_trained", 0))


def _read_saved(run_dir: Path, name: str, default: Any) -> Any:
    """A part of the training's state that is no tensor; a file that cannot be read is told of when its tensors are."""
    path = run_dir / STATE_DIR / TRAINING_FILE
    if path.exists():
        with (
            contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, TypeError),
            safe_open(path, framework="np") as file,
        ):
            return json.loads(file.metadata()[METADATA_KEY])[name]
    return default


def event_sizes(run_dir: Path) -> dict[str, int]:
    """The event files of a run and their sizes in bytes, which are then on disk for good."""
    sizes = {}
    for path in run_dir.glob(_EVENT_FILES):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            sizes[path.name] = os.fstat(file.fileno()).st_size
    return sizes


def find_published(options: Options, run_dir: Path) -> Path | None:
    """The checkpoint that a run had published before it was stopped."""
    run_id = read_id(run_dir)
    for version in reversed(list_versions(options.repository, options.model_name)):
        path = options.repository / options.model_name / str(version)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if (
                run_id is not None
                and json.loads((path / CONFIG_FILE).read_text())["graft"].get("run_id") == run_id
            ):
                return path
    return None


def read_id(run_dir: Path) -> str | None:
    """What tells a run from every other, wherever its folder is and whatever its name; None before `keep_choices`."""
    kept = _read_kept(run_dir)
    return None if kept is None else str(kept["id"])


def fix_options(options: Options) -> dict[str, Any]:
    """By their flags, the options that shape a run's outcome: one half of one kind and half of another would be neither."""
    values = options.model_dump(mode="json")
    return {
        f"--{name.replace('_', '-')}": value
        for name, value in values.items()
        if name not in _FREE_OPTIONS
    }


def check_fixed(
    run_dir: Path, then: Mapping[str, Any], now: Mapping[str, Any], otherwise: str = ""
) -> None:
    """Raise GraftError for the first thing that is not what it was when the run began, with a way out and another one, `otherwise`."""
    for name, value in now.items():
        if then.get(name) != value:
            raise GraftError(
                f"--resume {run_dir}: {name} was {then.get(name)} when the run began, and is {value} now; put it back "
                f"(an option in {run_dir / 'config.yaml'}), or begin another run{otherwise}"
            )


def is_resumable(run_dir: Path) -> bool:
    return (run_dir / STATE_DIR / TRAINING_FILE).is_file()


def remove_state(run_dir: Path) -> None:
    shutil.rmtree(run_dir / STATE_DIR, ignore_errors=True)


def resume_command(run_dir: Path) -> str:
    """What a person types to go on with a run."""
    script = Path(__file__).with_name("run.py")
    typed = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return shlex.join([Path(sys.executable).name, str(typed), "--resume", str(run_dir)])


def _read_kept(run_dir: Path) -> Any | None:
    path = run_dir / STATE_DIR / _RUN_FILE
    try:
        kept = json.loads(path.read_text())
        if not isinstance(kept, dict) or not kept.keys() >= _KEPT:
            raise ValueError("it is not what a run keeps")
        return kept
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise GraftError(
            f"{path}: it cannot be read: {error}; remove {path.parent}, and --resume begins again"
        ) from error


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        raise GraftError(f"{path}: it cannot be written: {error.strerror}") from error
