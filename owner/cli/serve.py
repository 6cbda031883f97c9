"""owner serve, owner config show | check"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import msgspec

from owner.cli.options import Settings, local
from owner.cli.output import Output
from owner.cli.settings import owner_config
from owner.owner_config import OwnerConfig
from tablewire.runtime.config import describe, flatten
from tablewire.runtime.uris import redact_uri


def _keys(_context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    keys: dict[str, str] = {}
    for text in values:
        path, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param=parameter)
        keys[path.strip()] = value
    return keys


def set_option(command: Any) -> Any:
    return click.option(
        "--set",
        "keys",
        multiple=True,
        callback=_keys,
        metavar="KEY=VALUE",
        help="A configuration key, such as etcd.endpoints=a:2379,b:2379; stronger than file and environment.",
    )(command)


_FLAGS = (
    ("--cluster", "cluster", "NAME", "Name of the cluster."),
    ("--id", "id", "NAME", "Name of this owner in lists."),
    ("--etcd", "etcd.endpoints", "HOST:PORT,...", "The members of etcd."),
    ("--host", "admin.host", "HOST", "Address that the admin API listens on."),
    ("--port", "admin.port", "PORT", "Its port; 0 takes a free one."),
    ("--advertise", "admin.advertise", "HOST:PORT", "Where others reach it, when that differs."),
    ("--http-host", "http.host", "HOST", "Address of /metrics, /healthz and /readyz."),
    ("--http-port", "http.port", "PORT", "Their port; 0 takes a free one."),
    ("--lease-ttl-ms", "etcd.lease_ttl_ms", "MS", "How long etcd keeps a silent process."),
    ("--log-level", "log.level", "LEVEL", "debug, info, warning or error."),
    ("--log-format", "log.format", "FORMAT", "auto, json or console."),
)
"""(flag, key, metavar, help) of the keys that are given most."""


def _flag_options(command: Any) -> Any:
    for flag, key, metavar, text in reversed(_FLAGS):
        command = click.option(flag, key.replace(".", "__"), metavar=metavar, help=text)(command)
    return command


@click.command("serve")
@local
@_flag_options
@set_option
def serve(_output: Output, settings: Settings, keys: dict[str, str], **flags: str | None) -> None:
    """Run an owner until SIGTERM. Every key: docs/configuration.md."""
    named = {name.replace("__", "."): value for name, value in flags.items() if value is not None}
    config, _ = owner_config(settings.config, {**named, **keys})
    # Not at the top: a client command should not load what only a service needs.
    from owner.service import serve as serve_owner

    serve_owner(config)


@click.group("config")
def config_group() -> None:
    """The owner's configuration: file, then TABLEWIRE_* variables, then --set."""


@config_group.command("check")
@local
@set_option
def check(output: Output, settings: Settings, keys: dict[str, str]) -> None:
    """Read the configuration; exit code 1 and one line if it is wrong."""
    _, origins = owner_config(settings.config, keys)
    if output.is_json:
        output.json({"ok": True, "given": len(origins)})
    else:
        output.line(f"the configuration is right; {len(origins)} keys are given, the rest are defaults")


@config_group.command("show")
@local
@set_option
def show(output: Output, settings: Settings, keys: dict[str, str]) -> None:
    """Every key with its value, and where the value comes from."""
    config, origins = owner_config(settings.config, keys)
    rows = [(path, _shown(value), origins.get(path, "default")) for path, value in flatten(config)]
    if output.is_json:
        output.json({"keys": [{"key": path, "value": value, "origin": origin} for path, value, origin in rows]})
        return
    docs = {row.path: row.doc for row in describe(OwnerConfig)}
    output.table(
        ("KEY", "VALUE", "FROM", "MEANING"),
        ((path, _text(value), origin, docs.get(path, "")) for path, value, origin in rows),
    )


def _shown(value: Any) -> Any:
    """As JSON has it, passwords hidden."""
    plain = msgspec.to_builtins(value)
    if isinstance(plain, str):
        return redact_uri(plain)
    return [redact_uri(item) if isinstance(item, str) else item for item in plain] if isinstance(plain, list) else plain


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
