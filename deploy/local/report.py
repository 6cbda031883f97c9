"""The outcome of a demo run: measurements, problems, the summary, and demo.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deploy.local.compare import Comparison
from deploy.local.observer import Measures
from deploy.local.workload import LoadCounts
from tablewire.runtime.text import plural

LOAD_SHARE_MIN = 0.5
"""The load counts as failed below this share of the announced rate."""
LEADER, PROCESSOR = "leading owner", "processor"
COUNTED_AS = (
    "by the sink's PostgreSQL: the first copy inserts the current rows only, an update of a key is a delete and an insert,"
    " and several changes of one row in a batch are merged"
)
METHOD = "by content: the text of every column, ordered by key, both sides streamed and merged; never by counts"
NEXT_STEPS = (
    "Next: `make cluster` starts the same cluster, leaves it running, and prints",
    "commands to try in a second terminal, such as `owner table list`.",
)


@dataclass(frozen=True, slots=True)
class TableMove:
    table: str
    origin: str
    target: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill. seconds: until a new leader had scheduled all tables, or others replicated them all."""

    node: str
    role: str
    seconds: float
    by: list[str]
    tables: list[str] = field(default_factory=list)
    signal: str = "SIGKILL"


@dataclass(slots=True)
class Report:
    """Everything that the summary and demo.json show."""

    seconds: float = 0.0
    load: LoadCounts | None = None
    replicated: Mapping[str, int] = field(default_factory=dict)
    moves: list[TableMove] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    measures: Measures = field(default_factory=Measures)
    events: int = 0
    comparison: Comparison | None = None
    postgres: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check(report: Report, rows_per_s: float) -> None:
    """Add a problem to the report for everything that was announced and has not happened."""
    load, problems = report.load, report.problems
    if load is None or 0 in load.by_kind.values():
        problems.append("the load did not insert, update and delete")
    elif load.total < LOAD_SHARE_MIN * rows_per_s * report.seconds:
        problems.append(f"the load changed {load.total} rows, less than half of what was announced")
    elif load.errors:
        problems.append(f"{plural(load.errors, 'transaction')} of the load failed")
    if not report.moves:
        problems.append("no table was moved")
    killed = {kill.role for kill in report.kills}
    problems += [f"no {role} was killed" for role in (LEADER, PROCESSOR) if role not in killed]
    if report.measures.went_back:
        problems.append(f"the checkpoint went back {plural(report.measures.went_back, 'time')}")
    if report.comparison is None:
        problems.append("source and sink were not compared")
    elif not report.comparison.equal:
        problems.append(f"source and sink differ: {report.comparison}")
    elif report.comparison.rows == 0:
        problems.append("there was no row to compare")


def summary(report: Report) -> list[str]:
    """Return the lines of the result. Without problems they fit on a terminal of 80 by 24."""
    measures, comparison, equal = report.measures, report.comparison, report.comparison is not None and report.comparison.equal
    written = report.load.by_kind if report.load is not None else {}
    lines = ["", "Summary"]
    lines.append(f"  rows written        {rows_text(written)}")
    lines.append(f"  rows replicated     {rows_text(report.replicated)}")
    if written and report.replicated and written != report.replicated:
        lines.append("    They differ because the first copy reads only the current rows, an update")
        lines.append("    of a key is a delete and an insert, and changes of a row in a batch merge.")
    for move in report.moves:
        lines.append(f"  planned move        {move.table}: {move.origin} -> {move.target}, {move.seconds:.2f} s")
    for kill in report.kills:
        label = "leader killed" if kill.role == LEADER else "processor killed"
        lines.append(f"  {label:<18}  {kill.node}; {', '.join(kill.by)} took over in {kill.seconds:.2f} s")
    lines.append(f"  longest standstill  {measures.longest_standstill_s:.2f} s, of the global checkpoint, kills included")
    lag = f"median {measures.lag_s_median:.2f} s, longest {measures.lag_s_max:.2f} s, {measures.lag_bytes_max:,} bytes of WAL"
    lines.append(f"  lag of the sink     {lag}")
    if comparison is not None:
        lines.append(f"  compared            {comparison.rows:,} rows in {plural(comparison.tables, 'table')}, by content")
    lines.append(f"  source = sink: {'yes' if equal else 'NO'}")
    lines += [f"  problem: {problem}" for problem in report.problems]
    return [*lines, "", *NEXT_STEPS] if not report.problems else lines


def rows_text(by_kind: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}s" for kind, count in by_kind.items()) or "none"


def write_json(path: Path, report: Report) -> None:
    """Write demo.json atomically, because two demos may write the same file."""
    load, comparison, measures = report.load, report.comparison, report.measures
    document = {
        "ok": not report.problems,
        "problems": report.problems,
        "seconds": round(report.seconds, 3),
        "rows_written": {**load.by_kind, "total": load.total, "transactions": load.transactions} if load else None,
        "rows_written_by_table": load.by_table if load else None,
        "rows_replicated": report.replicated,
        "rows_replicated_as": COUNTED_AS,
        "moves": [asdict(move) for move in report.moves],
        "kills": [asdict(kill) for kill in report.kills],
        "events": report.events,
        "longest_standstill_s": round(measures.longest_standstill_s, 3),
        "watermark_lag": {
            "median_s": round(measures.lag_s_median, 3),
            "longest_s": round(measures.lag_s_max, 3),
            "longest_bytes": measures.lag_bytes_max,
            "readings": measures.readings,
        },
        "checkpoint_went_back": measures.went_back,
        "source_equals_sink": comparison is not None and comparison.equal,
        "comparison": {
            "how": METHOD,
            "tables": comparison.tables,
            "rows": comparison.rows,
            "different": comparison.different,
            "examples": [str(example) for example in comparison.examples],
        }
        if comparison is not None
        else None,
        "postgres": report.postgres,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
