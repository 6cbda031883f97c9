"""Evictions with real etcd: a capture that is not known to be fenced counts as alive until its
lease must have stopped it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from deploy.local.etcd import EtcdServer
from deploy.local.proxy import TcpProxy
from owner.core.scheduler_config import SchedulerConfig
from owner.events.history import History
from owner.leadership.election import Election
from owner.leadership.evictions import Evictions
from owner.owner_config import OwnerConfig, SchedulerSection
from owner.scheduling.snapshot import Snapshot
from tablewire.errors import EtcdError, NotLeaderError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.guarded_write import GuardedWrite
from tablewire.etcd.records import CaptureRecord, EvictionRecord, decode, encode, now
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import Compare, EtcdUnavailableError, KeyValue, LeaseLostError, Put
from tablewire.model.ids import CaptureInfo
from tablewire.runtime.sections import EtcdSection
from tablewire.testing.fake_executor import UnfencedFakeTableExecutor
from tests.owner.world import World

pytestmark = pytest.mark.integration

TIMEOUT_S = 15.0
EVICT_S = 5.0
TTL_S = 10.0
HOLD_S = TTL_S + 2.0
OTHERS = {"b": CaptureInfo("b", "b:1")}


def silent_world(executor: type[UnfencedFakeTableExecutor] | None = None) -> World:
    """Return a snapshot in which "b" answers and "a" does not. executor: the kind that "a" reported
    earlier."""
    world = World(captures=["b"], tables=[1])
    world.join("a", executor(world.sink, name="a") if executor is not None else None)  # type: ignore[arg-type]
    world.settle()
    world.paused.add("a")
    world.until(lambda: any(view.id == "a" and view.state == "silent" for view in world.snapshot.captures))
    return world


FENCED = silent_world().snapshot
UNFENCED = silent_world(UnfencedFakeTableExecutor).snapshot


class Etcd:
    """A cluster in etcd, and the terms of its owners, which share a clock that the test moves."""

    def __init__(self, session: EtcdSession, cluster: str) -> None:
        self.session, self.cluster = session, cluster
        self.now_s = 1_000.0
        self.leases: dict[str, int] = {}
        self.elections: list[Election] = []
        self.history: History

    def lead(self) -> Election:
        """Make a new owner lead, after the previous one has died."""
        for former in self.elections:
            former.close()
        election = Election(self.session, self.cluster, f"o{len(self.elections)}", "o:1", ttl_s=5.0)
        self.elections.append(election)
        election.start(TIMEOUT_S)
        assert election.wait_for_leadership(TIMEOUT_S) is not None
        return election

    def term(self, session: EtcdSession | None = None, write: Callable[[GuardedWrite], GuardedWrite] | None = None) -> Evictions:
        """Return the evictions of a new term. session: for all but the guarded writes. write: wraps
        those."""
        election = self.lead()
        guarded, leadership = election.guarded_write, election.leadership()
        assert leadership is not None
        self.history = History(self.session, self.cluster, guarded, "o", 1, 100)
        config = OwnerConfig(
            cluster=self.cluster,
            scheduler=SchedulerSection(capture_evict_ms=int(EVICT_S * 1_000)),
            etcd=EtcdSection(lease_ttl_ms=int(TTL_S * 1_000)),
        )
        assert config.etcd.ttl_s + config.etcd.margin_s == HOLD_S
        evictions = Evictions(
            session or self.session,
            write(guarded) if write else guarded,
            election.guard,
            leadership.revision,
            config,
            self.history,
            lambda: self.now_s,
        )
        evictions.load()
        return evictions

    def register(self, capture: str) -> None:
        self.leases[capture], _ = self.session.grant(600)
        record = CaptureRecord(id=capture, address=f"{capture}:1", version="9", labels={"zone": "z"}, started_at=now())
        self.session.put(etcd_keys.capture_key(self.cluster, capture), encode(record), lease=self.leases[capture])

    def registered(self) -> Mapping[str, KeyValue]:
        items, _ = self.session.get_prefix(etcd_keys.captures_prefix(self.cluster))
        return {item.key.rpartition("/")[2]: item for item in items}

    def step(self, evictions: Evictions, *snapshots: Snapshot | None, after_s: float = 0.0) -> None:
        """Run one round of the thread "store", this many seconds later."""
        self.now_s += after_s
        registered = self.registered()
        evictions.step({id: CaptureInfo(id, f"{id}:1", "9", {"zone": "z"}) for id in registered}, registered, snapshots)

    def held(self, evictions: Evictions, after_s: float = 0.0) -> set[str]:
        return set(evictions.with_held(OTHERS, self.now_s + after_s)) - OTHERS.keys()

    def record(self, capture: str = "a") -> EvictionRecord | None:
        key = etcd_keys.evicted_key(self.cluster, capture)
        found = self.session.get(key)
        return None if found is None else decode(EvictionRecord, key, found.value)

    def has_lease(self, capture: str) -> bool:
        try:
            return self.session.keep_alive_once(self.leases[capture]) > 0
        except LeaseLostError:
            return False

    def told(self) -> Sequence[str]:
        self.history.flush()
        return [event.record.subject for event in self.history.events_after(0) or () if event.record is not None]


@pytest.fixture
def etcd(etcd_server: EtcdServer, etcd_prefix: str) -> Iterator[Etcd]:
    """Return a cluster with the captures "a", which will be evicted, and "b"."""
    session = EtcdSession([etcd_server.endpoint])
    etcd = Etcd(session, "evictions" + etcd_prefix.replace("/", "-"))
    etcd.register("a")
    etcd.register("b")
    yield etcd
    for election in etcd.elections:
        election.close()
    session.close()


@pytest.fixture
def cut_session(etcd_server: EtcdServer) -> Iterator[tuple[EtcdSession, TcpProxy]]:
    """Return a separate session, and the proxy that can cut it off."""
    with TcpProxy("127.0.0.1", etcd_server.endpoint) as proxy:
        session = EtcdSession([proxy.endpoint], request_timeout_ms=300)
        yield session, proxy
        session.close()


def evict(etcd: Etcd, evictions: Evictions, *snapshots: Snapshot | None) -> None:
    """Make the capture silent for long enough."""
    etcd.step(evictions, *snapshots)
    etcd.step(evictions, *snapshots, after_s=EVICT_S)


def test_an_unfenced_capture_is_held_for_a_ttl_and_its_margin(etcd: Etcd) -> None:
    """It is held from the revocation of its lease on; etcd has everything that the next owner
    needs."""
    evictions = etcd.term()
    etcd.step(evictions, UNFENCED)
    etcd.step(evictions, UNFENCED, after_s=EVICT_S - 0.1)
    assert set(etcd.registered()) == {"a", "b"}
    etcd.step(evictions, UNFENCED, after_s=0.1)
    assert set(etcd.registered()) == {"b"}
    assert not etcd.has_lease("a")
    record = etcd.record()
    assert record is not None
    assert (record.info, record.lease) == (CaptureInfo("a", "a:1", "9", {"zone": "z"}), etcd.leases["a"])
    assert not record.fenced
    etcd.step(evictions, UNFENCED, after_s=HOLD_S - 0.1)
    assert etcd.held(evictions) == {"a"}
    assert etcd.record() is not None
    etcd.step(evictions, after_s=0.1)
    assert etcd.held(evictions) == set()
    assert etcd.record() is None
    assert etcd.told() == ["a"]


def test_a_fenced_capture_is_not_held(etcd: Etcd) -> None:
    """Its sink refuses it, so it counts as dead at once, and no record remains."""
    evictions = etcd.term()
    evict(etcd, evictions, FENCED)
    assert set(etcd.registered()) == {"b"}
    assert not etcd.has_lease("a")
    assert etcd.record() is None
    assert evictions.with_held(OTHERS, etcd.now_s) is OTHERS
    etcd.step(evictions, FENCED)
    assert etcd.told() == ["a"]


@pytest.mark.parametrize("other", [UNFENCED, None], ids=["unfenced", "without a scheduler"])
def test_fenced_in_one_changefeed_alone_is_not_enough(etcd: Etcd, other: Snapshot | None) -> None:
    """One changefeed whose sink would not refuse it, or where that is not known, is enough."""
    evictions = etcd.term()
    evict(etcd, evictions, FENCED, other)
    assert etcd.held(evictions, HOLD_S - 0.1) == {"a"}


def test_it_is_held_before_its_key_is_gone(etcd: Etcd) -> None:
    """The tick may see the deletion of the key before the thread that evicts does; the capture
    still counts as alive."""
    seen = []

    def look(write: GuardedWrite) -> GuardedWrite:
        def writes(puts: Sequence[Put], deletes: Sequence[str] = (), extra_compares: Sequence[Compare] = ()) -> int:
            seen.append(etcd.held(evictions))
            return write(puts, deletes, extra_compares)

        return writes

    evictions = etcd.term(write=look)
    evict(etcd, evictions, UNFENCED)
    assert seen == [{"a"}]


def test_nobody_is_evicted_when_nobody_answers(etcd: Etcd) -> None:
    """Then the fault is likely on the owner's side."""
    world = silent_world()
    world.paused.add("b")
    world.until(lambda: all(view.state == "silent" for view in world.snapshot.captures))
    evict(etcd, etcd.term(), world.snapshot)
    assert set(etcd.registered()) == {"a", "b"}


