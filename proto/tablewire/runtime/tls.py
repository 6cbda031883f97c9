"""TLS identities from configuration: credentials for gRPC servers and channels and for etcd, and who may call a server.

Files are read and checked when the process starts: a certificate that does not fit its key is one ConfigError that names both,
not a handshake that fails later without a word.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import grpc
import structlog

from tablewire.errors import ConfigError
from tablewire.runtime.etcd import Credentials
from tablewire.runtime.sections import ClientTlsSection, PeerTlsSection, TlsSection

PEM_BYTES_MAX = 1024 * 1024

_log = structlog.get_logger("tablewire.tls")


def etcd_credentials(section: ClientTlsSection) -> Credentials | None:
    """None: plain text."""
    if not section.enabled:
        return None
    root, key, chain = _load(section, "etcd.tls")
    return Credentials(root, key, chain)


def server_credentials(section: PeerTlsSection) -> grpc.ServerCredentials | None:
    """None: plain text."""
    if not section.enabled:
        return None
    root, key, chain = _load(section, "tls")
    return grpc.ssl_server_credentials(
        [(key, chain)],
        root_certificates=root if section.require_client_cert else None,
        require_client_auth=section.require_client_cert,
    )


def channel_credentials(section: PeerTlsSection | ClientTlsSection) -> grpc.ChannelCredentials | None:
    """None: plain text."""
    if not section.enabled:
        return None
    root, key, chain = _load(section, "tls")
    return grpc.ssl_channel_credentials(root, key, chain)


def interceptors(section: PeerTlsSection) -> tuple[grpc.ServerInterceptor, ...]:
    """For the servers: the check of allowed_common_names, if there are any."""
    return (CommonNames(section.allowed_common_names),) if section.enabled and section.allowed_common_names else ()


def warn_of_roles(section: PeerTlsSection) -> None:
    """Logs it when every certificate of the authority may call, whatever its role. Once, at the start."""
    if section.enabled and not section.allowed_common_names:
        _log.warning("any_certificate_may_call", key="tls.allowed_common_names", reason="it is empty: roles are not told apart")


class CommonNames(grpc.ServerInterceptor):  # type: ignore[misc]
    """Lets only clients call whose certificate has one of these common names; PERMISSION_DENIED, naming the one it has."""

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(allowed)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        if handler.request_streaming:
            kind = "stream_stream" if handler.response_streaming else "stream_unary"
        else:
            kind = "unary_stream" if handler.response_streaming else "unary_unary"
        call = getattr(handler, kind)

        def checked(request: Any, context: Any) -> Any:
            names = [name.decode("utf-8", "replace") for name in context.auth_context().get("x509_common_name", ())]
            if self._allowed.isdisjoint(names):
                context.abort(
                    grpc.StatusCode.PERMISSION_DENIED, f"certificate of {', '.join(names) or 'nobody'} may not call here"
                )
            return call(request, context)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(checked, handler.request_deserializer, handler.response_serializer)


def _load(section: TlsSection, path: str) -> tuple[bytes | None, bytes | None, bytes | None]:
    """The PEM texts (root, key, chain), each None where no file is named."""
    root = _read(f"{path}.ca_file", section.ca_file)
    key = _read(f"{path}.key_file", section.key_file)
    chain = _read(f"{path}.cert_file", section.cert_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if root is not None:
        try:
            context.load_verify_locations(section.ca_file)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"{path}.ca_file: {section.ca_file} holds no usable certificates: {error}") from error
    if chain is not None:
        try:
            context.load_cert_chain(section.cert_file, section.key_file, password=_refuse)
        except (ssl.SSLError, OSError, ValueError) as error:
            reason = f"{section.cert_file} and {section.key_file} are no usable pair: {error}"
            raise ConfigError(f"{path}.cert_file, {path}.key_file: {reason}") from error
    return root, key, chain


def _read(path: str, file: str) -> bytes | None:
    if not file:
        return None
    try:
        with Path(file).open("rb") as stream:
            text = stream.read(PEM_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {file}: {error.strerror}") from error
    if len(text) > PEM_BYTES_MAX:
        raise ConfigError(f"{path}: {file} is larger than {PEM_BYTES_MAX} bytes")
    return text


def _refuse() -> str:
    """OpenSSL would ask the terminal for a passphrase."""
    raise ValueError("the key is encrypted, and there is nobody to ask for its passphrase")
