"""The panels of the dashboard, as data for `dashboard.py` and for docs/tools/monitoring_figures.py.

An expression may contain the dashboard variables `$changefeed` and `$processor` (regular expressions; "all" is `.*`) and
Grafana's `$__rate_interval`, which covers at least four scrapes. Only the leader exports series by changefeed, but around an
election the previous leader's last sample still counts. Take gauges as the max over owners before summing; increases of
counters may be summed directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

UNITS = {"s", "bytes", "Bps", "cps", "short", "percentunit", "none"}
"""Grafana's units: seconds, bytes, bytes/s, counts/s, a number with k and M, a fraction of 1, a plain number."""

Kind = Literal["stat", "lines", "bars", "stack"]


@dataclass(frozen=True, slots=True)
class Expression:
    """A PromQL expression with the legend of its series; `{{label}}` in a legend is the value of a label."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. A "stat" shows the last value, the other kinds show values over time.

    red_from: values from here on are red; over time, a dashed line marks the threshold. red_below: the opposite.
    """

    kind: Kind
    title: str
    unit: str
    description: str
    expressions: tuple[Expression, ...]
    red_from: float | None = None
    red_below: float | None = None


_FEED = '{changefeed=~"$changefeed"}'
_AT_PROCESSOR = '{changefeed=~"$changefeed", instance=~"$processor"}'


def _stat(
    title: str, unit: str, description: str, expr: str, *, red_from: float | None = None, red_below: float | None = None
) -> Panel:
    return Panel("stat", title, unit, description, (Expression(expr),), red_from, red_below)


def _lines(
    title: str,
    unit: str,
    description: str,
    *expressions: Expression,
    red_from: float | None = None,
    red_below: float | None = None,
) -> Panel:
    return Panel("lines", title, unit, description, expressions, red_from, red_below)


def _bars(title: str, description: str, *expressions: Expression, unit: str = "none") -> Panel:
    return Panel("bars", title, unit, description, expressions)


def _stack(title: str, unit: str, description: str, expr: str, legend: str) -> Panel:
    return Panel("stack", title, unit, description, (Expression(expr, legend),))


def _by_changefeed(name: str) -> Expression:
    """Return a gauge of the leader, one line per changefeed."""
    return Expression(f"max by (changefeed) ({name}{_FEED})", "{{changefeed}}")


def _of_leader(name: str, label: str) -> str:
    """Return a gauge that has the labels changefeed and `label`, summed over changefeeds."""
    return f"sum by ({label}) (max by (changefeed, {label}) ({name}{_FEED}))"


def _rate(name: str, label: str, selector: str = "", legend: str = "") -> Expression:
    return Expression(f"sum by ({label}) (rate({name}{selector}[$__rate_interval]))", legend or f"{{{{{label}}}}}")


def _growth(name: str, what: str) -> Expression:
    """Return how fast a source position grows, one line per changefeed."""
    return Expression(f"max by (changefeed) (deriv({name}{_FEED}[$__rate_interval]))", f"{{{{changefeed}}}} {what}")


def _quantile(fraction: float, histogram: str, by: str = "le") -> str:
    return f"histogram_quantile({fraction:g}, sum by ({by}) (rate({histogram}_bucket[$__rate_interval])))"


def _events(name: str, by: str = "changefeed", selector: str = _FEED, legend: str = "") -> Expression:
    """Return the exact number of events per step. `increase` extrapolates: it can turn 5 events into 6.

    No value is shown for a window in which the counter was reset.
    """
    counter = f"{name}{selector}[$__rate_interval]"
    return Expression(
        f"sum by ({by}) (max_over_time({counter}) - min_over_time({counter}) unless resets({counter}) > 0)",
        legend or f"{{{{{by}}}}}",
    )


