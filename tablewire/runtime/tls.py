"""TLS identities from configuration: credentials for gRPC servers and channels and for etcd, and who may call a server.

Files are read and checked when the process starts: a certificate that does not fit its key is one ConfigError that names both,
not a handshake that fails later without a word. Replaced files need no restart: connections that stand go on, each new one, of a
server and of a client, is made with what the files hold by then.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import grpc
import structlog

from tablewire.errors import ConfigError
from tablewire.etcd.session import Credentials, Login
from tablewire.runtime.sections import ClientTlsSection, EtcdSection, PeerTlsSection, TlsSection

PEM_BYTES_MAX = 1024 * 1024

_log = structlog.get_logger("tablewire.tls")


def etcd_credentials(section: ClientTlsSection) -> Callable[[], Credentials] | None:
    """What EtcdSession asks for its credentials. None: plain text."""
    return PemFiles(section, "etcd.tls").current if section.enabled else None


def server_credentials(section: PeerTlsSection) -> grpc.ServerCredentials | None:
    """Each new connection is served with what the files hold then. None: plain text."""
    if not section.enabled:
        return None
    files = PemFiles(section, "tls")
    served = files.current()

    def configuration(pem: Credentials) -> grpc.ServerCertificateConfiguration:
        root = pem.root if section.require_client_cert else None
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], root_certificates=root)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Before each handshake, on a thread of gRPC's; None: as before."""
        nonlocal served
        now = files.current()
        if now == served:
            return None
        served = now
        return configuration(now)

    return grpc.dynamic_ssl_server_credentials(
        configuration(served), fetch, require_client_authentication=section.require_client_cert
    )


def channel_credentials(section: PeerTlsSection | ClientTlsSection) -> grpc.ChannelCredentials | None:
    """Of now, for a process that does not live long. None: plain text."""
    provide = renewed_channel_credentials(section)
    return provide() if provide is not None else None


def renewed_channel_credentials(section: PeerTlsSection | ClientTlsSection) -> Callable[[], grpc.ChannelCredentials] | None:
    """What to open a channel with, to be asked again when a connection has failed; the same object while the files are the same.
    Any thread. None: plain text."""
    if not section.enabled:
        return None
    files, lock = PemFiles(section, "tls"), threading.Lock()
    made: tuple[Credentials, grpc.ChannelCredentials] | None = None

    def provide() -> grpc.ChannelCredentials:
        nonlocal made
        with lock:
            now = files.current()
            if made is None or made[0] != now:
                made = now, grpc.ssl_channel_credentials(now.root, now.key, now.chain)
            return made[1]

    return provide


class PemFiles:
    """The files of one identity, read again when they have changed. ConfigError when they are unusable at the start; later,
    also while they are being replaced one by one, the last usable ones go on, and the log says why. Any thread."""

    def __init__(self, section: TlsSection, path: str) -> None:
        self._section, self._path = section, path
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._pem = _load(section, path)

    def current(self) -> Credentials:
        """As the files are at this moment."""
        with self._lock:
            stamps = self._stamps()
            if stamps == self._seen:
                return self._pem
            try:
                pem = _load(self._section, self._path)
            except ConfigError as error:
                self._seen = stamps
                _log.warning("certificates_unusable", reason=str(error))
                return self._pem
            if self._stamps() != stamps:
                return self._pem  # replaced while they were read: the next connection looks again
            self._seen = stamps
            if pem != self._pem:
                self._pem = pem
                _log.info("certificates_replaced", key=self._path, cert_file=self._section.cert_file)
            return self._pem

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes with the files' contents."""
        return tuple(map(_stamp, (self._section.ca_file, self._section.cert_file, self._section.key_file)))


def interceptors(section: PeerTlsSection) -> tuple[grpc.ServerInterceptor, ...]:
    """For the servers: the check of allowed_common_names, if there are any."""
    return (CommonNames(section.allowed_common_names),) if section.enabled and section.allowed_common_names else ()


def etcd_login(section: EtcdSection) -> Login | None:
    """None: etcd is told no user. ConfigError when the password cannot be read; it is read again at every login."""
    if not section.username:
        return None

    def password() -> str:
        try:
            text = (_read("etcd.password_file", section.password_file) or b"").decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"etcd.password_file: {section.password_file} is no text of UTF-8") from error
        if not text:
            raise ConfigError(f"etcd.password_file: {section.password_file} is empty")
        return text

    password()
    if not section.tls.enabled:
        _log.warning("etcd_password_in_plain_text", key="etcd.tls.enabled", reason="it is false: whoever listens hears it")
    return Login(section.username, password)


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


def _load(section: TlsSection, path: str) -> Credentials:
    """The PEM texts, each None where no file is named."""
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
    return Credentials(root, key, chain)


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


def _stamp(file: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file) if file else None
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size) if found is not None else None


def _refuse() -> str:
    """OpenSSL would ask the terminal for a passphrase."""
    raise ValueError("the key is encrypted, and there is nobody to ask for its passphrase")
