"""The owner CLI against a real admin API: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import grpc
import msgspec
import pytest
from click.testing import CliRunner, Result

from deploy.local.process import wait_until
from docs.tools.cli_page import contexts
from owner.changefeed.store import ChangefeedEvent
from owner.cli.client import AdminClient
from owner.cli.main import cli
from owner.cli.output import CommandError
from tablewire.etcd.records import ChangefeedInfo, LeaderRecord
from tablewire.model.progress import Stats
from tablewire.model.spans import Span
from tablewire.source import CheckFailure
from tests.owner.admin_world import FEED, AdminView, paused, serving, ticking
from tests.owner.world import World

CREATE = ("changefeed", "create", "--id", "new", "--source", "postgresql://me:pw@h/db", "--sink", "blackhole://")
CREATE += ("--tables", "public.*")
Owner = Callable[..., Result]


@pytest.fixture
def view() -> AdminView:
    """Return an owner of three processors and three tables, all replicating."""
    view = AdminView()
    view.world.settle()
    return view


@pytest.fixture
def owner(view: AdminView, monkeypatch: pytest.MonkeyPatch) -> Iterator[Owner]:
    """Return a function that runs `owner ...` against the leader, which a thread ticks."""
    with ExitStack() as stack:
        monkeypatch.setenv("TABLEWIRE_ENDPOINTS", stack.enter_context(serving(view)))
        stack.enter_context(ticking(view))
        yield run


def run(*arguments: str, env: dict[str, str | None] | None = None) -> Result:
    return CliRunner().invoke(cli, arguments, env=env, prog_name="owner")


def answer(result: Result) -> Any:
    """Return the JSON of a command that succeeded: one object on one line of stdout."""
    assert result.exit_code == 0, result.output
    return json.loads(only_line(result))


def only_line(result: Result) -> str:
    assert result.stdout.count("\n") == 1, result.stdout
    return result.stdout


def failure(result: Result, code: int = 1) -> str:
    """Return the reason of a command that failed: it is on stderr, and stdout is empty."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    return result.stderr


def target_of(view: AdminView, table: int) -> str:
    return next(capture for capture in "abc" if capture != view.world.primary(table))


# ---------------------------------------------------------------------------------------------------------------------
# What all commands share


def test_o_json_may_precede_or_follow_the_command(owner: Owner) -> None:
    """The option closer to the command wins."""
    assert answer(owner("-o", "json", "status"))["cluster"] == "test"
    assert answer(owner("status", "-o", "json"))["cluster"] == "test"
    assert "owner-1" in owner("-o", "json", "status", "-o", "table").stdout.splitlines()[1]


def test_an_error_in_json_is_an_object_on_stdout_and_a_line_on_stderr(owner: Owner) -> None:
    """Scripts read the code, people read the text."""
    result = owner("changefeed", "query", "nope", "-o", "json")
    assert result.exit_code == 1
    error = json.loads(only_line(result))["error"]
    assert error["code"] == "not_found"
    assert error["message"] == "no changefeed default/nope; there: default/test"
    assert result.stderr == f"Error: {error['message']}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["status", "--nonsense"],
        ["table", "move", "t"],
        ["status", "-o", "xml"],
        ["status", "--timeout-s", "0"],
        ["capture", "drain", "a", "--wait", "--cancel"],
        [*CREATE, "--source-option", "novalue"],
        [*CREATE, "--source-option", "a=1", "--source-option", "a=2"],
        [*CREATE, "--source-option", "a=1", "--sink-option", "a=1"],
        ["table", "list", "--limit", "-1"],
        ["changefeed", "remove"],
        ["rebalance", "--wait", "--dry-run"],
        ["table", "move", "t", "--to", "a", "--wait", "--dry-run"],
        ["capture", "drain", "a", "--cancel", "--dry-run"],
    ],
)
def test_wrong_usage_is_exit_code_2(owner: Owner, arguments: list[str]) -> None:
    """The command fails before it calls an owner."""
    assert "Usage: owner" in failure(owner(*arguments), 2)