_GLANCE = (
    _stat("Leaders", "none", "Owners that lead. The right number is 1.", "sum(tablewire_owner_is_leader) or vector(0)",
        red_below=1),
    _stat("Owners up", "none", "Owners that Prometheus can scrape.", 'sum(up{job="tablewire-owner"})', red_below=1),
    _stat("Processors ready", "none", "Processors that are registered and can be assigned tables.",
        "sum(tablewire_processor_ready) or vector(0)", red_below=1),
    _stat("Checkpoint lag, worst", "s",
        "The lag of the changefeed that is furthest behind: the time since its source was at the "
        "checkpoint.", f"max(tablewire_owner_checkpoint_lag_seconds{_FEED})", red_from=60),
    _stat("WAL retained, most", "bytes", "The most WAL that a source keeps on disk for one changefeed.",
        f"max(tablewire_owner_source_retained_bytes{_FEED})", red_from=10 * 2**30),
    _stat("Spans replicating", "percentunit", "Fraction of the spans that have a writer.",
        'sum(max by (changefeed) (tablewire_owner_spans{state="replicating", changefeed=~"$changefeed"}))'
        f" / (sum(max by (changefeed, state) (tablewire_owner_spans{_FEED})) > 0)", red_below=1),
    _stat("Stalled spans", "none", "Spans that are not in a steady state, including first copies and moves.",
        f"sum(max by (changefeed, reason) (tablewire_owner_stalled_spans{_FEED}))", red_from=1),
    _stat("Alerts firing", "none", "docs/monitoring.md has a paragraph for each alert.",
        'sum(ALERTS{alertname=~"Tablewire.*", alertstate="firing"}) or vector(0)', red_from=1),
)  # fmt: skip

_PROGRESS = (
    _lines("Checkpoint lag", "s",
        "Time since the source was at the checkpoint, as far back as the current leader has observed it. "
        "The resolution is source.poll_interval_ms.", _by_changefeed("tablewire_owner_checkpoint_lag_seconds"),
        red_from=60),
    _lines("Checkpoint lag in source units", "bytes",
        "source_ts - checkpoint_ts. For PostgreSQL, bytes of WAL.", _by_changefeed("tablewire_owner_checkpoint_lag")),
    _lines("WAL retained by the source", "bytes",
        "For PostgreSQL, the WAL that the replication slot retains. It grows while a changefeed is "
        "paused, has failed, or makes first copies.", _by_changefeed("tablewire_owner_source_retained_bytes"),
        red_from=10 * 2**30),
    _lines("Growth of source and checkpoint", "Bps",
        "How fast the WAL of the source grows and how fast the checkpoint follows.",
        _growth("tablewire_owner_source_ts", "source"), _growth("tablewire_owner_checkpoint_ts", "checkpoint")),
    _lines("Received but not confirmed", "bytes",
        "resolved_ts - checkpoint_ts: read from the source and not yet durable in the sink.",
        Expression(f"max by (changefeed) (tablewire_owner_resolved_ts{_FEED})"
                   f" - max by (changefeed) (tablewire_owner_checkpoint_ts{_FEED})", "{{changefeed}}")),
    _stack("Changefeeds by state", "none", "A paused changefeed is `stopped`.",
        _of_leader("tablewire_owner_changefeed_state", "state") + " > 0", "{{state}}"),
)  # fmt: skip

_SPANS = (
    _stack("Spans by state", "short",
        "Replication state according to the leader. Empty while there is no leader.",
        _of_leader("tablewire_owner_spans", "state") + " > 0", "{{state}}"),
    _stack("Stalled spans by reason", "short",
        "Spans that are not in a steady state. docs/troubleshooting.md explains each reason. Empty is good.",
        _of_leader("tablewire_owner_stalled_spans", "reason") + " > 0", "{{reason}}"),
    _stack("Processors by state", "none",
        "According to the schedulers. A silent processor does not answer the owner but keeps its lease in "
        "etcd.", f"max by (state) (tablewire_owner_captures{_FEED}) > 0", "{{state}}"),
    _bars("Placements",
        "Spans that started to replicate on a processor. add: new, or lost by another processor. move: "
        "requested by an operator. drain and balance: also planned.",
        _events("tablewire_owner_placements_total", "why"), unit="short"),
    _bars("Finished jobs", "Moves, rebalances, drains and cancellations that operators requested.",
        Expression(_events("tablewire_owner_jobs_ended_total", "kind, state").expr + " > 0", "{{kind}} {{state}}")),
    _bars("Failovers and mass failures",
        "Processors lost while they were writing, and mass failures that suspended placement.",
        _events("tablewire_owner_failovers_total", legend="{{changefeed}} failover"),
        _events("tablewire_owner_brakes_total", legend="{{changefeed}} mass failure")),
)  # fmt: skip

