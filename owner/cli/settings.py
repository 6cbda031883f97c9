"""Where the CLI finds the owners, and how it reads the owner's configuration.

Endpoints: flags, else TABLEWIRE_ENDPOINTS, else the admin address of the configuration (a file if one is named, and the variables
of the sections [admin] and [tls]; what else stands in the environment is of no concern to a client). TLS: flags, else [tls].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import grpc

from owner.owner_config import OwnerConfig
from tablewire.errors import ConfigError
from tablewire.runtime.addresses import format_address, parse_address
from tablewire.runtime.config import load, load_with_origins
from tablewire.runtime.grpc import open_channel
from tablewire.runtime.sections import ClientTlsSection
from tablewire.runtime.tls import channel_credentials

ENDPOINTS_VARIABLE = "TABLEWIRE_ENDPOINTS"
CONFIG_VARIABLE = "TABLEWIRE_CONFIG"

_CLIENT_VARIABLES = ("TABLEWIRE_ADMIN__", "TABLEWIRE_TLS__")
_EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}


def find_endpoints(flags: Sequence[str], config: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """host:port of the owners to ask. ConfigError when one cannot be an address."""
    if flags:
        return [_checked(text, "--endpoint") for flag in flags for text in _split(flag)]
    if _split(environ.get(ENDPOINTS_VARIABLE, "")):
        return [_checked(text, ENDPOINTS_VARIABLE) for text in _split(environ[ENDPOINTS_VARIABLE])]
    admin = _client_config(config, environ).admin
    if admin.advertise:
        return [_checked(admin.advertise, "admin.advertise")]
    if admin.port == 0:
        raise ConfigError("admin.port is 0, a free port, in the configuration: name an owner by --endpoint")
    host = _EVERY_INTERFACE.get(admin.host, admin.host)
    return [format_address(host, admin.port)]


def open_channel_with(
    tls: Mapping[str, str], config: str, environ: Mapping[str, str] = os.environ
) -> Callable[[str], grpc.Channel]:
    """How to open a channel to an owner. tls: ca_file, cert_file, key_file, as given by flags."""
    if tls:
        try:
            section: ClientTlsSection = ClientTlsSection(enabled=True, **tls)
        except ValueError as error:
            raise ConfigError(f"--tls-*: {error}") from error
        credentials = channel_credentials(section)
    else:
        credentials = channel_credentials(_client_config(config, environ).tls)
    return lambda address: open_channel(address, credentials)


def owner_config(config: str, flags: Mapping[str, str] | None = None) -> tuple[OwnerConfig, dict[str, str]]:
    """The whole configuration of an owner, and where each given key comes from."""
    return load_with_origins(OwnerConfig, files=_files(config, os.environ), environ=os.environ, flags=flags)


def _client_config(config: str, environ: Mapping[str, str]) -> OwnerConfig:
    ours = {name: value for name, value in environ.items() if name.startswith(_CLIENT_VARIABLES)}
    return load(OwnerConfig, files=_files(config, environ), environ=ours)


def _files(config: str, environ: Mapping[str, str]) -> list[str]:
    file = config or environ.get(CONFIG_VARIABLE, "")
    return [file] if file else []


def _split(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _checked(text: str, origin: str) -> str:
    try:
        parse_address(text)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return text
