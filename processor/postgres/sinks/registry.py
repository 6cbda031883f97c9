"""Sinks by the scheme of their URI."""

from __future__ import annotations

from processor.postgres.sinks import Sink, SinkContext
from processor.postgres.sinks.blackhole import BlackholeSink
from processor.postgres.sinks.files import FilesSink
from processor.postgres.sinks.postgres_sink import PostgresSink
from processor.postgres.source_catalogue import SourceCatalogue
from tablewire.errors import OperatingError
from tablewire.postgres.connections import SCHEMES
from tablewire.postgres.options import PostgresOptions
from tablewire.runtime.uris import redact_uri


def new_sink(uri: str, context: SinkContext, catalogue: SourceCatalogue, options: PostgresOptions) -> Sink:
    """No I/O; OperatingError for a URI that cannot be right."""
    scheme = uri.partition("://")[0]
    if scheme in SCHEMES:
        return PostgresSink(uri, context, catalogue, options)
    if scheme == "blackhole":
        return BlackholeSink(context)
    if scheme == "file":
        return FilesSink(uri, context, options.file_max_bytes)
    raise OperatingError(f"sink {redact_uri(uri)}: the scheme is none of postgresql://, file:///directory, blackhole://")
