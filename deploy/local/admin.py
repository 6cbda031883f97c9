"""Read the admin API of a cluster in this process, for views and for waiting on conditions.

A view that refreshes twice a second cannot afford a CLI process for each call. Results are the
JSON objects of `owner ... -o json` (docs/cli.md). Only reads are offered here; changes to a
cluster go through the CLI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import grpc

from owner.cli.client import AdminClient
from owner.cli.json_objects import to_object, to_objects
from owner.cli.output import CommandError

READ_TIMEOUT_S = 3.0
_OPTIONS = (("grpc.enable_http_proxy", 0),)

Json: TypeAlias = dict[str, Any]


class AdminError(Exception):
    """No owner answered, or the owner refused."""


class Admin:
    """A reader for one thread. Close it after use."""

    def __init__(self, endpoints: Sequence[str], *, timeout_s: float = READ_TIMEOUT_S) -> None:
        self._client = AdminClient(endpoints, lambda endpoint: grpc.insecure_channel(endpoint, options=_OPTIONS))
        self._timeout_s = timeout_s

    def close(self) -> None:
        self._client.close()

    def status(self) -> Json:
        return to_object(self._call("GetStatus"))

    def captures(self) -> list[Json]:
        return to_objects(self._call("ListCaptures").captures)

    def changefeeds(self) -> list[Json]:
        return to_objects(self._call("ListChangefeeds").changefeeds)

    def changefeed(self, changefeed: str = "") -> Json:
        return to_object(self._call("QueryChangefeed", changefeed=changefeed))

    def tables(self, changefeed: str = "") -> list[Json]:
        try:
            chunks = self._client.stream("ListTables", self._timeout_s, changefeed=changefeed)
            return to_objects(row for chunk in chunks for row in chunk.tables)
        except CommandError as error:
            self._client.close()
            raise AdminError(error.message) from None

    def _call(self, method: str, **fields: Any) -> Any:
        try:
            return self._client.call(method, self._timeout_s, **fields)
        except CommandError as error:
            self._client.close()  # the next call finds another owner: this one may hang
            raise AdminError(error.message) from None
