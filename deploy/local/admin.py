"""Read the admin API of a cluster in this process, for views and for waiting on conditions.

Starting the CLI for each reading would cost too much CPU. The answers are the same JSON objects as those of `owner ... -o json`
(docs/cli.md). Only reads are offered; changes go through the CLI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import grpc

from owner.cli.client import AdminClient, CallError
from owner.cli.json_objects import to_object, to_objects
from tablewire.v1 import admin_pb2 as pb

READ_TIMEOUT_S = 3.0
_OPTIONS = (("grpc.enable_http_proxy", 0),)

Json: TypeAlias = dict[str, Any]


class AdminError(Exception):
    """No owner is reachable, or the request was refused."""


class Admin:
    """A client for one thread, to be closed."""

    def __init__(self, endpoints: Sequence[str], *, timeout_s: float = READ_TIMEOUT_S) -> None:
        self._client = AdminClient(endpoints, lambda endpoint: grpc.insecure_channel(endpoint, options=_OPTIONS))
        self._timeout_s = timeout_s

    def close(self) -> None:
        self._client.close()

    def status(self) -> Json:
        return to_object(self._call("GetStatus", pb.GetStatusRequest()))

    def captures(self) -> list[Json]:
        return to_objects(self._call("ListCaptures", pb.ListCapturesRequest()).captures)

    def changefeeds(self) -> list[Json]:
        return to_objects(self._call("ListChangefeeds", pb.ListChangefeedsRequest()).changefeeds)

    def changefeed(self, changefeed: str = "") -> Json:
        return to_object(self._call("QueryChangefeed", pb.ChangefeedRequest(changefeed=changefeed)))

    def tables(self, changefeed: str = "") -> list[Json]:
        try:
            chunks = self._client.stream("ListTables", pb.ListTablesRequest(changefeed=changefeed), self._timeout_s, reads=True)
            return [to_object(row) for chunk in chunks for row in chunk.tables]
        except CallError as error:
            self._client.close()
            raise AdminError(error.text) from None

    def _call(self, method: str, request: Any) -> Any:
        try:
            return self._client.call(method, request, self._timeout_s, reads=True)
        except CallError as error:
            self._client.close()  # this owner may hang: the next call tries another one
            raise AdminError(error.text) from None
