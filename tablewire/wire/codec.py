"""Messages as bytes and back. Pure functions, for any thread.

`encode_message` and `decode_message` convert one message, `BatchBuilder` and `decode_batch` all
messages of one call of Exchange. Decoding is strict: whatever the bytes are, the result is a valid
message or a CodecError that names the field. Encoding raises CodecError, before anything is sent,
for values that break the contract of tablewire/model/messages.py (a bug of the caller).

A decoder accepts several versions and an encoder writes a given one, while a Message is always as
in tablewire/model/messages.py: differences between versions are translated here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, EncodeError

from tablewire.errors import CodecError
from tablewire.model.ids import ChangefeedID
from tablewire.model.messages import PROTOCOL_VERSION, ActiveChangefeed, Batch, Message
from tablewire.v1 import schedule_pb2 as pb
from tablewire.wire.bodies import RowBudget, fits, read_body, rows_of, write_body
from tablewire.wire.limits import (
    MAX_ACTIVE_CHANGEFEEDS,
    MAX_MESSAGE_BYTES,
    MAX_MESSAGES_PER_BATCH,
    MAX_NAME_BYTES,
    MAX_ROWS_PER_BATCH,
    MAX_ROWS_PER_MESSAGE,
)
from tablewire.wire.versions import SUPPORTED_VERSIONS, ProtocolVersions

_Parsed = TypeVar("_Parsed", pb.Batch, pb.Envelope)
_SERVICE = pb.DESCRIPTOR.services_by_name["ProcessorService"]
EXCHANGE_SERVICE: Final[str] = _SERVICE.full_name
EXCHANGE_METHOD: Final[str] = _SERVICE.methods_by_name["Exchange"].name


def encode_message(message: Message, version: int | None = None) -> bytes:
    """Encode one message, in the message's own version if none is given."""
    envelope = pb.Envelope(
        version=fits(message.version if version is None else version, 32, "version"),
        sender=_name(message.sender, "sender"),
        receiver=_name(message.receiver, "receiver"),
        namespace=_name(message.changefeed.namespace, "namespace", may_be_empty=True),
        changefeed=_name(message.changefeed.id, "changefeed"),
        owner_revision=fits(message.owner_revision, 63, "owner_revision"),
        changefeed_epoch=fits(message.changefeed_epoch, 64, "changefeed_epoch"),
        processor_epoch=fits(message.processor_epoch, 64, "processor_epoch"),
        number=fits(message.number, 64, "number"),
        echo=fits(message.echo, 64, "echo"),
    )
    write_body(envelope, message)
    return _serialized(envelope, "message")


def decode_message(data: bytes | bytearray | memoryview, versions: ProtocolVersions = SUPPORTED_VERSIONS) -> Message:
    """Decode one message."""
    return _read_envelope(_parsed(pb.Envelope(), data, "message"), RowBudget(MAX_ROWS_PER_MESSAGE), versions)


def encode_batch(batch: Batch) -> bytes:
    """Encode a batch; raise CodecError if not all of its messages fit."""
    builder = BatchBuilder(batch.sender, batch.receiver, batch.owner_revision, batch.active, batch.version)
    for index, message in enumerate(batch.messages):
        if not builder.add(message):
            raise CodecError(f"envelopes[{index}]: the batch exceeds its limits")
    return builder.finish()


def decode_batch(data: bytes | bytearray | memoryview, versions: ProtocolVersions = SUPPORTED_VERSIONS) -> Batch:
    """Decode a batch."""
    batch = _parsed(pb.Batch(), data, "batch")
    _require_version(batch.version, versions)
    if len(batch.envelopes) > MAX_MESSAGES_PER_BATCH:
        raise CodecError(f"envelopes: {len(batch.envelopes)} of them, at most {MAX_MESSAGES_PER_BATCH}")
    if batch.owner_revision < 0:
        raise CodecError(f"owner_revision: {batch.owner_revision} is negative")
    sender, receiver = _name(batch.sender, "sender"), _name(batch.receiver, "receiver")
    rows = RowBudget(MAX_ROWS_PER_BATCH)
    messages: list[Message] = []
    for index, envelope in enumerate(batch.envelopes):
        try:
            message = _read_envelope(envelope, rows, versions)
            _require_ends(message, sender, receiver, batch.owner_revision)
        except CodecError as error:
            raise CodecError(f"envelopes[{index}].{error}") from None
        messages.append(message)
    return Batch(sender, receiver, batch.owner_revision, _read_active(batch.active), tuple(messages), batch.version)


