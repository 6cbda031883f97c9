"""URIs of sources and sinks: `${VAR}` is expanded when they are used, and passwords are hidden wherever they are shown."""

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
"""A password with characters that a URI cannot have (a space, a quote, a question mark): it ends at the next '@' all the same.
The bounds keep the time linear, whatever the text."""
_SECRET_NAME = r"(?P<name>\b\w{0,64}?(?:password|passwd|secret|token)\w{0,64}[\"']?\s*[=:]\s*)"
_SECRET_PARAMETER = re.compile(rf"(?<=[?&]){_SECRET_NAME}(?P<value>[^\s&]+)", re.IGNORECASE)
_SECRET_FIELD = re.compile(
    rf"(?<![?&]){_SECRET_NAME}(?P<value>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|(?:\\.|\S)+)", re.IGNORECASE
)
_AROUND = "\"'<>(),.;:"
"""What may stand round a URI in a text."""


def resolve_uri(text: str, environ: Mapping[str, str]) -> str:
    """The text with every `${VAR}` replaced by the variable's value; ConfigError when one is not set.

    A value within a URI's user part or query is percent-encoded, so that any password works as it is; elsewhere (the whole
    URI, a host, a path) it is taken literally. Values are not expanded again.
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
    """The text with every password in it hidden: in URIs anywhere in it, and in `password=…` fields. A password that is
    written as `${VAR}` is no secret and stays."""
    if "://" in text:
        text = _UNENCODED.sub(_hide_unencoded, _AUTHORITY.sub(_hide_user, text))
    return _SECRET_FIELD.sub(_hide_field, _SECRET_PARAMETER.sub(_hide_field, text))


def _hide_user(match: re.Match[str]) -> str:
    """Hides what stands between the user's colon and the last '@'. A raw '/' or '@' in a password is a mistake in a URI, and
    just then its text must not leak: so the last '@' of all counts, even where that hides a host and a path."""
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