def test_the_next_owner_revokes_and_holds_anew(etcd: Etcd, cut_session: tuple[EtcdSession, TcpProxy]) -> None:
    """The previous owner died between the deletion of the key and the revocation: the capture is
    held from before the first tick, and for the whole time after the lease is revoked."""
    session, proxy = cut_session
    first = etcd.term(session)
    proxy.cut()
    with pytest.raises(EtcdError, match="revoke"):
        evict(etcd, first, UNFENCED)
    assert set(etcd.registered()) == {"b"}
    assert etcd.has_lease("a")
    assert etcd.held(first, 1e6) == {"a"}
    second = etcd.term()
    assert etcd.held(second, 1e6) == {"a"}
    etcd.step(second, after_s=3.0)
    assert not etcd.has_lease("a")
    assert etcd.held(second, HOLD_S - 0.1) == {"a"}
    assert etcd.held(second, HOLD_S) == set()
    etcd.step(second, after_s=HOLD_S)
    assert etcd.record() is None


def test_a_third_owner_holds_for_the_whole_time_again(etcd: Etcd) -> None:
    """A lease that is gone already is no error, but it is not known since when."""
    evict(etcd, etcd.term(), UNFENCED)
    etcd.step(etcd.term(), after_s=HOLD_S - 1.0)
    third = etcd.term()
    etcd.step(third)
    assert etcd.held(third, HOLD_S - 0.1) == {"a"}


