"""Finds a sink by the scheme of its URI."""

from __future__ import annotations

from functools import cache, partial

import psycopg

from processor.postgres.sinks import Sink, SinkContext
from processor.postgres.sinks.blackhole import BlackholeSession
from processor.postgres.sinks.files import FilesSession
from processor.postgres.sinks.postgres_sink import PostgresSession
from processor.postgres.source.catalogue import SourceCatalogue
from tablewire.postgres.checks import sink_folder, unknown_scheme
from tablewire.postgres.connections import SCHEMES, SourceUnavailableError, connect, error_text, parse_uri, server_name
from tablewire.postgres.identity import database_identity
from tablewire.postgres.options import PostgresOptions


def new_sink(uri: str, context: SinkContext, catalogue: SourceCatalogue, options: PostgresOptions) -> Sink:
    """Return the sink, without I/O; raise OperatingError for a wrong URI."""
    scheme = uri.partition("://")[0]
    if scheme in SCHEMES:
        parse_uri(uri)
        session = partial(PostgresSession, uri, context, catalogue, options)
        return Sink(True, session, identity=cache(partial(_identity, uri, context.writer)), follows_shapes=True)
    if scheme == "blackhole":
        return Sink(True, partial(BlackholeSession, context))
    if scheme == "file":
        files = FilesSession(sink_folder(uri), context, options.file_max_bytes)
        return Sink(False, lambda: files, files.close_all)
    raise unknown_scheme(uri)


def _identity(uri: str, application_name: str) -> str:
    with connect(uri, application_name=application_name) as connection:
        try:
            return database_identity(connection)
        except psycopg.Error as error:
            raise SourceUnavailableError(f"{server_name(uri)}: cannot read its identity: {error_text(error)}") from None
