"""The command `processor`: reads the configuration, sets up logs, and runs the service."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from processor.processor_config import ProcessorConfig
from processor.service.processor_service import EXIT_FAILED, ProcessorService
from tablewire.errors import ConfigError, OperatingError
from tablewire.runtime import config as configuration
from tablewire.runtime import logs
from tablewire.runtime.shutdown import Shutdown
from tablewire.runtime.version import software_version
from tablewire.wire.versions import SUPPORTED_VERSIONS, ProtocolVersions

_FLAGS = (
    ("--cluster", "cluster", "NAME", "Name of the cluster."),
    ("--name", "name", "NAME", "Prefix of the ids of this processor."),
    ("--etcd", "etcd.endpoints", "HOST:PORT,...", "The members of etcd."),
    ("--host", "exchange.host", "HOST", "Address that the Exchange service listens on."),
    ("--port", "exchange.port", "PORT", "Port of the Exchange service; 0 for any free port."),
    ("--advertise", "exchange.advertise", "HOST:PORT", "Address at which owners reach it, if it differs."),
    ("--http-host", "http.host", "HOST", "Address of /metrics, /healthz and /readyz."),
    ("--http-port", "http.port", "PORT", "Port of /metrics, /healthz and /readyz; 0 for any free port."),
    ("--lease-ttl-ms", "etcd.lease_ttl_ms", "MS", "How long etcd keeps the lease of a process that no longer renews it."),
    ("--log-level", "log.level", click.Choice(["debug", "info", "warning", "error"]), "Least severe events to log."),
    ("--log-format", "log.format", click.Choice(["auto", "json", "console"]), "Format of the log."),
)
"""(flag, key, metavar or choice, help) of the keys that are set most often."""


def _flag_options(command: Any) -> Any:
    for flag, key, kind, text in reversed(_FLAGS):
        how = {"metavar": kind} if isinstance(kind, str) else {"type": kind}
        command = click.option(flag, key.replace(".", "__"), help=text, **how)(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(software_version(), prog_name="processor")
def cli() -> None:
    """Run a processor of a Tablewire cluster: it replicates the tables that the owner assigns to it."""


@cli.command()
@click.option("--config", "files", multiple=True, metavar="FILE", help="A TOML file; later ones win. Also TABLEWIRE_CONFIG.")
@_flag_options
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="A label that listings show; may be repeated.")
def serve(files: tuple[str, ...], labels: tuple[str, ...], **flags: str | None) -> None:
    """Run a processor until SIGTERM. See docs/configuration.md for all keys."""
    given = {name.replace("__", "."): value for name, value in flags.items()}
    given["labels"] = ",".join(labels) if labels else None
    named = files or tuple(filter(None, [os.environ.get("TABLEWIRE_CONFIG")]))
    try:
        config = configuration.load(ProcessorConfig, files=named, environ=os.environ, flags=given)
    except ConfigError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(EXIT_FAILED)
    sys.exit(run(config))


def run(config: ProcessorConfig, protocols: ProtocolVersions = SUPPORTED_VERSIONS) -> int:
    """Run the service and return the exit code."""
    logs.configure(config.log.format, config.log.level, service="processor")
    shutdown = Shutdown()
    shutdown.install()
    try:
        return ProcessorService(config, shutdown, version=software_version(), protocols=protocols).run()
    except OperatingError as error:
        click.echo(f"Error: {error}", err=True)
        return EXIT_FAILED
    finally:
        shutdown.uninstall()


def main() -> None:
    cli(prog_name="processor")


if __name__ == "__main__":
    main()