def test_the_next_owner_revokes_the_lease_of_a_fenced_one(etcd: Etcd, cut_session: tuple[EtcdSession, TcpProxy]) -> None:
    """A new term does not hold it either, but its process must not continue under a lease without a
    key."""
    session, proxy = cut_session
    first = etcd.term(session)
    proxy.cut()
    with pytest.raises(EtcdError, match="revoke"):
        evict(etcd, first, FENCED)
    assert etcd.has_lease("a")
    second = etcd.term()
    assert etcd.held(second) == set()
    etcd.step(second)
    assert not etcd.has_lease("a")
    assert etcd.record() is None


class Unanswered:
    """Guarded writes whose answer is lost while `lost` is set; they are applied, or not."""

    def __init__(self, write: GuardedWrite, is_applied: bool) -> None:
        self.write, self.is_applied, self.lost = write, is_applied, True

    def __call__(self, puts: Sequence[Put], deletes: Sequence[str] = (), extra_compares: Sequence[Compare] = ()) -> int:
        revision = self.write(puts, deletes, extra_compares) if self.is_applied or not self.lost else 0
        if self.lost:
            raise EtcdUnavailableError("no answer in time")
        return revision


def test_an_eviction_without_an_answer_goes_on_when_it_was_applied(etcd: Etcd) -> None:
    """The capture is held in the meantime, and the eviction is reported once."""
    writes: list[Unanswered] = []

    def unanswered(write: GuardedWrite) -> Unanswered:
        writes.append(Unanswered(write, is_applied=True))
        return writes[0]

    evictions = etcd.term(write=unanswered)
    with pytest.raises(EtcdUnavailableError):
        evict(etcd, evictions, UNFENCED)
    assert etcd.held(evictions, 1e6) == {"a"}
    writes[0].lost = False
    etcd.step(evictions, UNFENCED)
    assert not etcd.has_lease("a")
    assert etcd.held(evictions, HOLD_S - 0.1) == {"a"}
    assert etcd.held(evictions, HOLD_S) == set()
    assert etcd.told() == ["a"]


def test_an_eviction_without_an_answer_is_forgotten_when_it_was_not_applied(etcd: Etcd) -> None:
    """The capture answers again and leaves later: then no owner waits for it."""
    evictions = etcd.term(write=lambda write: Unanswered(write, is_applied=False))
    with pytest.raises(EtcdUnavailableError):
        evict(etcd, evictions, UNFENCED)
    world = World(captures=["a", "b"])
    world.settle()
    etcd.step(evictions, world.snapshot, after_s=EVICT_S)
    assert set(etcd.registered()) == {"a", "b"}
    etcd.session.revoke(etcd.leases["a"])
    etcd.step(evictions, world.snapshot)
    assert etcd.held(evictions) == set()
    assert etcd.told() == []


