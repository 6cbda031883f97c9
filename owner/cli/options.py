"""What every command shares: the options that find an owner and choose the output, and how a failure ends the process.

    @remote                       adds --endpoint, --config, --timeout-s, --output and TLS, and passes a Session first
    def command(session, ...):

The options also stand before the command's name (`owner -o json status`); what stands nearer to the command wins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from owner.cli.client import AdminClient, CallError
from owner.cli.output import Output
from owner.cli.settings import find_endpoints, open_channel_with
from tablewire.errors import OperatingError

TIMEOUT_S_DEFAULT = 15.0
TIMEOUT_S_MAX = 24 * 3_600.0


@dataclass(slots=True)
class Settings:
    """What the shared options said so far. timeout_s None: the command's own default."""

    endpoints: Sequence[str] = ()
    config: str = ""
    output: str = "table"
    timeout_s: float | None = None
    tls: dict[str, str] = field(default_factory=dict)


class CommandError(click.ClickException):
    """Exit code 1: one line on stderr, and with `-o json` also {"error": {"code", "message", ...}} on stdout."""

    def __init__(self, code: str, text: str, output: Output, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(text)
        self._code = code
        self._output = output
        self._details = details or {}

    def show(self, file: Any = None) -> None:
        self._output.note(f"Error: {self.message}")
        if self._output.is_json:
            self._output.json({"error": {"code": self._code, "message": self.message, **self._details}})


class Session:
    """One command's way to the cluster and to the terminal."""

    def __init__(self, client: AdminClient, output: Output, timeout_s: float | None) -> None:
        self.client = client
        self.output = output
        self.asked = ""
        """What has been asked for and goes on without this command, for who interrupts it."""
        self._timeout_s = timeout_s

    def timeout_s(self, default: float = TIMEOUT_S_DEFAULT) -> float:
        return self._timeout_s if self._timeout_s is not None else default

    def ask(self, method: str, request: Any, *, reads: bool = False, timeout_s: float | None = None) -> Any:
        return self.client.call(method, request, timeout_s or self.timeout_s(), reads=reads)

    def failure(self, text: str, code: str, **details: Any) -> CommandError:
        """To be raised. details: what a script may want to know beside the text."""
        return CommandError(code, text, self.output, details)


def _store(name: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def store(context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
        settings = context.ensure_object(Settings)
        if value is not None and value != ():
            setattr(settings, name, value)
        return value

    return store


def _store_tls(name: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def store(context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
        if value is not None:
            context.ensure_object(Settings).tls[name] = value
        return value

    return store


def _option(*names: str, store: Callable[..., Any], **more: Any) -> Callable[[Any], Any]:
    return click.option(*names, expose_value=False, callback=store, **more)


output_option = _option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    store=_store("output"),
    help="Tables for people, or one JSON object on one line.  [default: table]",
)
config_option = _option(
    "--config",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    store=_store("config"),
    help="The owner's TOML file (also TABLEWIRE_CONFIG).",
)

_SHARED = (
    _option(
        "--endpoint",
        multiple=True,
        metavar="HOST:PORT",
        store=_store("endpoints"),
        help="An owner's admin address; give several, the first that answers is asked. Otherwise TABLEWIRE_ENDPOINTS "
        "(separated by commas), or the configuration.",
    ),
    config_option,
    _option(
        "--timeout-s",
        type=click.FloatRange(min=0, max=TIMEOUT_S_MAX, min_open=True),
        metavar="SECONDS",
        store=_store("timeout_s"),
        help="How long to wait for an answer.",
    ),
    _option("--tls-ca-file", metavar="FILE", store=_store_tls("ca_file"), help="Trust this authority; turns TLS on."),
    _option("--tls-cert-file", metavar="FILE", store=_store_tls("cert_file"), help="This client's certificate."),
    _option("--tls-key-file", metavar="FILE", store=_store_tls("key_file"), help="This client's key."),
    output_option,
)


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SHARED):
        command = option(command)
    return command


def remote(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command on the cluster: gets the shared options, and a Session as its first argument."""

    @shared_options
    @click.pass_context
    @functools.wraps(command)
    def run(context: click.Context, /, *args: Any, **kwargs: Any) -> Any:
        with open_session(context.ensure_object(Settings)) as session:
            try:
                return command(session, *args, **kwargs)
            except KeyboardInterrupt:
                session.output.note("")
                raise session.failure(f"interrupted{session.asked and f'; {session.asked}'}", "interrupted") from None

    return run


def local(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that asks nobody: gets --output and --config, an Output and the Settings first."""

    @config_option
    @output_option
    @click.pass_context
    @functools.wraps(command)
    def run(context: click.Context, /, *args: Any, **kwargs: Any) -> Any:
        settings = context.ensure_object(Settings)
        output = Output(settings.output == "json")
        with _failures(output):
            return command(output, settings, *args, **kwargs)

    decorated: Callable[..., Any] = run
    return decorated


@contextmanager
def open_session(settings: Settings) -> Iterator[Session]:
    output = Output(settings.output == "json")
    with _failures(output):
        endpoints = find_endpoints(settings.endpoints, settings.config)
        client = AdminClient(endpoints, open_channel_with(settings.tls, settings.config))
        try:
            yield Session(client, output, settings.timeout_s)
        finally:
            client.close()


@contextmanager
def _failures(output: Output) -> Iterator[None]:
    """Refusals and failures become exit code 1 with their text."""
    try:
        yield
    except CallError as error:
        raise CommandError(error.code, error.text, output) from None
    except OperatingError as error:
        raise CommandError("config", str(error), output) from None
