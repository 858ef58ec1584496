"""Publish the other candidate of a run that trained layers, as the next version of its model.

python finetune/publish.py runs/photos-20261123-045110 --which tuned
python finetune/publish.py runs/photos-20261123-045110 --which probe --repository elsewhere/
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.command_line import parse_options
from finetune.config import Options, PublishOptions
from finetune.report.publishing import CANDIDATES_DIR, publish_again
from finetune.resume import find_published, resume_command
from finetune.terminal import run_program
from models.checkpoint import list_names, list_versions, load_checkpoint
from models.errors import GraftError

logger = logging.getLogger("graft.publish")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_program(lambda: publish(parse_options(PublishOptions, given)))


def publish(options: PublishOptions) -> Path:
    """Publish a candidate of a finished run as the next version; gives the version's folder.

    Where the newest version is this candidate already, nothing is published, and its folder is
    given. Raises GraftError where the run has no such candidate, where it is not finished, and
    where the checkpoint cannot be written.
    """
    run_dir, which = options.run, options.which
    run_options = _read_run(run_dir)
    name, run_repository = run_options.model_name, run_options.repository
    kept, run_id = _find_kept(run_dir)
    repository = options.repository or run_repository
    if options.repository is None and find_published(repository, name, run_id) is None:
        raise GraftError(
            f"{repository / name}: none of its versions is of {run_dir}, which published to a "
            "folder of this name; say --repository PATH"
        )
    published = find_published(repository, name, run_id, which)
    versions = list_versions(repository, name)
    if published is not None and int(published.name) == versions[-1]:
        logger.info("%s: the newest version is this candidate already", published)
        print(published)
        return published
    source = kept if kept.parent.name == which else published
    source = source or find_published(run_repository, name, run_id, which)
    if source is None:
        raise GraftError(
            f"--which {which}: {run_dir} published it to {run_repository / name}, where no version "
            f"of it is left; {kept} has the other candidate"
        )
    again = publish_again(source, repository, name, options.new_labels)
    logger.info("the %s candidate of %s, from %s, is published", which, run_dir, source)
    print(again)
    return again


def _read_run(run_dir: Path) -> Options:
    """A finished run's options."""
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise GraftError(
            f"{run_dir}: no config.yaml in it; RUN is the folder of a run, such as "
            "runs/digits-20261123-045110"
        )
    if not (run_dir / "metrics.json").is_file():
        raise GraftError(
            f"{run_dir}: this run is not finished; go on with it first\n  {resume_command(run_dir)}"
        )
    return parse_options(Options, ["--config", str(config)])


def _find_kept(run_dir: Path) -> tuple[Path, str]:
    """The checkpoint of the candidate that the run did not publish, and the run's id."""
    candidates = run_dir / CANDIDATES_DIR
    for name in list_names(candidates):
        kept = candidates / name / str(list_versions(candidates, name)[-1])
        return kept, str(load_checkpoint(kept).config["graft"]["run_id"])
    raise GraftError(
        f"{candidates}: no candidate is kept there; a run with --freeze backbone has its probe "
        "alone, and has published it"
    )


if __name__ == "__main__":
    sys.exit(main())
