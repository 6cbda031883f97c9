"""The changefeeds in a real etcd: guarded writes, and a distinct error for each reason why one
fails."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from deploy.local.etcd import EtcdServer
from owner.changefeed.store import ChangefeedEvent, ChangefeedRefusedError, EtcdChangefeeds
from owner.leadership.election import Election
from tablewire.errors import ConflictError, NotLeaderError, UnknownChangefeedError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd import records as registry
from tablewire.etcd.records import ChangefeedInfo, ChangefeedState, ChangefeedStatus, decode
from tablewire.etcd.session import EtcdSession
from tablewire.model.ids import ChangefeedID

pytestmark = pytest.mark.integration

ONE = ChangefeedID("default", "one")
INFO = ChangefeedInfo(id="one", source_uri="x://a", sink_uri="y://b", tables=["*"], created_at=registry.now())


@pytest.fixture
def cluster(etcd_prefix: str) -> str:
    return "registry" + etcd_prefix.replace("/", "-")


@pytest.fixture
def session(etcd_server: EtcdServer) -> Iterator[EtcdSession]:
    session = EtcdSession([etcd_server.endpoint])
    yield session
    session.close()


@pytest.fixture
def election(session: EtcdSession, cluster: str) -> Iterator[Election]:
    election = Election(session, cluster, "owner-1", "127.0.0.1:1", ttl_s=5)
    election.start(10.0)
    assert election.wait_for_leadership(10.0) is not None
    yield election
    election.close()


@pytest.fixture
def changefeeds(session: EtcdSession, cluster: str, election: Election) -> EtcdChangefeeds:
    return EtcdChangefeeds(session, cluster, election.guarded_write)


def test_a_life(changefeeds: EtcdChangefeeds) -> None:
    """A changefeed is created, paused, resumed at a higher epoch, removed and deleted."""
    changefeeds.create(INFO)
    created = changefeeds.get(ONE)
    assert created.state is ChangefeedState.NORMAL
    assert [info.changefeed for info in changefeeds.list()] == [ONE]
    changefeeds.apply(ONE, ChangefeedEvent.PAUSE)
    assert changefeeds.get(ONE).state is ChangefeedState.STOPPED
    changefeeds.apply(ONE, ChangefeedEvent.RESUME)
    resumed = changefeeds.get(ONE)
    assert resumed.state is ChangefeedState.NORMAL
    assert resumed.epoch > created.epoch
    changefeeds.apply(ONE, ChangefeedEvent.REMOVE)
    assert changefeeds.get(ONE).state is ChangefeedState.REMOVED
    changefeeds.forget(ONE, resumed.epoch)
    assert changefeeds.list() == []
    changefeeds.create(INFO)
    assert changefeeds.get(ONE).epoch > resumed.epoch


def test_an_id_that_exists_is_refused(changefeeds: EtcdChangefeeds) -> None:
    """The error names the changefeed, and the existing one stays."""
    changefeeds.create(INFO)
    with pytest.raises(ConflictError, match="default/one exists already; nothing was changed"):
        changefeeds.create(msgspec.structs.replace(INFO, source_uri="z://c"))
    assert changefeeds.get(ONE).source_uri == "x://a"


def test_what_is_not_there_and_what_is_not_allowed(changefeeds: EtcdChangefeeds) -> None:
    """An unknown changefeed and a refused event are different errors."""
    with pytest.raises(UnknownChangefeedError, match="no changefeed default/one"):
        changefeeds.apply(ONE, ChangefeedEvent.PAUSE)
    changefeeds.create(INFO)
    with pytest.raises(ChangefeedRefusedError, match="running already"):
        changefeeds.apply(ONE, ChangefeedEvent.RESUME)


def test_a_follower_writes_nothing(changefeeds: EtcdChangefeeds, election: Election) -> None:
    """Every write is guarded by the leader key."""
    changefeeds.create(INFO)
    election.close()
    with pytest.raises(NotLeaderError):
        changefeeds.apply(ONE, ChangefeedEvent.PAUSE)
    assert changefeeds.get(ONE).state is ChangefeedState.NORMAL


def test_the_start_is_stored_once_and_for_its_own_epoch(changefeeds: EtcdChangefeeds) -> None:
    """Neither a later start nor the start of an earlier run changes it."""
    changefeeds.create(INFO)
    epoch = changefeeds.get(ONE).epoch
    assert changefeeds.set_start(ONE, epoch - 1, 50).start_ts == 0
    assert changefeeds.set_start(ONE, epoch, 100).start_ts == 100
    assert changefeeds.set_start(ONE, epoch, 200).start_ts == 100


def test_an_event_of_a_former_run_changes_nothing(changefeeds: EtcdChangefeeds) -> None:
    """A failure of an earlier run does not change a changefeed that was restarted."""
    changefeeds.create(INFO)
    epoch = changefeeds.get(ONE).epoch
    changefeeds.apply(ONE, ChangefeedEvent.FATAL, error="late", epoch=epoch - 1)
    assert changefeeds.get(ONE).state is ChangefeedState.NORMAL
    changefeeds.apply(ONE, ChangefeedEvent.FATAL, error="lost", epoch=epoch)
    assert (changefeeds.get(ONE).state, changefeeds.get(ONE).error) == (ChangefeedState.FAILED, "lost")


def test_a_status_never_outlives_its_changefeed(changefeeds: EtcdChangefeeds, session: EtcdSession, cluster: str) -> None:
    """A status is written only with its record unchanged, and deleted with it."""
    changefeeds.create(INFO)
    revision = _revision(session, cluster)
    changefeeds.set_status(ONE, ChangefeedStatus(checkpoint_ts=5, resolved_ts=6), revision)
    key = etcd_keys.changefeed_status_key(cluster, ONE)
    found = session.get(key)
    assert found is not None
    assert decode(ChangefeedStatus, key, found.value) == ChangefeedStatus(checkpoint_ts=5, resolved_ts=6)
    changefeeds.apply(ONE, ChangefeedEvent.REMOVE)
    with pytest.raises(ConflictError):
        changefeeds.set_status(ONE, ChangefeedStatus(checkpoint_ts=7, resolved_ts=7), revision)
    changefeeds.forget(ONE, changefeeds.get(ONE).epoch)
    assert session.get(key) is None


def test_only_a_removed_changefeed_is_forgotten(changefeeds: EtcdChangefeeds) -> None:
    """Only the removed changefeed with this epoch is deleted."""
    changefeeds.create(INFO)
    with pytest.raises(ConflictError, match="not the one that was removed"):
        changefeeds.forget(ONE, changefeeds.get(ONE).epoch)
    changefeeds.apply(ONE, ChangefeedEvent.REMOVE)
    with pytest.raises(ConflictError, match="not the one that was removed"):
        changefeeds.forget(ONE, changefeeds.get(ONE).epoch - 1)
    assert changefeeds.get(ONE).state is ChangefeedState.REMOVED


def test_an_unreadable_record_hides_no_other(changefeeds: EtcdChangefeeds, session: EtcdSession, cluster: str) -> None:
    """An unreadable changefeed is left out of the list, and the error of `get` names it."""
    changefeeds.create(INFO)
    broken = ChangefeedID("default", "broken")
    session.put(etcd_keys.changefeed_info_key(cluster, broken), b"not json")
    assert [info.changefeed for info in changefeeds.list()] == [ONE]
    with pytest.raises(Exception, match="changefeeds/default/broken/info: unreadable"):
        changefeeds.get(broken)


def _revision(session: EtcdSession, cluster: str) -> int:
    found = session.get(etcd_keys.changefeed_info_key(cluster, ONE))
    assert found is not None
    return found.mod_revision
