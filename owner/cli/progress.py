"""How something that takes long goes on, on stderr: a bar on a terminal, elsewhere one line at each change."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from owner.cli.output import Output, printable

BAR_WIDTH = 24


class Progress:
    """`with Progress(output) as progress`, then `show` as often as you like. The bar goes at the end; lines stay."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._said = ""
        self._total = 0
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        if console.is_terminal:
            self._bar = RichProgress(
                BarColumn(BAR_WIDTH),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
                console=console,
                transient=True,
                expand=True,
            )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, text: str, done: int | None = None, left: int | None = None) -> None:
        """text: how it stands now, one line. done, left: of how many; None = not known. What was done before this began to look
        counts as done, so the bar never shrinks."""
        if self._bar is None:
            if text != self._said:
                self._output.note(text)
                self._said = text
            return
        if left is not None:
            self._total = max(self._total, (done or 0) + left)
        total = self._total if left is not None else None
        completed = self._total - left if left is not None else 0
        if self._task is None:
            self._task = self._bar.add_task(printable(text), total=total)
        self._bar.update(self._task, description=printable(text), total=total, completed=completed)
