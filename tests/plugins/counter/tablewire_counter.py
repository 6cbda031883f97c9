"""A source that counts milliseconds, and an executor that writes the count of each table into a log
file.

`counter:///folder` is the source. The file `tables` in that folder holds the names of the tables,
one per line (the id is the line number). A file `broken` makes every call of the source fail with
its text, `broken-<table id>` the table's executor. While there is a file `no-executor-<node>`,
processors whose id begins with that name cannot make an executor. The option `parts` divides each
table into that many spans; with `fenced=no` the sink accepts every writer. `file:///folder` is the
sink: `<table id>.log` (`<table id>-<start key>.log` for a span that begins there), one line per
write: changefeed_epoch assignment_epoch capture from to written_at_ms. `from` is where the previous
writer stopped, so a gap, an overlap or a second writer shows in the file itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from tablewire import (
    CheckFailure,
    Checkpoint,
    EpochRefusedError,
    ExecutorRequest,
    HashRanges,
    OperatingError,
    SourceRequest,
    Span,
    SpanBlock,
    TableState,
    TableStatus,
)

WRITE_INTERVAL_S = 0.02


def _now_ts() -> int:
    return int(time.time() * 1000)


class CounterSource:
    def __init__(self, request: SourceRequest) -> None:
        self._request = request
        self._folder = Path(urlsplit(request.source_uri).path)

    def check(self) -> Sequence[CheckFailure]:
        if not (self._folder / "tables").exists():
            return [CheckFailure("source_reachable", f"no file {self._folder / 'tables'}")]
        if not Path(urlsplit(self._request.sink_uri).path).is_dir():
            return [CheckFailure("sink_writable", f"no folder {self._request.sink_uri}")]
        return [] if self.tables() else [CheckFailure("tables_match", f"nothing matches {' '.join(self._request.tables)}")]

    def start(self) -> int:
        (self._folder / f"slot-{self._request.changefeed.id}").touch()
        return self._request.start_ts or self.current_ts()

    def tables(self) -> Mapping[int, str]:
        self._raise_if_broken()
        names = (self._folder / "tables").read_text().split()
        return {at: name for at, name in enumerate(names, 1) if any(fnmatch(name, want) for want in self._request.tables)}

    def spans(self, table_ids: npt.NDArray[np.int64]) -> SpanBlock:
        return HashRanges(int(self._request.options.get("parts", "1"))).split(table_ids)

    def current_ts(self) -> int:
        self._raise_if_broken()
        return _now_ts()

    def advance(self, checkpoint_ts: int) -> None:
        (self._folder / f"slot-{self._request.changefeed.id}").write_text(str(checkpoint_ts))

    def retained_bytes(self) -> int:
        return 0

    def drop(self) -> None:
        self._raise_if_broken()
        (self._folder / f"slot-{self._request.changefeed.id}").unlink(missing_ok=True)

    def close(self) -> None:
        pass

    def _raise_if_broken(self) -> None:
        broken = self._folder / "broken"
        if broken.exists():
            raise OperatingError(broken.read_text().strip() or "the source is broken")


@dataclass(slots=True)
class _Table:
    state: TableState
    checkpoint_ts: int
    epoch: int = 0
    error: str = ""


class UnfencedCounterExecutor:
    """All spans of one changefeed in one processor, written by one thread.

    The lock covers `_tables`.
    """

    def __init__(self, request: ExecutorRequest) -> None:
        self._request = request
        self._may_write: Callable[[], bool] = request.may_write
        self._source = Path(urlsplit(request.source_uri).path)
        self._folder = Path(urlsplit(request.sink_uri).path)
        self._tables: dict[Span, _Table] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="counter", daemon=True)
        self._thread.start()

    def add_table_span(self, span: Span, checkpoint: Checkpoint, is_prepare: bool) -> bool:
        with self._lock:
            table = self._tables.setdefault(span, _Table(TableState.PREPARED, checkpoint.checkpoint_ts))
            if not is_prepare:
                last = self._last_line(span)
                if last and (int(last[0]), int(last[1])) > self._fence(table):
                    raise EpochRefusedError(f"span {span} is held by {last[2]}")
                table.checkpoint_ts = max(checkpoint.checkpoint_ts, int(last[4]) if last else 0)
                table.state = TableState.REPLICATING
        return True

    def is_add_table_span_finished(self, span: Span, is_prepare: bool) -> bool:
        return span in self._tables

    def remove_table_span(self, span: Span) -> bool:
        with self._lock:
            if table := self._tables.get(span):
                table.state = TableState.STOPPED
        return True

    def is_remove_table_span_finished(self, span: Span) -> tuple[int, bool]:
        with self._lock:
            table = self._tables.pop(span, None)
        return (table.checkpoint_ts if table else 0), True

    def get_table_span_status(self, span: Span, collect_stat: bool) -> TableStatus:
        with self._lock:
            table = self._tables.get(span)
            if table is None:
                return TableStatus(span, TableState.ABSENT, Checkpoint(0, 0))
            if table.error:
                raise OperatingError(table.error)
            resolved_ts = max(table.checkpoint_ts, _now_ts())
            return TableStatus(span, table.state, Checkpoint(table.checkpoint_ts, resolved_ts, table.checkpoint_ts))

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(WRITE_INTERVAL_S):
            with self._lock:
                for span, table in self._tables.items():
                    if table.state is TableState.REPLICATING and not table.error:
                        self._write(span, table)

    def _write(self, span: Span, table: _Table) -> None:
        broken = self._source / f"broken-{span.table_id}"
        last = self._last_line(span)
        now_ts = _now_ts()
        if broken.exists():
            table.error = broken.read_text().strip() or "broken"
        elif last and (int(last[0]), int(last[1])) > self._fence(table):
            table.error = f"a newer epoch writes span {span}"
        elif self._may_write() and now_ts > table.checkpoint_ts:
            epochs = f"{self._request.changefeed_epoch} {table.epoch}"
            line = f"{epochs} {self._request.capture_id} {table.checkpoint_ts} {now_ts} {now_ts}\n"
            handle = os.open(self._log_of(span), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, line.encode())
            os.close(handle)
            table.checkpoint_ts = now_ts

    def _fence(self, table: _Table) -> tuple[int, int]:
        return self._request.changefeed_epoch, table.epoch

    def _log_of(self, span: Span) -> Path:
        part = f"-{span.start_key.hex()}" if span.start_key else ""
        return self._folder / f"{span.table_id}{part}.log"

    def _last_line(self, span: Span) -> list[str] | None:
        path = self._log_of(span)
        if not path.exists():
            return None
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 512))
            lines = log.read().splitlines()
        return lines[-1].decode().split() if lines else None


class CounterExecutor(UnfencedCounterExecutor):
    """An executor whose sink refuses an older epoch than that of the last write."""

    def set_assignment_epoch(self, span: Span, epoch: int) -> None:
        with self._lock:
            self._tables[span].epoch = epoch


def new_source(request: SourceRequest) -> CounterSource:
    return CounterSource(request)


def new_executor(request: ExecutorRequest) -> UnfencedCounterExecutor:
    node = request.capture_id.split("-")[0]
    if (Path(urlsplit(request.source_uri).path) / f"no-executor-{node}").exists():
        raise OperatingError(f"{node} lacks what it needs")
    fenced = request.options.get("fenced", "yes") == "yes"
    return CounterExecutor(request) if fenced else UnfencedCounterExecutor(request)
