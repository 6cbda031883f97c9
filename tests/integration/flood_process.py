"""Calls one method of a server as fast as it can: `python flood_process.py ADDRESS METHOD SECONDS [unary|stream]`; prints the
number of answers by status code as JSON."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from typing import Any

import grpc

UNDER_WAY_MAX = 500
CHANNELS = 4


def flood(address: str, method: str, seconds: float, streams: bool) -> Counter[str]:
    """Each channel has a connection of its own; UNDER_WAY_MAX calls are under way all the time."""
    counts: Counter[str] = Counter()
    places = threading.Semaphore(UNDER_WAY_MAX)
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
    channels = [grpc.insecure_channel(address, options=options) for _ in range(CHANNELS)]
    end = time.monotonic() + seconds

    def ended(call: Any) -> None:
        counts[call.code().name] += 1
        places.release()

    number = 0
    while time.monotonic() < end:
        places.acquire()
        number += 1
        channel = channels[number % CHANNELS]
        call = channel.unary_stream(method)(b"", timeout=10) if streams else channel.unary_unary(method).future(b"", timeout=10)
        call.add_done_callback(ended) if not streams else call.add_callback(lambda call=call: ended(call))
    for channel in channels:
        channel.close()
    return counts


if __name__ == "__main__":
    found = flood(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4:] == ["stream"])
    print(json.dumps(found))
