"""The progress of an operation, on stderr: a bar on a terminal, otherwise one line at each change."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from owner.cli.output import Output, new_console, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

BAR_WIDTH = 24


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
