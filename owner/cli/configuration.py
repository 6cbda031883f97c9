"""The owner's configuration as the CLI reads it, and how a command connects to an owner.

Endpoints come from --endpoint, else TABLEWIRE_ENDPOINTS, else the admin address in the
configuration; TLS from the --tls options, else the section [tls]. A client reads the configuration
file, if one is named, and the variables of the sections [admin] and [tls]; it ignores other
variables, which may be for a processor on the same machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from owner.cli.client import AdminClient
from owner.cli.settings import Settings
from owner.owner_config import OwnerConfig
from tablewire.errors import ConfigError
from tablewire.runtime.addresses import format_address, parse_address
from tablewire.runtime.config import load, load_with_origins
from tablewire.runtime.grpc import open_channel
from tablewire.runtime.sections import ClientTlsSection, PeerTlsSection

ENDPOINTS_VARIABLE = "TABLEWIRE_ENDPOINTS"
CONFIG_VARIABLE = "TABLEWIRE_CONFIG"

_CLIENT_VARIABLES = ("TABLEWIRE_ADMIN__", "TABLEWIRE_TLS__")
_EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}


def owner_config(settings: Settings, keys: Mapping[str, str]) -> tuple[OwnerConfig, dict[str, str]]:
    """Return the configuration of an owner and the origin of each key that is given. keys: from the command line."""
    return load_with_origins(OwnerConfig, files=_files(settings), environ=os.environ, flags=keys)


def open_client(settings: Settings) -> AdminClient:
    """Return a client of the owners that the settings name. It connects at its first call."""
    endpoints = _endpoints(settings)
    files = {"ca_file": settings.tls_ca_file, "cert_file": settings.tls_cert_file, "key_file": settings.tls_key_file}
    tls: ClientTlsSection | PeerTlsSection
    if any(files.values()):
        try:
            tls = ClientTlsSection(enabled=True, **files)
        except ValueError as error:
            raise ConfigError(f"--tls-*: {error}") from error
    else:
        tls = _client_config(settings).tls
    credentials = None
    if tls.enabled:
        from tablewire.runtime.tls import channel_credentials  # loads structlog, which is slow

        credentials = channel_credentials(tls)
    return AdminClient(endpoints, lambda address: open_channel(address, credentials))


def _endpoints(settings: Settings) -> list[str]:
    for origin, texts in (
        ("--endpoint", settings.endpoint),
        (ENDPOINTS_VARIABLE, (os.environ.get(ENDPOINTS_VARIABLE, ""),)),
    ):
        if words := [word for text in texts for word in text.replace(",", " ").split()]:
            return [_checked(word, origin) for word in words]
    admin = _client_config(settings).admin
    if admin.advertise:
        return [_checked(admin.advertise, "admin.advertise")]
    if admin.port == 0:
        raise ConfigError("the configuration sets admin.port to 0 (any free port): name an owner with --endpoint")
    return [format_address(_EVERY_INTERFACE.get(admin.host, admin.host), admin.port)]


def _client_config(settings: Settings) -> OwnerConfig:
    ours = {name: value for name, value in os.environ.items() if name.startswith(_CLIENT_VARIABLES)}
    return load(OwnerConfig, files=_files(settings), environ=ours)


def _files(settings: Settings) -> list[str]:
    file = settings.config or os.environ.get(CONFIG_VARIABLE, "")
    return [file] if file else []


def _checked(text: str, origin: str) -> str:
    try:
        parse_address(text)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return text
