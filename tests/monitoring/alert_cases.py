"""When each alert fires and when it does not: input for `promtool test rules`, at least one case for each alert.

Series use promtool's notation, one value every `interval`: `1+0x8` is nine times 1, `0+5x8` grows by 5, `_` is no sample.
With the series of `fires`, the alert must not fire at `not_before` and must fire at `at`; with those of `quiet` it must not
fire at either time. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

INTERVAL_S = 15

Series = Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """labels, summary: those of the firing alert, without `alertname` and `severity`."""

    alert: str
    at: int
    fires: Series
    quiet: Series
    summary: str
    labels: Mapping[str, str] = field(default_factory=dict)
    not_before: int = 0
    interval: int = INTERVAL_S


FEED = {"changefeed": "default/orders"}
OWNER = {"job": "tablewire-owner", "instance": "owner-1:7441"}
PROCESSOR = {"job": "tablewire-processor", "instance": "processor-1:7451"}
ETCD = {"job": "etcd", "instance": "etcd-1:2379"}


def named(name: str, *labels: Mapping[str, str], **more: str) -> str:
    """Return `name{label="value", ...}`."""
    whole = {**{key: value for part in labels for key, value in part.items()}, **more}
    return f"{name}{{{','.join(f'{key}={value!r}' for key, value in whole.items())}}}".replace("'", '"')


def owner(name: str, *labels: Mapping[str, str], **more: str) -> str:
    return named(f"tablewire_owner_{name}", OWNER, *labels, **more)


def processor(name: str, *labels: Mapping[str, str], **more: str) -> str:
    return named(f"tablewire_processor_{name}", PROCESSOR, *labels, **more)


def other(series: str) -> str:
    """Return the same series of a second process."""
    return series.replace("-1:", "-2:")


def state(word: str) -> str:
    return owner("changefeed_state", FEED, state=word)


def stalled(reason: str) -> str:
    return owner("stalled_spans", FEED, reason=reason)


def fsync(bucket: str) -> str:
    return named("etcd_disk_wal_fsync_duration_seconds_bucket", ETCD, le=bucket)


def build(process: Mapping[str, str], version: str) -> str:
    return named("tablewire_build_info", process, version=version)


def ticks(bucket: str) -> str:
    return owner("tick_seconds_bucket", le=bucket)


ON, OFF, LONG = "1+0x80", "0+0x80", "1+0x300"
RUNS = {state("normal"): ON, state("warning"): OFF}
CAPTURE = {"capture": "processor-1-7f3a"}

CASES = (
    Case(
        "TablewireNoLeader", 90, {owner("is_leader"): "1+0x2 0+0x80"}, {owner("is_leader"): OFF, other(owner("is_leader")): ON},
        "No owner leads", not_before=60,
    ),
    Case("TablewireNoLeader", 60, {processor("ready"): ON}, {owner("is_leader"): ON}, "No owner leads", not_before=15),
    Case(
        "TablewireTwoLeaders", 45, {owner("is_leader"): ON, other(owner("is_leader")): ON},
        {owner("is_leader"): "1+0x2 0+0x80", other(owner("is_leader")): "0+0x1 1+0x80"},
        "2 owners report that they lead", not_before=15,
    ),
    Case(
        "TablewireOwnerDown", 90, {named("up", OWNER): OFF}, {named("up", OWNER): "1 0 0 1+0x80", named("up", PROCESSOR): OFF},
        "Owner owner-1:7441 is unreachable", OWNER, not_before=45,
    ),
    Case(
        "TablewireOneOwnerLeft", 420,
        {named("up", OWNER): ON, other(named("up", OWNER)): "1 1 0+0x80", named("up", PROCESSOR): ON},
        {named("up", OWNER): ON, other(named("up", OWNER)): ON}, "Only one owner runs", not_before=315,
    ),
    Case(
        "TablewireElections", 900, {owner("elections_total"): "0 0 1 2 3 4 5+0x80"},
        {owner("elections_total"): "0 0 1+0x80", other(owner("elections_total")): "0+0x9 1+0x80"},
        "5 elections in 15 minutes",
    ),
    Case(
        "TablewireNoProcessor", 90, {processor("ready"): OFF}, {processor("ready"): OFF, other(processor("ready")): ON},
        "No processor is ready", not_before=45,
    ),
    Case("TablewireNoProcessor", 90, {owner("is_leader"): ON}, {processor("ready"): ON}, "No processor is ready", not_before=45),
    Case(
        "TablewireProcessorDown", 90, {named("up", PROCESSOR): OFF}, {named("up", PROCESSOR): ON, named("up", OWNER): OFF},
        "Processor processor-1:7451 is unreachable", PROCESSOR, not_before=45,
    ),
    Case(
        "TablewireProcessorNotReady", 90, {processor("ready"): OFF}, {processor("ready"): "0 0 1+0x80"},
        "Processor processor-1:7451 runs but is not ready", PROCESSOR, not_before=45,
    ),
    Case(
        "TablewireLeaseMarginLow", 120, {processor("lease_margin_seconds"): "7.5 7.1 0.4 -3+0x80"},
        {processor("lease_margin_seconds"): "7.5 7.1 0.4 7.6 7.2 0.9 7.9 7.4 7.1 7.0"},
        "tablewire-processor processor-1:7451 has at most -3.0 s of its lease left", PROCESSOR, not_before=75,
    ),
    Case(
        "TablewireLeaseMarginLow", 120, {owner("lease_margin_seconds"): "0.4+0x80"}, {owner("lease_margin_seconds"): "4+0x80"},
        "tablewire-owner owner-1:7441 has at most 0.4 s of its lease left", OWNER, not_before=15,
    ),
    Case(
        "TablewireLeaseLost", 60, {processor("lease_losses_total"): "0 0 1+0x80"}, {processor("lease_losses_total"): "3+0x80"},
        "Processor processor-1:7451 has lost its lease", PROCESSOR, not_before=15,
    ),
    Case(
        "TablewireMixedVersions", 3700,
        {build(OWNER, "1.0"): LONG, build(PROCESSOR, "1.1"): LONG},
        {build(OWNER, "1.0"): LONG, build(PROCESSOR, "1.0"): LONG},
        "2 versions run side by side", not_before=3500,
    ),
    Case(
        "TablewireChangefeedFailed", 45, {state("failed"): ON, state("normal"): OFF}, {state("failed"): OFF, state("normal"): ON},
        "Changefeed default/orders has failed", FEED, not_before=15,
    ),
    Case(
        "TablewireChangefeedWarning", 330, {state("warning"): ON},
        {state("warning"): "1+0x10 0 1+0x10 0 1+0x10", state("normal"): ON},
        "Changefeed default/orders has had an error for 5 minutes", FEED, not_before=285,
    ),
    Case(
        "TablewireCheckpointLag", 150, {**RUNS, owner("checkpoint_lag_seconds", FEED): "90+0x80"},
        {**RUNS, owner("checkpoint_lag_seconds", FEED): "45+0x80"},
        "Changefeed default/orders is 1m 30s behind its source", FEED, not_before=105,
    ),
    Case(
        "TablewireCheckpointLag", 150, {**RUNS, owner("checkpoint_lag_seconds", FEED): "90+0x80"},
        {state("stopped"): ON, state("normal"): OFF, owner("checkpoint_lag_seconds", FEED): "90+0x80"},  # paused on purpose
        "Changefeed default/orders is 1m 30s behind its source", FEED, not_before=105,
    ),
    Case(
        "TablewireCheckpointStuck", 345,
        {**RUNS, owner("checkpoint_ts", FEED): "500+0x80", owner("checkpoint_lag", FEED): "0+100x80"},
        {**RUNS, owner("checkpoint_ts", FEED): "500+90x80", owner("checkpoint_lag", FEED): "0+10x80"},
        "The checkpoint of changefeed default/orders does not move", FEED, not_before=285,
    ),
    Case(
        "TablewireCheckpointStuck", 345,
        {**RUNS, owner("checkpoint_ts", FEED): "500+0x80", owner("checkpoint_lag", FEED): "0+100x80"},
        {**RUNS, owner("checkpoint_ts", FEED): "500+0x80", owner("checkpoint_lag", FEED): "0+0x80"},  # an idle source
        "The checkpoint of changefeed default/orders does not move", FEED, not_before=285,
    ),
    Case(
        "TablewireCheckpointStuck", 345,
        {**RUNS, owner("checkpoint_ts", FEED): "500+0x80", owner("checkpoint_lag", FEED): "0+100x80"},
        {
            state("stopped"): ON, state("normal"): OFF,  # paused on purpose
            owner("checkpoint_ts", FEED): "500+0x80", owner("checkpoint_lag", FEED): "0+100x80",
        },
        "The checkpoint of changefeed default/orders does not move", FEED, not_before=285,
    ),
    Case(
        "TablewireSpansStalled", 630, {stalled("silent_capture"): "3+0x80", other(stalled("silent_capture")): "_ _ 3 _x80"},
        {stalled("snapshot"): "2+0x80", stalled("preparing"): "1+0x10 0 1+0x80"},
        "3 tables of default/orders stalled: silent_capture", {**FEED, "reason": "silent_capture"}, not_before=585,
    ),
    Case(
        "TablewireSpanErrors", 150, {stalled("executor_error"): "1 0 1 0 1 0+0x80", stalled("backoff"): "0 1 0 1 0 1+0x80"},
        {stalled("executor_error"): "1 1 0+0x80", stalled("backoff"): OFF, stalled("preparing"): ON},
        "1 table of default/orders cannot be replicated", FEED, not_before=105,
    ),
    Case(
        "TablewireSnapshotLong", 21720, {stalled("snapshot"): "4+0x200"},
        {stalled("snapshot"): "4+0x90 0+0x100", stalled("preparing"): "4+0x200"},
        "First copies of default/orders have taken longer than 6 hours",
        {**FEED, "reason": "snapshot"}, not_before=21480, interval=120,
    ),
    Case(
        "TablewireSourceRetains", 360, {owner("source_retained_bytes", FEED): "21474836480+0x80"},
        {owner("source_retained_bytes", FEED): "1073741824+0x80"},
        "The source retains 20GiB of WAL for default/orders", FEED, not_before=285,
    ),
    Case(
        "TablewireBrake", 30, {owner("brake", FEED): "0 0 1+0x80"}, {owner("brake", FEED): OFF},
        "Many processors were lost at once; placement of default/orders is suspended", FEED, not_before=15,
    ),
    Case(
        "TablewireFailover", 60, {owner("failovers_total", FEED): "0 0 1+0x80"}, {owner("failovers_total", FEED): "7+0x80"},
        "A processor that was writing tables of default/orders was lost", FEED, not_before=15,
    ),
    Case(
        "TablewireAgentNotRunning", 330,
        {processor("agent_running", FEED): OFF}, {processor("agent_running", FEED): "0 0 1+0x80"},
        "Processor processor-1:7451 cannot run default/orders", {**PROCESSOR, **FEED}, not_before=285,
    ),
    Case(
        "TablewireQueueFull", 630, {processor("queue_bytes", FEED): "95+0x80", processor("queue_limit_bytes", FEED): "100+0x80"},
        {processor("queue_bytes", FEED): "80+0x80", processor("queue_limit_bytes", FEED): "100+0x80"},
        "The queue for default/orders on processor processor-1:7451 is 95% full", {**PROCESSOR, **FEED}, not_before=585,
    ),
    Case(
        "TablewireQueueFull", 630, {processor("queue_bytes", FEED): "95+0x80", processor("queue_limit_bytes", FEED): "100+0x80"},
        {processor("queue_bytes", FEED): "80+0x80", processor("queue_limit_bytes", FEED): OFF},  # an executor without a limit
        "The queue for default/orders on processor processor-1:7451 is 95% full", {**PROCESSOR, **FEED}, not_before=585,
    ),
    Case(
        "TablewireTwoWriters", 60, {owner("two_writers_total", FEED): "0 0 2+0x80"}, {owner("two_writers_total", FEED): "2+0x80"},
        "Two processors reported writing the same table of default/orders", FEED, not_before=15,
    ),
    Case(
        "TablewireOrphans", 60, {owner("orphans_total", FEED): "0 0 2+0x80"}, {owner("orphans_total", FEED): "2+0x80"},
        "A processor held tables of default/orders that it should not", FEED, not_before=15,
    ),
    Case(
        "TablewireAuditFailures", 300, {owner("audit_failures_total", FEED): "0+1x80"},
        {owner("audit_failures_total", FEED): "0 0 1+0x80"},
        "Owner and processors repeatedly disagree about default/orders", FEED, not_before=30,
    ),
    Case(
        "TablewireCaptureSilent", 90, {owner("captures", FEED, state="silent"): "2+0x80"},
        {owner("captures", FEED, state="silent"): "2 2 0+0x80", owner("captures", FEED, state="ready"): ON},
        "2 silent processors with a valid lease, seen by the owner of default/orders", FEED, not_before=45,
    ),
    Case(
        "TablewireExchangeFailing", 30, {owner("exchange_failing_seconds", CAPTURE): "0+15x80"},
        {owner("exchange_failing_seconds", CAPTURE): "0 5 0 5 0+0x80"},
        "Calls to processor-1-7f3a have failed for 30s", CAPTURE,
    ),
    Case(
        "TablewireExchangeSlow", 420,
        {owner("exchange_seconds_sum", CAPTURE): "0+30x80", owner("exchange_seconds_count", CAPTURE): "0+15x80"},
        {owner("exchange_seconds_sum", CAPTURE): "0+3x80", owner("exchange_seconds_count", CAPTURE): "0+15x80"},
        "Calls to processor-1-7f3a take 2s on average", CAPTURE, not_before=285,
    ),
    Case(
        "TablewireMessagesDropped", 420, {owner("exchange_dropped_messages_total", CAPTURE): "0+3x80"},
        {owner("exchange_dropped_messages_total", CAPTURE): "7+0x80"},
        "The owner drops messages for processor-1-7f3a", CAPTURE, not_before=285,
    ),
    Case(
        "TablewireRequestsInvalid", 60, {processor("exchanges_total", outcome="invalid"): "0 0 1+0x80"},
        {processor("exchanges_total", outcome="invalid"): OFF, processor("exchanges_total", outcome="received"): "0+100x80"},
        "Processor processor-1:7451 received an invalid request", {"instance": PROCESSOR["instance"]}, not_before=15,
    ),
    Case(
        "TablewireTickSlow", 420,
        {ticks("1.0"): OFF, ticks("2.5"): "0+100x80", ticks("+Inf"): "0+100x80"},
        {ticks("0.1"): "0+100x80", ticks("1.0"): "0+100x80", ticks("+Inf"): "0+100x80"},
        "The p99 of a tick is 2.485s", not_before=285,
    ),
    Case(
        "TablewireEtcdDown", 90, {named("up", ETCD): OFF}, {named("up", ETCD): ON, named("up", OWNER): OFF},
        "etcd member etcd-1:2379 is unreachable", ETCD, not_before=45,
    ),
    Case(
        "TablewireEtcdNoLeader", 45,
        {named("etcd_server_has_leader", ETCD): OFF, other(named("etcd_server_has_leader", ETCD)): ON},
        {named("etcd_server_has_leader", ETCD): ON, other(named("etcd_server_has_leader", ETCD)): ON},
        "An etcd member has no leader", not_before=15,
    ),
    Case(
        "TablewireEtcdSlow", 420, {fsync("0.512"): OFF, fsync("1.024"): "0+100x80", fsync("+Inf"): "0+100x80"},
        {fsync("0.002"): "0+100x80", fsync("0.512"): "0+100x80", fsync("+Inf"): "0+100x80"},
        "The p99 of fsync on etcd member etcd-1:2379 is 1.019s", {"instance": ETCD["instance"]}, not_before=285,
    ),
    Case(
        "TablewireEtcdFull", 330,
        {named("etcd_mvcc_db_total_size_in_bytes", ETCD): "90+0x80", named("etcd_server_quota_backend_bytes", ETCD): "100+0x80"},
        {named("etcd_mvcc_db_total_size_in_bytes", ETCD): "70+0x80", named("etcd_server_quota_backend_bytes", ETCD): "100+0x80"},
        "The database of etcd member etcd-1:2379 uses 90% of its quota", ETCD, not_before=285,
    ),
)  # fmt: skip
