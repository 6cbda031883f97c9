"""The executors of plug-ins: found by the entry point group `tablewire.executors`, named by the scheme of the source URI."""

from __future__ import annotations

from typing import cast

from tablewire.errors import OperatingError
from tablewire.executor import (
    ExecutorMeter,
    ExecutorRequest,
    MeteredTableExecutor,
    TableExecutor,
)
from tablewire.runtime.plugins import EXECUTORS, find_factory
from tablewire.runtime.uris import redact_uri


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
