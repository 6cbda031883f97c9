"""What the dashboard shows: rows of panels, as data. `dashboard.py` makes Grafana's JSON of it, `plots.py` draws the queries.

An expression may hold `$changefeed` and `$processor` (regular expressions, "all" matches everything) and `$__rate_interval`, a
time that holds at least four scrapes. Only the leader has series by changefeed, but between two scrapes a former one may seem
to have them too: gauges are a max over the owners, before anything is added up; increases of counters are a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

UNITS = {"s", "bytes", "Bps", "cps", "short", "percentunit", "none"}
"""Grafana's names: seconds, bytes, bytes a second, counts a second, a number with k and M, 0..1, a plain number."""

STAT, LINES, BARS, STACK = "stat", "lines", "bars", "stack"


@dataclass(frozen=True, slots=True)
class Query:
    """legend: Grafana's, with {{label}} for the value of a label."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """kind: STAT shows the last value, LINES, BARS and STACK show time. red_from: where a STAT is red, and from which a value
    in time is drawn above a line; red_below: the other way round. width: of 24."""

    title: str
    kind: str
    unit: str
    queries: tuple[Query, ...]
    description: str
    red_from: float | None = None
    red_below: float | None = None
    width: int = 8


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


FEED = '{changefeed=~"$changefeed"}'
OF_PROCESSOR = '{changefeed=~"$changefeed", instance=~"$processor"}'
FIRING = 'sum(ALERTS{alertname=~"Tablewire.*", alertstate="firing"}) or vector(0)'


def by_feed(how: str, name: str) -> Query:
    """One line a changefeed."""
    return Query(f"{how} by (changefeed) ({name}{FEED})", "{{changefeed}}")


def of_leader(name: str, by: str, selector: str = FEED) -> str:
    """A gauge by changefeed and one more label, added up over the changefeeds."""
    return f"sum by ({by}) (max by (changefeed, {by}) ({name}{selector}))"


def per_second(name: str, by: str, selector: str = "", legend: str = "") -> Query:
    return Query(f"sum by ({by}) (rate({name}{selector}[$__rate_interval]))", legend or f"{{{{{by}}}}}")


def growth(name: str, what: str) -> Query:
    """Of a position of the source, by changefeed."""
    return Query(f"max by (changefeed) (deriv({name}{FEED}[$__rate_interval]))", f"{{{{changefeed}}}} {what}")


def quantile(share: float, histogram: str, by: str = "le") -> str:
    return f"histogram_quantile({share:g}, sum by ({by}) (rate({histogram}_bucket[$__rate_interval])))"


def events(name: str, by: str = "changefeed", selector: str = FEED, legend: str = "") -> Query:
    """How often in one step, exactly: an `increase` is extrapolated, and would make six of five. Where a counter has begun anew
    within the window nothing is shown."""
    counter = f"{name}{selector}[$__rate_interval]"
    return Query(
        f"sum by ({by}) (max_over_time({counter}) - min_over_time({counter}) unless resets({counter}) > 0)",
        legend or f"{{{{{by}}}}}",
    )


GLANCE = Row(
    "At a glance",
    (
        Panel(
            "Leaders", STAT, "none", (Query("sum(tablewire_owner_is_leader) or vector(0)"),),
            "Owners that lead now. 1 is right.", red_below=1, width=3,
        ),
        Panel("Owners up", STAT, "none", (Query('sum(up{job="tablewire-owner"})'),), "Owners that answer.", red_below=1, width=3),
        Panel(
            "Processors ready", STAT, "none", (Query("sum(tablewire_processor_ready) or vector(0)"),),
            "Processors that are registered and may be given tables.", red_below=1, width=3,
        ),
        Panel(
            "Checkpoint lag, worst", STAT, "s", (Query(f"max(tablewire_owner_checkpoint_lag_seconds{FEED})"),),
            "How long ago the source was where the checkpoint is; of the changefeed that is furthest behind.",
            red_from=60, width=3,
        ),
        Panel(
            "WAL kept, most", STAT, "bytes", (Query(f"max(tablewire_owner_source_retained_bytes{FEED})"),),
            "What a source keeps on disk for a changefeed.", red_from=10 * 2**30, width=3,
        ),
        Panel(
            "Spans replicating", STAT, "percentunit",
            (
                Query(
                    'sum(max by (changefeed) (tablewire_owner_spans{state="replicating", changefeed=~"$changefeed"}))'
                    f" / (sum(max by (changefeed, state) (tablewire_owner_spans{FEED})) > 0)"
                ),
            ),
            "Share of the spans that somebody writes.", red_below=1, width=3,
        ),
        Panel(
            "Stalled spans", STAT, "none", (Query(f"sum(max by (changefeed, reason) (tablewire_owner_stalled_spans{FEED}))"),),
            "Spans that are not steady, first copies and moves included.", red_from=1, width=3,
        ),
        Panel(
            "Alerts firing", STAT, "none", (Query(FIRING),), "docs/monitoring.md has a paragraph for each.", red_from=1, width=3,
        ),
    ),
)  # fmt: skip

PROGRESS = Row(
    "How far it is",
    (
        Panel(
            "Checkpoint lag", LINES, "s", (by_feed("max", "tablewire_owner_checkpoint_lag_seconds"),),
            "How long ago the source was where the checkpoint is, as far as the present leader has seen; as fine as the source is"
            " asked (source.poll_interval_ms).", red_from=60,
        ),
        Panel(
            "Checkpoint lag in the source's units", LINES, "bytes", (by_feed("max", "tablewire_owner_checkpoint_lag"),),
            "source_ts - checkpoint_ts: for PostgreSQL bytes of WAL.",
        ),
        Panel(
            "Kept at the source", LINES, "bytes", (by_feed("max", "tablewire_owner_source_retained_bytes"),),
            "For PostgreSQL the WAL that the slot holds. It grows while a changefeed is paused, fails, or copies a table first.",
            red_from=10 * 2**30,
        ),
        Panel(
            "Source and checkpoint", LINES, "Bps",
            (growth("tablewire_owner_source_ts", "source"), growth("tablewire_owner_checkpoint_ts", "checkpoint")),
            "How fast the source's WAL grows, and the checkpoint follows.",
        ),
        Panel(
            "Received and not confirmed", LINES, "bytes",
            (
                Query(
                    f"max by (changefeed) (tablewire_owner_resolved_ts{FEED})"
                    f" - max by (changefeed) (tablewire_owner_checkpoint_ts{FEED})",
                    "{{changefeed}}",
                ),
            ),
            "resolved_ts - checkpoint_ts: what has been read and is not in the sink yet.",
        ),
        Panel(
            "State of the changefeeds", STACK, "none",
            (Query(of_leader("tablewire_owner_changefeed_state", "state") + " > 0", "{{state}}"),),
            "How many are in which state. A paused one is `stopped`.",
        ),
    ),
)  # fmt: skip

SPANS = Row(
    "Spans",
    (
        Panel(
            "Spans by state", STACK, "short", (Query(of_leader("tablewire_owner_spans", "state") + " > 0", "{{state}}"),),
            "Replication state, as the leader sees it. Nothing is drawn while nobody leads.",
        ),
        Panel(
            "Stalled spans by reason", STACK, "short",
            (Query(of_leader("tablewire_owner_stalled_spans", "reason") + " > 0", "{{reason}}"),),
            "Spans that are not steady, and why. docs/operations.md has a line for each reason. Empty is good.",
        ),
        Panel(
            "Processors by state", STACK, "none",
            (Query(f"max by (state) (tablewire_owner_captures{FEED}) > 0", "{{state}}"),),
            "As the schedulers see them; silent: does not answer, while etcd still hears it.",
        ),
        Panel(
            "Spans that began to replicate", BARS, "short", (events("tablewire_owner_placements_total", "why"),),
            "add: new, or after a loss. move: an operator's. drain, balance: planned as well.",
        ),
        Panel(
            "Jobs that ended", BARS, "none",
            (
                Query(events("tablewire_owner_jobs_ended_total", "kind, state").expr + " > 0", "{{kind}} {{state}}"),
            ),
            "Moves, rebalances, drains and cancellations that somebody asked for.",
        ),
        Panel(
            "Failovers and brakes", BARS, "none",
            (
                events("tablewire_owner_failovers_total", legend="{{changefeed}} failover"),
                events("tablewire_owner_brakes_total", legend="{{changefeed}} brake"),
            ),
            "Processors lost while they were writing; mass losses that held placement back.",
        ),
    ),
)  # fmt: skip

PROCESSORS = Row(
    "Processors",
    (
        Panel(
            "Spans by processor", LINES, "short",
            (Query(of_leader("tablewire_owner_capture_spans", "capture"), "{{capture}}"),),
            "Spans of which a processor is the Primary, by the leader.",
        ),
        Panel(
            "Load by processor", LINES, "short",
            (Query(of_leader("tablewire_owner_capture_load", "capture"), "{{capture}}"),),
            "Their weight: 1 a span, and more for one with many rows/s or bytes/s. This is what balance evens out.",
        ),
        Panel(
            "Agents that run", LINES, "none",
            (Query(f"sum by (changefeed) (tablewire_processor_agent_running{OF_PROCESSOR})", "{{changefeed}}"),),
            "At how many processors a changefeed's agent runs.",
        ),
        Panel(
            "Rows written", LINES, "cps",
            (per_second("tablewire_processor_sink_rows_total", "instance", OF_PROCESSOR),),
            "Rows a second into the sink, first copies included.",
        ),
        Panel(
            "Bytes written", LINES, "Bps",
            (per_second("tablewire_processor_sink_bytes_total", "instance", OF_PROCESSOR),),
            "Bytes of those rows, as they came from the source.",
        ),
        Panel(
            "Source read", LINES, "Bps",
            (
                Query(
                    "sum by (instance) (clamp_min("
                    f"deriv(tablewire_processor_reader_position_ts{OF_PROCESSOR}[$__rate_interval]), 0))",
                    "{{instance}}",
                ),
            ),
            "How fast each processor's reader goes through the WAL. All of them read all of it.",
        ),
        Panel(
            "Queues in use", LINES, "percentunit",
            (
                Query(
                    f"max by (instance) (tablewire_processor_queue_bytes{OF_PROCESSOR}"
                    f" / (tablewire_processor_queue_limit_bytes{OF_PROCESSOR} > 0))",
                    "{{instance}}",
                ),
            ),
            "Read and not written yet, of what may be. Full: the sink is the bottleneck.", red_from=0.9,
        ),
        Panel(
            "Spans held, by what the processors say", STACK, "short",
            (Query(f"sum by (state) (tablewire_processor_spans{OF_PROCESSOR}) > 0", "{{state}}"),),
            "The other side of `Spans by state`; prepared: at the target of a move. Processors are not scraped at the same"
            " moment: a span that moves in between may be counted twice, or not at all, once.",
        ),
        Panel(
            "Lease margin of the processors", LINES, "s",
            (Query('tablewire_processor_lease_margin_seconds{instance=~"$processor"}', "{{instance}}"),),
            "Until it must stop writing unless its lease is renewed. Below 0 it has stopped.", red_below=0,
        ),
    ),
)  # fmt: skip

OWNERS = Row(
    "Owners and what they say to processors",
    (
        Panel(
            "Who leads", STACK, "none", (Query("tablewire_owner_is_leader > 0", "{{instance}}"),),
            "One owner at a time.",
        ),
        Panel(
            "Elections", BARS, "none",
            (events("tablewire_owner_elections_total", "instance", ""),),
            "How often each owner became the leader.",
        ),
        Panel(
            "Lease margin of the leader", LINES, "s", (Query("tablewire_owner_lease_margin_seconds", "{{instance}}"),),
            "Until it must stop acting unless its lease is renewed.", red_below=0,
        ),
        Panel(
            "Tick", LINES, "s",
            (
                Query(quantile(0.5, "tablewire_owner_tick_seconds"), "median"),
                Query(quantile(0.99, "tablewire_owner_tick_seconds"), "p99"),
            ),
            "One round of ticks of all changefeeds, from buckets.",
        ),
        Panel(
            "Exchange", LINES, "s",
            (
                Query(
                    "sum by (capture) (rate(tablewire_owner_exchange_seconds_sum[$__rate_interval]))"
                    " / (sum by (capture) (rate(tablewire_owner_exchange_seconds_count[$__rate_interval])) > 0)",
                    "{{capture}}",
                ),
            ),
            "A call to a processor on average, up to exchange.wait_ms of waiting for spans to settle included.",
        ),
        Panel(
            "Exchanges", LINES, "cps",
            (
                per_second("tablewire_owner_exchange_seconds_count", "capture"),
                per_second("tablewire_owner_exchange_failures_total", "capture", legend="{{capture}} failed"),
            ),
            "Calls a second to each processor, and those that failed.",
        ),
        Panel(
            "Failing since", LINES, "s", (Query("max by (capture) (tablewire_owner_exchange_failing_seconds)", "{{capture}}"),),
            "Since the first of the failures in a row; 0: the last call went well.", red_from=10,
        ),
        Panel(
            "Messages that wait", LINES, "short",
            (
                Query("max by (capture) (tablewire_owner_exchange_queued_messages)", "{{capture}}"),
                per_second("tablewire_owner_exchange_dropped_messages_total", "capture", legend="{{capture}} pushed out"),
            ),
            "For the next Exchange; what was pushed out is said again.",
        ),
        Panel(
            "Calls as the processors see them", LINES, "cps",
            (per_second("tablewire_processor_exchanges_total", "outcome", '{instance=~"$processor"}'),),
            "unanswered: nothing had settled within exchange.wait_ms, the answer comes with the next call. invalid, refused,"
            " overflowed: nothing changed.",
        ),
    ),
)  # fmt: skip

TROUBLE = Row(
    "What should not happen",
    (
        Panel(
            "Two writers, orphans, audits", BARS, "none",
            (
                events("tablewire_owner_two_writers_total", legend="{{changefeed}} two writers"),
                events("tablewire_owner_orphans_total", legend="{{changefeed}} orphans"),
                events("tablewire_owner_audit_failures_total", legend="{{changefeed}} audit failures"),
            ),
            "A processor held what it should not, or did not hold what it should. Resolved at once, and refused by a fenced"
            " sink.",
        ),
        Panel(
            "Leases lost", BARS, "none",
            (events("tablewire_processor_lease_losses_total", "instance", '{instance=~"$processor"}'),),
            "A processor stopped writing because its lease was in doubt, and came back under a new capture id.",
        ),
        Panel(
            "Alerts", STACK, "none",
            (
                Query(
                    'sum by (alertname, alertstate) (ALERTS{alertname=~"Tablewire.*"})', "{{alertname}} {{alertstate}}"
                ),
            ),
            "pending: true, and not yet for as long as `for:` says.",
        ),
    ),
)  # fmt: skip

BELOW = Row(
    "Processes and etcd",
    (
        Panel(
            "CPU", LINES, "percentunit",
            (Query('rate(process_cpu_seconds_total{job=~"tablewire-.*"}[$__rate_interval])', "{{job}} {{instance}}"),),
            "Of one core.",
        ),
        Panel(
            "Memory", LINES, "bytes", (Query('process_resident_memory_bytes{job=~"tablewire-.*"}', "{{job}} {{instance}}"),),
            "Resident set.",
        ),
        Panel(
            "Versions", STACK, "none",
            (Query("count by (service, version) (tablewire_build_info)", "{{service}} {{version}}"),),
            "How many processes run which version.",
        ),
        Panel(
            "etcd: fsync, p99", LINES, "s",
            (Query(quantile(0.99, "etcd_disk_wal_fsync_duration_seconds", "instance, le"), "{{instance}}"),),
            "Leases live on it.", red_from=0.5,
        ),
        Panel(
            "etcd: members with a leader", LINES, "none",
            (
                Query("sum(etcd_server_has_leader)", "with a leader"),
                events("etcd_server_leader_changes_seen_total", "job", "", "changes of it seen"),
            ),
            "All of them, and no changes.",
        ),
        Panel(
            "etcd: database", LINES, "percentunit",
            (Query("etcd_mvcc_db_total_size_in_bytes / etcd_server_quota_backend_bytes", "{{instance}}"),),
            "Of its quota.", red_from=0.8,
        ),
    ),
)  # fmt: skip

ROWS = (GLANCE, PROGRESS, SPANS, PROCESSORS, OWNERS, TROUBLE, BELOW)
