"""Plug-ins: the factory that an installed distribution offers for the scheme of a source URI.

`owner.changefeed.sources` and `processor.service.executor_plugins` are its two users, each with its
own group of entry points. Any thread; reads the installed distributions at each call (a few
milliseconds), so that nothing here has to be invalidated.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tablewire.errors import OperatingError
from tablewire.runtime.uris import redact_uri

EXECUTORS = "tablewire.executors"
SOURCES = "tablewire.sources"


def find_factory(group: str, uri: str) -> Any:
    """What the entry point named by the scheme of `uri` loads to.

    OperatingError when the URI has no scheme, when no installed distribution serves it (naming those that are), when two do,
    or when the one that does cannot be imported.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator or not scheme:
        raise OperatingError(f"source {redact_uri(uri)!r} has no scheme, such as postgresql://")
    offered = entry_points(group=group)
    found = {entry.value: entry for entry in offered if entry.name == scheme.lower()}
    if not found:
        schemes = ", ".join(sorted(f"{entry.name}://" for entry in offered)) or "none at all"
        raise OperatingError(f"no plug-in of {group} serves {scheme}:// here; installed: {schemes}")
    if len(found) > 1:
        raise OperatingError(
            f"more than one plug-in of {group} serves {scheme}://: {', '.join(sorted(map(_describe, found.values())))}"
        )
    return _load(next(iter(found.values())))


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # the border to a user's code: importing it may raise anything
        raise OperatingError(f"plug-in {_describe(entry)} cannot be imported: {type(error).__name__}: {error}") from error


def _describe(entry: EntryPoint) -> str:
    return f"{entry.value} ({entry.dist.name} {entry.dist.version})" if entry.dist else entry.value
