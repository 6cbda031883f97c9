"""The shipped compose file as a running cluster: changefeeds, moves, drains, kills, scaling, and source = sink at the end.

The tests run in order on one cluster; each leaves two owners and three processors for the next one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from deploy.local.admin import Admin
from deploy.local.compare import compare
from deploy.local.workload import Workload, create_tables
from tests.compose.conftest import Step
from tests.compose.stack import LEASE_TTL_S, PROJECT, Stack

pytestmark = pytest.mark.integration

SHOP_TABLES = tuple(f"shop.{name}" for name in ("customers", "products", "orders", "order_lines", "payments", "visits"))
LOAD_SCHEMA = "load"
ROWS_AT_START = 100
ROWS_PER_S = 150.0
FAILOVER_TIMEOUT_S = LEASE_TTL_S + 30.0
DRAIN_GRACE_S = 90.0
"""stop_grace_period of a processor."""


@pytest.fixture(scope="module")
def load_tables(stack: Stack) -> list[str]:
    """Create twelve tables with rows at the source, of different shapes, owned by the role that replicates."""
    uri = stack.uri("source")
    names = create_tables(uri, schema=LOAD_SCHEMA)
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO tablewire").format(sql.Identifier(LOAD_SCHEMA)))
        for name in names:
            connection.execute(sql.SQL("ALTER TABLE {} OWNER TO tablewire").format(sql.Identifier(*name.split("."))))
    return names


@pytest.fixture(scope="module")
def workload(stack: Stack, load_tables: list[str]) -> Iterator[Workload]:
    """Run inserts, updates and deletes on these tables continuously."""
    load = Workload(stack.uri("source"), rows_per_s=ROWS_PER_S, schema=LOAD_SCHEMA)
    load.fill(ROWS_AT_START)
    load.start()
    yield load
    load.stop()


def primary_of(stack: Stack, table: str) -> str:
    """Return the capture that writes a table of the shop."""
    (row,) = [row for row in stack.tables("shop") if row["table"] == table]
    return str(row["primary"])


def wait_steady(stack: Stack, *, without: str = "") -> None:
    """Wait until both changefeeds replicate all of their tables and their checkpoints advance."""
    for changefeed, tables in (("shop", len(SHOP_TABLES)), ("load", 12)):
        stack.wait_replicating(changefeed, tables=tables, without=without)
        stack.wait_progress(changefeed)


def last_event(stack: Stack) -> int:
    """Return the sequence number of the newest event."""
    return max((int(event["sequence"]) for event in stack.owner_exec("events")["events"]), default=0)


def kinds_since(stack: Stack, sequence: int) -> list[str]:
    """Return the kinds of the events since then, in order."""
    return [event["kind"] for event in stack.owner_exec("events")["events"] if event["sequence"] > sequence]


def test_changefeeds_are_created_by_the_cli_in_a_container(
    stack: Stack, step: Step, load_tables: list[str], workload: Workload
) -> None:
    """The profile `demo` creates one changefeed and its load, the CLI another; both copy their tables and then replicate."""
    assert workload.counts.total >= ROWS_AT_START
    with step("demo profile and `owner changefeed create`: 18 tables copied and replicating"):
        stack.up("changefeed", "load")
        created = stack.owner(
            *("changefeed", "create", "--id", "load", "--tables", f"{LOAD_SCHEMA}.*"),
            *("--source", "postgresql://tablewire:${SOURCE_PASSWORD}@source/shop"),
            *("--sink", "postgresql://tablewire:${SINK_PASSWORD}@sink/shop"),
        )
        assert created["changefeed"] == "default/load"
        assert "PASSWORD" not in created["source_uri"].upper() or "${SOURCE_PASSWORD}" in created["source_uri"]
        wait_steady(stack)
    (once,) = stack.containers("changefeed", stopped=True)
    assert once["State"]["Status"] == "exited"
    assert once["State"]["ExitCode"] == 0
    assert len({row["primary"] for row in stack.tables("load")}) == 3


def test_a_table_moves(stack: Stack, step: Step, workload: Workload) -> None:
    """`owner table move --wait` returns when the other processor writes the table."""
    former = primary_of(stack, "shop.orders")
    target = next(capture for capture in stack.captures() if capture != former)
    with step("owner table move --wait"):
        answer = stack.owner("table", "move", "shop.orders", "--changefeed", "shop", "--to", target, "--wait")
    assert answer["state"] == "done"
    assert primary_of(stack, "shop.orders") == target
    wait_steady(stack)


def test_a_processor_is_drained(stack: Stack, step: Step, workload: Workload) -> None:
    """`owner capture drain --wait` returns when the processor holds no table; `--cancel` ends the drain."""
    capture = primary_of(stack, "shop.orders")
    with step("owner capture drain --wait"):
        answer = stack.owner("capture", "drain", capture, "--wait")
    assert (answer["remaining"], answer["gone"]) == (0, False)
    assert capture not in {row["primary"] for name in ("shop", "load") for row in stack.tables(name)}
    stack.owner("capture", "drain", capture, "--cancel")
    with step("owner rebalance --wait"):
        stack.owner("rebalance", "--wait")
    assert capture in {row["primary"] for name in ("shop", "load") for row in stack.tables(name)}
    wait_steady(stack)


def test_the_leading_owner_is_killed(stack: Stack, step: Step, figures: dict[str, Any], workload: Workload) -> None:
    """After `docker kill` of the leader, the other owner leads when the lease expires, and replication continues meanwhile."""
    leader = stack.leader()
    other = next(owner for owner in stack.containers("owner") if owner["Id"] != leader["Id"])
    with step("docker kill of the leading owner: the other leads"):
        started = time.monotonic()
        stack.engine.docker("kill", leader["Id"])
        stack.wait(
            "the other owner leads",
            lambda: (stack.call(Admin.status)["leader"] or {}).get("address") == f"{other['Id'][:12]}:7440",
            FAILOVER_TIMEOUT_S,
        )
        figures["leader_killed_until_the_next_leads_s"] = round(time.monotonic() - started, 1)
    wait_steady(stack)
    with step("up: the killed owner is back"):
        stack.up("--no-recreate", "owner")
        stack.wait("two owners", lambda: len(stack.call(Admin.status)["owners"]) == 2)


def test_a_processor_is_killed(stack: Stack, step: Step, figures: dict[str, Any], workload: Workload) -> None:
    """After `docker kill` of a processor, its tables continue on other processors from their checkpoints."""
    capture = primary_of(stack, "shop.orders")
    container = stack.container_of(capture)
    with step("docker kill of a processor: its tables replicate on others"):
        started = time.monotonic()
        stack.engine.docker("kill", container["Id"])
        stack.wait_replicating("shop", tables=len(SHOP_TABLES), without=capture, timeout_s=FAILOVER_TIMEOUT_S)
        stack.wait_replicating("load", tables=12, without=capture, timeout_s=FAILOVER_TIMEOUT_S)
        figures["processor_killed_until_its_tables_replicate_s"] = round(time.monotonic() - started, 1)
    wait_steady(stack)
    with step("up: the killed processor is back under a new id"):
        stack.up("--no-recreate", "processor")
        stack.wait("three processors", lambda: len(stack.captures()) == 3)
    assert capture not in stack.captures()


def test_a_crashed_processor_is_restarted(stack: Stack, step: Step, workload: Workload) -> None:
    """After SIGKILL to the process, the restart policy restarts the container, and the processor registers again."""
    container = stack.containers("processor")[0]
    before = next(capture for capture in stack.captures() if capture.startswith(container["Id"][:12]))
    with step("SIGKILL inside a container: restarted by its policy"):
        stack.kill_process(container)
        stack.wait(
            "it is back under a new id",
            lambda: any(c.startswith(container["Id"][:12]) and c != before for c in stack.captures()),
            FAILOVER_TIMEOUT_S,
        )
        wait_steady(stack, without=before)
    stack.wait("the former id is gone", lambda: before not in stack.captures(), FAILOVER_TIMEOUT_S)
    assert stack.engine.inspect(container["Id"])[0]["RestartCount"] == 1
    assert len(stack.captures()) == 3


def test_etcd_members_restart_one_by_one(stack: Stack, step: Step, workload: Workload) -> None:
    """During a rolling restart of etcd no processor loses its registration, and the checkpoint advances after each restart."""
    before = stack.captures()
    with step("etcd members restarted one by one"):
        for member in ("etcd-1", "etcd-2", "etcd-3"):
            stack.compose("restart", member)
            stack.wait_healthy([member])
            stack.wait_progress("shop")
            stack.wait_progress("load")
    wait_steady(stack)
    assert stack.captures() == before


def test_processors_scale_up_and_down(stack: Stack, step: Step, workload: Workload) -> None:
    """`--scale processor=5` adds two processors under load; scaling back to 3 drains them first, without a failover."""
    with step("--scale processor=5, rebalanced"):
        stack.up("--no-recreate", "--scale", "processor=5", "processor")
        stack.wait("five processors", lambda: len(stack.captures()) == 5)
        stack.owner("rebalance", "--wait")
        wait_steady(stack)
    five = set(stack.captures())
    assert {row["primary"] for name in ("shop", "load") for row in stack.tables(name)} == five
    seen = last_event(stack)
    with step("--scale processor=3, the others drained"):
        stack.up("--no-recreate", "--scale", "processor=3", "processor")
        stack.wait("three processors", lambda: len(stack.captures()) == 3)
        wait_steady(stack)
    assert len(stack.containers("processor", stopped=True)) == 3
    happened = kinds_since(stack, seen)
    assert happened.count("capture_gone") == 2
    assert "failover_began" not in happened


def test_sigterm_drains(stack: Stack, step: Step, figures: dict[str, Any], workload: Workload) -> None:
    """On `docker stop`, a processor receives SIGTERM as process 1, moves its tables away, and exits with code 0."""
    capture = primary_of(stack, "shop.orders")
    container = stack.container_of(capture)
    seen = last_event(stack)
    with step("docker stop of a processor: drained"):
        started = time.monotonic()
        stack.engine.docker("stop", "--time", str(int(DRAIN_GRACE_S)), container["Id"])
        figures["processor_stopped_within_s"] = round(time.monotonic() - started, 1)
        wait_steady(stack, without=capture)
    (ended,) = stack.engine.inspect(container["Id"])
    assert ended["State"]["ExitCode"] == 0
    assert not ended["State"]["OOMKilled"]
    logged = [event["event"] for event in stack.logs(container)]
    assert "leaves_undrained" not in logged
    assert "failover_began" not in kinds_since(stack, seen)
    stack.up("--no-recreate", "processor")
    stack.wait("three processors", lambda: len(stack.captures()) == 3)


def test_source_and_sink_are_the_same(
    stack: Stack, step: Step, figures: dict[str, Any], workload: Workload, load_tables: list[str]
) -> None:
    """After all of this, the content of 18 tables is equal in source and sink."""
    wait_steady(stack)
    with step("load stopped, checkpoint caught up, 18 tables compared"):
        stack.compose("stop", "load")
        counts = workload.stop()
        end = stack.source_ts()
        for changefeed in ("shop", "load"):
            stack.wait_checkpoint(changefeed, end)
        found = compare(stack.uri("source"), stack.uri("sink"), [*SHOP_TABLES, *load_tables])
    figures["changes_by_the_load"] = counts.total
    figures["rows_compared"] = found.rows
    assert found.equal, str(found)
    assert found.rows > 1_000
    assert counts.total > 5_000


def test_a_files_sink_writes_into_the_shared_volume(stack: Stack, step: Step, workload: Workload) -> None:
    """`file:///data/...` is one folder for all processors, writable by their user."""
    with step("a changefeed into files"):
        stack.owner(
            *("changefeed", "create", "--id", "files", "--tables", "shop.products", "--sink", "file:///data/products"),
            *("--source", "postgresql://tablewire:${SOURCE_PASSWORD}@source/shop"),
        )
        stack.wait_replicating("files", tables=1)
    script = "cat $(find /data/products -name '*.jsonl*' -type f) | wc -l"
    counts = [int(stack.engine.docker("exec", c["Id"], "sh", "-c", script)) for c in stack.containers("processor")]
    assert len(counts) == 3
    assert len(set(counts)) == 1
    assert counts[0] >= 50


def test_everything_loses_power_at_once(
    stack: Stack, step: Step, figures: dict[str, Any], workload: Workload, load_tables: list[str]
) -> None:
    """After `docker kill` of all containers right after a commit, `up` recovers from the volumes, and the rows arrive."""
    with psycopg.connect(stack.uri("source"), connect_timeout=10) as connection:
        connection.execute("INSERT INTO shop.visits (page, seconds) SELECT '/last', n FROM generate_series(1, 1000) AS n")
        connection.execute("DELETE FROM shop.orders WHERE id % 7 = 0")
    with step("docker kill of all containers, up again"):
        stack.engine.docker("kill", *stack.engine.docker("ps", "--quiet").split())
        stack.up()
        stack.wait("an owner leads three processors", lambda: len(stack.captures()) == 3, FAILOVER_TIMEOUT_S)
        wait_steady(stack)
        found = compare(stack.uri("source"), stack.uri("sink"), [*SHOP_TABLES, *load_tables])
    assert found.equal, str(found)
    assert found.rows > 1_000


def test_everything_stops_in_order(stack: Stack, step: Step) -> None:
    """On `stop`, all services exit by themselves, processors before owners before etcd; `down` keeps the volumes."""
    services = ("owner", "processor", "etcd-1", "etcd-2", "etcd-3", "source", "sink")
    ids = {service: [container["Id"] for container in stack.containers(service)] for service in services}
    with step("stop: all exit by themselves"):
        stack.compose("stop")
    ended = {service: [c["State"] for c in stack.engine.inspect(*found)] for service, found in ids.items()}
    assert {service: [state["ExitCode"] for state in states] for service, states in ended.items()} == {
        service: [0] * len(found) for service, found in ids.items()
    }
    assert max(state["FinishedAt"] for state in ended["processor"]) < min(state["FinishedAt"] for state in ended["owner"])
    assert max(state["FinishedAt"] for state in ended["owner"]) < min(state["FinishedAt"] for state in ended["etcd-1"])
    with step("down"):
        stack.compose("down")
    assert f"{PROJECT}_source" in stack.engine.docker("volume", "ls", "--quiet").split()
