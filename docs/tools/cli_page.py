"""Print docs/cli.md, or write it with `python -m docs.tools.cli_page --write docs/cli.md`.

The help texts are the program's own. The tables of JSON fields are the records of admin.proto, with
the comments on their fields. The life of a changefeed is `owner.changefeed.store.TRANSITIONS`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

from docs.tools import page
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

`owner` runs an owner (`owner serve`) and sends commands to running owners. Any owner can be asked:
an owner that does not lead forwards the call to the leader, once.

- **Which owner**: `--endpoint HOST:PORT`, which may be repeated; else `TABLEWIRE_ENDPOINTS=a:7440,b:7440`;
  else the admin address in the configuration (`--config FILE`, `TABLEWIRE_CONFIG`,
  `TABLEWIRE_ADMIN__PORT` ...). All endpoints are tried at once, so a dead one costs no time. During an
  election a command waits for the next leader, up to `--timeout-s`.
- **Which changefeed**: `id` in the namespace `default`, or `namespace/id`. The name is optional if
  there is only one changefeed (except for `remove`).
- **Which table**: `schema.table` as in the source, or the table's id. A table that is split has
  several spans; each span counts as one table in lists and counts.
- **Which processor**: its id. The commands call a processor a `capture`.
- **Passwords** need not be on the command line: `${NAME}` in a URI is stored as written, and owners
  and processors replace it by the value of their environment variable NAME. Other passwords are
  hidden wherever a URI is shown.
- **TLS**: `--tls-ca-file`, with `--tls-cert-file` and `--tls-key-file` if owners require a client
  certificate; else the section `[tls]` of the configuration.
- **Exit codes**: 0 done; 1 refused or failed, with the reason on stderr; 2 wrong usage. `table move`
  and `rebalance` return when the owner has accepted or refused the job, with `--wait` when the job
  is done. If that does not happen within `--timeout-s`, the exit code is 1 and the state of the job
  is shown; the owner continues the job.
- **Completion**: `eval "$(_OWNER_COMPLETE=bash_source owner)"` in bash (zsh: `zsh_source`), in fish
  `_OWNER_COMPLETE=fish_source owner | source`: commands, options, and the names of changefeeds,
  processors and tables.
- **Ctrl-C** ends a command that waits (exit code 1), but not what it started; the command says what
  continues. For `top` and `events -f` the exit code is 0.

## Events

`owner events` shows the events that the leader keeps in etcd, at most `history.events_max`;
passwords are hidden. `by` is the common name of the caller's certificate (without TLS: the caller's
address); "alice via owner-2" means that owner-2 forwarded a call from alice. `job` is the id of a
job, which `table move` and `rebalance` print; it is also in the logs of the owner and of the
processors that the job touches.

| event | what happened |
|---|---|
| `owner_leads`, `owner_stops_leading` | an owner won an election; a leader gave up leadership on request (not after a crash) |
| `capture_joined`, `capture_evicted` | a processor registered; a processor that did not answer was evicted |
| `capture_gone` | a processor has left; why: it was stopping (empty: it was lost) |
| `changefeed_created`, `_paused`, `_resumed`, `_resynced`, `_updated` | a changefeed was changed; by: the caller |
| `changefeed_failed` | a changefeed was stopped by an error; why: the error |
| `changefeed_finished`, `_removing`, `_removed` | a changefeed reached its target; is being removed; is gone |
| `changefeed_bootstrapped` | a new leader knows where each table is |
| `move_requested`, `rebalance_requested` | an operator started a job; by: the caller |
| `span_moved` | a manual move has ended |
| `job_ended`, `jobs_ended` | another job (drain, rebalance) has ended, or a move was refused or cancelled |
| `spans_placed` | tables that began to replicate, by reason: `add` (new, or after a failure), `drain`, `balance`, `move` |
| `failover_began`, `failover_done` | processors that wrote tables were lost; all tables have a writer again |
| `brake_on`, `brake_off` | many processors vanished at once, so placement is suspended for a while; it was resumed |
| `span_failed` | the executor of a table failed; why: its error. It is retried after a pause, on another processor first |
| `two_writers`, `placement_trouble` | two processors reported writing the same table; counts of such anomalies |
| `drain_requested`, `drain_cancelled` | an operator started or cancelled a drain; by: the caller |
| `events_dropped` | etcd did not accept events in time |

## The life of a changefeed

`pause`, `resume`, `resync` and `remove` are commands. *error* and *recovered*: a failed operation is being
retried, or has succeeded. *fatal*: retrying cannot succeed. *target reached*: everything up to
`--target-ts` is written. A resume starts a new run from the checkpoint, a resync one that copies all
tables again from the source as it is now; nothing that the former run still does has an effect.

%s
Failures are retried: a source after `source.retry_min_ms`, doubling up to `source.retry_max_ms`, with
jitter; a table after `scheduler.error_backoff_initial_ms`, up to `error_backoff_max_ms`, while other
tables continue.

Only the tables and the options of a paused changefeed can be changed (`update`). `remove` is complete
when everything that it created at the source is gone; until then the state is `removed`, the error
gives the reason, and the removal is retried.

## JSON

`-o json`, before or after the command's name, prints exactly one object on one line to stdout; all
other output goes to stderr. A failure (exit code 1) prints
`{"error": {"code": ..., "message": ...}}`, with the `job`, the `jobs`, the `drain` or the
`changefeed` that failed. The code is the lower-case name of a gRPC status, the state of a job that
did not reach its goal (`refused`, `pending`, `accepted`, `cancelled`), the state of a changefeed
(`failed`, `stopped`, `removed`), `interrupted` (Ctrl-C) or `config`.

Fields are never removed and never change their meaning; new ones may be added. Ts (`*_ts`) are
unsigned 64-bit numbers: use a parser that keeps integers exact. null: empty, absent or unknown.

| command | object |
|---|---|
| `status` | status, and `endpoint`: the address that was asked |
| `resign` | `former`: id, `leader`: owner |
| `capture list` | `captures`: list of capture |
| `capture drain` | drain |
| `changefeed list` | `changefeeds`: list of changefeed |
| `changefeed create`, `query`, `pause`, `resume`, `resync`, `update` | changefeed |
| `changefeed statistics` | fields of changefeed, and `tables`: fields of table, busiest first, each with `lag`: int or null |
| `changefeed remove` | `changefeed`: namespace/id, `gone`: bool (true only with `--wait`) |
| `table list` | `changefeed`: namespace/id, `truncated`: bool, `tables`: list of table |
| `table move` | job |
| `rebalance` | `jobs`: list of job, one for each changefeed; `state`: of the job that is furthest from done |
| `table move`, `capture drain` and `rebalance` with `--dry-run` | plan |
| `events` | `events`: list of event, oldest first; with `--follow` one event a line instead |
| `top` | one object a line for each refresh: `at`, `error` (why no owner answered, or null), `status`, `captures`, |
| | `changefeeds`, `stalled` (tables, each with its `changefeed`), `events` |
| `version` | `version`, `python` |
| `config check` | `ok`: true, `given`: number of keys that are set |
| `config show` | `keys`: list of `key`, `value`, `origin` |
"""


def contexts(command: click.Command = cli, name: str = PROGRAM, parent: click.Context | None = None) -> Iterator[click.Context]:
    """Yield the program and its commands, each followed by the commands below it."""
    settings = {**cli.context_settings, "terminal_width": HELP_WIDTH, "max_content_width": HELP_WIDTH}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    yield context
    if isinstance(command, click.Group):
        for below in sorted(command.commands):
            yield from contexts(command.commands[below], below, context)


def render() -> str:
    """Return the page."""
    parts = [HEAD % _life()]
    meanings = comments()
    for record, title in RECORDS.items():
        parts += [f"\n### {title}\n\n| field | type | meaning |\n|---|---|---|\n"]
        parts += [
            f"| `{field.name}` | {_type(field)} | {meanings[field.full_name]} |\n"
            for field in pb.DESCRIPTOR.message_types_by_name[record].fields
        ]
    parts.append("\n## Commands\n")
    for context in contexts():
        shown = "\n".join(line.rstrip() for line in context.get_help().splitlines())
        parts.append(f"\n### {context.command_path}\n\n```\n{shown}\n```\n")
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
    """Return the transitions of a changefeed as a diagram, and a table of what is refused in which state."""
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


if __name__ == "__main__":
    page.main("cli_page", render)
