"""What all commands share: the options that select an owner and the output format, and the session.

    @remote                       # adds --endpoint, --config, --timeout-s, --output and TLS options
    def command(session, ...):

The options may also precede the command's name (`owner -o json status`); the one closer to the
command wins.

Modules of this package import what is slow to load (grpc, rich, numpy, msgspec) only where it is
used: a shell starts the program at each press of TAB. The exceptions are client.py and
configuration.py, which are themselves imported where they are used.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from owner.cli.output import CommandError, Output
from owner.cli.settings import Settings
from tablewire.errors import OperatingError

if TYPE_CHECKING:
    from owner.cli.client import AdminClient

TIMEOUT_S_DEFAULT = 15.0
TIMEOUT_S_MAX = 24 * 3_600.0
POLL_INTERVAL_S = 0.25


class Session:
    """The cluster and the terminal of one command."""

    def __init__(self, client: AdminClient, output: Output, timeout_s: float | None) -> None:
        self.client = client
        self.output = output
        self.pending = ""
        """What continues in the cluster if the command is interrupted."""
        self._timeout_s = timeout_s

    def timeout_s(self, default: float = TIMEOUT_S_DEFAULT) -> float:
        """Return the value of --timeout-s, or the default."""
        return self._timeout_s if self._timeout_s is not None else default

    def ask(self, method: str, *, timeout_s: float | None = None, **fields: Any) -> Any:
        """Call a method of the Admin service with these fields of its request, and return the response."""
        return self.client.call(method, timeout_s or self.timeout_s(), **fields)

    def polls(self, timeout_s: float) -> Iterator[float]:
        """Yield the remaining seconds at each POLL_INTERVAL_S until --timeout-s, or this default, has passed."""
        deadline = time.monotonic() + self.timeout_s(timeout_s)
        while (left_s := deadline - time.monotonic()) > 0:
            yield left_s
            time.sleep(POLL_INTERVAL_S)


def _store(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    if value not in (None, ()):
        setattr(context.ensure_object(Settings), str(parameter.name), value)
    return value


_option = functools.partial(click.option, expose_value=False, callback=_store)

output_option = _option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    help="Tables for people, or one JSON object on one line.  [default: table]",
)
config_option = _option(
    "--config", type=click.Path(dir_okay=False), metavar="FILE", help="The owner's TOML file. Default: TABLEWIRE_CONFIG."
)

_SHARED = (
    _option(
        "--endpoint",
        multiple=True,
        metavar="HOST:PORT",
        help="Admin address of an owner; may be repeated: the first owner that answers is asked. Default: TABLEWIRE_ENDPOINTS "
        "(separated by commas), else the configuration.",
    ),
    config_option,
    _option(
        "--timeout-s",
        type=click.FloatRange(min=0, max=TIMEOUT_S_MAX, min_open=True),
        metavar="SECONDS",
        help="How long to wait for an answer.",
    ),
    _option("--tls-ca-file", metavar="FILE", help="Certificate authority to trust; enables TLS."),
    _option("--tls-cert-file", metavar="FILE", help="Client certificate."),
    _option("--tls-key-file", metavar="FILE", help="Key of the client certificate."),
    output_option,
)


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of all commands that call an owner."""
    return functools.reduce(lambda decorated, option: option(decorated), reversed(_SHARED), command)


def remote(command: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command that calls an owner: add the shared options, and pass a Session first."""

    @shared_options
    @click.pass_context
    @functools.wraps(command)
    def run(context: click.Context, /, *args: Any, **kwargs: Any) -> Any:
        with open_session(context.ensure_object(Settings)) as session:
            try:
                return command(session, *args, **kwargs)
            except KeyboardInterrupt:
                session.output.note("")
                raise CommandError("interrupted", f"interrupted{session.pending and f'; {session.pending}'}") from None

    return run


def local(command: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command that calls no owner: add --output and --config, and pass Output and Settings first."""

    @config_option
    @output_option
    @click.pass_context
    @functools.wraps(command)
    def run(context: click.Context, /, *args: Any, **kwargs: Any) -> Any:
        settings = context.ensure_object(Settings)
        output = Output(settings.output == "json")
        with _failures():
            return command(output, settings, *args, **kwargs)

    decorated: Callable[..., Any] = run
    return decorated


@contextmanager
def open_session(settings: Settings) -> Iterator[Session]:
    """Open a session with the owners that the settings name."""
    output = Output(settings.output == "json")
    with _failures():
        from owner.cli.configuration import open_client

        client = open_client(settings)
        try:
            yield Session(client, output, settings.timeout_s)
        finally:
            client.close()


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except OperatingError as error:
        raise CommandError("config", str(error)) from None
