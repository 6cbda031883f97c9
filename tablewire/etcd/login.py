"""Authentication as an etcd user: a password becomes a token, which is sent with every request.

etcd drops tokens when they were unused for five minutes, when its users or roles change, and when a
member restarts. A request that is refused because of its token was not applied, so it is sent again
with a new one. As long as authentication is disabled at etcd, requests carry no token; the services
may therefore be given their user before authentication is enabled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

import structlog

from tablewire.errors import ConfigError, EtcdError
from tablewire.runtime.config import read_file
from tablewire.runtime.sections import EtcdSection

Metadata: TypeAlias = tuple[tuple[str, str], ...]
"""gRPC metadata of a request."""
NO_TOKEN: Metadata = ()

_NOT_ENABLED = "authentication is not enabled"
_TOKEN_REFUSALS = ("auth token", "revision of auth store is old", "user name is empty", "permission denied")

_log = structlog.get_logger("tablewire.etcd")


class Login:
    """The token of one user. password() is called for each login. Any thread."""

    def __init__(self, username: str, password: Callable[[], str]) -> None:
        self._username = username
        self._password = password
        self._lock = threading.Lock()
        self._token: Metadata | None = None

    def metadata(self, authenticate: Callable[[str, str], str]) -> Metadata:
        """Return the token; call authenticate(username, password) if there is none."""
        with self._lock:  # one login at a time: etcd makes a login expensive on purpose
            if self._token is None:
                try:
                    self._token = (("token", authenticate(self._username, self._password())),)
                except ConfigError as error:
                    raise EtcdError(str(error)) from error
                except EtcdError as error:
                    if _NOT_ENABLED not in str(error):
                        raise
                    _log.warning("etcd_asks_for_no_password", username=self._username)
                    self._token = NO_TOKEN
            return self._token

    def forget(self, refused: Metadata) -> None:
        """Drop the token of a request that was refused, unless there is a newer one."""
        with self._lock:
            if self._token == refused:
                self._token = None


def etcd_login(section: EtcdSection) -> Login | None:
    """Return the configured user, if any. Raise ConfigError if the password cannot be read."""
    if not section.username:
        return None

    def password() -> str:
        where = f"etcd.password_file: {section.password_file}"
        try:
            text = read_file(section.password_file, where).decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where} is not UTF-8 text") from error
        if not text:
            raise ConfigError(f"{where} is empty")
        return text

    password()
    if not section.tls.enabled:
        _log.warning(
            "etcd_password_in_plain_text", key="etcd.tls.enabled", reason="without TLS the password is sent in plain text"
        )
    return Login(section.username, password)


def is_token_refusal(text: str) -> bool:
    """Return whether a request that failed with this text may succeed with a new token."""
    return any(refusal in text for refusal in _TOKEN_REFUSALS)
