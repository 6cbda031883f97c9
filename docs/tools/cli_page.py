"""docs/cli.md, written from the program itself: `python -m docs.tools.cli_page` prints it, `--write FILE` writes it.

So is its picture of a changefeed's life: from `owner.changefeed.store.TRANSITIONS`, which is what the owner does.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

from owner.changefeed.store import TRANSITIONS, Next, Refused
from owner.cli.json_objects import is_null_if_empty, map_value
from owner.cli.main import PROGRAM, cli
from tablewire.etcd.records import ChangefeedState
from tablewire.v1 import admin_pb2 as pb

HELP_WIDTH = 110
ROOT = Path(__file__).resolve().parents[2]
PROTO = "tablewire/v1/admin.proto"
RECORDS = {
    "Owner": "owner",
    "GetStatusResponse": "status",
    "Capture": "capture",
    "DrainCaptureResponse": "drain",
    "TableRow": "table",
    "Job": "job",
    "Plan": "plan",
    "PlannedMove": "planned move",
    "Changefeed": "changefeed",
    "Event": "event",
}
"""The title of each record of admin.proto that the page describes."""
_MESSAGES, _FIELDS = FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER, DescriptorProto.FIELD_FIELD_NUMBER
_SCALARS = {
    FieldDescriptor.CPPTYPE_STRING: "string",
    FieldDescriptor.CPPTYPE_BOOL: "bool",
    FieldDescriptor.CPPTYPE_DOUBLE: "number",
    FieldDescriptor.CPPTYPE_INT64: "int",
    FieldDescriptor.CPPTYPE_UINT64: "int",
    FieldDescriptor.CPPTYPE_UINT32: "int",
}

HEAD = """# The owner CLI

<!-- Written by `python -m docs.tools.cli_page --write docs/cli.md`; change the program, not this page. -->

`owner` runs an owner (`owner serve`) and asks those that run. Any owner may be asked: one that does not lead passes the call
on to the leader, by one hop.

- **Which owner**: `--endpoint HOST:PORT`, several times; else `TABLEWIRE_ENDPOINTS=a:7440,b:7440`; else the admin address of
  the configuration (`--config FILE`, `TABLEWIRE_CONFIG`, `TABLEWIRE_ADMIN__PORT` ...). All are tried at once, and a dead one
  costs nothing. While an election is under way a command waits for the next leader, as long as `--timeout-s` allows.
- **Which changefeed**: `id` in the namespace `default`, or `namespace/id`. It may be left out while there is exactly one
  (but not when it is removed).
- **Which table**: `schema.table` as the source names it, or its number.
- **Passwords** need not stand on a command line: what stands as `${NAME}` in a URI is stored as it was written and taken
  from the environment of the owners and processors. Other passwords are hidden wherever a URI is shown.
- **TLS**: `--tls-ca-file`, with `--tls-cert-file` and `--tls-key-file` where owners ask for a client's certificate; else the
  section `[tls]` of the configuration.
- **Exit codes**: 0 done; 1 refused or failed, with the reason on stderr; 2 wrong usage. Nothing is answered as accepted that
  was not: `table move` returns when the owner has decided, with `--wait` when it is done, and a job that is neither within
  `--timeout-s` is exit code 1 with how it stands (the owner goes on with it).
- **Completion**: `eval "$(_OWNER_COMPLETE=bash_source owner)"` in bash (zsh: `zsh_source`), in fish
  `_OWNER_COMPLETE=fish_source owner | source`: commands, options, and the names of changefeeds, captures and tables.
- **Ctrl-C** ends a command that waits (exit code 1), never what it asked for; it says what goes on. `top` and `events -f` are
  left by it with 0.

## Events

`owner events` shows what the leader keeps in etcd, at most `history.events_max` events; passwords are hidden in them.
`by` is the common name of the caller's certificate (without TLS: the caller's address); "alice via owner-2": another owner passed
the call on and says that it came from alice. `job` is the id of a job: `table move` and `rebalance` answer it, and it stands in
the logs of the owner and of the processors that the job touches.

