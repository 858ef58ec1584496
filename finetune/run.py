"""One run, top to bottom: labelled images → probe → (gradient epochs) → evaluation → checkpoint.

python finetune/run.py                                      the embedded digits, without a network
python finetune/run.py --data photos/ --backbone resnet18   your own images
python finetune/run.py --data photos/ --freeze until:layer3
                                                            layers after layer3 train, too
python finetune/run.py --resume runs/photos-20261123-045110
                                                            go on with a stopped or killed run
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from finetune.auditing.findings import Audit
from finetune.auditing.inspection import inspect
from finetune.auditing.output import write_audit
from finetune.candidates import choose, compare, fine_tune, fit_probe
from finetune.command_line import parse_options
from finetune.config import Options
from finetune.data.duplicates import Duplicates
from finetune.data.lasting_split import load_lasting_splits
from finetune.data.splits import Splits
from finetune.monitor import Monitor
from finetune.probe.features import prepare, prepare_meanwhile
from finetune.probe.fit import choose_fit
from finetune.probe.learning_curve import LearningCurve, measure_learning_curve
from finetune.probe.precision import extract_in_best_precision
from finetune.report.candidate import Candidate
from finetune.report.mistakes import explain_mistakes, worst_mistakes
from finetune.report.next_steps import commands_to_try, print_next_steps, write_example
from finetune.report.page import write_report
from finetune.report.publishing import check_labels, keep_other_candidate, publish_chosen
from finetune.report.result import Result
from finetune.report.tensorboard import show_in_tensorboard
from finetune.resume import (
    Choices,
    ImagesGoneError,
    find_published,
    fix_options,
    is_resumable,
    keep_choices,
    lock,
    read_id,
    read_options,
    remove_state,
    restore_splits,
    resume_command,
    seconds_trained,
    trim_events,
)
from finetune.terminal import run_program
from finetune.timer import Timer
from finetune.training.broken_batch import FOLDER as BROKEN_BATCH_DIR
from finetune.unused import (
    warn_if_nothing_is_stretched,
    warn_if_service_takes_less,
    warn_if_split_is_given,
    warn_if_split_is_kept,
    warn_if_unused,
)
from models.checkpoint import check_repository
from models.errors import GraftError, describe_error
from models.files import check_writable, full_disk_in_words, scratch_folder, write_whole
from models.named import import_named
from models.sources import check_source_exists

logger = logging.getLogger("graft.run")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    return run_program(
        lambda: run(parse_options(Options, list(sys.argv[1:] if arguments is None else arguments)))
    )


def run(options: Options) -> Path:
    """Do one run and return the folder of the published checkpoint.

    Raises GraftError for every error the user can fix.
    """
    with Timer() as total:
        if options.resume is not None:
            options = read_options(options)
        else:
            warn_if_unused(options)
        warn_if_service_takes_less()
        if ":" in options.head_init:
            import_named("--head-init", options.head_init)  # fail before any work
        restore = None
        if options.resume is not None:
            restore = functools.partial(restore_splits, options.resume, data=options.data)
        # Before a name is made from it.
        with _moved_data_in_words(options):
            check_source_exists(options.data)
        _check_folders(options)
        with (
            _moved_data_in_words(options),
            prepare_meanwhile(options, all_levels=options.uses_all_levels),
        ):
            splits, duplicates = load_lasting_splits(
                options.data,
                data_root=options.data_root,
                val_fraction=options.val_fraction,
                seed=options.seed,
                runs_dir=None if options.new_split else options.output,
                cache_dir=options.enabled_cache_dir,
                num_workers=options.workers,
                strict=options.strict,
                restore=restore,
                refuse=functools.partial(_refuse, options),
            )
        if options.resume is None:
            if not splits.is_drawn:
                warn_if_split_is_given(options)
            elif splits.is_kept:
                warn_if_split_is_kept(options)
            warn_if_nothing_is_stretched(options, splits)
        run_dir = options.resume or _make_run_dir(options)
        with (
            _kept_or_removed(run_dir, options),
            lock(run_dir),
            full_disk_in_words(
                {
                    "--output": run_dir,
                    "--repository": options.repository,
                    "--cache-dir": options.cache_dir,
                    "TMPDIR": Path(os.environ.get("TMPDIR") or "/tmp"),
                }
            ),
        ):
            return _run_in(run_dir, options, splits, duplicates, total)


def _run_in(
    run_dir: Path, options: Options, splits: Splits, duplicates: Duplicates, total: Timer
) -> Path:
    trim_events(run_dir)
    earlier_seconds = seconds_trained(run_dir)
    monitor = Monitor(run_dir)
    with scratch_folder() as scratch:
        result = _fit(options, splits, duplicates, monitor, run_dir, scratch, earlier_seconds)
        checkpoint = _publish(result, duplicates, run_dir)
        mistakes = worst_mistakes(result.splits, result.chosen)
        if mistakes and options.explains:
            mistakes = explain_mistakes(result.chosen, mistakes)
        show_in_tensorboard(monitor, result, mistakes)
    result = replace(result, seconds={**result.seconds, "total": earlier_seconds + total.seconds})
    result.splits.write_csv(run_dir / "splits.csv")
    example = write_example(run_dir, result.splits.val[0])
    commands = commands_to_try(options.repository, options.model_name, example)
    version = int(checkpoint.name)
    report = write_report(result, mistakes, version=version, commands=commands, run_dir=run_dir)
    _write(run_dir / "report.html", report)
    # The last file: with it, the run is done.
    _write(run_dir / "metrics.json", json.dumps(result.to_dict(), indent=2) + "\n")
    remove_state(run_dir)
    print_next_steps(result, run_dir, checkpoint, commands)
    return checkpoint


def _fit(
    options: Options,
    loaded: Splits,
    duplicates: Duplicates,
    monitor: Monitor,
    run_dir: Path,
    scratch: Path,
    earlier_seconds: float,
) -> Result:
    """Features → probe → audit → gradient epochs where something is unfrozen → choice.

    `scratch` takes backbones that are not kept; `earlier_seconds` are those that earlier processes
    of this run trained.
    """
    prepared = prepare(
        options.backbone,
        loaded.train,
        options,
        scratch,
        weights=options.weights,
        pretrained=options.pretrained,
        all_levels=options.uses_all_levels,
    )
    chosen_fit = None
    if options.fit == "auto":
        chosen_fit = choose_fit(
            prepared,
            loaded,
            duplicates.sizes,
            device=options.device,
            precision=options.precision,
            num_workers=options.workers,
            cache=options.feature_cache,
            seed=options.seed,
        )
        prepared = prepared.fitted(chosen_fit.chosen)
    else:
        prepared = prepared.fitted(options.fit)
    prepared.check_freeze(options.freeze)
    _check_folders(options, sum(path.stat().st_size for path in prepared.folder.iterdir()))
    with Timer() as extraction:
        precise, splits, features, extract_seconds = extract_in_best_precision(
            prepared, loaded, options, scratch, digests=duplicates.digests
        )
        backbone, engine = precise.backbone, precise.engine.info
        precise.engine.close()
        fixed = fix_options(options.model_dump(mode="json"))
        why_precision = keep_choices(
            run_dir,
            Choices(fixed, loaded, splits, engine.precision, precise.reason, duplicates.digests),
        )
    options = options.model_copy(update={"precision": engine.precision})
    probe = fit_probe(options, splits, backbone, engine, features)
    with Timer() as auditing:
        audit = inspect(
            loaded, splits, probe.columns, probe.solution, duplicates, backbone.preprocess
        )
        _log_audit(audit, write_audit(audit, run_dir, "audit", options.data), options.strict)
    with Timer() as measuring:
        learning_curve = _measure_learning_curve(splits, probe, options.seed)
    tuned, verdict = None, None
    if options.freeze != "backbone":
        tuned = fine_tune(
            options, splits, probe, duplicates.digests, monitor, scratch, earlier_seconds
        )
        verdict = compare(options, splits, probe, tuned)
    return Result(
        options=options,
        splits=splits,
        probe=probe,
        tuned=tuned,
        chosen=choose(probe, tuned, verdict),
        verdict=verdict,
        why_precision=why_precision,
        fit=chosen_fit,
        learning_curve=learning_curve,
        audit=audit,
        seconds={
            "engine": extraction.seconds - extract_seconds,
            "features": extract_seconds,
            "probe": probe.seconds,
            "audit": auditing.seconds,
            "learning_curve": measuring.seconds,
            "train": 0.0 if tuned is None else tuned.seconds,
        },
    )


def _publish(result: Result, duplicates: Duplicates, run_dir: Path) -> Path:
    """Keep the other candidate, and publish the chosen one, unless an earlier process has."""
    keep_other_candidate(result, duplicates.digests, run_dir)
    options, published = result.options, None
    if options.resume is not None:
        published = find_published(
            options.repository, options.model_name, read_id(run_dir), result.chosen.name
        )
    return published or publish_chosen(result, duplicates.digests, run_dir)


@contextlib.contextmanager
def _kept_or_removed(run_dir: Path, options: Options) -> Iterator[None]:
    """After an error, keep the folder of a run that can go on, and say how; remove others."""
    try:
        yield
    except GraftError as error:
        if is_resumable(run_dir) or find_published(
            options.repository, options.model_name, read_id(run_dir)
        ):
            error.add_note(
                f"{run_dir} is kept; after fixing this, go on with\n  {resume_command(run_dir)}"
            )
        elif (run_dir / BROKEN_BATCH_DIR).exists():
            remove_state(run_dir)
        elif options.resume is None:
            # An empty run folder would clutter TensorBoard.
            shutil.rmtree(run_dir, ignore_errors=True)
        raise
    except KeyboardInterrupt as stop:
        stop.add_note(f"go on with\n  {resume_command(run_dir)}")
        raise


def _measure_learning_curve(splits: Splits, probe: Candidate, seed: int) -> LearningCurve:
    train_labels, val_labels = splits.labels(splits.train), splits.labels(splits.val)
    columns = probe.columns
    learnt_from = columns["train"][: probe.solution.num_views * len(train_labels)]
    return measure_learning_curve(
        learnt_from,
        train_labels,
        probe.solution,
        columns["val"],
        val_labels,
        splits.task,
        seed=seed,
    )


def _log_audit(audit: Audit, paths: tuple[Path, Path], is_strict: bool) -> None:
    if is_strict:
        audit.refuse_leaks()
    for line in audit.to_lines():
        logger.log(logging.WARNING if audit.leaks else logging.INFO, "%s", line)
    if audit.findings:
        logger.info("audit: look at %s", paths[1])


def _check_folders(options: Options, num_bytes: int = 0) -> None:
    """Raise GraftError where the run's folder or the checkpoint could not be written.

    Both are written at the end of a run, and this is its beginning.
    """
    try:
        check_writable(options.output, num_bytes if options.freeze != "backbone" else 0)
    except OSError as error:
        raise GraftError(
            f"--output {options.output}: {describe_error(error)}; name a folder that you can write "
            "to"
        ) from error
    check_repository(options.repository, options.model_name, num_bytes)


@contextlib.contextmanager
def _moved_data_in_words(options: Options) -> Iterator[None]:
    """Say how a run goes on whose images are not found where they were."""
    try:
        yield
    except GraftError as error:
        if options.resume is not None and not isinstance(error, ImagesGoneError):
            error.add_note("where the images have moved, add --data NEW to --resume")
        raise


def _check_task(options: Options, splits: Splits) -> None:
    """Raise GraftError for an option that means nothing where images have several labels."""
    for name in splits.task.unsupported_options:
        value = getattr(options, name)
        if value != type(options).model_fields[name].default:
            flag = f"--{name.replace('_', '-')}"
            raise GraftError(
                f"{flag} {value}: it is for one label an image, and {options.data} has a column "
                "labels; leave it out"
            )


def _refuse(options: Options, splits: Splits) -> None:
    """Raise GraftError for what is known to be wrong once the labels are read."""
    _check_task(options, splits)
    check_labels(options.repository, options.model_name, splits.label_names, options.new_labels)
    if options.balance == "none":
        splits.task.warn_if_imbalanced(splits.labels(splits.train), splits.label_names)


def _make_run_dir(options: Options) -> Path:
    """`runs/<name>-<time>`, made before any work so that an unwritable output is known at once."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        options.repository.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{number}" for number in range(2, 100))):
            run_dir = options.output / f"{options.model_name}-{stamp}{suffix}"
            try:
                run_dir.mkdir()
            except FileExistsError:
                continue
            break
    except OSError as error:
        raise GraftError(
            f"--output {options.output}: {describe_error(error)}; name a folder that you can write "
            "to"
        ) from error
    try:
        _write(run_dir / "config.yaml", options.to_yaml())
    except GraftError:
        shutil.rmtree(run_dir, ignore_errors=True)
        raise
    return run_dir


def _write(path: Path, text: str) -> None:
    try:
        # A path may hold bytes that are no text.
        write_whole(
            path,
            lambda temporary: temporary.write_text(
                text, encoding="utf-8", errors="surrogateescape"
            ),
        )
    except OSError as error:
        raise GraftError(f"{path}: it cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
