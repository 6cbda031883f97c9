"""owner serve, owner config show | check"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from owner.cli.options import local
from owner.cli.output import Output, new_table
from owner.cli.parameters import name_values
from owner.cli.settings import Settings

if TYPE_CHECKING:
    from owner.owner_config import OwnerConfig

_FLAGS = (
    ("--cluster", "cluster", "NAME", "Name of the cluster."),
    ("--id", "id", "NAME", "Name of this owner in lists."),
    ("--etcd", "etcd.endpoints", "HOST:PORT,...", "The members of etcd."),
    ("--host", "admin.host", "HOST", "Address that the admin API listens on."),
    ("--port", "admin.port", "PORT", "Port of the admin API; 0 for any free port."),
    ("--advertise", "admin.advertise", "HOST:PORT", "Address at which others reach the admin API, if it differs."),
    ("--http-host", "http.host", "HOST", "Address of /metrics, /healthz and /readyz."),
    ("--http-port", "http.port", "PORT", "Port of /metrics, /healthz and /readyz; 0 for any free port."),
    ("--lease-ttl-ms", "etcd.lease_ttl_ms", "MS", "How long etcd keeps the lease of a process that no longer renews it."),
    ("--log-level", "log.level", "LEVEL", "debug, info, warning or error."),
    ("--log-format", "log.format", "FORMAT", "auto, json or console."),
)
"""(flag, key, metavar, help) of the keys that are set most often."""

_set_option = click.option(
    "--set",
    "keys",
    multiple=True,
    callback=name_values(unique=False),
    metavar="KEY=VALUE",
    help="A configuration key, such as etcd.endpoints=a:2379,b:2379; overrides the file and the environment.",
)


def _flag_options(command: Any) -> Any:
    for flag, key, metavar, text in reversed(_FLAGS):
        command = click.option(flag, key.replace(".", "__"), metavar=metavar, help=text)(command)
    return command


def _load(settings: Settings, keys: Mapping[str, str]) -> tuple[OwnerConfig, dict[str, str]]:
    from owner.cli.configuration import owner_config

    return owner_config(settings, keys)


@click.command("serve")
@local
@_flag_options
@_set_option
def serve(_output: Output, settings: Settings, keys: dict[str, str], **flags: str | None) -> None:
    """Run an owner until SIGTERM. See docs/configuration.md for all keys."""
    named = {name.replace("__", "."): value for name, value in flags.items() if value is not None}
    config, _ = _load(settings, {**named, **keys})
    from owner.service import serve as serve_owner

    serve_owner(config)


@click.group("config")
def config_group() -> None:
    """Check and show the owner's configuration.

    TABLEWIRE_* variables override the file, and --set overrides both.
    """


@config_group.command("check")
@local
@_set_option
def check(output: Output, settings: Settings, keys: dict[str, str]) -> None:
    """Read the configuration; exit with code 1 and one line of text if it is invalid."""
    _, origins = _load(settings, keys)
    given = f"{len(origins)} key is" if len(origins) == 1 else f"{len(origins)} keys are"
    output.result({"ok": True, "given": len(origins)}, f"the configuration is valid; {given} set, the others have defaults")


@config_group.command("show")
@local
@_set_option
def show(output: Output, settings: Settings, keys: dict[str, str]) -> None:
    """Show each key with its value and the origin of the value."""
    from owner.owner_config import OwnerConfig
    from tablewire.runtime.config import describe, flatten

    config, origins = _load(settings, keys)
    rows = [(path, _shown(value), origins.get(path, "default")) for path, value in flatten(config)]
    if output.is_json:
        output.json({"keys": [{"key": path, "value": value, "origin": origin} for path, value, origin in rows]})
        return
    docs = {row.path: row.doc for row in describe(OwnerConfig)}
    table = [(path, _text(value), origin, docs.get(path, "")) for path, value, origin in rows]
    output.print(new_table(("KEY", "VALUE", "FROM", "MEANING"), table))


def _shown(value: Any) -> Any:
    """Return the value as JSON has it, with passwords hidden."""
    import msgspec

    from tablewire.runtime.uris import redact_uri

    plain = msgspec.to_builtins(value)
    if isinstance(plain, str):
        return redact_uri(plain)
    return [redact_uri(item) if isinstance(item, str) else item for item in plain] if isinstance(plain, list) else plain


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
