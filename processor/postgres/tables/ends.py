"""How the work of a worker or a copy ended: the input, and the data of the next state."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from processor.postgres.sinks import ReloadNeededError
from processor.postgres.tables.life import Data, Grant, Retry, TableInput, Writer
from tablewire.model.ids import Ts


@dataclass(frozen=True, slots=True)
class End:
    """data: of the next state, made from the present one (another thread may have changed it meanwhile).

    again: there is more to do now. delay_s: there is more to do after so long. start_ts: where the writer starts.
    """

    what: TableInput
    data: Callable[[Writer | Grant], Data] = lambda data: data
    again: bool = False
    delay_s: float | None = None
    start_ts: Ts | None = None


def settled(data: Writer | Grant) -> Data:
    return data.settled() if isinstance(data, Writer) else data


WROTE = End(TableInput.DONE, settled, again=True)
IDLE = End(TableInput.DONE, settled)


def gathering(delay_s: float) -> End:
    return End(TableInput.GATHER, settled, delay_s=delay_s)


def retry_after(delay_s: float, since: float | None, is_unsure: bool, copy_wanted: ReloadNeededError | None) -> End:
    """Return the end of work that failed temporarily. since: of the first failure in a row, None: as before."""

    def data(data: Writer | Grant) -> Data:
        retry = Retry(time.monotonic() + delay_s, data.retry.since if since is None else since)
        if isinstance(data, Grant):
            return replace(data, retry=retry)
        wanted = copy_wanted or data.copy_wanted
        return replace(data, retry=retry, is_unsure=data.is_unsure or is_unsure, copy_wanted=wanted)

    return End(TableInput.RETRY, data, delay_s=delay_s)


def copy_due(accepted: Callable[[Writer | Grant], Writer] | None = None, start_ts: Ts | None = None) -> End:
    """Return the end of work after which the table must be copied. accepted: returns the writer after a takeover."""

    def data(data: Writer | Grant) -> Data:
        writer = accepted(data) if accepted is not None else data
        assert isinstance(writer, Writer)
        retry = replace(writer.retry, at=0.0)
        return replace(writer, retry=retry, is_unsure=False, copy_wanted=None, copy_after=time.monotonic())

    return End(TableInput.COPY_DUE, data, start_ts=start_ts)
