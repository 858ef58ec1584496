"""The candidates of a run side by side, as report, card and TensorBoard show them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from finetune.report.candidate import Candidate, CandidateName

_TITLES: dict[CandidateName, str] = {"probe": "probe", "tuned": "fine-tuned"}


def candidate_title(candidate: Candidate) -> str:
    return _TITLES[candidate.name]


def command_to_publish(
    run_dir: Path, candidates: Sequence[Candidate], chosen: Candidate
) -> str | None:
    """What to type to publish the candidate that was not chosen; None if there is no other."""
    others = [candidate.name for candidate in candidates if candidate is not chosen]
    if not others:
        return None
    return f"python finetune/publish.py {shlex.quote(str(run_dir))} --which {others[0]}"


Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def tabulate_results(
    candidates: Sequence[Candidate], chosen: Candidate, mark: str = "published"
) -> Table:
    """Head and rows: averages with intervals, by split and candidate; the chosen one is marked."""
    names = chosen.metrics["val"].NAMES.values()
    rows = [
        (
            *_model_cell(candidates, candidate, chosen, mark),
            split,
            *(metrics.with_interval(name) for name in metrics.intervals),
            f"{metrics.loss:.4f}",
            f"{metrics.num_images:,}",
        )
        for split in chosen.metrics
        for candidate in candidates
        for metrics in [candidate.metrics[split]]
    ]
    return (*_model_head(candidates), "split", *names, "log loss", "images"), rows


def tabulate_calibration(candidates: Sequence[Candidate], chosen: Candidate) -> Table:
    """Head and rows: calibration errors and what else a task measures, by split and candidate."""
    further = chosen.calibrated["val"].columns
    rows = [
        (
            *_model_cell(candidates, candidate, chosen, "published"),
            split,
            f"{quality.before.error:.3f}",
            f"{quality.after.error:.3f}",
            *quality.columns.values(),
        )
        for split in chosen.calibrated
        for candidate in candidates
        for quality in [candidate.calibrated[split]]
    ]
    return (*_model_head(candidates), "split", "error before temperature", "error", *further), rows


def _model_head(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """The head of a first column that names the candidate, if there are two."""
    return ("model",) if len(candidates) > 1 else ()


def _model_cell(
    candidates: Sequence[Candidate], candidate: Candidate, chosen: Candidate, mark: str
) -> tuple[str, ...]:
    if len(candidates) == 1:
        return ()
    title = candidate_title(candidate)
    return (f"{title}, {mark}" if candidate is chosen else title,)
