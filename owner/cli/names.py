"""What a shell completes beside commands and options: the names of changefeeds, captures and tables, as the cluster has them.

A shell waits for these at each press of the key, so an answer has COMPLETION_TIMEOUT_S; without one there is nothing to offer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import click
from click.shell_completion import CompletionItem

from owner.admin.operations import DEFAULT_NAMESPACE
from owner.cli.options import Session, Settings, open_session
from tablewire.v1 import admin_pb2 as pb

COMPLETION_TIMEOUT_S = 2.0
NAMES_MAX = 1_000

Completion: TypeAlias = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _completion(names: Callable[[Session, str], Iterable[str]]) -> Completion:
    """names: by the session and the changefeed that the line names already."""

    def complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            with open_session(context.ensure_object(Settings)) as session:
                found = sorted(set(names(session, context.params.get("changefeed") or "")))
        except click.ClickException:
            return []
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]

    return complete


def _changefeeds(session: Session, _changefeed: str) -> Iterable[str]:
    answer = session.ask("ListChangefeeds", pb.ListChangefeedsRequest(), reads=True, timeout_s=COMPLETION_TIMEOUT_S)
    return (row.changefeed.removeprefix(f"{DEFAULT_NAMESPACE}/") for row in answer.changefeeds)


def _captures(session: Session, _changefeed: str) -> Iterable[str]:
    answer = session.ask("ListCaptures", pb.ListCapturesRequest(), reads=True, timeout_s=COMPLETION_TIMEOUT_S)
    return (row.id for row in answer.captures)


def _tables(session: Session, changefeed: str) -> Iterable[str]:
    request = pb.ListTablesRequest(changefeed=changefeed, limit=NAMES_MAX)
    for chunk in session.client.stream("ListTables", request, COMPLETION_TIMEOUT_S, reads=True):
        yield from (row.table for row in chunk.tables if row.table)


complete_changefeeds = _completion(_changefeeds)
complete_captures = _completion(_captures)
complete_tables = _completion(_tables)
