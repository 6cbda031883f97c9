"""A candidate as a process of its own, for tests that kill or stop it.

Says "leads <revision>" or "follows" whenever that changes. Arguments: endpoint, cluster, owner id, TTL in seconds. Looks every
millisecond, so that what it says after a pause is what it thinks right then.
"""

from __future__ import annotations

import sys
import threading

from owner.leadership.election import Election
from tablewire.etcd.session import EtcdSession
from tablewire.runtime import logs

LOOK_INTERVAL_S = 0.001


def main() -> None:
    endpoint, cluster, owner_id, ttl_s = sys.argv[1:]
    logs.configure("json")
    session = EtcdSession([endpoint], request_timeout_ms=500)
    election = Election(session, cluster, owner_id, f"{owner_id}:1", ttl_s=float(ttl_s))
    election.start(10)
    said = ""
    never = threading.Event()
    while not never.wait(LOOK_INTERVAL_S):
        leadership = election.leadership()
        now = f"leads {leadership.revision}" if leadership is not None else "follows"
        if now != said:
            print(now, flush=True)
            said = now


if __name__ == "__main__":
    main()