def test_a_dead_endpoint_is_skipped(owner: Owner, view: AdminView, free_port: int) -> None:
    """The order of the endpoints does not matter."""
    alive = view.records[0].address
    for endpoints in (f"127.0.0.1:{free_port},{alive}", f"{alive} 127.0.0.1:{free_port}"):
        result = answer(owner("status", "-o", "json", env={"TABLEWIRE_ENDPOINTS": endpoints}))
        assert result["endpoint"] == alive
    both = ("--endpoint", f"127.0.0.1:{free_port}", "--endpoint", alive)
    assert answer(owner(*both, "capture", "list", "-o", "json"))["captures"]


def test_when_none_answers_all_that_were_tried_are_named(free_port: int) -> None:
    """The error says for each endpoint why it did not answer."""
    dead = f"127.0.0.1:{free_port}"
    text = failure(run("status", "--endpoint", dead, "--endpoint", "127.0.0.2:1"))
    assert text == f"Error: no owner answers; tried {dead} (refused), 127.0.0.2:1 (refused)\n"


@pytest.mark.parametrize("endpoint", ["nonsense", "http://a:1", "a:0", "a:70000", ":1", "a:b"])
def test_an_endpoint_that_cannot_be_one_is_refused(endpoint: str) -> None:
    """The error names the text and where it came from."""
    assert failure(run("status", "--endpoint", endpoint)) == f"Error: --endpoint: {endpoint!r} is not host:port\n"
    text = failure(run("status", env={"TABLEWIRE_ENDPOINTS": endpoint}))
    assert text == f"Error: TABLEWIRE_ENDPOINTS: {endpoint!r} is not host:port\n"


def test_a_follower_is_as_good_as_the_leader(owner: Owner, view: AdminView) -> None:
    """It forwards the call, and status names the owner that answered."""
    other = AdminView(view.world, "owner-2")
    other.leads, other.records = False, [*view.records, LeaderRecord(id="owner-2", address="127.0.0.1:2")]
    with serving(other) as address:
        result = answer(owner("--endpoint", address, "status", "-o", "json"))
        assert (result["endpoint"], result["answered_by"]) == (address, "owner-1")
        moved = owner("--endpoint", address, "table", "move", "public.t1", "--to", target_of(view, 1), "--wait")
        assert moved.exit_code == 0, moved.output


def test_without_a_leader_a_command_waits_for_one(owner: Owner, view: AdminView) -> None:
    """It retries until its time has passed, and then says what is missing."""
    view.leads, view.records = False, []
    text = failure(owner("capture", "list", "--timeout-s", "3"))
    assert "owner owner-1 does not lead, and no leader is known: an election is under way" in text
    assert "none: an election is under way" in owner("status").stdout


def test_the_last_answer_is_shown_when_no_owner_answers_later(view: AdminView, free_port: int) -> None:
    """If an owner refuses and is then lost, the error still says why it refused."""
    view.leads, view.records = False, []
    asked: list[str] = []

    def open_channel(endpoint: str) -> grpc.Channel:
        asked.append(endpoint)
        return grpc.insecure_channel(endpoint if len(asked) == 1 else f"127.0.0.1:{free_port}")

    with (
        serving(view) as address,
        closing(AdminClient([address], open_channel)) as client,
        pytest.raises(CommandError) as caught,
    ):
        client.call("ListCaptures", 30)
    assert caught.value.message == (
        "owner owner-1 does not lead, and no leader is known: an election is under way; "
        f"try again; then no owner answers; tried {address} (refused)"
    )
    assert caught.value.code == "unavailable"


