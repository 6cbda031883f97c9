"""Executors by entry points: the group `tablewire.executors`, named by the scheme of the source URI."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import cast

from tablewire.errors import OperatingError
from tablewire.etcd.records import ChangefeedInfo
from tablewire.executor import (
    ClosableTableExecutor,
    ExecutorMeter,
    ExecutorRequest,
    MeteredTableExecutor,
    TableExecutor,
)
from tablewire.model.ids import CaptureID
from tablewire.runtime.plugins import EXECUTORS, find_factory
from tablewire.runtime.uris import redact_uri, resolve_uri


def executor_request(
    info: ChangefeedInfo,
    *,
    capture_id: CaptureID,
    wake: Callable[[], None],
    may_write: Callable[[], bool],
    environ: Mapping[str, str] = os.environ,
) -> ExecutorRequest:
    """The request for this changefeed's executor, its URIs with `${VAR}` expanded; ConfigError when a variable is not set."""
    return ExecutorRequest(
        capture_id=capture_id,
        changefeed=info.changefeed,
        changefeed_epoch=info.epoch,
        source_uri=resolve_uri(info.source_uri, environ),
        sink_uri=resolve_uri(info.sink_uri, environ),
        tables=tuple(info.tables),
        start_ts=info.start_ts,
        initial_snapshot=info.initial_snapshot,
        options=dict(info.options),
        wake=wake,
        may_write=may_write,
    )


def new_executor(request: ExecutorRequest) -> TableExecutor:
    """The plug-in's executor for this request. May block (it may connect): never on the agents' thread.

    OperatingError when no plug-in serves the scheme or the plug-in's factory fails.
    """
    factory = find_factory(EXECUTORS, request.source_uri)
    try:
        return cast(TableExecutor, factory(request))
    except OperatingError:
        raise
    except Exception as error:
        text = redact_uri(f"{type(error).__name__}: {error}")
        raise OperatingError(f"the executor plug-in for {redact_uri(request.source_uri)} failed: {text}") from error


def close_executor(executor: TableExecutor) -> str:
    """Closes an executor that can be closed, and waits until no write can follow. May block: never on the agents' thread.
    The text of what its close raised, empty when it did not."""
    if not isinstance(executor, ClosableTableExecutor):
        return ""
    try:
        executor.close()
    except Exception as error:  # noqa: BLE001 - the border to a user's code
        return redact_uri(f"{type(error).__name__}: {error}")
    return ""


def meter_of(executor: TableExecutor) -> ExecutorMeter | None:
    """None: it has no figures, or cannot tell them now."""
    if not isinstance(executor, MeteredTableExecutor):
        return None
    try:
        return executor.meter()
    except Exception:  # noqa: BLE001 - the border to a user's executor: what it cannot count is no reason to stop it
        return None