_PROCESSORS = (
    _lines("Spans by processor", "short",
        "Spans of which the processor is the primary, according to the leader.",
        Expression(_of_leader("tablewire_owner_capture_spans", "capture"), "{{capture}}")),
    _lines("Load by processor", "short",
        "Sum of span weights: 1 per span, more for spans with many rows/s or bytes/s. Balancing evens "
        "this out.", Expression(_of_leader("tablewire_owner_capture_load", "capture"), "{{capture}}")),
    _lines("Running agents", "none", "The number of processors on which the agent of a changefeed runs.",
        Expression(f"sum by (changefeed) (tablewire_processor_agent_running{_AT_PROCESSOR})", "{{changefeed}}")),
    _lines("Rows written", "cps", "Rows per second written to the sink, including first copies.",
        _rate("tablewire_processor_sink_rows_total", "instance", _AT_PROCESSOR)),
    _lines("Bytes written", "Bps", "Size of those rows as received from the source.",
        _rate("tablewire_processor_sink_bytes_total", "instance", _AT_PROCESSOR)),
    _lines("Conflicts at sinks", "cps", "Changes per second that found other rows at the sink than at the source.",
        _rate("tablewire_processor_sink_conflicts_total", "changefeed", _AT_PROCESSOR)),
    _lines("WAL read", "Bps", "How fast each processor reads the WAL. Each processor reads all of it.",
        Expression("sum by (instance) (clamp_min("
                   f"deriv(tablewire_processor_reader_position_ts{_AT_PROCESSOR}[$__rate_interval]), 0))", "{{instance}}")),
    _lines("Queue usage", "percentunit",
        "Changes read but not yet written, as a fraction of the limit. A full queue means that the sink "
        "is the bottleneck.",
        Expression(f"max by (instance) (tablewire_processor_queue_bytes{_AT_PROCESSOR}"
                   f" / (tablewire_processor_queue_limit_bytes{_AT_PROCESSOR} > 0))", "{{instance}}"), red_from=0.9),
    _stack("Spans by state, reported by processors", "short",
        "The processors' view of `Spans by state`. A span is `prepared` on the target of a move. "
        "Processors are scraped at different times, so a span that moves in between can be counted twice "
        "or not at all.", f"sum by (state) (tablewire_processor_spans{_AT_PROCESSOR}) > 0", "{{state}}"),
    _lines("Lease margin of processors", "s",
        "Time until the processor must stop writing unless its lease is renewed. Below 0 it has stopped.",
        Expression('tablewire_processor_lease_margin_seconds{instance=~"$processor"}', "{{instance}}"), red_below=0),
)  # fmt: skip

