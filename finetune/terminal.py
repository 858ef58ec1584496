"""What a program says while it works and how it ends: log lines, progress bars where the output is a terminal, exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from models.errors import GraftError

_console = Console(stderr=True)


class ConsoleHandler(logging.Handler):
    """Log lines that a progress bar makes room for, never wrapped or coloured by guesswork."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        _console.print(self.format(record), style=style, soft_wrap=True, markup=False, highlight=False)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.0f} images/s", style="progress.data.speed")


def run_program(work: Callable[[], object]) -> int:
    """Do the work and give the exit code: 0; 2 with a message for what the user can mend; 130 on Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[ConsoleHandler()])
    logging.getLogger("graft").setLevel(logging.INFO)
    try:
        work()
    except GraftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was published", file=sys.stderr)
        return 130
    return 0


@contextmanager
def progress_bar(description: str, num_images: int) -> Iterator[Callable[[int], None]]:
    """Give a function to call with the number of images done since; the bar goes when it is over."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns, console=_console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(description, total=num_images)
        yield lambda num_done: progress.advance(task, num_done)
