"""Source plug-ins: entry points of the group `tablewire.sources`, named by the scheme of the source
URI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import cast

from tablewire.errors import OperatingError
from tablewire.etcd.records import ChangefeedInfo
from tablewire.runtime.plugins import SOURCES, find_factory
from tablewire.runtime.uris import redact_uri, resolve_uri
from tablewire.source import Source, SourceRequest


def source_request(info: ChangefeedInfo, environ: Mapping[str, str] = os.environ) -> SourceRequest:
    """Return the request for this changefeed's source, with `${VAR}` in its URIs expanded;
    ConfigError if one is not set."""
    return SourceRequest(
        changefeed=info.changefeed,
        source_uri=resolve_uri(info.source_uri, environ),
        sink_uri=resolve_uri(info.sink_uri, environ),
        tables=tuple(info.tables),
        start_ts=info.start_ts,
        initial_snapshot=info.initial_snapshot,
        options=dict(info.options),
    )


def new_source(request: SourceRequest) -> Source:
    """Return the plug-in's Source for this request, without I/O.

    OperatingError: no plug-in has the scheme, or the plug-in's factory failed.
    """
    factory = find_factory(SOURCES, request.source_uri)
    try:
        return cast(Source, factory(request))
    except OperatingError:
        raise
    except Exception as error:
        text = redact_uri(f"{type(error).__name__}: {error}")
        raise OperatingError(f"the source plug-in for {redact_uri(request.source_uri)} failed: {text}") from error
