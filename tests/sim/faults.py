"""The faults of the simulation. Each storm uses some of them, so that a seed may concentrate on one
or two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from tablewire.model.spans import Span
from tablewire.model.states import LivenessState
from tests.sim.network import FINE
from tests.sim.nodes import LEASE_S, Process

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

Kind: TypeAlias = "Callable[[Simulation], bool]"
"""Strikes, if it can; whether it did."""

CALLS = (
    "add_table_span",
    "is_add_table_span_finished",
    "remove_table_span",
    "is_remove_table_span_finished",
    "get_table_span_status",
    "set_assignment_epoch",
)


class Faults:
    """Injects faults into a simulation, and counts them in `counts`."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.counts: Counter[str] = Counter()
        self._kinds: list[Kind] = []
        self._hangs: list[tuple[float, Process, str, Span | None]] = []

    def draw_kinds(self) -> None:
        """Choose the faults of this storm and their frequencies."""
        draw, sim = self.sim.random, self.sim
        kinds = [*CLUSTER, *EXECUTORS, *(FENCED if sim.fenced else ())]
        self._kinds = []
        for kind in draw.sample(kinds, draw.randrange(1, 7)):
            self._kinds += [kind] * draw.choice((1, 3))
        for kind in draw.sample(OPERATORS, draw.randrange(1, 4)):
            self._kinds += [kind] * draw.choice((1, 4))
        self._kinds += [move] * draw.choice((1, 4))

    def strike(self) -> None:
        kind = self.sim.random.choice(self._kinds)
        if kind(self.sim):
            self.counts[kind.__name__] += 1

    def hang(self, process: Process, step: str, span: Span | None, seconds: float) -> None:
        process.executor.hang(step, span)
        self._hangs.append((self.sim.now + seconds, process, step, span))

    def pass_by(self) -> None:
        """End the hangs whose time is over."""
        if self._hangs:
            for until, process, step, span in self._hangs:
                if until <= self.sim.now:
                    process.executor.let_go(step, span)
            self._hangs = [hang for hang in self._hangs if hang[0] > self.sim.now]

    def calm_down(self) -> None:
        """End all faults: hung executors continue, links are restored, deposed owners learn that
        they are."""
        sim = self.sim
        sim.calm = True
        sim.network.weather = FINE
        sim.network.flush()
        self._hangs = [(0.0, *hang[1:]) for hang in self._hangs]
        self.pass_by()
        for owner in sim.owners[:-1]:
            owner.scheduler.close()
        sim.owners = sim.owners[-1:]
        sim.owner.paused_until = 0.0
        sim.owner.blind_until.clear()
        for process in sim.processes.values():
            process.paused_until = process.cut_off_until = process.hung_until = 0.0
            process.is_zombie = False
        staying = [
            id
            for id, process in sim.processes.items()
            if process.liveness.state is LivenessState.ALIVE and sim.leases[id].ended_at is None and id not in sim.drained
        ]
        if not staying:
            sim.start_process()
            if sim.processes[f"p{sim.next_process}"].liveness.state is not LivenessState.ALIVE:
                cancel_drains(sim)
        if len(sim.processes) >= 5 and not staying:
            cancel_drains(sim)
            for process in list(sim.processes.values())[:2]:
                sim.end_process(process)
            sim.start_process()
        sim.watch()


def any_process(sim: Simulation) -> Process | None:
    return sim.processes[sim.random.choice(sorted(sim.processes))] if sim.processes else None


def any_held(sim: Simulation) -> tuple[Process, Span] | None:
    process = any_process(sim)
    spans = process.executor.spans() if process is not None else ()
    return (process, sim.random.choice(spans)) if process is not None and spans else None


# -- processes --------------------------------------------------------------------------------------------------------


def crash_process(sim: Simulation) -> bool:
    process = any_process(sim)
    if process is None:
        return False
    sim.end_process(process)
    if sim.random.random() < 0.8 or len(sim.processes) < 2:
        sim.start_process()
    return True


def crash_while_removing(sim: Simulation) -> bool:
    """Drop a table, and crash a process while it still holds the table."""
    drop_table(sim)
    held = any_held(sim)
    if held is None or held[1].table_id in sim.tables:
        return False
    sim.end_process(held[0])
    sim.start_process()
    return True


def pause_process(sim: Simulation) -> bool:
    process = any_process(sim)
    if process is not None:
        process.paused_until = sim.now + sim.random.choice((0.5, 1.0, 2 * LEASE_S)) * sim.random.random()
    return process is not None


def cut_off_from_etcd(sim: Simulation) -> bool:
    process = any_process(sim)
    if process is not None:
        process.cut_off_until = sim.now + 2 * LEASE_S * sim.random.random()
    return process is not None


