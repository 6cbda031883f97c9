"""Watches with a real member: they deliver whole states, and resume or reload after every kind of
break.
"""

from __future__ import annotations

from collections.abc import Iterator

import etcd3.etcdrpc as rpc
import pytest

from deploy.local.etcd import EtcdServer
from deploy.local.process import wait_until
from deploy.local.proxy import TcpProxy
from tablewire.errors import EtcdError
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import PrefixState, Put
from tablewire.etcd.watch import PrefixWatch

pytestmark = pytest.mark.integration

TIMEOUT_S = 10.0


@pytest.fixture
def session(etcd_server: EtcdServer) -> Iterator[EtcdSession]:
    session = EtcdSession([etcd_server.endpoint])
    yield session
    session.close()


@pytest.fixture
def proxy(etcd_server: EtcdServer) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", etcd_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def watcher(proxy: TcpProxy) -> Iterator[EtcdSession]:
    """Provide a session that reaches the member only through the proxy."""
    session = EtcdSession([proxy.endpoint], request_timeout_ms=500)
    yield session
    session.close()


def values(state: PrefixState) -> dict[str, bytes]:
    return {key.rsplit("/", 1)[1]: item.value for key, item in state.entries.items()}


def expect(watch: PrefixWatch, wanted: dict[str, bytes]) -> PrefixState:
    return watch.wait_until(lambda state: values(state) == wanted, TIMEOUT_S)


def compact(session: EtcdSession, revision: int) -> None:
    """Delete the history before this revision."""
    session.members.repeat("compact", lambda member: member.kv.Compact, rpc.CompactionRequest(revision=revision))


def test_a_watch_delivers_whole_states(session: EtcdSession, etcd_prefix: str) -> None:
    """Each call receives the whole mapping, from the first state on, without keys of other
    prefixes; revisions only grow.
    """
    prefix = f"{etcd_prefix}/p/"
    session.put(f"{prefix}a", b"1")
    states: list[PrefixState] = []
    watch = session.watch_prefix(prefix, states.append)
    assert values(watch.wait_loaded(TIMEOUT_S)) == {"a": b"1"}
    session.put(f"{etcd_prefix}/q", b"no")
    session.put(f"{prefix}b", b"2")
    session.transact([], [Put(f"{prefix}c", b"3")], [f"{prefix}a"])
    last = expect(watch, {"b": b"2", "c": b"3"})
    wait_until("on_change has the last state", lambda: states[-1] == last, TIMEOUT_S)
    # etcd may combine changes, but never splits a transaction.
    possible = [{"a": b"1"}, {"a": b"1", "b": b"2"}, {"b": b"2", "c": b"3"}]
    assert values(states[0]) == possible[0]
    assert all(values(state) in possible for state in states)
    assert [state.revision for state in states] == sorted({state.revision for state in states})
    assert not watch.error


def test_no_call_comes_after_close(session: EtcdSession, etcd_prefix: str) -> None:
    """A closed watch calls no longer, and closing is idempotent."""
    states: list[PrefixState] = []
    watch = session.watch_prefix(etcd_prefix, states.append)
    watch.wait_loaded(TIMEOUT_S)
    watch.close()
    watch.close()
    session.put(f"{etcd_prefix}/a", b"1")
    other = session.watch_prefix(etcd_prefix)
    expect(other, {"a": b"1"})
    assert len(states) == 1


def test_a_broken_watch_resumes(session: EtcdSession, watcher: EtcdSession, proxy: TcpProxy, etcd_prefix: str) -> None:
    """Changes during a broken connection arrive after it, without a reload."""
    session.put(f"{etcd_prefix}/a", b"1")
    watch = watcher.watch_prefix(f"{etcd_prefix}/")
    watch.wait_loaded(TIMEOUT_S)
    proxy.refuse()
    wait_until("the watch has noticed", lambda: bool(watch.error), TIMEOUT_S)
    session.put(f"{etcd_prefix}/a", b"2")
    last = session.put(f"{etcd_prefix}/a", b"3")
    session.put(f"{etcd_prefix}-elsewhere", b"")
    assert values(watch.wait_loaded(TIMEOUT_S)) == {"a": b"1"}
    proxy.heal()
    # The state has the revision of its own last change; a reloaded one would have etcd's last revision.
    assert expect(watch, {"a": b"3"}).revision == last
    wait_until("the watch is well", lambda: not watch.error, TIMEOUT_S)


def test_a_watch_that_asks_for_no_sign_of_life_resumes_too(
    session: EtcdSession, watcher: EtcdSession, proxy: TcpProxy, etcd_prefix: str
) -> None:
    """It sends one request, stays open for later changes, and ends when it is closed."""
    watch = watcher.watch_prefix(f"{etcd_prefix}/", progress_interval_s=None)
    watch.wait_loaded(TIMEOUT_S)
    for value in (b"1", b"2"):
        session.put(f"{etcd_prefix}/a", value)
        expect(watch, {"a": value})
    proxy.refuse()
    wait_until("the watch has noticed", lambda: bool(watch.error), TIMEOUT_S)
    session.delete(f"{etcd_prefix}/a")
    proxy.heal()
    expect(watch, {})
    session.put(f"{etcd_prefix}/b", b"3")
    expect(watch, {"b": b"3"})
    watch.close()
    session.put(f"{etcd_prefix}/b", b"4")
    assert values(watch.wait_loaded(TIMEOUT_S)) == {"b": b"3"}


