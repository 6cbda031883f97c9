"""The files sink: JSON lines below a folder, at least once, each change identified (envelope.py).

<folder>/<schema>.<table>/
    <incarnation>-<changefeed_epoch>-<assignment_epoch>-<number>.jsonl   changes; names sort by age
    snapshot-<incarnation>-<table id>.jsonl                              the first copy, once complete
    snapshot-<incarnation>-<table id>.position                           where changes follow it
    epochs/<incarnation>-<changefeed_epoch>-<assignment_epoch>           the writers of the table

A writer only appends to files of its own epoch, and only while no greater epoch has been announced; a
paused writer that continues can at most repeat, in its own file, changes that its successor writes too.
A batch is on disk (fsync) before the checkpoint advances; the next writer cuts off an incomplete last
line. With processors on several machines the folder must be a shared one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from processor.postgres.sinks import Fence, SinkContext, SinkSession, SinkUnavailableError, TakeoverResult
from processor.postgres.sinks.envelope import change_lines, copy_lines
from processor.postgres.source.pgoutput import Part, Transaction
from tablewire.errors import EpochRefusedError, OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import TableSchema

EPOCHS_KEPT = 50
TORN_FILES_MAX = 3
"""Only the newest files can have an incomplete last line."""
TAIL_BYTES = 64 * 1024
"""How much of a file is searched for the last line end at a time."""
WRITE_BYTES = 1024 * 1024


class FilesSession(SinkSession):
    """One session for all threads; a table is written by one of them at a time."""

    def __init__(self, root: Path, context: SinkContext, file_max_bytes: int) -> None:
        self.context = context
        self._root = root
        self._file_max_bytes = file_max_bytes
        self._tables: dict[TableID, TableFiles] = {}

    def take_over(self, schema: TableSchema, fence: Fence, granted_ts: Ts, wants_snapshot: bool) -> TakeoverResult:
        self.context.require_allowed()
        with _errors(schema):
            position = self._files(schema, fence).take_over(schema.table_id)
        if position is not None and position < schema.published_ts:
            raise OperatingError(
                f"table {schema.full_name} was outside of the changefeed's tables for a while, and what was written to it then is"
                " not here: remove its folder to have it copied again"
            )
        return TakeoverResult(position or 0, wants_snapshot and position is None)

    def begin(self, schema: TableSchema, fence: Fence) -> FilesTransaction:
        return FilesTransaction(self, schema, self._files(schema, fence))

    def forget(self, table_id: TableID) -> None:
        if (found := self._tables.pop(table_id, None)) is not None:
            found.close()

    def close_all(self) -> None:
        for table_id in list(self._tables):
            self.forget(table_id)

    def _files(self, schema: TableSchema, fence: Fence) -> TableFiles:
        found = self._tables.get(schema.table_id)
        if found is None or found.fence != fence:
            self.forget(schema.table_id)
            folder = self._root / f"{_file_name(schema.schema)}.{_file_name(schema.name)}"
            found = self._tables[schema.table_id] = TableFiles(folder, fence, self._file_max_bytes)
        return found


class TableFiles:
    """The files that one writer (one fence) appends to, and those of its predecessors."""

    def __init__(self, folder: Path, fence: Fence, file_max_bytes: int) -> None:
        self.folder = folder
        self.fence = fence
        self.prefix = f"{fence.incarnation:020d}-{fence.changefeed_epoch:020d}-{fence.assignment_epoch:020d}"
        self._file_max_bytes = file_max_bytes
        self._descriptor: int | None = None
        self._number = 0
        self._size = 0

    def take_over(self, table_id: TableID) -> Ts | None:
        """Announce the fence; return the position of the first copy if that is complete."""
        epochs = self.folder / "epochs"
        epochs.mkdir(parents=True, exist_ok=True)
        self.require_newest()
        (epochs / self.prefix).touch()
        _sync_folder(epochs)
        # The fence is announced: an older writer that comes now sees it, and this call sees a newer one that came meanwhile.
        self.require_newest()
        for path in sorted(epochs.iterdir())[:-EPOCHS_KEPT]:
            path.unlink(missing_ok=True)
        for path in self.folder.glob("*.tmp"):
            path.unlink(missing_ok=True)
        for path in sorted(self.folder.glob("[0-9]*.jsonl"))[-TORN_FILES_MAX:]:
            _cut_torn_line(path)
        self._number = sum(1 for _ in self.folder.glob(f"{self.prefix}-*.jsonl"))
        try:
            return int(self.snapshot_path(table_id, "position").read_text(encoding="ascii"))
        except FileNotFoundError:
            return None

    def require_newest(self) -> None:
        newest = max((path.name for path in (self.folder / "epochs").iterdir()), default="")
        if newest > self.prefix:
            raise EpochRefusedError(f"{self.folder.name}: a newer writer ({newest}) has taken the table over")

    def append(self, data: bytes) -> None:
        """Write at the end of the current file; begin a new one if it is large."""
        if self._descriptor is None or self._size >= self._file_max_bytes:
            self._open_next()
        assert self._descriptor is not None
        view = memoryview(data)
        while view:
            written = os.write(self._descriptor, view)
            self._size += written
            view = view[written:]

    def mark(self) -> tuple[int, int]:
        return self._number, self._size

    def cut(self, mark: tuple[int, int]) -> None:
        """Remove what was appended after the mark."""
        number, size = mark
        while self._number > number:
            self.close()
            self._path(self._number).unlink(missing_ok=True)
            self._number -= 1
            self._size = self._file_max_bytes  # the next append opens a new file
        if number and self._path(number).exists():
            os.truncate(self._path(number), size)
            if self._descriptor is not None:
                self._size = size

    def sync(self) -> None:
        if self._descriptor is not None:
            os.fdatasync(self._descriptor)

    def snapshot_path(self, table_id: TableID, kind: str) -> Path:
        return self.folder / f"snapshot-{self.fence.incarnation:020d}-{table_id}.{kind}"

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open_next(self) -> None:
        self.sync()
        self.close()
        self._number += 1
        self._descriptor = os.open(self._path(self._number), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._size = os.fstat(self._descriptor).st_size
        _sync_folder(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.prefix}-{number:06d}.jsonl"


class FilesTransaction:
    """The lines of one batch. They are visible in the file before the commit; a rollback removes them."""

    def __init__(self, session: FilesSession, schema: TableSchema, files: TableFiles) -> None:
        self._session = session
        self._schema = schema
        self._files = files
        self._mark = files.mark()
        self._temporary: Path | None = None
        self._next_ordinal: tuple[Transaction | None, int] = (None, 0)
        """After the last call of apply: a source transaction may arrive in pieces, all of them here. A batch that is written
        again after a rollback counts from the beginning."""

    def apply(self, parts: Sequence[Part], is_last: bool) -> int:
        transaction, ordinal = self._next_ordinal
        if parts[0].transaction is not transaction:
            ordinal = 0
        with _errors(self._schema):
            self._require_allowed()
            self._append(change_lines(parts, ordinal, time.time_ns() // 1_000_000))
        last = parts[-1].transaction
        begun = ordinal if parts[0].transaction is last else 0
        self._next_ordinal = (last, begun + sum(len(part.frames) for part in parts if part.transaction is last))
        return sum(len(part.frames) for part in parts)

    def copy(self, schema: TableSchema, rows: Iterable[bytes], position: Ts) -> None:
        self._temporary = self._files.snapshot_path(schema.table_id, f"jsonl.{self._files.prefix}.tmp")
        with _errors(schema):
            self._require_allowed()
            with self._temporary.open("wb") as file:
                file.writelines(copy_lines(schema, rows, position, time.time_ns() // 1_000_000))
                file.flush()
                os.fsync(file.fileno())
            self._files.snapshot_path(schema.table_id, "position.tmp").write_text(str(position), encoding="ascii")

    def commit(self) -> None:
        with _errors(self._schema):
            self._require_allowed()
            if self._temporary is None:
                self._files.sync()
                return
            table_id = self._schema.table_id
            self._temporary.rename(self._files.snapshot_path(table_id, "jsonl"))
            # Last, as it means that the copy is complete.
            self._files.snapshot_path(table_id, "position.tmp").rename(self._files.snapshot_path(table_id, "position"))
            _sync_folder(self._files.folder)
            self._temporary = None

    def rollback(self) -> None:
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        try:
            self._files.cut(self._mark)
        except OSError:
            self._session.forget(self._schema.table_id)

    def _require_allowed(self) -> None:
        self._session.context.require_allowed()
        self._files.require_newest()

    def _append(self, lines: Iterator[bytes]) -> None:
        pending: list[bytes] = []
        size = 0
        for line in lines:
            pending.append(line)
            size += len(line)
            if size >= WRITE_BYTES:
                self._files.append(b"".join(pending))
                pending, size = [], 0
        if pending:
            self._files.append(b"".join(pending))


@contextmanager
def _errors(schema: TableSchema) -> Iterator[None]:
    """Translate errors of the file system: a full disk may have space later, a missing permission remains."""
    try:
        yield
    except UnicodeDecodeError as error:
        remedy = "correct it at the source, then have its tables copied again (owner changefeed resync)"
        raise OperatingError(f"table {schema.full_name}: a value is not UTF-8: {error.object[:80]!r}: {remedy}") from None
    except OSError as error:
        kind = OperatingError if isinstance(error, PermissionError) else SinkUnavailableError
        raise kind(f"table {schema.full_name}: the files sink cannot be written: {error}") from None


def _file_name(name: str) -> str:
    """Return the name as a part of a file's name, reversibly."""
    return quote(name, safe=" ()[]{}+,;=@$~!#&'").replace(".", "%2E")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut_torn_line(path: Path) -> None:
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - TAIL_BYTES)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            file.truncate(end)