def hang_process(sim: Simulation) -> bool:
    """Hang the agent of a process; the lease is kept."""
    process = any_process(sim)
    if process is not None:
        process.hung_until = sim.now + sim.random.choice((1.0, 8.0)) * sim.random.random()
    return process is not None


def start_hung_process(sim: Simulation) -> bool:
    """Start a process that joins and does not respond."""
    started = start_process(sim)
    if started:
        sim.processes[f"p{sim.next_process}"].hung_until = sim.now + 5.0
    return started


def restart_agent(sim: Simulation) -> bool:
    process = any_process(sim)
    if process is not None and sim.now >= max(process.paused_until, process.hung_until):
        sim.restart_agent(process)
        return True
    return False


def start_process(sim: Simulation) -> bool:
    before = sim.next_process
    sim.start_process()
    return sim.next_process > before


def stop_process(sim: Simulation) -> bool:
    process = any_process(sim)
    if process is None or len(sim.processes) < 3:
        return False
    process.liveness.stop()
    return True


def make_zombie(sim: Simulation) -> bool:
    """Cut a process off from etcd without its noticing."""
    process = any_process(sim)
    if process is None:
        return False
    process.cut_off_until = sim.now + 3 * LEASE_S
    process.is_zombie = True
    sim.doubtful.add(process.id)
    return True


def overlook_capture(sim: Simulation) -> bool:
    """Hide one living capture from an owner for a while, as a stale read of etcd does."""
    process = any_process(sim)
    if process is None:
        return False
    sim.random.choice(sim.owners).blind_until[process.id] = sim.now + 2 * sim.random.random()
    sim.doubtful.add(process.id)
    return True


def overlook_stalled(sim: Simulation) -> bool:
    """Hide a capture that writes nothing meanwhile: it considers itself the writer when it is
    visible again."""
    process = any_process(sim)
    if process is None:
        return False
    for owner in sim.owners:
        owner.blind_until[process.id] = sim.now + 1 + sim.random.random()
    process.stalled_until = sim.now + 5.0
    sim.doubtful.add(process.id)
    return True


def overlook_amid_moves(sim: Simulation) -> bool:
    """Hide a capture, and show it again while its spans are moving between two others that stop
    slowly."""
    if not overlook_stalled(sim):
        return False
    for process in sim.processes.values():
        sim.faults.hang(process, "stop", None, 3.0 * sim.random.random())
    return move_all(sim)


# -- owners -----------------------------------------------------------------------------------------------------------


def crash_owner(sim: Simulation) -> bool:
    sim.owners = []
    sim.elect(_next_revision(sim))
    _ask_again(sim)
    return True


def crash_owner_beside_a_silent_one(sim: Simulation) -> bool:
    """Replace the owner while one process, which may hold any span, does not respond."""
    process = any_process(sim)
    if process is not None:
        process.hung_until = sim.now + sim.config.bootstrap_timeout_ms / 1000 + 4 * sim.random.random()
    return crash_owner(sim)


def crash_owner_amid_moves(sim: Simulation) -> bool:
    """Replace the owner by one with lower limits, which finds more moves in progress than it would
    start, and gets more requests."""
    tables = sim.owner.core.tables
    moving = (tables.primary[: tables.size] >= 0) & (tables.secondary[: tables.size] >= 0)
    if int(moving.sum()) >= 2:
        crash_owner(sim)
    return move_all(sim)


def _ask_again(sim: Simulation) -> None:
    """Replace the owner during moves. It knows no jobs, so operators may repeat them at once."""
    if sim.random.random() < 0.4:
        move_all(sim)


def _next_revision(sim: Simulation) -> int:
    sim.last_revision += sim.random.randrange(1, 5)
    return sim.last_revision


def depose_owner(sim: Simulation) -> bool:
    """Elect a new owner without the knowledge of the old one, which continues beside it with the
    tables and captures of that moment."""
    for owner in sim.owners:
        if owner.frozen_at is None:
            owner.frozen_at, owner.frozen_tables, owner.frozen_checkpoint_ts = sim.now, sorted(sim.tables), sim.checkpoint_ts
    sim.owners = sim.owners[-2:]
    sim.elect(_next_revision(sim))
    _ask_again(sim)
    return True


def pause_owner(sim: Simulation) -> bool:
    sim.owner.paused_until = sim.now + 2 * sim.random.random()
    return True


def restart_changefeed(sim: Simulation) -> bool:
    """Restart the changefeed under a new changefeed_epoch in the same term; each process notices it
    in its own time."""
    sim.owner.scheduler.close()
    sim.owners = []
    sim.changefeed_epoch += 1
    for process in sim.processes.values():
        process.restarts_at = sim.now + sim.random.random()
    sim.elect(sim.last_revision)
    return True


# -- the network ------------------------------------------------------------------------------------------------------