class BatchBuilder:
    """Encodes messages into one batch as long as they fit. One thread."""

    def __init__(
        self,
        sender: str,
        receiver: str,
        owner_revision: int,
        active: Iterable[ActiveChangefeed] = (),
        version: int = PROTOCOL_VERSION,
    ) -> None:
        self._sender, self._receiver, self._owner_revision, self._version = sender, receiver, owner_revision, version
        batch = pb.Batch(
            version=fits(version, 32, "version"),
            sender=_name(sender, "sender"),
            receiver=_name(receiver, "receiver"),
            owner_revision=fits(owner_revision, 63, "owner_revision"),
        )
        for one in active:
            batch.active.add(
                namespace=_name(one.changefeed.namespace, "active.namespace", may_be_empty=True),
                id=_name(one.changefeed.id, "active.id"),
                epoch=fits(one.epoch, 64, "active.epoch"),
            )
        if len(batch.active) > MAX_ACTIVE_CHANGEFEEDS:
            raise CodecError(f"active: {len(batch.active)} changefeeds, at most {MAX_ACTIVE_CHANGEFEEDS}")
        self._parts = [_serialized(batch, "batch")]
        self._bytes = len(self._parts[0])
        self._rows = 0

    def __len__(self) -> int:
        return len(self._parts) - 1

    def add(self, message: Message) -> bool:
        """Add the message; return False if the batch is full. Raise CodecError if it fits into none."""
        _require_ends(message, self._sender, self._receiver, self._owner_revision)
        body = encode_message(message, self._version)
        # The tag and length of field 6 of Batch: the parts can be joined without copying the
        # message through protobuf again.
        head = b"\x32" + _varint(len(body))
        size, rows = len(head) + len(body), rows_of(message)
        if self._bytes + size > MAX_MESSAGE_BYTES:
            if len(self) == 0:
                raise CodecError(f"message: {len(body)} bytes, at most {MAX_MESSAGE_BYTES} with its batch")
            return False
        if self._rows + rows > MAX_ROWS_PER_BATCH or len(self) >= MAX_MESSAGES_PER_BATCH:
            return False
        self._parts.append(head + body)
        self._bytes += size
        self._rows += rows
        return True

    def finish(self) -> bytes:
        return b"".join(self._parts)


# ---------------------------------------------------------------------------------------------------------------------


def _read_envelope(envelope: pb.Envelope, rows: RowBudget, versions: ProtocolVersions) -> Message:
    _require_version(envelope.version, versions)
    if envelope.owner_revision < 0:
        raise CodecError(f"owner_revision: {envelope.owner_revision} is negative")
    return Message(
        sender=_name(envelope.sender, "sender"),
        receiver=_name(envelope.receiver, "receiver"),
        changefeed=ChangefeedID(
            _name(envelope.namespace, "namespace", may_be_empty=True), _name(envelope.changefeed, "changefeed")
        ),
        owner_revision=envelope.owner_revision,
        changefeed_epoch=envelope.changefeed_epoch,
        processor_epoch=envelope.processor_epoch,
        number=envelope.number,
        echo=envelope.echo,
        body=read_body(envelope, rows),
    )


def _read_active(active: Iterable[pb.ActiveChangefeed]) -> tuple[ActiveChangefeed, ...]:
    found: dict[ChangefeedID, ActiveChangefeed] = {}
    for index, one in enumerate(active):
        if index >= MAX_ACTIVE_CHANGEFEEDS:
            raise CodecError(f"active: more than {MAX_ACTIVE_CHANGEFEEDS} changefeeds")
        path = f"active[{index}]"
        changefeed = ChangefeedID(_name(one.namespace, f"{path}.namespace", may_be_empty=True), _name(one.id, f"{path}.id"))
        if changefeed in found:
            raise CodecError(f"{path}: {changefeed} is named twice")
        found[changefeed] = ActiveChangefeed(changefeed, one.epoch)
    return tuple(found.values())


def _require_version(version: int, versions: ProtocolVersions) -> None:
    if version not in versions:
        raise CodecError(f"version: {version} is not supported, only {versions}")


def _require_ends(message: Message, sender: str, receiver: str, owner_revision: int) -> None:
    """Raise CodecError unless the message is between the two ends of its batch."""
    for path, found, wanted in (
        ("sender", message.sender, sender),
        ("receiver", message.receiver, receiver),
        ("owner_revision", message.owner_revision, owner_revision),
    ):
        if found != wanted:
            raise CodecError(f"{path}: {found!r} is not its batch's, {wanted!r}")


def _name(text: str, path: str, *, may_be_empty: bool = False) -> str:
    try:
        length = len(text.encode())
    except (UnicodeEncodeError, AttributeError):
        raise CodecError(f"{path}: {text!r} is not UTF-8 text") from None
    if length > MAX_NAME_BYTES or not (length or may_be_empty):
        raise CodecError(f"{path}: {length} bytes, wanted 1 to {MAX_NAME_BYTES}")
    return text


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _serialized(message: pb.Batch | pb.Envelope, what: str) -> bytes:
    try:
        data = message.SerializeToString()
    except EncodeError as error:
        raise CodecError(f"{what}: {error}") from None
    _require_size(len(data), what)
    return data


def _parsed(target: _Parsed, data: bytes | bytearray | memoryview, what: str) -> _Parsed:
    _require_size(len(data), what)
    try:
        target.ParseFromString(data if isinstance(data, bytes) else bytes(data))
    except DecodeError as error:
        raise CodecError(f"{what}: {error}") from None
    return target


def _require_size(size: int, what: str) -> None:
    if size > MAX_MESSAGE_BYTES:
        raise CodecError(f"{what}: {size} bytes, at most {MAX_MESSAGE_BYTES}")
