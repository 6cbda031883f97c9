"""A registered processor as a process of its own, for tests that stop it: it tries to have an effect every millisecond.

Prints "valid" or "fenced" whenever `is_valid` changes. Arguments: endpoint, cluster, capture id, TTL in seconds.
"""

from __future__ import annotations

import sys
import threading

from processor.service.registration import Registration
from tablewire.etcd.records import CaptureRecord, now
from tablewire.etcd.session import EtcdSession
from tablewire.runtime import logs

LOOK_INTERVAL_S = 0.001


def main() -> None:
    endpoint, cluster, capture_id, ttl_s = sys.argv[1:]
    logs.configure("json")
    session = EtcdSession([endpoint], request_timeout_ms=500)
    record = CaptureRecord(id=capture_id, address="127.0.0.1:1", started_at=now())
    registration = Registration(session, cluster, record, ttl_s=float(ttl_s), on_lost=lambda _reason: None)
    registration.start()
    said = ""
    never = threading.Event()
    while not never.wait(LOOK_INTERVAL_S):
        may = "valid" if registration.is_valid() else "fenced"
        if may != said:
            print(may, flush=True)
            said = may


if __name__ == "__main__":
    main()