def cut_link(sim: Simulation) -> bool:
    """Cut the links between an owner and a process, or of a process with every node, in one
    direction or both."""
    process = any_process(sim)
    if process is None:
        return False
    until = sim.now + 2 * sim.random.random()
    owner = sim.random.choice((sim.random.choice(sim.owners).id, "*"))
    links = [(owner, process.id), (process.id, owner)]
    for link in links if sim.random.random() < 0.4 else [sim.random.choice(links)]:
        sim.network.cuts[link] = until
    return True


# -- executors --------------------------------------------------------------------------------------------------------


def fail_span(sim: Simulation) -> bool:
    held = any_held(sim)
    if held is not None:
        held[0].executor.fail(held[1], "scripted")
    return held is not None


def lose_span(sim: Simulation) -> bool:
    held = any_held(sim)
    if held is not None:
        held[0].executor.lose(held[1])
    return held is not None


def raise_at(sim: Simulation) -> bool:
    process = any_process(sim)
    call = sim.random.choice(CALLS)
    if process is None or not hasattr(process.executor, call):
        return False
    process.executor.raise_at(call)
    return True


def stall_executor(sim: Simulation) -> bool:
    """Stall the writes of an executor, so that it does not notice either that its permission is
    void."""
    process = any_process(sim)
    if process is not None:
        process.stalled_until = sim.now + 5 * sim.random.random()
    return process is not None


def hang(sim: Simulation) -> bool:
    process = any_process(sim)
    if process is None:
        return False
    step = sim.random.choice(("prepare", "write", "stop", "stop"))
    span = sim.random.choice([None, *sim.spans()])
    sim.faults.hang(process, step, span, sim.random.choice((0.5, 3.0)) * sim.random.random())
    return True


# -- tables and operators ---------------------------------------------------------------------------------------------


def drop_table(sim: Simulation) -> bool:
    if len(sim.tables) < 2:
        return False
    sim.tables.discard(sim.random.choice(sorted(sim.tables)))
    for owner in sim.owners:
        owner.proceeding = False
    return True


def new_table(sim: Simulation) -> bool:
    """Add a table, possibly one that was dropped before."""
    if len(sim.tables) >= 10:
        return False
    gone = sorted(sim.former_tables - sim.tables)
    sim.add_table(sim.random.choice([*gone, max(sim.former_tables) + 1]))
    for owner in sim.owners:
        owner.proceeding = False
    return True


def move(sim: Simulation) -> bool:
    process = any_process(sim)
    if process is None or not sim.tables:
        return False
    if sim.random.random() < 0.2:
        sim.owner.scheduler.move_span(sim.random.choice(sim.spans()), process.id)
    else:
        sim.owner.scheduler.move_table(sim.random.choice(sorted(sim.tables)), process.id)
    sim.watch()
    return True


def move_all(sim: Simulation) -> bool:
    """Move every table to some capture."""
    for table in sorted(sim.tables):
        process = any_process(sim)
        if process is not None:
            sim.owner.scheduler.move_table(table, process.id)
    sim.watch()
    return True


def rebalance(sim: Simulation) -> bool:
    sim.owner.scheduler.rebalance()
    sim.watch()
    return True


def cancel(sim: Simulation) -> bool:
    queries = [query for query in sim.owner.scheduler.queries() if query.kind != "drain"]
    if queries:
        sim.random.choice(queries[-5:]).cancel()
    return bool(queries)


def drain(sim: Simulation) -> bool:
    process = any_process(sim)
    known = {view.id for view in sim.owner.scheduler.snapshot().captures}
    if process is None or process.id not in known or len(sim.drained) >= max(1, len(sim.processes) - 2):
        return False
    if sim.owner.scheduler.drain_capture(process.id) == 0:
        sim.oracle.empty(process.id)
    sim.drained.add(process.id)
    sim.watch()
    return True


def cancel_drains(sim: Simulation) -> bool:
    for target in sorted(sim.drained):
        sim.owner.scheduler.cancel_drain(target)
    sim.drained.clear()
    return True


CLUSTER: tuple[Kind, ...] = (
    crash_process,
    crash_while_removing,
    pause_process,
    cut_off_from_etcd,
    hang_process,
    restart_agent,
    start_process,
    start_hung_process,
    stop_process,
    crash_owner,
    crash_owner_beside_a_silent_one,
    crash_owner_amid_moves,
    depose_owner,
    pause_owner,
    restart_changefeed,
    cut_link,
)
EXECUTORS: tuple[Kind, ...] = (fail_span, lose_span, raise_at, stall_executor, hang, hang)
OPERATORS: tuple[Kind, ...] = (drop_table, new_table, move_all, rebalance, cancel, drain, cancel_drains)

FENCED: tuple[Kind, ...] = (make_zombie, overlook_capture, overlook_capture, overlook_stalled, overlook_amid_moves)
"""What only a sink that fences can bear."""
