"""docs/troubleshooting.md leaves nothing out: what the code can say is collected from the code and looked for in the page."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from owner import service as owner_service
from processor.service import processor_service as processor_service
from tablewire.model.states import QueryState, StallReason
from tablewire.runtime import shutdown
from tests.source_tree import PACKAGES, ROOT, modules

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
SPEAKS_TO_CLIENTS = ("owner/", "processor/service/exchange_server.py", "tablewire/runtime/rates.py", "tablewire/runtime/tls.py")
"""Where a status of gRPC is one that a client can receive; elsewhere it is one of etcd's."""
SEVERE = {"warning", "error", "critical"}


MODULES = [(module.name, module.tree) for module in modules(*PACKAGES)]


def calls() -> Iterator[tuple[str, ast.Call]]:
    for module in modules(*PACKAGES):
        for node, _ in module.calls:
            yield module.name, node


def section(heading: str) -> str:
    """What stands below a heading of the page."""
    found = re.split(r"^## ", PAGE, flags=re.M)
    (text,) = [part for part in found if part.startswith(f"{heading}\n")]
    return text


def rows(heading: str) -> list[str]:
    """The first cells of a section's table, each with the backquotes that it has."""
    return re.findall(r"^\| (?!---)([^|]+?) \|", section(heading), re.M)[1:]


def words(heading: str) -> set[str]:
    """Every word in backquotes of the first cells."""
    return {word for cell in rows(heading) for word in re.findall(r"`([^`]+)`", cell)}


def test_every_stall_reason_is_explained() -> None:
    """A line for each reason, in their order, and for nothing else."""
    assert rows("Stall reasons") == [reason.value for reason in StallReason]


def statuses() -> set[str]:
    """The statuses that owners and processors end calls with, as `-o json` has them."""
    return {
        node.attr.lower()
        for name, tree in MODULES
        if name.startswith(SPEAKS_TO_CLIENTS)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"grpc.StatusCode", "_STATUS"}
    }


def cli_codes() -> set[str]:
    """The codes that the CLI gives by itself."""
    found = set()
    for name, call in calls():
        called = ast.unparse(call.func)
        at = {"CommandError": 0}.get(called)
        if name.startswith("owner/cli/") and at is not None and len(call.args) > at and isinstance(call.args[at], ast.Constant):
            found.add(str(call.args[at].value))  # type: ignore[attr-defined]
    return found


def test_every_code_of_an_answer_is_explained() -> None:
    """All that the code can answer has a line, and no line is about something else."""
    jobs = {state.value for state in QueryState} - {QueryState.DONE.value}
    can_be = statuses() | cli_codes() | jobs
    assert {"not_found", "unavailable", "config", "interrupted"} <= can_be
    assert can_be <= words("Error codes")
    assert words("Error codes") <= can_be | {"internal", "unknown"}


def test_every_check_of_create_is_explained() -> None:
    """Each word that a check can fail with."""
    found = {
        call.args[0].value
        for _, call in calls()
        if ast.unparse(call.func) == "CheckFailure" and call.args and isinstance(call.args[0], ast.Constant)
    }
    assert found
    assert words("Checks of create") == found


def test_every_exit_code_is_explained() -> None:
    """Each EXIT_ constant of the services, and the two of a second signal."""
    services = (owner_service, processor_service, shutdown)
    codes = {value for module in services for name, value in vars(module).items() if re.fullmatch(r"EXIT_[A-Z]+", name)}
    text = " ".join(rows("Exit codes"))
    assert codes | {2, shutdown.EXIT_SIGNAL_BASE + 15, shutdown.EXIT_SIGNAL_BASE + 2} == set(map(int, re.findall(r"\d+", text)))


def severe_calls() -> Iterator[tuple[str, ast.Call]]:
    """(module, call) wherever something is logged at warning or above, whatever its logger is called."""
    for name, call in calls():
        if isinstance(call.func, ast.Attribute) and call.func.attr in SEVERE:
            yield name, call


def severe_events() -> set[str]:
    """The events that are logged at warning or above."""
    return {call.args[0].value for _, call in severe_calls() if call.args and isinstance(call.args[0], ast.Constant)}


def test_every_severe_event_is_explained() -> None:
    """A line for each, and none for one that is not logged."""
    assert len(severe_events()) > 20
    missing, gone = severe_events() - words("Log events"), words("Log events") - severe_events()
    assert not missing, "give each a line in docs/troubleshooting.md"
    assert not gone, "no longer logged: take it out of docs/troubleshooting.md"


def test_every_severe_event_has_a_literal_name() -> None:
    """An event whose name is computed could not be looked up."""
    found = [
        f"{name}:{call.lineno}" for name, call in severe_calls() if not (call.args and isinstance(call.args[0], ast.Constant))
    ]
    assert not found


def error_classes() -> set[str]:
    """Every class of ours that is an error by its name."""
    return {
        node.name
        for _, tree in MODULES
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and not node.name.startswith("_")
    }


def test_every_kind_of_error_is_explained() -> None:
    """The classes of tablewire.errors and all others that are made."""
    assert {"OperatingError", "EpochRefusedError", "InvariantError"} <= error_classes()
    named = set(re.findall(r"`(\w+Error)`", section("Errors in code")))
    assert not error_classes() - named, "give each a place in docs/troubleshooting.md"
    assert not named - error_classes(), "no longer there: take it out of docs/troubleshooting.md"


@pytest.mark.parametrize("pattern", re.findall(r"^\| `([^`]+)` \|", section("Errors of a table"), re.M))
def test_texts_that_are_quoted_are_in_the_code(pattern: str) -> None:
    """What an operator should look for is what the executor says."""
    sources = "".join(
        path.read_text() for folder in ("processor/postgres", "tablewire/postgres") for path in (ROOT / folder).rglob("*.py")
    )
    assert pattern in sources
