"""A process that replicates tables until it is ended: `python -m tests.processor.postgres.writer_process JSON`.

JSON: source_uri, sink_uri, namespace, id, start_ts, epoch, table_ids. Prints one line when all tables write.
"""

from __future__ import annotations

import json
import sys
import threading

from processor.postgres import PostgresExecutor, new_executor
from tablewire.executor import ExecutorRequest
from tablewire.model.ids import ChangefeedID
from tablewire.model.spans import Span
from tests.processor.postgres.replication_kit import prepare, promote


def main() -> None:
    given = json.loads(sys.argv[1])
    executor = new_executor(
        ExecutorRequest(
            capture_id="writer-process",
            changefeed=ChangefeedID(given["namespace"], given["id"]),
            changefeed_epoch=1,
            source_uri=given["source_uri"],
            sink_uri=given["sink_uri"],
            tables=["public.*"],
            start_ts=given["start_ts"],
        )
    )
    assert isinstance(executor, PostgresExecutor)
    for table_id in given["table_ids"]:
        prepare(executor, Span(table_id), given["start_ts"])
        promote(executor, Span(table_id), given["start_ts"], epoch=given["epoch"])
    print("writing", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