_OWNERS = (
    _stack("Leader", "none", "One owner at a time.", "tablewire_owner_is_leader > 0", "{{instance}}"),
    _bars("Elections", "How often each owner became the leader.",
        _events("tablewire_owner_elections_total", "instance", "")),
    _lines("Lease margin of the leader", "s",
        "Time until the leader must stop acting unless its lease is renewed.",
        Expression("tablewire_owner_lease_margin_seconds", "{{instance}}"), red_below=0),
    _lines("Tick", "s", "Duration of one round of ticks of all changefeeds, estimated from histogram buckets.",
        Expression(_quantile(0.5, "tablewire_owner_tick_seconds"), "median"),
        Expression(_quantile(0.99, "tablewire_owner_tick_seconds"), "p99")),
    _lines("Exchange duration", "s",
        "Average duration of a call to a processor. It includes up to exchange.wait_ms during which the "
        "processor waits for spans to settle.",
        Expression("sum by (capture) (rate(tablewire_owner_exchange_seconds_sum[$__rate_interval]))"
                   " / (sum by (capture) (rate(tablewire_owner_exchange_seconds_count[$__rate_interval])) > 0)", "{{capture}}")),
    _lines("Exchanges", "cps", "Calls per second to each processor, and those that failed.",
        _rate("tablewire_owner_exchange_seconds_count", "capture"),
        _rate("tablewire_owner_exchange_failures_total", "capture", legend="{{capture}} failed")),
    _lines("Exchange failing for", "s",
        "Time since the first of the current consecutive failures. 0: the last call succeeded.",
        Expression("max by (capture) (tablewire_owner_exchange_failing_seconds)", "{{capture}}"), red_from=10),
    _lines("Queued messages", "short",
        "Messages waiting for the next Exchange. The content of a dropped message is sent again.",
        Expression("max by (capture) (tablewire_owner_exchange_queued_messages)", "{{capture}}"),
        _rate("tablewire_owner_exchange_dropped_messages_total", "capture", legend="{{capture}} dropped")),
    _lines("Exchanges received by processors", "cps",
        "unanswered: nothing settled within exchange.wait_ms, the answer comes with the next call. "
        "invalid, refused, overflowed: nothing changed.",
        _rate("tablewire_processor_exchanges_total", "outcome", '{instance=~"$processor"}')),
)  # fmt: skip

_ANOMALIES = (
    _bars("Two writers, orphans, audit failures",
        "A processor held a span that it should not hold, or did not hold one that it should. The owner "
        "resolves this at once, and a fenced sink refuses stale writes.",
        _events("tablewire_owner_two_writers_total", legend="{{changefeed}} two writers"),
        _events("tablewire_owner_orphans_total", legend="{{changefeed}} orphans"),
        _events("tablewire_owner_audit_failures_total", legend="{{changefeed}} audit failures")),
    _bars("Lost leases",
        "A processor stopped writing because its lease might have expired, and registered again under a "
        "new capture id.", _events("tablewire_processor_lease_losses_total", "instance", '{instance=~"$processor"}')),
    _stack("Alerts", "none", "pending: the condition holds, but not yet for as long as `for:` requires.",
        'sum by (alertname, alertstate) (ALERTS{alertname=~"Tablewire.*"})', "{{alertname}} {{alertstate}}"),
)  # fmt: skip

_PROCESSES = (
    _lines("CPU", "percentunit", "Fraction of one core.",
        Expression('rate(process_cpu_seconds_total{job=~"tablewire-.*"}[$__rate_interval])', "{{job}} {{instance}}")),
    _lines("Memory", "bytes", "Resident set size.",
        Expression('process_resident_memory_bytes{job=~"tablewire-.*"}', "{{job}} {{instance}}")),
    _stack("Versions", "none", "Number of processes by version.", "count by (service, version) (tablewire_build_info)",
        "{{service}} {{version}}"),
    _lines("etcd: fsync, p99", "s", "Leases depend on it.",
        Expression(_quantile(0.99, "etcd_disk_wal_fsync_duration_seconds", "instance, le"), "{{instance}}"),
        red_from=0.5),
    _lines("etcd: members with a leader", "none", "All members, and no changes of the leader.",
        Expression("sum(etcd_server_has_leader)", "with a leader"),
        _events("etcd_server_leader_changes_seen_total", "job", "", "leader changes seen")),
    _lines("etcd: database", "percentunit", "Fraction of the quota.",
        Expression("etcd_mvcc_db_total_size_in_bytes / etcd_server_quota_backend_bytes", "{{instance}}"), red_from=0.8),
)  # fmt: skip

ROWS: Mapping[str, tuple[Panel, ...]] = {
    "At a glance": _GLANCE,
    "Progress": _PROGRESS,
    "Spans": _SPANS,
    "Processors": _PROCESSORS,
    "Owners and their calls to processors": _OWNERS,
    "Anomalies": _ANOMALIES,
    "Processes and etcd": _PROCESSES,
}
