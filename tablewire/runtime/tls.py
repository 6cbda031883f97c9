"""TLS: credentials of servers and channels from the configured files, and which clients may call.

Files are read and checked when a process starts: a certificate that does not match its key is one
ConfigError that names both files, not a handshake that fails later. Replaced files need no restart:
existing connections continue, and each new one, of a server or a client, uses what the files hold
then.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from tablewire.errors import ConfigError
from tablewire.runtime.config import read_file
from tablewire.runtime.sections import ClientTlsSection, PeerTlsSection, TlsSection

_log = structlog.get_logger("tablewire.tls")


@dataclass(frozen=True, slots=True)
class PemTexts:
    """The contents of the files of a TlsSection. root: None for the system's certificates."""

    root: bytes | None
    key: bytes | None
    chain: bytes | None


class PemFiles:
    """The files of a TlsSection, read again at each use. Any thread. path: for error texts.

    The constructor raises ConfigError if they are unusable. Later, for instance while they are
    being replaced one by one, the last usable contents stay in use, and the log says why.
    """

    def __init__(self, section: TlsSection, path: str) -> None:
        self._section, self._path = section, path
        self._lock = threading.Lock()
        self._refused: PemTexts | str | None = None  # contents, or the error of reading them
        self._pem = _read(section, path)
        _check(self._pem, section, path)

    def current(self) -> PemTexts:
        """Return the usable contents at this moment."""
        with self._lock:
            pem: PemTexts | None = None
            try:
                pem = _read(self._section, self._path)
                if pem in (self._pem, self._refused):
                    return self._pem
                _check(pem, self._section, self._path)
                if _read(self._section, self._path) != pem:
                    return self._pem  # replaced while they were checked: the next connection reads them
            except ConfigError as error:
                if self._refused != (pem or str(error)):
                    _log.warning("certificates_unusable", reason=str(error))
                self._refused = pem or str(error)
                return self._pem
            self._pem, self._refused = pem, None
            _log.info("certificates_replaced", key=self._path, cert_file=self._section.cert_file)
            return self._pem


def server_credentials(section: PeerTlsSection) -> grpc.ServerCredentials | None:
    """Return credentials that follow the files; None for plain text."""
    if not section.enabled:
        return None
    files = PemFiles(section, "tls")
    served = files.current()

    def configuration(pem: PemTexts) -> grpc.ServerCertificateConfiguration:
        root = pem.root if section.require_client_cert else None
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], root_certificates=root)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Return the changed certificates, None if unchanged. Called before each handshake, on a thread of gRPC."""
        nonlocal served
        pem = files.current()
        if pem == served:
            return None
        served = pem
        return configuration(pem)

    return grpc.dynamic_ssl_server_credentials(
        configuration(served), fetch, require_client_authentication=section.require_client_cert
    )


def channel_credentials(section: PeerTlsSection | ClientTlsSection) -> grpc.ChannelCredentials | None:
    """Return the current credentials, for a short-lived process; None for plain text."""
    provide = renewed_channel_credentials(section)
    return provide() if provide is not None else None


def renewed_channel_credentials(section: PeerTlsSection | ClientTlsSection) -> Callable[[], grpc.ChannelCredentials] | None:
    """Return a provider of credentials, to be called after a failure; None for plain text.

    It returns the same object as long as the files are unchanged.
    """
    if not section.enabled:
        return None
    files, lock = PemFiles(section, "tls"), threading.Lock()
    made: tuple[PemTexts, grpc.ChannelCredentials] | None = None

    def provide() -> grpc.ChannelCredentials:
        nonlocal made
        with lock:
            pem = files.current()
            if made is None or made[0] != pem:
                made = pem, grpc.ssl_channel_credentials(pem.root, pem.key, pem.chain)
            return made[1]

    return provide


def interceptors(section: PeerTlsSection) -> tuple[grpc.ServerInterceptor, ...]:
    """Return the check of allowed_common_names for a server, if any are configured."""
    return (CommonNames(section.allowed_common_names),) if section.enabled and section.allowed_common_names else ()


def warn_of_roles(section: PeerTlsSection) -> None:
    """Log, once at the start, that every certificate of the authority may call, whatever its role."""
    if section.enabled and not section.allowed_common_names:
        _log.warning(
            "any_certificate_may_call", key="tls.allowed_common_names", reason="it is empty, so roles are not distinguished"
        )


class CommonNames(grpc.ServerInterceptor):  # type: ignore[misc]
    """Accepts only clients whose certificate has one of these common names."""

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(allowed)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        kind = "_".join(
            "stream" if is_stream else "unary" for is_stream in (handler.request_streaming, handler.response_streaming)
        )
        call = getattr(handler, kind)

        def checked(request: Any, context: Any) -> Any:
            names = [name.decode("utf-8", "replace") for name in context.auth_context().get("x509_common_name", ())]
            if self._allowed.isdisjoint(names):
                context.abort(
                    grpc.StatusCode.PERMISSION_DENIED,
                    f"certificate of {', '.join(names) or 'a client without a name'} may not call here",
                )
            return call(request, context)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(checked, handler.request_deserializer, handler.response_serializer)


def _read(section: TlsSection, path: str) -> PemTexts:
    def read(name: str) -> bytes | None:
        file = getattr(section, name)
        return read_file(file, f"{path}.{name}: {file}") if file else None

    return PemTexts(read("ca_file"), read("key_file"), read("cert_file"))


def _check(pem: PemTexts, section: TlsSection, path: str) -> None:
    """Raise ConfigError if the files are unusable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if pem.root is not None:
        try:
            context.load_verify_locations(section.ca_file)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"{path}.ca_file: {section.ca_file} holds no usable certificates: {error}") from error
    if pem.chain is not None:
        try:
            context.load_cert_chain(section.cert_file, section.key_file, password=_refuse_passphrase)
        except (ssl.SSLError, OSError, ValueError) as error:
            reason = f"{section.cert_file} and {section.key_file} are no usable pair: {error}"
            raise ConfigError(f"{path}.cert_file, {path}.key_file: {reason}") from error


def _refuse_passphrase() -> str:
    """Prevent OpenSSL from asking the terminal."""
    raise ValueError("the key is encrypted; Tablewire cannot ask for its passphrase")
