"""Source plug-ins: entry points of the group `tablewire.sources`, named by the scheme of the source
URI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import cast

from tablewire.etcd.records import ChangefeedInfo
from tablewire.model.ids import Ts
from tablewire.runtime.plugins import SOURCES, make
from tablewire.runtime.uris import resolve_uri
from tablewire.source import Source, SourceRequest


def source_request(info: ChangefeedInfo, checkpoint_ts: Ts = 0, environ: Mapping[str, str] = os.environ) -> SourceRequest:
    """Return the request for this changefeed's source, with `${VAR}` in its URIs expanded;
    ConfigError if one is not set. checkpoint_ts: as stored."""
    return SourceRequest(
        changefeed=info.changefeed,
        source_uri=resolve_uri(info.source_uri, environ),
        sink_uri=resolve_uri(info.sink_uri, environ),
        tables=tuple(info.tables),
        start_ts=info.start_ts,
        checkpoint_ts=checkpoint_ts,
        initial_snapshot=info.initial_snapshot,
        options=dict(info.options),
    )


def new_source(request: SourceRequest) -> Source:
    """Return the plug-in's Source for this request, without I/O. OperatingError: see `plugins.make`."""
    return cast(Source, make(SOURCES, request.source_uri, request))
