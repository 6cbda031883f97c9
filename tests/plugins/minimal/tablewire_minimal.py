"""`minimal://host?tables=3`: that many tables, and a file for each at the sink, touched while the table is replicated."""

import time
from pathlib import Path

from tablewire import Checkpoint, TableState, TableStatus


class Source:
    def __init__(self, request):
        self.count = int(request.source_uri.partition("tables=")[2])

    check = lambda self: ()  # noqa: E731
    retained_bytes = drop = close = lambda self: 0
    current_ts = lambda self: int(time.time() * 1000)  # noqa: E731
    advance = lambda self, checkpoint_ts: None  # noqa: E731
    tables = lambda self: {number: f"public.t{number}" for number in range(1, self.count + 1)}  # noqa: E731


class Executor:
    def __init__(self, request):
        self.sink, self.states = Path(request.sink_uri.removeprefix("file://")), {}

    def add_table_span(self, span, checkpoint, is_prepare):
        self.states[span] = TableState.PREPARED if is_prepare else TableState.REPLICATING
        return True

    def is_add_table_span_finished(self, span, is_prepare):
        return True

    def remove_table_span(self, span):
        return True

    def is_remove_table_span_finished(self, span):
        self.states.pop(span, None)
        return int(time.time() * 1000), True

    def get_table_span_status(self, span, collect_stat):
        state, now_ts = self.states.get(span, TableState.ABSENT), int(time.time() * 1000)
        if state is TableState.REPLICATING:
            (self.sink / str(span.table_id)).touch()
        return TableStatus(span, state, Checkpoint(now_ts, now_ts) if self.states.get(span) else Checkpoint(0, 0))
