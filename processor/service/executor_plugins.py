"""The executors of plug-ins: found by the entry point group `tablewire.executors`, named by the scheme of the source URI."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import cast

from tablewire.errors import OperatingError
from tablewire.etcd.records import ChangefeedInfo
from tablewire.executor import (
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
    """Return the request for a changefeed's executor, with `${VAR}` in its URIs expanded. ConfigError when one is not set."""
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
    """Return the plug-in's executor for this request. May block (it may connect): never on the agents' thread.

    OperatingError if no plug-in serves the scheme or its factory fails.
    """
    factory = find_factory(EXECUTORS, request.source_uri)
    try:
        return cast(TableExecutor, factory(request))
    except OperatingError:
        raise
    except Exception as error:
        text = redact_uri(f"{type(error).__name__}: {error}")
        raise OperatingError(f"the executor plug-in for {redact_uri(request.source_uri)} failed: {text}") from error


def meter_of(executor: TableExecutor) -> ExecutorMeter | None:
    """Return the figures of an executor; None if it has none, or fails to return them."""
    if not isinstance(executor, MeteredTableExecutor):
        return None
    try:
        return executor.meter()
    except Exception:  # noqa: BLE001 - the border to a user's code: missing figures are no reason to stop
        return None
