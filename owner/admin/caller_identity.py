"""Who asked: the name that events and logs show for a call on the admin API.

With TLS it is the common name of the caller's certificate, else the address that the call came from. A call that another owner
passed on names whom that one saw, and that owner behind it ("alice via owner-2"): what a caller says of itself is never shown
without the name that was checked here.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import unquote

CALLER_KEY: Final = "tablewire-caller"
"""Metadata of a call that is passed on: whom the owner that passes it on saw."""
NAME_LENGTH_MAX: Final = 128


def caller_of(context: Any) -> str:
    """Of a call that is being served, as gRPC's context knows it."""
    names = [name.decode("utf-8", "replace") for name in context.auth_context().get("x509_common_name", ())]
    seen = _clean(", ".join(names)) or _host_of(context.peer())
    told = next((value for key, value in context.invocation_metadata() if key == CALLER_KEY), "")
    text = told if isinstance(told, str) else told.decode("ascii", "replace")
    return f"{_clean(unquote(text))} via {seen}" if text else seen


def _host_of(peer: str) -> str:
    """Of `ipv4:127.0.0.1:4711` or `ipv6:[::1]:4711`: the host. The port tells nobody anything."""
    kind, _, address = unquote(peer).partition(":")
    if kind in ("ipv4", "ipv6"):
        return _clean(address.rpartition(":")[0].strip("[]"))
    return _clean(kind)


def _clean(text: str) -> str:
    return "".join(character for character in text if character.isprintable())[:NAME_LENGTH_MAX].strip()
