"""The ways in which an operation refuses a request. `owner.admin.grpc_service` maps each to a gRPC status code."""

from __future__ import annotations

from tablewire.errors import OperatingError


class InvalidRequestError(OperatingError):
    """The request can never succeed, whatever the state of the cluster."""


class UnknownTableError(OperatingError, LookupError):
    """The changefeed has no table with this name or id."""


class AlreadyExistsError(OperatingError):
    """A changefeed with this id exists."""


class RefusedError(OperatingError):
    """The state of the cluster does not allow the operation; nothing was changed."""
