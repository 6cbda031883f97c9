"""Plug-ins: the factory that an installed distribution offers for a scheme. Any thread.

The installed distributions are read at each call, which takes a few milliseconds.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tablewire.errors import OperatingError
from tablewire.runtime.uris import redact_uri

EXECUTORS = "tablewire.executors"
SOURCES = "tablewire.sources"
ALIASES = {"postgres": "postgresql"}
"""Schemes that mean the same; libpq accepts both."""


def find_factory(group: str, uri: str) -> Any:
    """Return the object of the entry point that is named after the scheme of `uri`.

    Raise OperatingError if the URI has no scheme, if no distribution or more than one serves it, or
    if it cannot be imported.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator or not scheme:
        raise OperatingError(f"source {redact_uri(uri)!r} has no scheme, such as postgresql://")
    offered = entry_points(group=group)
    name = ALIASES.get(scheme.lower(), scheme.lower())
    found = {entry.value: entry for entry in offered if entry.name == name}
    if not found:
        schemes = ", ".join(sorted(f"{entry.name}://" for entry in offered)) or "none"
        raise OperatingError(f"no plug-in of {group} serves {scheme}:// here; installed: {schemes}")
    if len(found) > 1:
        described = ", ".join(sorted(map(_describe, found.values())))
        raise OperatingError(f"more than one plug-in of {group} serves {scheme}://: {described}")
    return _load(next(iter(found.values())))


def make(group: str, uri: str, request: object) -> Any:
    """Return what the plug-in for `uri` makes of the request. May block.

    Raise OperatingError as `find_factory` does, or if the plug-in's factory fails.
    """
    factory = find_factory(group, uri)
    try:
        return factory(request)
    except OperatingError:
        raise
    except Exception as error:
        text = redact_uri(f"{type(error).__name__}: {error}")
        raise OperatingError(f"the plug-in of {group} for {redact_uri(uri)} failed: {text}") from error


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # the import of a user's module may raise anything
        raise OperatingError(f"plug-in {_describe(entry)} cannot be imported: {type(error).__name__}: {error}") from error


def _describe(entry: EntryPoint) -> str:
    return f"{entry.value} ({entry.dist.name} {entry.dist.version})" if entry.dist else entry.value
