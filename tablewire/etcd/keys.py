"""The keys of a cluster in etcd. No other module spells a path. Pure; any thread.

    /tablewire/<cluster>/owner/<lease>                 LeaderRecord, leased; the lowest create revision leads
    /tablewire/<cluster>/captures/<capture_id>         CaptureRecord, leased
    /tablewire/<cluster>/changefeeds/<ns>/<id>/info    ChangefeedInfo
    /tablewire/<cluster>/changefeeds/<ns>/<id>/status  ChangefeedStatus
    /tablewire/<cluster>/drains/<capture_id>           DrainRecord
    /tablewire/<cluster>/evicted/<capture_id>          EvictionRecord, until the capture must have stopped
    /tablewire/<cluster>/events/<sequence>             EventRecord, a bounded number

A `..._key` function checks the names that it is given, so that a name from a command line cannot
reach another key. A `..._of` function returns what a key belongs to, None for a key of another
kind.
"""

from __future__ import annotations

import re
from enum import StrEnum

from tablewire.errors import OperatingError
from tablewire.model.ids import CaptureID, ChangefeedID

ROOT = "/tablewire"
NAME_LENGTH_MAX = 128
EVENT_SEQUENCE_DIGITS = 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ChangefeedKey(StrEnum):
    """The last path element of a changefeed's keys."""

    INFO = "info"
    STATUS = "status"


def check_name(what: str, name: str) -> str:
    """Return the name; raise OperatingError, naming `what`, if it cannot be one element of a key."""
    if not _NAME.fullmatch(name) or len(name) > NAME_LENGTH_MAX:
        raise OperatingError(
            f"{what} {name!r} is not a valid name: letters, digits, '.', '_' and '-', starting with a letter or digit, "
            f"at most {NAME_LENGTH_MAX} characters"
        )
    return name


def cluster_prefix(cluster: str) -> str:
    return f"{ROOT}/{check_name('cluster', cluster)}/"


def owner_prefix(cluster: str) -> str:
    return f"{cluster_prefix(cluster)}owner/"


def owner_key(cluster: str, lease_id: int) -> str:
    """Return the key of a candidate, which with a new lease is a new candidate."""
    return f"{owner_prefix(cluster)}{lease_id:016x}"


def captures_prefix(cluster: str) -> str:
    return f"{cluster_prefix(cluster)}captures/"


def capture_key(cluster: str, capture_id: CaptureID) -> str:
    return captures_prefix(cluster) + check_name("capture", capture_id)


def changefeeds_prefix(cluster: str) -> str:
    return f"{cluster_prefix(cluster)}changefeeds/"


def changefeed_prefix(cluster: str, changefeed: ChangefeedID) -> str:
    """Return the prefix of both keys of one changefeed."""
    namespace = check_name("namespace", changefeed.namespace)
    return f"{changefeeds_prefix(cluster)}{namespace}/{check_name('changefeed', changefeed.id)}/"


def changefeed_info_key(cluster: str, changefeed: ChangefeedID) -> str:
    return changefeed_prefix(cluster, changefeed) + ChangefeedKey.INFO


def changefeed_status_key(cluster: str, changefeed: ChangefeedID) -> str:
    return changefeed_prefix(cluster, changefeed) + ChangefeedKey.STATUS


def changefeed_of(cluster: str, key: str) -> tuple[ChangefeedID, ChangefeedKey] | None:
    prefix = changefeeds_prefix(cluster)
    parts = key.removeprefix(prefix).split("/")
    if not key.startswith(prefix) or len(parts) != 3 or parts[2] not in tuple(ChangefeedKey):
        return None
    return ChangefeedID(parts[0], parts[1]), ChangefeedKey(parts[2])


def drains_prefix(cluster: str) -> str:
    return f"{cluster_prefix(cluster)}drains/"


def drain_key(cluster: str, capture_id: CaptureID) -> str:
    return drains_prefix(cluster) + check_name("capture", capture_id)


def drain_of(cluster: str, key: str) -> CaptureID | None:
    return _last_element(drains_prefix(cluster), key)


def evicted_prefix(cluster: str) -> str:
    return f"{cluster_prefix(cluster)}evicted/"


def evicted_key(cluster: str, capture_id: CaptureID) -> str:
    return evicted_prefix(cluster) + check_name("capture", capture_id)


def evicted_of(cluster: str, key: str) -> CaptureID | None:
    return _last_element(evicted_prefix(cluster), key)


def events_prefix(cluster: str) -> str:
    return f"{cluster_prefix(cluster)}events/"


def event_key(cluster: str, sequence: int) -> str:
    """Return the key of an event; leading zeros keep the keys in the order of their numbers."""
    return f"{events_prefix(cluster)}{sequence:0{EVENT_SEQUENCE_DIGITS}d}"


def event_sequence_of(cluster: str, key: str) -> int | None:
    element = _last_element(events_prefix(cluster), key) or ""
    return int(element) if element.isascii() and element.isdigit() else None


def _last_element(prefix: str, key: str) -> str | None:
    element = key.removeprefix(prefix)
    return element if key.startswith(prefix) and element and "/" not in element else None
