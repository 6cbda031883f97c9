"""Finds a sink by the scheme of its URI."""

from __future__ import annotations

from processor.postgres.sinks import Sink, SinkContext
from processor.postgres.sinks.blackhole import BlackholeSink
from processor.postgres.sinks.files import FilesSink
from processor.postgres.sinks.postgres_sink import PostgresSink
from processor.postgres.source_catalogue import SourceCatalogue
from tablewire.postgres.checks import unknown_scheme
from tablewire.postgres.connections import SCHEMES
from tablewire.postgres.options import PostgresOptions


def new_sink(uri: str, context: SinkContext, catalogue: SourceCatalogue, options: PostgresOptions) -> Sink:
    """Return the sink, without I/O; raise OperatingError for a wrong URI."""
    scheme = uri.partition("://")[0]
    if scheme in SCHEMES:
        return PostgresSink(uri, context, catalogue, options)
    if scheme == "blackhole":
        return BlackholeSink(context)
    if scheme == "file":
        return FilesSink(uri, context, options.file_max_bytes)
    raise unknown_scheme(uri)
