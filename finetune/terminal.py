"""Log lines, progress bars where the output is a terminal, signals and exit codes of programs."""

from __future__ import annotations

import _thread
import atexit
import codecs
import gc
import io
import logging
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from models.errors import GraftError
from models.files import find_home

_console = Console(stderr=True)
_ERRORS = "graft"
# Python's default is 700; importing torch creates millions of objects.
_OBJECTS_BETWEEN_COLLECTIONS = 20_000


def _encode_anyway(error: UnicodeError) -> tuple[bytes, int]:
    """What a locale's encoding lacks: a file name's bytes as they are, others in ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    encoded = b"".join(
        bytes([ord(char) - 0xDC00])
        if "\udc80" <= char <= "\udcff"
        else unicodedata.normalize("NFKC", char).encode("ascii", "backslashreplace")
        for char in characters
    )
    return encoded, error.end


codecs.register_error(_ERRORS, _encode_anyway)


class ConsoleHandler(logging.Handler):
    """Prints log lines above a progress bar, neither wrapped nor coloured by their content."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        _console.print(
            self.format(record), style=style, soft_wrap=True, markup=False, highlight=False
        )


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(
            "" if task.speed is None else f"{task.speed:.0f} images/s", style="progress.data.speed"
        )


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a program as Ctrl-C does, with another exit code."""


def run_program(work: Callable[[], object]) -> int:
    """Do the work; gives the exit code.

    0; 2 after a GraftError, which is printed with its notes (`add_note`); 130 on Ctrl-C, 143 on
    SIGTERM.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[ConsoleHandler()])
    logging.getLogger("graft").setLevel(logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)
    # Where torch and timm are imported, looking for cycles in what stays was 1.7 s of 9, and 1.2 s
    # more when the process ended.
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    atexit.register(gc.freeze)
    sys.unraisablehook = _raise_again
    threading.excepthook = _report_thread
    # OpenVINO fails for a user without a home, and others would write to a folder named "~".
    os.environ.setdefault("HOME", str(find_home()))
    try:
        with _handling({signal.SIGTERM: _raise_terminated}):
            work()
    except GraftError as error:
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(
            "stopped; nothing was published",
            *getattr(stop, "__notes__", ()),
            sep="\n",
            file=sys.stderr,
        )
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    return 0


@contextmanager
def stop_softly() -> Iterator[Callable[[], KeyboardInterrupt | None]]:
    """Within, the first Ctrl-C or SIGTERM is only noted; the second ends the process at once.

    Gives a function that returns the exception to raise for the noted signal, or None.
    """
    asked: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if asked:
            os._exit(128 + number)
        asked.append(number)
        # Neither print nor logging: the interrupted code may hold their locks.
        os.write(2, b"\nstopping after this step; once more ends it at once\n")

    def exception() -> KeyboardInterrupt | None:
        return (
            (Terminated() if asked[0] == signal.SIGTERM else KeyboardInterrupt()) if asked else None
        )

    with _handling({signal.SIGINT: handle, signal.SIGTERM: handle}):
        yield exception


@contextmanager
def _handling(
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]],
) -> Iterator[None]:
    """Signal handlers within the block; only the main thread can set them, others go without."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _raise_terminated(*_: object) -> None:
    raise Terminated


def _report_thread(raised: threading.ExceptHookArgs) -> None:
    """Leave out errors of the system: TensorBoard's writer raises its thread's in the next call."""
    if not isinstance(raised.exc_value, OSError):
        threading.__excepthook__(raised)


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Raise a signal's exception again where Python drops it: in destructors, callbacks from C."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        number = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
        # Later, because an exception raised in this function is dropped, too.
        threading.Timer(0.05, _thread.interrupt_main, [number]).start()
    else:
        sys.__unraisablehook__(unraisable)


@contextmanager
def progress_bar(description: str, num_images: int) -> Iterator[Callable[[int], None]]:
    """Show a bar; gives a function to call with the number of images done since the last call."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=_console, transient=True, disable=not sys.stderr.isatty()
    ) as progress:
        task = progress.add_task(description, total=num_images)
        yield lambda num_done: progress.advance(task, num_done)