def test_a_compacted_watch_reloads(session: EtcdSession, watcher: EtcdSession, proxy: TcpProxy, etcd_prefix: str) -> None:
    """If its last revision is compacted during a break, the watch loads the prefix again, deletions
    included.
    """
    session.put(f"{etcd_prefix}/a", b"1")
    session.put(f"{etcd_prefix}/b", b"1")
    watch = watcher.watch_prefix(f"{etcd_prefix}/")
    watch.wait_loaded(TIMEOUT_S)
    proxy.refuse()
    wait_until("the watch has noticed", lambda: bool(watch.error), TIMEOUT_S)
    session.put(f"{etcd_prefix}/a", b"2")
    session.delete(f"{etcd_prefix}/b")
    compact(session, session.put(f"{etcd_prefix}/c", b"3"))
    proxy.heal()
    expect(watch, {"a": b"2", "c": b"3"})
    session.put(f"{etcd_prefix}/a", b"4")
    expect(watch, {"a": b"4", "c": b"3"})


def test_a_silent_connection_is_given_up(session: EtcdSession, watcher: EtcdSession, proxy: TcpProxy, etcd_prefix: str) -> None:
    """A stream that is open but silent is detected, and the watch continues with a new connection."""
    watch = watcher.watch_prefix(f"{etcd_prefix}/", progress_interval_s=0.15)
    watch.wait_loaded(TIMEOUT_S)
    proxy.stall()
    wait_until("the silence was noticed", lambda: bool(watch.error), TIMEOUT_S)
    session.put(f"{etcd_prefix}/a", b"1")
    proxy.heal()
    expect(watch, {"a": b"1"})
    wait_until("etcd is heard again", lambda: watch.silence_s() < 0.5 and not watch.error, TIMEOUT_S)


def test_a_quiet_watch_hears_etcd(session: EtcdSession, etcd_prefix: str) -> None:
    """A prefix without changes is not mistaken for a dead connection."""
    watch = session.watch_prefix(f"{etcd_prefix}/", progress_interval_s=0.3)
    watch.wait_loaded(TIMEOUT_S)
    start = watch._watch_thread._heard_at
    wait_until("etcd was heard for two stall timeouts", lambda: watch._watch_thread._heard_at - start > 2.0, TIMEOUT_S)
    assert not watch.error


def test_a_watch_waits_for_etcd(etcd_prefix: str, etcd_server: EtcdServer, proxy: TcpProxy) -> None:
    """A watch that starts without etcd reports the reason, and has its state when etcd answers."""
    proxy.refuse()
    session = EtcdSession([proxy.endpoint], request_timeout_ms=300)
    watch = session.watch_prefix(etcd_prefix)
    wait_until("the watch says what is wrong", lambda: proxy.endpoint in watch.error, TIMEOUT_S)
    with pytest.raises(EtcdError, match=proxy.endpoint):
        watch.wait_loaded(0)
    proxy.heal()
    assert values(watch.wait_loaded(TIMEOUT_S)) == {}
    session.close()


def test_watches_on_one_stream_are_independent(
    session: EtcdSession, watcher: EtcdSession, proxy: TcpProxy, etcd_prefix: str
) -> None:
    """Each has the state of its own prefix and resumes from its own revision; one that was
    compacted away loads itself again.
    """
    session.put(f"{etcd_prefix}/a/1", b"1")
    calls: list[str] = []
    prefixes = {
        f"{etcd_prefix}/a/": lambda _state: calls.append("a"),
        f"{etcd_prefix}/b/": lambda _state: calls.append("b"),
    }
    first, second = watcher.watch_prefixes(prefixes, name="watch")
    assert (values(first.wait_loaded(TIMEOUT_S)), values(second.wait_loaded(TIMEOUT_S))) == ({"1": b"1"}, {})
    session.put(f"{etcd_prefix}/b/2", b"2")
    expect(second, {"2": b"2"})
    session.transact([], [Put(f"{etcd_prefix}/a/1", b"3"), Put(f"{etcd_prefix}/b/2", b"3")])
    expect(first, {"1": b"3"})
    expect(second, {"2": b"3"})
    wait_until("on_change was called for each change", lambda: sorted(calls) == ["a", "a", "b", "b", "b"], TIMEOUT_S)
    proxy.refuse()
    wait_until("both have noticed", lambda: bool(first.error and second.error), TIMEOUT_S)
    session.put(f"{etcd_prefix}/a/1", b"4")
    session.delete(f"{etcd_prefix}/a/1")
    compact(session, session.put(f"{etcd_prefix}/b/2", b"4"))
    proxy.heal()
    expect(first, {})
    expect(second, {"2": b"4"})
    wait_until("both are well", lambda: not first.error and not second.error, TIMEOUT_S)
    second.close()
    assert len(calls) >= 7
