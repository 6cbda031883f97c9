"""Names of what a changefeed owns at its source. Pure.

The slot and the publication have the same name: `tablewire_<id>` for a plain id in the namespace
`default`, else `tablewire_<namespace>_<id>_h<digest>`, so that no two changefeeds share one. At most
63 bytes of [a-z0-9_].
"""

from __future__ import annotations

import hashlib
import re

from tablewire.model.ids import ChangefeedID

NAME_BYTES_MAX = 63
DEFAULT_NAMESPACE = "default"
_DIGEST_CHARS = 10
_PREFIX = "tablewire_"
_PLAIN = re.compile(r"[a-z0-9_]+\Z")
_STREAM_TOKEN = re.compile(r"_((?:shared|catchup)_[0-9a-f]{10})\Z")
_DIGEST_END = re.compile(rf"_h[0-9a-f]{{{_DIGEST_CHARS}}}\Z")


def slot_name(changefeed: ChangefeedID) -> str:
    """Return the name of the changefeed's permanent slot and of its publication."""
    plain = _PREFIX + changefeed.id
    if (
        changefeed.namespace == DEFAULT_NAMESPACE
        and _PLAIN.match(changefeed.id)
        and not _DIGEST_END.search(changefeed.id)  # otherwise an id could spell another changefeed's digest
        and len(plain) <= NAME_BYTES_MAX
    ):
        return plain
    digest = hashlib.sha256(f"{changefeed.namespace}\0{changefeed.id}".encode()).hexdigest()[:_DIGEST_CHARS]
    readable = re.sub(r"[^a-z0-9]+", "_", f"{changefeed.namespace}_{changefeed.id}".lower()).strip("_")
    end = f"_h{digest}"
    return _PREFIX + readable[: NAME_BYTES_MAX - len(_PREFIX) - len(end)] + end


def temporary_slot_name(changefeed: ChangefeedID, token: str) -> str:
    """Return the name of a temporary slot. token: unique at the server, at most 24 characters of [a-z0-9_]."""
    return slot_name(changefeed)[: NAME_BYTES_MAX - len(token) - 1] + "_" + token


def is_stream_slot(changefeed: ChangefeedID, name: str) -> bool:
    """Return whether this is the name of a temporary slot from which a processor reads changes of the changefeed."""
    found = _STREAM_TOKEN.search(name)
    return found is not None and temporary_slot_name(changefeed, found[1]) == name
