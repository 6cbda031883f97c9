"""A user of etcd: its password becomes a token, and the token goes with every call until etcd does not know it any more.

etcd forgets tokens: they expire when unused (five minutes), with every change of its users and roles, and when a member restarts.
A call that is refused for its token was not applied, so it is made again with a new one. While authentication is not enabled at
etcd there is no token, and calls go without one: the services may be told their user first, and etcd be told to ask for it then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

import structlog

from tablewire.errors import ConfigError, EtcdError

Metadata: TypeAlias = tuple[tuple[str, str], ...]
"""What goes with a call."""

TOKEN_KEY = "token"
NO_TOKEN: Metadata = ()

_NOT_ENABLED = "authentication is not enabled"
_REFUSALS = ("invalid auth token", "revision of auth store is old", "user name is empty", "permission denied", "auth token")

_log = structlog.get_logger("tablewire.etcd")


class Login:
    """password is asked for at every login, so that a changed one is used without a restart. Any thread."""

    def __init__(self, username: str, password: Callable[[], str]) -> None:
        self._username = username
        self._password = password
        self._lock = threading.Lock()
        self._token: Metadata | None = None

    def metadata(self, authenticate: Callable[[str, str], str]) -> Metadata:
        """With the token of now; authenticate(username, password) is called when there is none. EtcdError: etcd refused."""
        with self._lock:  # one login at a time: etcd makes it expensive on purpose
            if self._token is None:
                try:
                    self._token = ((TOKEN_KEY, authenticate(self._username, self._password())),)
                except ConfigError as error:
                    raise EtcdError(str(error)) from error
                except EtcdError as error:
                    if _NOT_ENABLED not in str(error):
                        raise
                    _log.warning("etcd_asks_for_no_password", username=self._username)
                    self._token = NO_TOKEN
            return self._token

    def forget(self, used: Metadata) -> None:
        """What went with a call that was refused; a newer token stays."""
        with self._lock:
            if self._token == used:
                self._token = None


def is_refused_token(text: str) -> bool:
    """Whether etcd's refusal may be over once there is a new token."""
    return any(refusal in text for refusal in _REFUSALS)
