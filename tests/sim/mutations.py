"""Bugs that are planted into the real modules, one at a time, for the simulation to find.

A bug is an edit of the source of a function, or a change of the rules. The text that an edit
replaces must occur exactly once, so that a bug cannot silently stop being planted. Every reference
to the function sees the edit, and it is undone afterwards.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FunctionType

from owner.core import replication, transitions
from owner.core.transitions import (
    GONE,
    Condition,
    Dispatch,
    Note,
    Outcome,
    Role,
    RoleChange,
    Rule,
    compile_rules,
)
from tablewire.errors import InvariantError
from tablewire.model.states import ReplicationState as S
from tablewire.model.states import TableState as T
from tests.sim.simulation import Simulation

Rules = tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Edit:
    """In `function` ("module:name" or "module:Class.name"), `old` becomes `new`."""

    function: str
    old: str
    new: str

    def resolve(self) -> FunctionType:
        module, _, path = self.function.partition(":")
        found: object = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        assert isinstance(found, FunctionType), f"{self.function} is no function"
        return found

    def planted(self, function: FunctionType) -> FunctionType:
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"{self.function}: {self.old!r} is there {source.count(self.old)} times"
        scope: dict[str, object] = {}
        code = compile(
            "from __future__ import annotations\n" + source.replace(self.old, self.new), inspect.getfile(function), "exec"
        )
        exec(code, function.__globals__, scope)
        result = scope[function.__name__]
        assert isinstance(result, FunctionType)
        return result


@dataclass(frozen=True, slots=True)
class Bug:
    """seed: the first one known to find the bug; other seeds are tried if it no longer does."""

    name: str
    seed: int = 1
    edits: tuple[Edit, ...] = ()
    rules: Callable[[Rules], Rules] | None = None

    @contextmanager
    def plant(self) -> Iterator[None]:
        former = [(edit, function := edit.resolve(), function.__code__) for edit in self.edits]
        rules, compiled = transitions.RULES, replication.COMPILED
        try:
            for edit, function, _ in former:
                function.__code__ = edit.planted(function).__code__
            if self.rules is not None:
                transitions.RULES = self.rules(rules)
                replication.COMPILED = compile_rules()
            yield
        finally:
            for _, function, code in former:
                function.__code__ = code
            transitions.RULES, replication.COMPILED = rules, compiled

    def find(self, seeds: Iterable[int]) -> str | None:
        """Return the violation that the first of these seeds to find the bug reports, None if none
        finds it."""
        with self.plant():
            for seed in seeds:
                try:
                    violations = Simulation(seed).run().violations
                except (InvariantError, AssertionError, ValueError, IndexError, KeyError) as error:
                    return f"seed {seed}: {error!r}"
                if violations:
                    return violations[0]
        return None


def _first(*rules: Rule) -> Callable[[Rules], Rules]:
    return lambda former: (*rules, *former)


def _instead(which: Callable[[Rule], bool], then: Outcome | None) -> Callable[[Rules], Rules]:
    """Give the matching rules another outcome; None: remove them."""

    def change(rules: Rules) -> Rules:
        assert any(which(rule) for rule in rules)
        return tuple(replace(rule, then=then) if which(rule) and then else rule for rule in rules if then or not which(rule))

    return change


def _edit(function: str, old: str, new: str) -> tuple[Edit, ...]:
    return (Edit(function, old, new),)


GRANT = Outcome(S.COMMIT, dispatch=Dispatch.GRANT)
GRANT_AFTER = Outcome(None, RoleChange.CLEAR, Dispatch.GRANT, checkpoint=True)
ALONE = Condition(primary=False)
WITH_SECONDARY = Condition(secondary=True)
BESIDE_ANOTHER = Condition(primary=True, undetermined=True)
INBOX, MOVES, AGENT = "owner.core.inbox", "owner.core.moves", "processor.agent.agent"
ADD = "owner.core.policies.add_and_remove"

DEMANDED = (
    Bug(
        "promotion beside an Undetermined: the Secondary is prepared",
        seed=2,
        rules=_first(Rule((S.PREPARE, S.COMMIT), Role.SECONDARY, (T.PREPARED,), ALONE, GRANT, "planted")),
    ),
    Bug(
        "promotion beside an Undetermined: the Primary has stopped",
        seed=357,
        rules=_first(Rule((S.COMMIT,), Role.PRIMARY, GONE, WITH_SECONDARY, GRANT_AFTER, "planted")),
    ),
    Bug(
        "an orphan is told to go and gets no role",
        seed=3,
        rules=_instead(lambda rule: rule.role is Role.NONE, Outcome(dispatch=Dispatch.REMOVE_REPORTER, note=Note.ORPHAN)),
    ),
    Bug("an orphan is ignored", seed=3, rules=_instead(lambda rule: rule.role is Role.NONE, None)),
    Bug(
        "the agent obeys an older owner",
        seed=1,
        edits=_edit(
            f"{AGENT}:Agent._listen_to", "message.owner_revision > owner.revision", "message.owner_revision != owner.revision"
        ),
    ),
    Bug(
        "the agent applies an older dispatch",
        seed=5,
        edits=_edit(
            f"{AGENT}:Agent._take",
            "if owner is None or message.number <= owner.received:",
            "if owner is None or isinstance(message.body, Heartbeat) and message.number <= owner.received:",
        ),
    ),
    Bug(
        "the owner applies an older report",
        seed=3,
        edits=_edit(f"{INBOX}:_receive", "elif message.number <= capture.received:", "elif message.number < 0:"),
    ),
    Bug(
        "the processor epoch is ignored",
        seed=2,
        edits=_edit(
            f"{INBOX}:_receive", "if message.processor_epoch != capture.processor_epoch:", "if not capture.processor_epoch:"
        ),
    ),
    Bug(
        "a checkpoint goes back",
        seed=1,
        edits=_edit(
            "owner.core.replication:advance_checkpoints",
            "np.maximum(tables.checkpoint_ts[rows], reports.checkpoint_ts)",
            "reports.checkpoint_ts.copy()",
        ),
    ),
    Bug(
        "the limit is compared with ==",
        seed=82,
        edits=_edit(f"{MOVES}:MoveSlots.allow", "self.free > 0", "self.free != 0"),
    ),
    Bug(
        "the limit of a capture is compared with ==",
        seed=27,
        edits=_edit(f"{MOVES}:MoveSlots.allow", "< self.limit", "!= self.limit"),
    ),
    Bug(
        "bootstrap is not waited for",
        seed=2,
        edits=_edit("owner.core.bootstrap:try_finish_bootstrap", "{capture.index for capture in core.captures.alive()}", "set()"),
    ),
    Bug(
        "a capture's death is ignored in Removing",
        seed=7,
        edits=_edit(
            "owner.core.replication:apply_capture_loss",
            "rows = replication.tables.rows_with_role(capture)",
            "rows = replication.tables.rows_with_role(capture)\n    rows = rows[replication.tables.state[rows] != REMOVING]",
        ),
    ),
    Bug(
        "drain counts primaries alone",
        seed=1,
        edits=_edit(
            "owner.core.policies.drain:update_drains",
            "len(core.tables.rows_with_role(capture.index))",
            "int((core.tables.primary == capture.index).sum())",
        ),
    ),
    Bug(
        "a late joiner closes the gate",
        seed=2,
        edits=_edit(
            "owner.core.tick:tick",
            "bootstrapped = try_finish_bootstrap(core)",
            "bootstrapped = try_finish_bootstrap(core)\n"
            "    core.bootstrap.done = core.bootstrap.done and all(c.reported_ms is not None for c in core.captures.alive())",
        ),
    ),
    Bug(
        "a late joiner stops the policies",
        seed=2,
        edits=_edit(
            "owner.core.tick:tick",
            "    if core.bootstrap.done:\n        _run_policies",
            "    if core.bootstrap.done and all(c.reported_ms is not None for c in core.captures.alive()):\n"
            "        _run_policies",
        ),
    ),
)
"""What the simulation was built to find."""

MORE = (
    Bug(
        "a report counts although it is older than the last dispatch",
        seed=206,
        edits=_edit("owner.core.replication:counted", "return mask", "return np.ones(len(rows), np.bool_)"),
    ),
    Bug(
        "a permission keeps its number",
        seed=2,
        edits=_edit(
            "owner.core.replication:grant",
            "tables.grants[rows] = np.maximum(tables.grants[rows], replication.grants_floor) + 1",
            "tables.grants[rows] = 1",
        ),
    ),
    Bug(
        "the grants of a dropped table begin again",
        seed=8,
        edits=_edit(
            "owner.core.replication:find_removed",
            "replication.grants_floor = max(replication.grants_floor, int(tables.grants[rows].max()))",
            "pass",
        ),
    ),
    Bug(
        "a Secondary whose prepare was undone is forgotten",
        seed=1,
        edits=_edit(f"{MOVES}:undo_prepare", "assign(tables, rows, Role.UNDETERMINED, holders, reported, dispatches)", "pass"),
    ),
    Bug(
        "a capture that never spoke holds nothing",
        seed=2,
        edits=_edit("owner.core.replication:apply_reports", "if replication.may_hold_any_span - {capture}:", "if False:"),
    ),
    Bug(
        "a Primary is told to stop although nobody could follow",
        seed=28,
        rules=_instead(
            lambda rule: rule.states == (S.PREPARE,) and rule.reports == (T.PREPARED,) and rule.when == BESIDE_ANOTHER,
            Outcome(S.COMMIT, dispatch=Dispatch.REMOVE_PRIMARY),
        ),
    ),
    Bug(
        "a row is dropped while somebody may hold it",
        seed=38,
        edits=_edit(
            "owner.core.replication:find_removed", "mask &= tables.live[:size] & (tables.undetermined_count[:size] == 0)", "pass"
        ),
    ),
    Bug(
        "a span is added where somebody may still hold it",
        seed=1,
        edits=_edit("owner.core.policies.add_and_remove:add_missing", "exclude=tables.undetermined.get(row, ())", "exclude=()"),
    ),
    Bug(
        "a report is applied on a base that was never applied",
        seed=3,
        edits=_edit(f"{INBOX}:_receive", "if report.base > capture.acked or", "if"),
    ),
    Bug(
        "what a report leaves out is not told again",
        seed=8,
        edits=_edit(f"{INBOX}:apply_span_reports", "elif restate:", "elif False:"),
    ),
    Bug(
        "a whole report says nothing of what it leaves out",
        seed=4,
        edits=_edit(f"{INBOX}:apply_span_reports", "    if is_complete:\n        _restate", "    if False:\n        _restate"),
    ),
    Bug(
        "a capture that came back is believed by number",
        seed=7,
        edits=_edit(
            "owner.core.captures:Captures.update",
            "capture.acked, capture.must_report_names, capture.heartbeat_ms = 0, True, None",
            "capture.heartbeat_ms = None",
        ),
    ),
    Bug(
        "who is Stopping at the start of a term is forgotten",
        seed=3,
        edits=_edit(
            "owner.core.bootstrap:_note_stopping",
            "core.tables.add_undetermined(report.rows[report.states == STOPPING], capture.index, STOPPING)",
            "pass",
        ),
    ),
    Bug(
        "a second prepared one at the start of a term is forgotten",
        seed=3,
        edits=_edit(
            "owner.core.bootstrap:_assign_secondaries",
            "tables.add_undetermined(rows[tables.secondary[rows] != capture.index], capture.index, state)",
            "pass",
        ),
    ),
    Bug(
        "a move is done when its target is prepared",
        seed=1,
        edits=_edit(
            "owner.core.policies.planner:plan_move",
            "inputs.primary[row] != target or inputs.state[row] != REPLICATING",
            "target not in (inputs.primary[row], inputs.secondary[row])",
        ),
    ),
    Bug(
        "a cancelled move goes on",
        seed=6,
        edits=_edit("owner.core.policies.move:_cancel", "_undo(core, job)\n", "return\n"),
    ),
    Bug(
        "the watermark takes resolved for the checkpoint",
        seed=1,
        edits=_edit(
            "owner.core.watermark:compute",
            "checkpoints = tables.checkpoint_ts[rows]",
            "checkpoints = tables.resolved_ts[rows]",
        ),
    ),
    Bug(
        "the watermark forgets the barrier",
        seed=15,
        edits=_edit(
            "owner.core.watermark:compute", "min(int(checkpoints[slowest]), checkpoint_bound)", "int(checkpoints[slowest])"
        ),
    ),
    Bug(
        "a new owner is not told everything",
        seed=1,
        edits=_edit(f"{AGENT}:Agent._listen_to", "self._table.report_everything(to_new_owner=True)", "pass"),
    ),
    Bug(
        "an error that is raised by a removal counts as Stopped",
        seed=8,
        edits=_edit(
            "processor.agent.executor_driver:ExecutorDriver._make",
            "self._table.apply(OUTCOME[call], done)",
            "self._table.apply(OUTCOME[call], rows if call is Call.IS_REMOVED and self.last_error else done)",
        ),
    ),
)
"""Others, to see how sharp it is."""

HARMLESS = (
    Bug(
        "a permission from before the prepare point is taken",
        edits=_edit("processor.agent.executor_driver:ExecutorDriver.drive", "self._ask(doubtful, self._is_behind)", "[]"),
    ),
    Bug(
        "a drain waits for a prepare towards its target",
        edits=_edit(
            "owner.core.policies.drain:_cancel_inbound",
            "rows if elsewhere else rows[tables.primary[rows] != NO_CAPTURE]",
            "rows[tables.primary[rows] == NO_CAPTURE] if elsewhere else rows[:0]",
        ),
    ),
    Bug(
        "the agent takes acknowledgements that were meant for its predecessor",
        edits=_edit(
            f"{AGENT}:Agent._take_heartbeat", "heartbeat.acked if knows_us and not heartbeat.by_name else 0", "heartbeat.acked"
        ),
    ),
    Bug(
        "the agent takes a dispatch that was meant for its predecessor",
        edits=_edit(f"{AGENT}:Agent._take", "if message.processor_epoch == self.processor_epoch:\n", "if True:\n"),
    ),
    Bug(
        "a Remove leaves the kept permission behind",
        edits=_edit("processor.core.span_table:SpanTable._cancel_grant", "if self.kept_grants or self.to_raise:", "if False:"),
    ),
    Bug(
        "any other processor epoch is believed",
        edits=_edit(f"{INBOX}:_receive", "capture.processor_epoch and message.echo <= capture.echoed", "False"),
    ),
)
"""What other rules make up for, so that no seed finds it: the deadline of a prepare ends what a drain waits for; numbers and
echoes turn away what another epoch said; a permission that was kept never comes to a span that is on its way out; what a span is
prepared from is durable anyway."""
