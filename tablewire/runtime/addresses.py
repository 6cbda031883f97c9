"""Network addresses as text: `host:port`, with an IPv6 host in brackets."""

from __future__ import annotations


def parse_address(text: str) -> tuple[str, int]:
    """Return the host (without brackets) and the port of `host:port` or `[host]:port`.

    Raise ValueError unless both are present and the port is between 1 and 65535.
    """
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or "/" in host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise ValueError(f"{text!r} is not host:port")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
