"""What the CLI prints: results on stdout (tables, or one line of JSON), everything else on stderr."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

import click

if TYPE_CHECKING:
    from rich.console import Console, OverflowMethod
    from rich.progress import Progress, TaskID
    from rich.table import Table
    from rich.text import Text

WIDE = 10_000
"""The width of output that is not for a terminal, so that nothing is cut or wrapped."""
BAR_WIDTH = 24
UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


class CommandError(click.ClickException):
    """A failed command: exit code 1, a line on stderr, and with `-o json` also an object on stdout.

    code: the gRPC status in lower case, or another word of docs/troubleshooting.md. details:
    objects to print beside the message with `-o json`.
    """

    def __init__(self, code: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self._details = details
        context = click.get_current_context(silent=True)
        self._is_json = context is not None and getattr(context.obj, "output", "") == "json"

    def show(self, file: Any = None) -> None:
        click.echo(printable(f"Error: {self.message}"), err=True)
        if self._is_json:
            click.echo(to_json({"error": {"code": self.code, "message": self.message, **self._details}}))


Column: TypeAlias = tuple[str, str | Callable[[Any], object]]
"""The heading of a column, '#' before it for numbers (aligned right), and a field or function of a record."""


class Output:
    """The output of one command. is_json: `-o json`."""

    def __init__(self, is_json: bool) -> None:
        self.is_json = is_json
        if sys.stdout is None:  # `>&-`
            raise click.ClickException("stdout is closed")
        self._stdout = sys.stdout

    def json(self, result: Mapping[str, Any]) -> None:
        self.raw(to_json(result) + "\n")

    def result(self, result: Mapping[str, Any], text: str) -> None:
        """Print the result as JSON, or the text."""
        if self.is_json:
            self.json(result)
        else:
            self.line(text)

    def raw(self, text: str) -> None:
        """Write to stdout; characters that its encoding lacks are replaced."""
        encoding = self._stdout.encoding or "utf-8"
        try:
            self._stdout.write(text.encode(encoding, "replace").decode(encoding))
            self._stdout.flush()
        except OSError as error:
            if error.errno != errno.EPIPE and self._stdout is sys.stdout:
                _give_up_stdout()
                raise click.ClickException(f"cannot write to stdout: {error.strerror or error}") from None
            raise

    def note(self, text: str) -> None:
        """Write a line for people to stderr."""
        click.echo(printable(text), err=True)

    def table(self, columns: Sequence[Column], records: Iterable[Any]) -> None:
        """Print records as a table."""
        headings = [heading for heading, _ in columns]
        self.print(new_table(headings, ([_read(record, value) for _, value in columns] for record in records)))

    def pairs(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Print names and values in two columns."""
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        for name, value in pairs:
            table.add_row(Text(name, style="bold"), cell(value))
        self.print(table)

    def line(self, text: str) -> None:
        self.raw(printable(text) + "\n")

    @property
    def is_terminal(self) -> bool:
        return self._stdout.isatty()

    def console(self) -> Console:
        """Return a console for a live view on stdout."""
        return new_console(self._stdout)

    def print(self, table: Table) -> None:
        """Print as wide as the terminal; without one, cut and wrap nothing and end no line in spaces."""
        if self.is_terminal:
            self.console().print(table)
            return
        text = io.StringIO()
        new_console(text, width=WIDE).print(table)
        self.raw("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """A context manager; call `show` as often as needed. The bar disappears at the end, lines stay."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._shown = ""
        self._total = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        console = new_console(sys.stderr)
        if console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.table import Column

            description = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            self._bar = Progress(
                BarColumn(BAR_WIDTH),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False, table_column=description),
                console=console,
                transient=True,
                expand=True,
            )
            self._bar.start()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, text: str, done: int | None = None, left: int | None = None) -> None:
        """Show one line of text. done, left: numbers of items, None if unknown; the bar never shrinks."""
        if self._bar is None:
            if text != self._shown:
                self._output.note(text)
                self._shown = text
            return
        if left is not None:
            self._total = max(self._total, (done or 0) + left)
        total = self._total if left is not None else None
        completed = self._total - left if left is not None else 0
        if self._task is None:
            self._task = self._bar.add_task(printable(text), total=total)
        self._bar.update(self._task, description=printable(text), total=total, completed=completed)


def new_table(headings: Sequence[str], rows: Iterable[Sequence[object]], overflow: OverflowMethod = "fold") -> Table:
    """Return a table; see Column for headings. overflow: of cells that do not fit the terminal."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(
            heading.lstrip("#"),
            justify="right" if heading.startswith("#") else "left",
            overflow=overflow,
            no_wrap=overflow == "ellipsis",
        )
    for row in rows:
        table.add_row(*map(cell, row))
    return table


def _read(record: Any, value: str | Callable[[Any], object]) -> object:
    if callable(value):
        return value(record)
    return optional(record, value) if record.DESCRIPTOR.fields_by_name[value].has_presence else getattr(record, value)


def new_console(file: TextIO, width: int | None = None) -> Console:
    """Return a console that prints text as it is."""
    from rich.console import Console

    return Console(file=file, markup=False, highlight=False, emoji=False, width=width)


def _give_up_stdout() -> None:
    """Redirect stdout to nowhere: what is still buffered would fail again, noisily, at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def to_json(value: Any) -> str:
    """Return JSON on one line, in ASCII: valid in every encoding, and no name can break the line."""
    return json.dumps(value, separators=(",", ":"))


def cell(value: object) -> Text:
    """Return a table cell; `-` for a value that is empty or unknown."""
    from rich.text import Text

    return Text("-" if value is None or value == "" else printable(str(value)))


def printable(text: str) -> str:
    """Return the text without control characters: a remote text must not control the terminal."""
    return "".join(character if character.isprintable() or character == "\n" else UNPRINTABLE for character in text)


def counts(by_name: Mapping[str, int]) -> str:
    """Return `replicating 12, prepare 1`, the most frequent first."""
    ranked = sorted(by_name.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count}" for name, count in ranked)


def optional(record: Any, field: str) -> Any:
    """Return the value of a field of a record; None if it is absent."""
    return getattr(record, field) if record.HasField(field) else None


def keys(row: Any) -> str:
    """Return the key range of a span, in hexadecimal."""
    return f"[{row.start_key.hex() or '-'}, {row.end_key.hex() or '-'})"


def duration(milliseconds: int) -> str:
    """Return a duration such as `1.5 s`, `2 min 3 s` or `4 d 5 h`."""
    seconds = milliseconds / 1000
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(count: float | None) -> str | None:
    """Return a number of bytes such as `4.0 KiB`; None stays None."""
    if count is None:
        return None
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def number(value: float | None) -> str | None:
    """Return a whole number such as `12,345`; None stays None."""
    return None if value is None else f"{value:,.0f}"
