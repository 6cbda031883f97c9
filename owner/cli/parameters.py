"""The arguments and options that several commands share, and the names that a shell completes.

A shell waits for the names at each press of TAB, so the cluster has COMPLETION_TIMEOUT_S to answer;
otherwise nothing is offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import click
from click.shell_completion import CompletionItem

from owner.cli.options import Session, open_session
from owner.cli.settings import Settings

COMPLETION_TIMEOUT_S = 2.0
NAMES_MAX = 1_000
ROWS_SHOWN_MAX = 1_000
LIST_TIMEOUT_S = 300.0

Completion: TypeAlias = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _completion(names: Callable[[Session, str], Iterable[str]]) -> Completion:
    """Return a completion of names. names: takes the changefeed that the command line already names."""

    def complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            with open_session(context.ensure_object(Settings)) as session:
                found = sorted(set(names(session, context.params.get("changefeed") or "")))
        except click.ClickException:
            return []
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]

    return complete


def _changefeeds(session: Session, _changefeed: str) -> Iterable[str]:
    answer = session.ask("ListChangefeeds", timeout_s=COMPLETION_TIMEOUT_S)
    return (row.changefeed.removeprefix("default/") for row in answer.changefeeds)


def _captures(session: Session, _changefeed: str) -> Iterable[str]:
    return (row.id for row in session.ask("ListCaptures", timeout_s=COMPLETION_TIMEOUT_S).captures)


def _tables(session: Session, changefeed: str) -> Iterable[str]:
    for chunk in session.client.stream("ListTables", COMPLETION_TIMEOUT_S, changefeed=changefeed, limit=NAMES_MAX):
        yield from (row.table for row in chunk.tables if row.table)


complete_changefeeds = _completion(_changefeeds)
complete_captures = _completion(_captures)
complete_tables = _completion(_tables)

changefeed_argument = click.argument("changefeed", default="", metavar="[ID]", shell_complete=complete_changefeeds)
required_changefeed_argument = click.argument("changefeed", metavar="ID", shell_complete=complete_changefeeds)
changefeed_option = click.option(
    "--changefeed", default="", metavar="ID", shell_complete=complete_changefeeds, help="Optional if there is only one."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Show the moves and the loads before and after; change nothing.")


def limit_option(noun: str) -> Callable[[Any], Any]:
    """Return the option --limit of a list of `noun`."""
    return click.option(
        "--limit",
        type=click.IntRange(min=0, max=2**32 - 1),
        default=None,
        metavar="ROWS",
        help=f"Maximum number of {noun}; 0 for all.  [default: {ROWS_SHOWN_MAX}; all with -o json]",
    )


def name_values(unique: bool) -> Callable[[click.Context, click.Parameter, Iterable[str]], dict[str, str]]:
    """Return a callback that parses NAME=VALUE options. unique: refuse a name that is given twice."""

    def parse(_context: click.Context, parameter: click.Parameter, texts: Iterable[str]) -> dict[str, str]:
        values: dict[str, str] = {}
        for text in texts:
            name, equals, value = text.partition("=")
            if not equals or not name.strip():
                raise click.BadParameter(f"{text!r} is not {parameter.metavar}", param=parameter)
            if unique and name.strip() in values:
                raise click.BadParameter(f"{name!r} is given twice", param=parameter)
            values[name.strip()] = value
        return values

    return parse


def exclude_each_other(**flags: bool) -> None:
    """Raise a UsageError if more than one of these flags is set."""
    if sum(flags.values()) > 1:
        names = [f"--{name.replace('_', '-')}" for name in flags]
        raise click.UsageError(f"{', '.join(names[:-1])} and {names[-1]} exclude each other")
