"""The screen. It shows text literally, and no failure of it ever ends a command.

Nothing printed here is read as markup: names, paths, prompts and errors may hold any characters.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

_WIDEST = 10_000  # columns
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line feeds


class _Output(io.TextIOBase):
    """Standard output, which may be gone: its pipe closed, its disk full."""

    @property
    def _stream(self) -> TextIO:
        return getattr(
            sys.stdout, "rich_proxied_file", sys.stdout
        )  # not what bars put in its place

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The encoding that it is written in."""
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return its file descriptor."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write text, or lose it."""
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or lose it."""
        with self._losing():
            self._stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # What is still buffered would fail again when the process ends.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


class _Log(logging.Handler):
    """Prints warnings to standard error, above the progress bars if there are any.

    Where there are none, lines of progress are printed to standard output.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        try:
            if record.levelno < logging.WARNING:
                if not redraws(console):
                    say(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {self.format(record)}")
                return
            sys.stderr.write(f"{record.levelname.lower()}: {self.format(record)}\n")
        except Exception:
            self.handleError(record)


class _Screen(Console):
    """A console that shows control characters, which a terminal would obey, by their codes."""

    def __init__(self, width: int | None = None) -> None:
        output = cast(TextIO, _Output())
        super().__init__(file=output, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text as it is shown."""
        return super().render_str(visible(text), **options)


def visible(text: str) -> str:
    """Return text with control characters, which a terminal would obey, as their codes."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


console: Console = _Screen()


def set_up() -> None:
    """Let any character be printed, and show the warnings and the progress of this project."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name in ("ddpo", "ddpo_workflow"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Log) for handler in logger.handlers):
            logger.addHandler(_Log())


def redraws(screen: Console) -> bool:
    """Return whether a screen is a terminal that can redraw lines."""
    return screen.is_terminal and not screen.is_dumb_terminal and screen.file.isatty()


def say(text: str | Text, style: str | None = None) -> None:
    """Print text on lines of its own, which only a terminal breaks.

    Args:
        text: The text.
        style: How a terminal shows it, such as ``bold``.
    """
    console.print(text, style=style, soft_wrap=True)


def show(shown: Table | Tree, *, fold: bool = False) -> None:
    """Print a table or tree without shortening anything: users may need to type what it shows.

    Args:
        shown: The table or tree.
        fold: Fold cells, so that the table fits a terminal. Elsewhere, and without it, a row is one
            line, however long.
    """
    if fold and isinstance(shown, Table):
        for column in shown.columns:
            column.overflow = "fold"
    options = console.options.update(max_width=_WIDEST)
    width = Measurement.get(console, options, shown).maximum
    folded = fold and console.is_terminal
    _Screen(None if folded else max(width, console.width)).print(shown)


def show_places(places: dict[str, str]) -> None:
    """Print where results are.

    Args:
        places: Paths and addresses by name.
    """
    longest = max(map(len, places))
    for name, place in places.items():
        say(f"{name:{longest}}  {place}")


@contextmanager
def busy(text: str) -> Iterator[Callable[[str], None]]:
    """Show that something is being done.

    Args:
        text: What is being done.

    Yields:
        A function that shows another text in its place.
    """
    with console.status(Text(text)) as status:
        yield lambda text: status.update(Text(visible(text)))