def test_the_configuration_names_the_owner(view: AdminView, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables override the admin address in the file; a client ignores variables of other sections."""
    monkeypatch.setenv("TABLEWIRE_ADVERTISE__HOST", "a processor's key, say")
    with serving(view) as address:
        host, port = address.split(":")
        file = tmp_path / "owner.toml"
        file.write_text(f'[admin]\nhost = "0.0.0.0"\nport = {port}\n')
        assert answer(run("status", "-o", "json", "--config", str(file)))["endpoint"] == f"{host}:{port}"
        assert answer(run("status", "-o", "json", env={"TABLEWIRE_CONFIG": str(file)}))["endpoint"] == f"{host}:{port}"
        assert answer(run("status", "-o", "json", env={"TABLEWIRE_ADMIN__PORT": port}))["endpoint"] == f"{host}:{port}"
    assert "file nowhere.toml" in failure(run("status", "--config", "nowhere.toml"))


def test_remote_text_does_not_control_the_terminal(owner: Owner, view: AdminView) -> None:
    """Neither escape sequences nor markup have an effect."""
    view.names[1] = "public.[red]t1[/red]\x1b[2J"
    result = owner("table", "list")
    assert "\x1b" not in result.stdout
    assert "[red]t1[/red]" in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Moves and tables


def test_a_move_says_accepted_once_it_is(owner: Owner, view: AdminView) -> None:
    """The exit code is 0, and stdout has one line."""
    target = target_of(view, 1)
    result = owner("table", "move", "public.t1", "--to", target)
    assert result.exit_code == 0, result.output
    job = view.events.events_after(0)[-1].record.job
    assert result.stdout in [f"move of public.t1 to {target}: {state} (job {job})\n" for state in ("accepted", "done")]


def test_a_move_with_wait_ends_when_it_is_done(owner: Owner, view: AdminView) -> None:
    """Its changes go to stderr, its end goes to stdout."""
    target = target_of(view, 2)
    result = owner("table", "move", "2", "--to", target, "--wait", "-o", "json")
    assert answer(result) == {
        "changefeed": FEED, "kind": "move", "target": "public.t2", "capture": target, "state": "done", "reason": None,
        "id": view.events.events_after(0)[-1].record.job, "by": "127.0.0.1", "moves_done": None, "moves_left": None,
    }  # fmt: skip
    assert "move of public.t2" in result.stderr
    assert view.world.primary(2) == target


def test_scenario_31_a_refused_move_is_a_failure_with_its_reason(owner: Owner, view: AdminView) -> None:
    """Nothing changes, and no output says accepted."""
    where = view.world.primary(1)
    text = failure(owner("table", "move", "1", "--to", where))
    assert text == f"Error: move of public.t1 to {where}: refused: processor {where} is already the primary\n"
    assert "no table 'public.zz'" in failure(owner("table", "move", "public.zz", "--to", "a"))
    assert "no processor 'z'; registered: a, b, c" in failure(owner("table", "move", "1", "--to", "z"))


def test_a_move_that_does_not_end_in_time_is_not_called_done(owner: Owner, view: AdminView) -> None:
    """The exit code is 1; the error reports the state and that the job continues."""
    target = target_of(view, 1)
    view.world.executors[target].hang("prepare", Span(1))
    text = failure(owner("table", "move", "1", "--to", target, "--wait", "--timeout-s", "0.5"))
    assert f"move of public.t1 to {target}: accepted: not done within 0.5 s; the owner continues it" in text


def test_rebalance_with_even_loads_is_done(owner: Owner) -> None:
    """A rebalance without moves succeeds."""
    assert "rebalance of default/test: done" in owner("rebalance", "--wait").stdout
    assert answer(owner("rebalance", "--wait", "-o", "json"))["state"] == "done"


def test_a_dry_run_shows_moves_and_loads_and_changes_nothing(owner: Owner, view: AdminView) -> None:
    """This holds for a drain, a move and a rebalance, as text and as JSON."""
    source, target = view.world.primary(1), target_of(view, 1)
    result = owner("table", "move", "public.t1", "--to", target, "--dry-run")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["TABLE", "ID", "FROM", "TO", "WEIGHT", "WHY"]
    assert lines[1].split()[:5] == ["public.t1", "1", source, target, "1.0"]
    assert [source, "1.0", "0.0"] in [line.split() for line in lines]
    assert result.stderr == "1 move planned; nothing was changed\n"
    plan = answer(owner("capture", "drain", source, "--dry-run", "-o", "json"))
    assert [(move["table"], move["source"]) for move in plan["moves"]] == [("public.t1", source)]
    assert (plan["load_before"][source], plan["load_after"][source]) == (1.0, 0.0)
    assert "nothing would move: a difference of up to 5 %" in owner("rebalance", "--dry-run").stderr
    assert "is already the primary" in failure(owner("table", "move", "1", "--to", source, "--dry-run"))
    assert not view.world.scheduler.queries()
    assert view.drains == []


def test_rebalance_moves_what_its_dry_run_named(owner: Owner, view: AdminView) -> None:
    """It ends when all planned moves are done."""
    view.world.join("d")
    view.world.tables = [*view.world.tables, *range(4, 9)]
    view.world.until(view.world.steady)
    assert answer(owner("table", "move", "1", "--to", target_of(view, 1), "--wait", "-o", "json"))["state"] == "done"
    plan = answer(owner("rebalance", "--dry-run", "-o", "json"))
    done = answer(owner("rebalance", "--wait", "-o", "json"))
    assert (done["state"], [job["state"] for job in done["jobs"]]) == ("done", ["done"])
    assert plan["moves"]
    assert [(job["moves_done"], job["moves_left"]) for job in done["jobs"]] == [(len(plan["moves"]), 0)]
    for move in plan["moves"]:
        assert view.world.primary(move["table_id"]) == move["target"]


def test_table_list_shows_every_span(owner: Owner) -> None:
    """It does so as text and as JSON."""
    lines = owner("table", "list").stdout.splitlines()
    assert lines[0].split() == ["TABLE", "ID", "STATE", "PRIMARY", "SECONDARY", "CHECKPOINT", "AGE", "STALL", "ERROR"]
    assert [line.split()[0] for line in lines[1:]] == ["public.t1", "public.t2", "public.t3"]
    listed = answer(owner("table", "list", "-o", "json"))
    assert (listed["changefeed"], listed["truncated"]) == (FEED, False)
    assert [row["table"] for row in listed["tables"]] == ["public.t1", "public.t2", "public.t3"]
    assert listed["tables"][0]["secondary"] is None


def test_table_list_filters_and_says_when_it_cuts(owner: Owner, view: AdminView) -> None:
    """The note is on stderr, so that stdout has only rows."""
    result = owner("table", "list", "--limit", "2")
    assert len(result.stdout.splitlines()) == 3
    assert result.stderr == "only the first 2 rows are shown; --limit 0 shows all\n"
    assert answer(owner("table", "list", "--stalled", "-o", "json"))["tables"] == []
    rows = answer(owner("table", "list", "--capture", view.world.primary(3), "--table", "public.t3", "-o", "json"))["tables"]
    assert [row["table_id"] for row in rows] == [3]


def test_a_long_line_is_neither_cut_nor_wrapped_without_a_terminal(owner: Owner, view: AdminView) -> None:
    """Otherwise grep would not find it."""
    view.names[1] = "public." + "x" * 300
    assert view.names[1] in owner("table", "list", "--table", "1").stdout


def test_names_that_the_encoding_does_not_have_are_replaced(owner: Owner, view: AdminView) -> None:
    """A name can neither make a command fail nor break the line of JSON."""
    view.names[1] = "public.t\u00fcr\u2028x"
    runner = CliRunner(charset="ascii")
    assert "public.t" in runner.invoke(cli, ["table", "list"]).stdout
    result = runner.invoke(cli, ["table", "list", "-o", "json"])
    assert answer(result)["tables"][0]["table"] == view.names[1]


# ---------------------------------------------------------------------------------------------------------------------
# Changefeeds


def test_create_query_pause_resume_remove(owner: Owner, view: AdminView) -> None:
    """The commands take a changefeed through its life."""
    assert (
        owner(*CREATE, "--sink-option", "sink_connections=5", "--source-option", "binary=off").stdout
        == "changefeed default/new created\n"
    )
    (stored,) = (info for info in view.store.list() if info.id == "new")
    assert stored.options == {"sink_connections": "5", "binary": "off"}
    kept = "the source retains 4.0 KiB for it, and more with each change"
    assert owner("changefeed", "pause", "new").stdout == f"changefeed default/new is stopped; {kept}\n"
    assert "cannot pause: it is paused already" in failure(owner("changefeed", "pause", "new"))
    assert answer(owner("changefeed", "resume", "new", "-o", "json"))["state"] == "normal"
    shown = answer(owner("changefeed", "query", "new", "-o", "json"))
    assert (shown["source_uri"], shown["running"], shown["slowest"]) == ("postgresql://me:***@h/db", False, None)
    assert owner("changefeed", "remove", "new").stdout == "changefeed default/new is being removed\n"


def test_create_prints_every_failed_check(owner: Owner, view: AdminView) -> None:
    """One error names all of them, the exit code is 1, and nothing is stored."""
    view.failures = [CheckFailure("wal_level", "it is replica"), CheckFailure("tables_match", "nothing matches x.*")]
    text = failure(owner(*CREATE))
    assert "2 checks failed: wal_level: it is replica; tables_match: nothing matches x.*" in text
    assert len(view.store.infos) == 1


def test_create_of_an_id_that_exists_is_refused(owner: Owner) -> None:
    """The error names the changefeed."""
    arguments = [argument if argument != "new" else "test" for argument in CREATE]
    assert failure(owner(*arguments)) == "Error: changefeed default/test exists already; nothing was changed\n"


def test_create_dry_run_stores_nothing(owner: Owner, view: AdminView) -> None:
    """The output says that nothing was stored."""
    assert owner(*CREATE, "--dry-run").stdout == "changefeed default/new: all checks passed; nothing was stored\n"
    assert len(view.store.infos) == 1


def test_query_for_people_says_what_costs_and_what_waits(owner: Owner, view: AdminView) -> None:
    """No password is shown."""
    text = owner("changefeed", "query").stdout
    assert "4.0 KiB" in text
    assert "replicating 3" in text
    assert "secret" not in text
    assert "${SINK_PASSWORD}" in text


def test_with_two_changefeeds_one_has_to_be_named(owner: Owner, view: AdminView) -> None:
    """The error names both."""
    view.store.create(paused())
    assert "2 changefeeds, so name one; there: default/other, default/test" in failure(owner("table", "list"))
    assert owner("table", "list", "--changefeed", "test").exit_code == 0
    lines = owner("changefeed", "list").stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["default/other", "stopped"], ["default/test", "normal"]]


def test_create_with_wait_ends_when_all_tables_follow(owner: Owner, view: AdminView) -> None:
    """If they do not in time, or it is paused meanwhile, the error reports the progress and that it
    was created."""
    view.store.infos.clear()
    create = view.store.create
    view.store.create = lambda info: create(msgspec.structs.replace(info, start_ts=1))  # type: ignore[method-assign]
    created = answer(owner(*CREATE[:3], "test", *CREATE[4:], "--wait", "-o", "json"))
    assert (created["changefeed"], created["spans_by_state"]) == (FEED, {"replicating": 3})
    text = failure(owner(*CREATE, "--wait", "--timeout-s", "0.5"))
    assert "changefeed default/new: normal, starting after 0.5 s; it was created and continues" in text
    view.store.infos.pop(next(name for name in view.store.infos if name.id == "new"))
    view.store.create = lambda info: view.store.infos.update({info.changefeed: paused("new")})  # type: ignore[method-assign]
    assert "changefeed default/new: stopped" in failure(owner(*CREATE, "--wait"))


def test_remove_with_wait_ends_when_it_is_forgotten(owner: Owner, view: AdminView) -> None:
    """If it is not in time, the error says what the removal waits for."""
    view.store.create(paused())
    text = failure(owner("changefeed", "remove", "other", "--wait", "--timeout-s", "0.5"))
    assert "default/other is still being removed after 0.5 s; it continues" in text
    apply = view.store.apply

    def forget(changefeed: Any, event: ChangefeedEvent, *, by: str = "") -> ChangefeedInfo:
        apply(changefeed, event, by=by)
        return view.store.infos.pop(changefeed)

    view.store.apply = forget  # type: ignore[method-assign]
    assert answer(owner("changefeed", "remove", "other", "--wait", "-o", "json")) == {"changefeed": "default/other", "gone": True}


# ---------------------------------------------------------------------------------------------------------------------
# Captures and owners


def test_capture_list_and_drain(owner: Owner, view: AdminView) -> None:
    """A drain with --wait ends when nothing is left."""
    captures = answer(owner("capture", "list", "-o", "json"))["captures"]
    assert [(row["id"], row["state"], row["draining"]) for row in captures] == [(name, "ready", False) for name in "abc"]
    result = answer(owner("capture", "drain", "a", "--wait", "-o", "json"))
    assert (result["draining"], result["remaining"], result["gone"]) == (True, 0, False)
    assert "safe to stop" in owner("capture", "list").stdout.splitlines()[1]
    assert "is not being drained" in owner("capture", "drain", "a", "--cancel").stdout
    assert "processor a is not being drained, so there is nothing to cancel" in failure(
        owner("capture", "drain", "a", "--cancel")
    )
    assert "no processor 'z'" in failure(owner("capture", "drain", "z"))


def test_a_drain_that_does_not_end_says_why(owner: Owner, view: AdminView) -> None:
    """The exit code is 1, and the error has the stall reasons of what is left."""
    held = next(table for table in (1, 2, 3) if view.world.primary(table) == "a")
    for capture in "bc":
        view.world.executors[capture].hang("prepare", Span(held))
    text = failure(owner("capture", "drain", "a", "--wait", "--timeout-s", "1"))
    assert "1 table left (preparing 1) after 1 s; the drain continues" in text


def test_resign_waits_for_the_next_leader(owner: Owner, view: AdminView) -> None:
    """The only owner refuses; with a second one the output names the new leader."""
    assert "only owner" in failure(owner("resign"))
    other = AdminView(view.world, "owner-2")
    other.leads = False
    with serving(other) as address:
        successor = LeaderRecord(id="owner-2", address=address)
        view.records.append(successor)
        other.records = [successor]
        give_up = view.stop

        def stop(reason: str, by: str) -> None:
            give_up(reason, by)
            other.leads = True

        view.stop = stop  # type: ignore[method-assign]
        assert owner("resign").stdout == "owner-1 has resigned, owner-2 leads\n"


# ---------------------------------------------------------------------------------------------------------------------
# Local commands


def test_version_calls_no_owner() -> None:
    """It shows the version as text and as JSON without calling an owner."""
    assert run("version").stdout.startswith("tablewire 0.")
    assert set(answer(run("version", "-o", "json"))) == {"version", "python"}


def test_config_show_says_where_each_value_comes_from(tmp_path: Any) -> None:
    """A value comes from a file, a variable, a flag or the default."""
    file = tmp_path / "owner.toml"
    file.write_text('cluster = "blue"\n[admin]\nport = 1\n')
    shown = run(
        "config", "show", "-o", "json", "--config", str(file), "--set", "tick.interval_ms=50", env={"TABLEWIRE_ADMIN__PORT": "2"}
    )
    keys = {row["key"]: (row["value"], row["origin"]) for row in answer(shown)["keys"]}
    assert keys["cluster"] == ("blue", f"file {file}")
    assert keys["admin.port"] == (2, "environment variable TABLEWIRE_ADMIN__PORT")
    assert keys["tick.interval_ms"] == (50, "flag tick.interval_ms")
    assert keys["admin.host"][1] == "default"
    assert "blue" in run("config", "show", "--config", str(file)).stdout


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("clutser = 'x'", "unknown key clutser (did you mean cluster?)"),
        ("[admin]\nport = 70000", "admin.port: Expected `int` <= 65535"),
        ("[admin", "not valid TOML"),
    ],
)
def test_config_check_refuses_in_one_line(tmp_path: Any, text: str, reason: str) -> None:
    """The line names the file and the key."""
    file = tmp_path / "owner.toml"
    file.write_text(text)
    said = failure(run("config", "check", "--config", str(file)))
    assert reason in said
    assert said.count("\n") == 1
    assert f"file {file}" in said


def test_config_check_of_a_right_one(tmp_path: Any) -> None:
    """The exit code is 0."""
    assert answer(run("config", "check", "-o", "json")) == {"ok": True, "given": 0}
    assert "--set" in failure(run("config", "check", "--set", "nonsense"), 2)
    assert "flag no.key: no such key" in failure(run("config", "check", "--set", "no.key=1"))


def test_every_command_has_help() -> None:
    """No help text fails to render."""
    for context in contexts():
        result = run(*context.command_path.split()[1:], "--help")
        assert result.exit_code == 0
        assert "Usage: owner" in result.stdout


def test_many_tables_come_as_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """The object is on one line, whatever the number of tables."""
    view = AdminView(World(tables=range(1, 3001)))
    view.world.settle()
    with serving(view) as address:
        monkeypatch.setenv("TABLEWIRE_ENDPOINTS", address)
        assert len(answer(run("table", "list", "-o", "json"))["tables"]) == 3000
        cut = run("table", "list")
    assert len(cut.stdout.splitlines()) == 1001
    assert "only the first 1000 rows" in cut.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Events


def test_events_are_shown_oldest_first_and_limited(owner: Owner, view: AdminView) -> None:
    """They are shown as a table and as JSON."""
    view.events.add("capture_joined", subject="a", text="registered")
    view.events.add("span_moved", changefeed=FEED, subject="public.t1", text="from a to b", why="move")
    assert [event["kind"] for event in answer(owner("events", "-o", "json"))["events"]] == ["capture_joined", "span_moved"]
    (last,) = answer(owner("events", "-n", "1", "-o", "json"))["events"]
    assert (last["sequence"], last["changefeed"], last["why"], last["at"][-1]) == (2, FEED, "move", "Z")
    shown = owner("events").stdout.splitlines()
    assert shown[0].split() == ["AT", "EVENT", "CHANGEFEED", "SUBJECT", "WHAT", "WHY", "BY", "JOB"]
    assert "public.t1" in shown[2]


def test_events_of_an_owner_that_does_not_lead_are_the_leaders(owner: Owner, view: AdminView) -> None:
    """A follower forwards the call."""
    view.events.add("owner_leads", subject="owner-1")
    other = AdminView(view.world, "owner-2")
    other.leads, other.records = False, [*view.records, LeaderRecord(id="owner-2", address="127.0.0.1:2")]
    with serving(other) as address:
        assert answer(owner("--endpoint", address, "events", "-o", "json"))["events"][0]["kind"] == "owner_leads"


# ---------------------------------------------------------------------------------------------------------------------
# Statistics, updates, targets


def test_statistics_name_the_busiest_table_first_and_sum_up(view: AdminView, owner: Owner) -> None:
    """Rates are null if executors report none; the lag is known nevertheless."""
    quiet = answer(owner("changefeed", "statistics", "-o", "json"))
    assert (quiet["rows_per_s"], quiet["tables"][0]["rows_per_s"], quiet["spans"]) == (None, None, 3)
    for table, rows_per_s in ((1, 5.0), (2, 20.0), (3, 0.0)):
        executor = view.world.executors[view.world.primary(table)]
        executor.set_stats(Span(table), Stats(rows_per_s=rows_per_s, bytes_per_s=rows_per_s * 1024))
    wait_until("rates are reported", lambda: answer(owner("changefeed", "query", "-o", "json"))["rows_per_s"] == 25.0, 20.0)
    reported = answer(owner("changefeed", "statistics", "-o", "json"))
    assert [(row["table"], row["rows_per_s"]) for row in reported["tables"]] == [
        ("public.t2", 20.0),
        ("public.t1", 5.0),
        ("public.t3", 0.0),
    ]
    assert (reported["bytes_per_s"], reported["tables"][0]["bytes_per_s"]) == (25.0 * 1024, 20.0 * 1024)
    assert all(row["lag"] >= 50 for row in reported["tables"])
    shown = owner("changefeed", "statistics", "--limit", "1").stdout
    assert "25.0 KiB" in shown
    assert "public.t2" in shown
    assert "public.t1" not in shown


def test_a_running_changefeed_is_not_changed(owner: Owner) -> None:
    """The error gives the reason."""
    text = failure(owner("changefeed", "update", "test", "--tables", "public.x"))
    assert text == "Error: changefeed default/test is normal: only a paused one can be changed; nothing was changed\n"


def test_a_paused_changefeed_gets_another_filter_and_options(
    owner: Owner, view: AdminView, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks run on the new values; if one fails, nothing changes."""
    monkeypatch.setenv("SINK_PASSWORD", "pw")
    view.store.infos[paused().changefeed] = paused()
    changed = answer(
        owner("changefeed", "update", "other", "--tables", "public.a,public.b", "--sink-option", "x=1", "-o", "json")
    )
    assert (changed["tables"], changed["options"], changed["state"]) == (["public.a", "public.b"], {"x": "1"}, "stopped")
    assert (list(view.requests[-1].tables), dict(view.requests[-1].options)) == (["public.a", "public.b"], {"x": "1"})
    view.failures.append(CheckFailure("tables", "the filter matches nothing"))
    assert "the filter matches nothing" in failure(owner("changefeed", "update", "other", "--tables", "nope.*"))
    view.failures.clear()
    assert answer(owner("changefeed", "query", "other", "-o", "json"))["tables"] == ["public.a", "public.b"]
    assert answer(owner("changefeed", "update", "other", "--unset-option", "x", "-o", "json"))["options"] == {}
    assert "option 'x' is not set" in failure(owner("changefeed", "update", "other", "--unset-option", "x"))
    assert "nothing to change" in failure(owner("changefeed", "update", "other"), 2)


@pytest.mark.parametrize(("text", "ts"), [("0/16B3748", 0x16B3748), ("1/2", (1 << 32) + 2), ("23804744", 23804744)])
def test_a_target_is_an_lsn_or_a_number(owner: Owner, view: AdminView, text: str, ts: int) -> None:
    """It is stored with the changefeed."""
    assert answer(owner(*CREATE, "--target-ts", text, "-o", "json"))["target_ts"] == ts


@pytest.mark.parametrize("text", ["0/", "x", "-1", "1/2/3", "18446744073709551616"])
def test_a_target_that_cannot_be_one_is_wrong_usage(owner: Owner, text: str) -> None:
    """The command fails before it calls an owner."""
    assert "neither a number nor an LSN" in failure(owner(*CREATE, "--target-ts", text), 2)


def test_a_target_that_has_passed_is_refused(owner: Owner, view: AdminView) -> None:
    """The error names the position of the source, and nothing is stored."""
    text = failure(owner(*CREATE, "--target-ts", "999"))
    assert "target_ts: the source is at 1000, past the target 999 already" in text
    assert len(view.store.infos) == 1
