"""Finds a sink by the scheme of its URI."""

from __future__ import annotations

from functools import partial

from processor.postgres.sinks import Sink, SinkContext
from processor.postgres.sinks.blackhole import BlackholeSession
from processor.postgres.sinks.files import FilesSession
from processor.postgres.sinks.postgres_sink import PostgresSession
from processor.postgres.source.catalogue import SourceCatalogue
from tablewire.postgres.checks import sink_folder, unknown_scheme
from tablewire.postgres.connections import SCHEMES, parse_uri
from tablewire.postgres.options import PostgresOptions


def new_sink(uri: str, context: SinkContext, catalogue: SourceCatalogue, options: PostgresOptions) -> Sink:
    """Return the sink, without I/O; raise OperatingError for a wrong URI."""
    scheme = uri.partition("://")[0]
    if scheme in SCHEMES:
        parse_uri(uri)
        return Sink(True, partial(PostgresSession, uri, context, catalogue, options))
    if scheme == "blackhole":
        return Sink(True, partial(BlackholeSession, context))
    if scheme == "file":
        session = FilesSession(sink_folder(uri), context, options.file_max_bytes)
        return Sink(False, lambda: session, session.close_all)
    raise unknown_scheme(uri)