| event | what happened |
|---|---|
| `owner_leads`, `owner_stops_leading` | an election was won; leadership was given up as asked (not after a crash) |
| `capture_joined`, `capture_evicted` | a processor registered; it was given up while silent |
| `capture_gone` | a processor is gone; why: it had said that it was leaving (nothing: it was lost) |
| `changefeed_created`, `_paused`, `_resumed`, `_updated`, `_failed` | its record changed; why: its error; by: who asked |
| `changefeed_finished`, `_removing`, `_removed` | it reached its target; is being removed; nothing is left of it |
| `changefeed_bootstrapped` | a new leader knows where every table is |
| `move_requested`, `rebalance_requested` | an operator asked for it; by: who |
| `span_moved` | a move by hand has ended |
| `job_ended`, `jobs_ended` | another job (drain, rebalance), or a move that was refused or cancelled, has ended |
| `spans_placed` | how many spans came to a place, by why: `add` (new, or after a failure), `drain`, `balance`, `move` |
| `failover_began`, `failover_done` | captures that wrote spans are gone; all spans have a writer again |
| `brake_on`, `brake_off` | many captures vanished at once, so nothing is placed anew for a while |
| `span_failed` | the executor of a span failed; why: its error. It is tried again after a pause, at another capture first |
| `two_writers`, `placement_trouble` | a span was reported to be written twice; counts of trouble that has no line of its own |
| `drain_requested`, `drain_cancelled` | an operator asked for it; by: who (a processor that is stopping needs no drain) |
| `events_dropped` | etcd did not take events in time |

## The life of a changefeed

`pause`, `resume` and `remove` are an operator's; *error* and *recovered* say that something is being retried or is well again,
*fatal* that no retry can mend it, *target reached* that all is written up to `--target-ts`. A resume is a new start: it goes on
from the checkpoint, and nothing that is still under way of the former run counts any more.

%s
What fails is retried: a source after `source.retry_min_ms`, each time twice as long up to `source.retry_max_ms`, and always a
random part earlier; a table after `scheduler.error_backoff_initial_ms` up to `error_backoff_max_ms`, while the others go on.

Of a paused changefeed the tables and the options may be changed (`update`), nothing else. `remove` ends when what it made at the
source is gone; until then it is `removed` with the reason as its error, and is tried again.

## JSON

`-o json`, before or behind the command's name, prints exactly one object on one line on stdout; whatever else there is to
say goes to stderr. A failure (exit code 1) prints `{"error": {"code": ..., "message": ...}}`, with the `job`, the `jobs`, the
`drain` or the `changefeed` that failed; codes are the lower-case names of gRPC's status codes, the state of a job that did not
get where it should (`refused`, `pending`, `accepted`, `cancelled`) or of a changefeed (`failed`, `stopped`, `removed`),
`interrupted` (Ctrl-C) or `config`.

Fields are never removed and never change their meaning; new ones may come at any time. Ts (`*_ts`) are unsigned 64-bit
numbers: read them with a parser that keeps whole numbers whole.

| command | object |
|---|---|
| `status` | status, and `endpoint`: the address that was asked |
| `resign` | `former`: id, `leader`: owner |
| `capture list` | `captures`: list of capture |
| `capture drain` | drain |
| `changefeed list` | `changefeeds`: list of changefeed |
| `changefeed create`, `query`, `pause`, `resume`, `update` | changefeed |
| `changefeed statistics` | fields of changefeed, and `tables`: fields of table, the busiest first, each with `lag`: int or null |
| `changefeed remove` | `changefeed`: namespace/id, `gone`: bool (only `--wait` waits for it) |
| `table list` | `changefeed`: namespace/id, `truncated`: bool, `tables`: list of table |
| `table move` | job |
| `rebalance` | `jobs`: list of job, one for each changefeed; `state`: of the one that is furthest from done |
| `table move`, `capture drain` and `rebalance` with `--dry-run` | plan |
| `events` | `events`: list of event, oldest first; with `--follow` one event a line instead |
| `top` | one object a line for each look: `at`, `error` (why there is no answer, or null), `status`, `captures`, |
| | `changefeeds`, `stalled` (tables, each with its `changefeed`), `events` |
| `version` | `version`, `python` |
| `config check` | `ok`: true, `given`: number of keys that are not defaults |
| `config show` | `keys`: list of `key`, `value`, `origin` |
"""


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group below the program, by name."""
    for name, command in sorted(group.commands.items()):
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def command_paths() -> list[tuple[str, ...]]:
    """The words behind `owner` that lead to each command, the program itself first."""
    return [(), *(path for path, _ in commands())]


