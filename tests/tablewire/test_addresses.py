"""host:port as text, with IPv6 hosts in brackets."""

from __future__ import annotations

import pytest

from tablewire.runtime.addresses import format_address, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port"), [("db-1:5432", "db-1", 5432), ("10.0.0.1:1", "10.0.0.1", 1), ("[::1]:65535", "::1", 65535)]
)
def test_an_address_is_parsed_and_formatted(text: str, host: str, port: int) -> None:
    """Parsing and formatting are inverse."""
    assert parse_address(text) == (host, port)
    assert format_address(host, port) == text


@pytest.mark.parametrize("text", ["", "h", ":1", "h:", "h:0", "h:65536", "h:-1", "h:1x", "h:\u0661", "http://h:1", "h:1/x"])
def test_other_texts_are_refused(text: str) -> None:
    """The error names the text."""
    with pytest.raises(ValueError, match="is not host:port"):
        parse_address(text)