def test_a_key_that_was_changed_meanwhile_is_left_alone(etcd: Etcd) -> None:
    """The record of the capture has changed, so the decision is void, and the next round decides
    again."""
    evictions = etcd.term()
    before = etcd.registered()
    captures = {id: CaptureInfo(id, f"{id}:1") for id in before}
    evictions.step(captures, before, [UNFENCED])
    etcd.session.put(before["a"].key, before["a"].value, lease=etcd.leases["a"])
    etcd.now_s += EVICT_S
    evictions.step(captures, before, [UNFENCED])
    assert set(etcd.registered()) == {"a", "b"}
    assert etcd.record() is None
    etcd.step(evictions, UNFENCED)
    assert set(etcd.registered()) == {"b"}


def test_a_former_term_of_the_same_owner_evicts_nobody(etcd: Etcd) -> None:
    """A late thread of an earlier term of this process must not evict a capture of the new term."""
    evictions = etcd.term()
    etcd.step(evictions, UNFENCED)
    (election,) = etcd.elections
    election.resign()
    assert election.wait_for_leadership(TIMEOUT_S) is not None
    with pytest.raises(NotLeaderError):
        etcd.step(evictions, UNFENCED, after_s=EVICT_S)
    assert set(etcd.registered()) == {"a", "b"}


def test_a_watch_that_lags_evicts_nobody_twice(etcd: Etcd) -> None:
    """The key may seem to exist for a moment after its deletion; the hold does not start again."""
    evictions = etcd.term()
    before = etcd.registered()
    evict(etcd, evictions, UNFENCED)
    etcd.now_s += 1.0
    evictions.step({id: CaptureInfo(id, f"{id}:1") for id in before}, before, [UNFENCED])
    assert etcd.held(evictions, HOLD_S - 1.0) == set()
    assert etcd.told() == ["a"]


def test_a_record_that_cannot_be_read_holds_until_it_is_deleted(etcd: Etcd) -> None:
    """Its lease is not known, and so neither is when the capture has stopped; only an operator can
    know."""
    key = etcd_keys.evicted_key(etcd.cluster, "gone")
    etcd.session.put(key, b'{"format": 99}')
    evictions = etcd.term()
    etcd.step(evictions, after_s=HOLD_S)
    assert etcd.held(evictions, 1e6) == {"gone"}
    etcd.session.delete(key)
    etcd.step(evictions)
    assert etcd.held(evictions) == set()


def test_one_that_fails_stops_no_other(etcd: Etcd) -> None:
    """The write for the first capture fails; the second is evicted in the same round, and then the
    error is raised."""
    etcd.register("a2")
    world = World(captures=["b"], tables=[1])
    for capture in ("a", "a2"):
        world.join(capture, UnfencedFakeTableExecutor(world.sink, name=capture))  # type: ignore[arg-type]
    world.settle()
    world.paused |= {"a", "a2"}
    world.until(lambda: sum(view.state == "silent" for view in world.snapshot.captures) == 2)

    def all_but_one(write: GuardedWrite) -> GuardedWrite:
        def writes(puts: Sequence[Put], deletes: Sequence[str] = (), extra_compares: Sequence[Compare] = ()) -> int:
            if etcd_keys.capture_key(etcd.cluster, "a") in deletes:
                raise EtcdUnavailableError("no answer in time")
            return write(puts, deletes, extra_compares)

        return writes

    evictions = etcd.term(write=all_but_one)
    with pytest.raises(EtcdUnavailableError):
        evict(etcd, evictions, world.snapshot)
    assert set(etcd.registered()) == {"a", "b"}
    assert (etcd.has_lease("a"), etcd.has_lease("a2")) == (True, False)


def test_who_never_spoke_may_be_unfenced() -> None:
    """It is not known whether the sink of a capture that has been silent since before the term
    would refuse it."""
    world = World(captures=["a", "mute"], tables=[1])
    world.config = SchedulerConfig(bootstrap_timeout_ms=500)
    world.settle()
    assert world.snapshot.unfenced == frozenset()
    world.paused.add("mute")
    world.elect("owner2")
    world.until(world.scheduler.is_initialized)
    assert world.snapshot.unfenced == {"mute"}