def render() -> str:
    """The whole page."""
    parts = [HEAD % _life()]
    meanings = comments()
    for record, title in RECORDS.items():
        parts += [f"\n### {title}\n\n| field | type | meaning |\n|---|---|---|\n"]
        parts += [
            f"| `{field.name}` | {_type(field)} | {meanings[field.full_name]} |\n"
            for field in pb.DESCRIPTOR.message_types_by_name[record].fields
        ]
    parts.append("\n## Commands\n")
    for path in command_paths():
        name = " ".join((PROGRAM, *path))
        parts.append(f"\n### {name}\n\n```\n{_help(path)}\n```\n")
    return "".join(parts)


def _type(field: FieldDescriptor) -> str:
    """Return the JSON type of a field of a record."""
    if (value := map_value(field)) is not None:
        return f"object of {_type(value)}"
    name = RECORDS[field.message_type.name] if field.message_type else _SCALARS[field.cpp_type]
    if field.is_repeated:
        return f"list of {name}"
    return f"{name} or null" if field.has_presence or is_null_if_empty(field) else name


def comments() -> dict[str, str]:
    """Return the comment on each field of admin.proto, by the field's full name."""
    with tempfile.NamedTemporaryFile() as file:
        protoc.main(["", f"-I{ROOT / 'proto'}", "--include_source_info", f"--descriptor_set_out={file.name}", PROTO])
        (proto,) = FileDescriptorSet.FromString(file.read()).file
    comments = {}
    for location in proto.source_code_info.location:
        if len(location.path) == 4 and (location.path[0], location.path[2]) == (_MESSAGES, _FIELDS):
            message = proto.message_type[location.path[1]]
            text = location.leading_comments or location.trailing_comments
            comments[f"{proto.package}.{message.name}.{message.field[location.path[3]].name}"] = " ".join(text.split())
    return comments


def _life() -> str:
    """The transitions of a changefeed as a picture, and what is refused in which state."""
    arrows: dict[tuple[ChangefeedState, ChangefeedState], list[str]] = {}
    refused = []
    for (state, event), outcome in TRANSITIONS.items():
        if isinstance(outcome, Refused):
            refused.append(f"| {state} | `{event}` | {outcome.reason} |\n")
        elif isinstance(outcome, Next) and outcome.state is not state:
            arrows.setdefault((state, outcome.state), []).append(event.replace("_", " "))
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> normal: create"]
    lines += [f"    {state} --> {after}: {', '.join(events)}" for (state, after), events in arrows.items()]
    lines += ["    removed --> [*]: all is gone from the source", "```", "", "| state | refused | because |", "|---|---|---|"]
    return "\n".join(lines) + "\n" + "".join(refused)


def _help(path: tuple[str, ...]) -> str:
    context = _context(cli, PROGRAM, None)
    command: click.Command = cli
    for word in path:
        assert isinstance(command, click.Group)
        command = command.commands[word]
        context = _context(command, word, context)
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    settings = {**cli.context_settings, "terminal_width": HELP_WIDTH, "max_content_width": HELP_WIDTH}
    return click.Context(command, info_name=name, parent=parent, **settings)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--write"] and len(arguments) == 2:
        Path(arguments[1]).write_text(render(), encoding="utf-8")
    elif not arguments:
        sys.stdout.write(render())
    else:
        sys.exit("usage: python -m docs.tools.cli_page [--write FILE]")


if __name__ == "__main__":
    main(sys.argv[1:])
