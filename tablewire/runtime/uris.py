"""URIs of sources and sinks: `${VAR}` is expanded at their use, passwords are never shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote

from tablewire.errors import ConfigError

HIDDEN = "***"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_AUTHORITY = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]{0,30}://)(?P<rest>[^\s?#\"'<>]*)")
_UNENCODED = re.compile(
    r"(?P<start>[A-Za-z][A-Za-z0-9+.\-]{0,30}://[^\s:/@?#\"'<>]{0,128}:)"
    r"(?!\d{1,5}(?:$|[\s\"'<>(),;/#]|\?[^@\s]*=))"  # a port
    r"(?P<password>[^\n@]{0,512}(?:@[^\s@]{0,512}(?=@)){0,9})@"
)
"""A password with characters that a URI cannot contain (a space, a quote, a question mark): it
extends to the next '@'. The bounds keep the time linear for any text."""
_SECRET_NAME = r"(?P<name>\b\w{0,64}?(?:password|passwd|secret|token)\w{0,64}[\"']?\s*[=:]\s*)"
_SECRET_PARAMETER = re.compile(rf"(?<=[?&]){_SECRET_NAME}(?P<value>[^\s&]+)", re.IGNORECASE)
_SECRET_FIELD = re.compile(
    rf"(?<![?&]){_SECRET_NAME}(?P<value>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|(?:\\.|\S)+)", re.IGNORECASE
)
_AROUND = "\"'<>(),.;:"
"""Punctuation around a URI in a text."""


def resolve_uri(text: str, environ: Mapping[str, str]) -> str:
    """Replace every `${VAR}` by the value of the variable; raise ConfigError if one is not set.

    In the user part and the query of a URI the value is percent-encoded, so that any password works
    unchanged; elsewhere (the whole URI, a host, a path) it is inserted literally. Values are not
    expanded again.
    """
    authority = text.find("://")
    path = _first(text, "/", authority + 3)
    user_end = text.rfind("@", 0, path) if authority >= 0 else -1
    query = _first(text, "?", 0)

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in environ:
            raise ConfigError(f"{redact_uri(text)}: environment variable {name} is not set")
        is_part = match.start() < user_end or match.start() > query
        return quote(environ[name], safe="") if is_part else environ[name]

    return _VARIABLE.sub(value, text)


def redact_uri(text: str) -> str:
    """Replace every password in URIs and `password=…` fields, except one written as `${VAR}`."""
    if "://" in text:
        text = _UNENCODED.sub(_hide_unencoded, _AUTHORITY.sub(_hide_user, text))
    return _SECRET_FIELD.sub(_hide_field, _SECRET_PARAMETER.sub(_hide_field, text))


def _hide_user(match: re.Match[str]) -> str:
    """Hide everything between the colon after the user and the last '@'.

    A '/' or '@' in a password should be percent-encoded; if it is not, the text must not leak
    either. Therefore the last '@' of all counts, even if that hides a host and a path.
    """
    scheme, rest = match.group("scheme"), match.group("rest")
    user, colon, tail = rest.partition(":")
    password, at, host = tail.rpartition("@")
    if not colon or not at or "/" in user or "@" in user:
        return match.group()
    return f"{scheme}{user}:{_hide(password)}@{host}"


def _hide_unencoded(match: re.Match[str]) -> str:
    return f"{match.group('start')}{_hide(match.group('password'))}@"


def _hide_field(match: re.Match[str]) -> str:
    return match.group("name") + _hide(match.group("value"))


def _hide(secret: str) -> str:
    bare = secret.strip(_AROUND)
    return secret if not secret or _VARIABLE.fullmatch(bare) else HIDDEN


def _first(text: str, what: str, start: int) -> int:
    found = text.find(what, start)
    return len(text) if found < 0 else found
