"""An etcd that lost its data and was recreated: its revisions start again, and nothing of the
former one is used.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deploy.local.etcd import EtcdServer
from deploy.local.process import wait_until
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import Put

pytestmark = pytest.mark.integration

TIMEOUT_S = 20.0
FORMER_WRITES = 30


def test_a_watch_forgets_the_keys_of_another_etcd(tmp_path: Path) -> None:
    """After etcd lost its data, a watch has the keys of the new etcd and no others."""
    server = EtcdServer(tmp_path)
    server.start()
    session = EtcdSession([server.endpoint], request_timeout_ms=1_000)
    try:
        watch = session.watch_prefix("/replaced/", None)
        session.transact([], [Put("/replaced/former", b"1")])
        for number in range(FORMER_WRITES):
            session.transact([], [Put("/elsewhere", b"%d" % number)])
        # The progress responses, one every second, contain the revisions of writes elsewhere too.
        wait_until("the watch has heard", lambda: watch._watch_thread._seen_revision > FORMER_WRITES, TIMEOUT_S)
        server.kill()
        shutil.rmtree(tmp_path / server.name / "data")
        server.start()
        fresh = EtcdSession([server.endpoint])  # the former one may still hold a connection that has just broken
        fresh.transact([], [Put("/replaced/new", b"1")])
        fresh.close()
        state = watch.wait_until(lambda state: "/replaced/former" not in state.entries, TIMEOUT_S)
        state = watch.wait_until(lambda state: "/replaced/new" in state.entries, TIMEOUT_S)
        assert list(state.entries) == ["/replaced/new"]
        assert state.revision < FORMER_WRITES
    finally:
        session.close()
        server.kill()
