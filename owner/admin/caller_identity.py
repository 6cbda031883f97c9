"""The name of the caller that events and logs show for a call on the admin API.

With TLS it is the common name of the caller's certificate, otherwise the address that the call came
from. For a forwarded call it is the name that the forwarding owner saw, with that owner behind it
("alice via owner-2"): the name that a caller claims is never shown without the name that was
checked here.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import unquote

from tablewire.runtime.addresses import parse_address

CALLER_KEY: Final = "tablewire-caller"
"""Metadata of a forwarded call: the name of its caller."""
NAME_LENGTH_MAX: Final = 128


def caller_of(context: Any) -> str:
    """Return the name of the caller, from the gRPC context of a call."""
    names = [name.decode("utf-8", "replace") for name in context.auth_context().get("x509_common_name", ())]
    seen = _clean(", ".join(names)) or _host_of(context.peer())
    claimed = next((value for key, value in context.invocation_metadata() if key == CALLER_KEY), "")
    text = claimed if isinstance(claimed, str) else claimed.decode("ascii", "replace")
    return f"{_clean(unquote(text))} via {seen}" if text else seen


def _host_of(peer: str) -> str:
    """Return the host of `ipv4:127.0.0.1:4711` or `ipv6:[::1]:4711`; the port is of no use."""
    kind, _, address = unquote(peer).partition(":")
    return _clean(parse_address(address)[0] if kind in ("ipv4", "ipv6") else kind)


def _clean(text: str) -> str:
    return "".join(character for character in text if character.isprintable())[:NAME_LENGTH_MAX].strip()
