"""What the CLI prints: answers on stdout (tables by rich, or one JSON object on one line), everything else on stderr."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

import click
from rich.console import Console, JustifyMethod, OverflowMethod
from rich.table import Table
from rich.text import Text

WIDE = 10_000
"""Width where no terminal limits it, so that nothing is cut or wrapped for grep."""
UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


class OutputError(click.ClickException):
    """stdout does not take what is to be said: exit code 1. (A reader that has gone, as with `| head`, is click's to end.)"""


class Output:
    """One command's output. is_json: `-o json`."""

    def __init__(self, is_json: bool, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.is_json = is_json
        self._stdout = stdout or _stdout()
        self._stderr = stderr or sys.stderr

    def json(self, answer: Mapping[str, Any]) -> None:
        self.raw(to_json(answer) + "\n")

    def raw(self, text: str) -> None:
        """What stdout's encoding does not have is replaced."""
        encoding = self._stdout.encoding or "utf-8"
        try:
            self._stdout.write(text.encode(encoding, "replace").decode(encoding))
            self._stdout.flush()
        except OSError as error:
            if error.errno != errno.EPIPE and self._stdout is sys.stdout:
                _give_up_stdout()
                raise OutputError(f"cannot write to stdout: {error.strerror or error}") from None
            raise

    def note(self, text: str) -> None:
        """For people, on stderr."""
        click.echo(printable(text), err=True)

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """See `new_table`."""
        self._print(new_table(headings, rows))

    def pairs(self, pairs: Iterable[tuple[str, object]]) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, value in pairs:
            table.add_row(Text(name, style="bold"), cell(value))
        self._print(table)

    def line(self, text: str) -> None:
        self.raw(printable(text) + "\n")

    @property
    def is_terminal(self) -> bool:
        return self._stdout.isatty()

    def console(self) -> Console:
        """For a live view on stdout."""
        return _console(self._stdout)

    def _print(self, table: Table) -> None:
        """On a terminal as wide as it is; elsewhere nothing is cut or wrapped, and no line ends in spaces."""
        if self._stdout.isatty():
            _console(self._stdout).print(table)
            return
        text = io.StringIO()
        _console(text, width=WIDE).print(table)
        self.raw("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))


def new_table(headings: Sequence[str], rows: Iterable[Sequence[object]], overflow: OverflowMethod = "fold") -> Table:
    """Headings that begin with '#' are numbers, set to the right. overflow: of a cell that does not fit the terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        is_number = heading.startswith("#")
        justify: JustifyMethod = "right" if is_number else "left"
        table.add_column(heading.lstrip("#"), justify=justify, overflow=overflow, no_wrap=overflow == "ellipsis")
    for row in rows:
        table.add_row(*map(cell, row))
    return table


def _stdout() -> TextIO:
    if sys.stdout is None:  # `>&-`
        raise OutputError("stdout is closed")
    return sys.stdout


def _give_up_stdout() -> None:
    """What is still buffered for it would fail once more, noisily, when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _console(file: TextIO, width: int | None = None) -> Console:
    return Console(file=file, markup=False, highlight=False, emoji=False, width=width)


def to_json(answer: Any) -> str:
    """On one line, in ASCII: right in every encoding, and no character of a name can break the line."""
    return json.dumps(answer, separators=(",", ":"))


def cell(value: object) -> Text:
    return Text("-" if value is None or value == "" else printable(str(value)))


def printable(text: str) -> str:
    """Text from afar (an error, a name) may not steer the terminal."""
    return "".join(character if character.isprintable() or character == "\n" else UNPRINTABLE for character in text)


def counts(by_name: Mapping[str, int]) -> str:
    """`replicating 12, prepare 1`, the most frequent first."""
    ranked = sorted(by_name.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count}" for name, count in ranked)


def keys(row: Any) -> str:
    """A span's range, in hex."""
    return f"[{row.start_key.hex() or '-'}, {row.end_key.hex() or '-'})"


def duration(milliseconds: int) -> str:
    seconds = milliseconds / 1000
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(count: int | None) -> str | None:
    """Bytes for people; None stays None."""
    if count is None:
        return None
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
