"""The composition root of the processor: configuration -> logs -> service -> run."""

from __future__ import annotations

import os
import sys

import click

from processor.processor_config import ProcessorConfig
from processor.service.processor_service import EXIT_FAILED, ProcessorService
from tablewire.errors import ConfigError, OperatingError
from tablewire.runtime import config as configuration
from tablewire.runtime import logs
from tablewire.runtime.shutdown import Shutdown
from tablewire.runtime.version import software_version
from tablewire.wire.versions import SUPPORTED_VERSIONS, ProtocolVersions


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(software_version(), prog_name="processor")
def cli() -> None:
    """Hosts the agents of a Tablewire cluster: does the per-table work that the owner assigns."""


@cli.command()
@click.option("--config", "files", multiple=True, metavar="FILE", help="A TOML file; later ones win. Also TABLEWIRE_CONFIG.")
@click.option("--cluster", help="Name of the cluster.")
@click.option("--name", help="How the capture ids of this processor begin.")
@click.option("--etcd", metavar="HOST:PORT,...", help="The members of etcd.")
@click.option("--host", help="Address that the Exchange service listens on.")
@click.option("--port", help="Its port; 0 takes a free one.")
@click.option("--advertise", metavar="HOST:PORT", help="Where owners reach it, when that differs.")
@click.option("--http-host", help="Address of /metrics, /healthz and /readyz.")
@click.option("--http-port", help="Their port; 0 takes a free one.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="A label that lists show; may be repeated.")
@click.option("--lease-ttl-ms", help="How long etcd keeps a silent process.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--log-format", type=click.Choice(["auto", "json", "console"]))
def serve(files: tuple[str, ...], labels: tuple[str, ...], **flags: str | None) -> None:
    """Run a processor until SIGTERM. Every key: docs/configuration.md."""
    paths = {
        "cluster": "cluster",
        "name": "name",
        "etcd": "etcd.endpoints",
        "host": "exchange.host",
        "port": "exchange.port",
        "advertise": "exchange.advertise",
        "http_host": "http.host",
        "http_port": "http.port",
        "lease_ttl_ms": "etcd.lease_ttl_ms",
        "log_level": "log.level",
        "log_format": "log.format",
    }
    given = {path: flags[name] for name, path in paths.items()}
    given["labels"] = ",".join(labels) if labels else None
    named = files or tuple(filter(None, [os.environ.get("TABLEWIRE_CONFIG")]))
    try:
        config = configuration.load(ProcessorConfig, files=named, environ=os.environ, flags=given)
    except ConfigError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(EXIT_FAILED)
    sys.exit(run(config))


def run(config: ProcessorConfig, protocols: ProtocolVersions = SUPPORTED_VERSIONS) -> int:
    """The exit code."""
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
