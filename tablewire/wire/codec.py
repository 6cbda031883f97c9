"""Messages as bytes and back. With codec_columns.py the only place that knows how v1/schedule.proto lies on the wire.

`encode_message`/`decode_message` carry one envelope, `encode_batch`/`decode_batch` one turn of an Exchange; `BatchBuilder` fills
a batch up to its limits. Pure functions of their arguments, for any thread. Decoding is strict: what it cannot take whole it
refuses with a CodecError whose text names the field, and nothing else ever escapes for any bytes whatsoever. Encoding raises
CodecError for values that break the contract of types.py (a bug of the caller), before anything was sent.

Versions: what is read may have any of `versions` and what is written has `version`, while a Message is always what types.py says;
so a version that differs from it is translated here, and nowhere else.

Limits: MAX_MESSAGE_BYTES for any encoded thing; MAX_ROWS_PER_MESSAGE and MAX_ROWS_PER_BATCH bound what a few bytes can unfold to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, EncodeError

from tablewire.errors import CodecError
from tablewire.model.ids import ChangefeedID
from tablewire.model.messages import PROTOCOL_VERSION, ActiveChangefeed, Batch, Message
from tablewire.v1 import schedule_pb2 as pb
from tablewire.wire.bodies import Rows, fits, read_body, write_body
from tablewire.wire.versions import SPOKEN, ProtocolVersions

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""Of one Batch (and so of one message), both ways; gRPC is given the same limit."""
MAX_ROWS_PER_MESSAGE: Final = 2**21
MAX_ROWS_PER_BATCH: Final = 2**22
MAX_MESSAGES_PER_BATCH: Final = 65_536
MAX_ACTIVE_CHANGEFEEDS: Final = 65_536
MAX_NAME_BYTES: Final = 1_024
"""Of a capture id, a namespace, a changefeed id, in UTF-8."""

_Parsed = TypeVar("_Parsed", pb.Batch, pb.Envelope)
_SERVICE = pb.DESCRIPTOR.services_by_name["ProcessorService"]
EXCHANGE_SERVICE: Final[str] = _SERVICE.full_name
EXCHANGE_METHOD: Final[str] = _SERVICE.methods_by_name["Exchange"].name


def encode_message(message: Message, version: int | None = None) -> bytes:
    """One envelope, of the message's own version if none is given. CodecError when the message breaks its contract or is larger
    than MAX_MESSAGE_BYTES."""
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
    write_body(envelope, message.body, Rows(MAX_ROWS_PER_MESSAGE))
    return _serialized(envelope, "message")


def decode_message(data: bytes | bytearray | memoryview, versions: ProtocolVersions = SPOKEN) -> Message:
    """The message that `encode_message` made of these bytes; CodecError for any others."""
    return _read_envelope(_parsed(pb.Envelope(), data, "message"), Rows(MAX_ROWS_PER_MESSAGE), versions)


def encode_batch(batch: Batch) -> bytes:
    """One turn. CodecError when a message is not between the batch's sender and receiver, or a limit is exceeded."""
    builder = BatchBuilder(batch.sender, batch.receiver, batch.owner_revision, batch.active, batch.version)
    for index, message in enumerate(batch.messages):
        if not builder.add(message):
            raise CodecError(f"envelopes[{index}]: the batch exceeds its limits")
    return builder.finish()


def decode_batch(data: bytes | bytearray | memoryview, versions: ProtocolVersions = SPOKEN) -> Batch:
    """The batch that `encode_batch` made of these bytes; CodecError for any others."""
    batch = _parsed(pb.Batch(), data, "batch")
    _require_version(batch.version, "version", versions)
    if len(batch.envelopes) > MAX_MESSAGES_PER_BATCH:
        raise CodecError(f"envelopes: {len(batch.envelopes)} of them, at most {MAX_MESSAGES_PER_BATCH}")
    if batch.owner_revision < 0:
        raise CodecError(f"owner_revision: {batch.owner_revision} is negative")
    sender, receiver = _name(batch.sender, "sender"), _name(batch.receiver, "receiver")
    rows = Rows(MAX_ROWS_PER_BATCH)
    messages: list[Message] = []
    for index, envelope in enumerate(batch.envelopes):
        try:
            message = _read_envelope(envelope, rows, versions)
            _require_belongs(message, sender, receiver, batch.owner_revision)
        except CodecError as error:
            raise CodecError(f"envelopes[{index}].{error}") from None
        messages.append(message)
    return Batch(sender, receiver, batch.owner_revision, _read_active(batch.active), tuple(messages), batch.version)


class BatchBuilder:
    """Fills one batch with messages as long as they fit; what did not fit goes into the next turn. One thread."""

    def __init__(
        self,
        sender: str,
        receiver: str,
        owner_revision: int,
        active: Iterable[ActiveChangefeed] = (),
        version: int = PROTOCOL_VERSION,
    ) -> None:
        self._sender, self._receiver, self._owner_revision, self._version = sender, receiver, owner_revision, version
        self._batch = pb.Batch(
            version=fits(version, 32, "version"),
            sender=_name(sender, "sender"),
            receiver=_name(receiver, "receiver"),
            owner_revision=fits(owner_revision, 63, "owner_revision"),
        )
        for one in active:
            self._batch.active.add(
                namespace=_name(one.changefeed.namespace, "active.namespace", may_be_empty=True),
                id=_name(one.changefeed.id, "active.id"),
                epoch=fits(one.epoch, 64, "active.epoch"),
            )
        if len(self._batch.active) > MAX_ACTIVE_CHANGEFEEDS:
            raise CodecError(f"active: {len(self._batch.active)} changefeeds, at most {MAX_ACTIVE_CHANGEFEEDS}")
        self._parts = [_serialized(self._batch, "batch")]
        self._bytes = len(self._parts[0])
        self._rows = 0

    def __len__(self) -> int:
        return len(self._parts) - 1

    def add(self, message: Message) -> bool:
        """Takes the message in, or False: it does not fit beside what is there. CodecError: it can never be sent."""
        _require_belongs(message, self._sender, self._receiver, self._owner_revision)
        body = encode_message(message, self._version)
        # Field 6 of Batch, length-delimited: what a parent writes before a child, so that nothing is copied through pb twice.
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


def rows_of(message: Message) -> int:
    """How many rows the decoder will count for this message."""
    rows = Rows(MAX_ROWS_PER_BATCH)
    rows.count(message.body)
    return rows.taken


# ---------------------------------------------------------------------------------------------------------------------


def _read_envelope(envelope: pb.Envelope, rows: Rows, versions: ProtocolVersions) -> Message:
    _require_version(envelope.version, "version", versions)
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
        version=PROTOCOL_VERSION,
    )


def _read_active(active: Iterable[pb.ActiveChangefeed]) -> tuple[ActiveChangefeed, ...]:
    found: dict[ChangefeedID, ActiveChangefeed] = {}
    for index, one in enumerate(active):
        if index >= MAX_ACTIVE_CHANGEFEEDS:
            raise CodecError(f"active: more than {MAX_ACTIVE_CHANGEFEEDS} changefeeds")
        name = f"active[{index}]"
        changefeed = ChangefeedID(_name(one.namespace, f"{name}.namespace", may_be_empty=True), _name(one.id, f"{name}.id"))
        if changefeed in found:
            raise CodecError(f"{name}: {changefeed} is named twice")
        found[changefeed] = ActiveChangefeed(changefeed, one.epoch)
    return tuple(found.values())


def _require_version(version: int, name: str, versions: ProtocolVersions) -> None:
    if version not in versions:
        raise CodecError(f"{name}: {version} is not spoken here, only {versions}")


def _require_belongs(message: Message, sender: str, receiver: str, owner_revision: int) -> None:
    """Every message of a batch goes where the batch goes."""
    for name, mine, wanted in (
        ("sender", message.sender, sender),
        ("receiver", message.receiver, receiver),
        ("owner_revision", message.owner_revision, owner_revision),
    ):
        if mine != wanted:
            raise CodecError(f"{name}: {mine!r} is not its batch's, {wanted!r}")


def _name(text: str, name: str, *, may_be_empty: bool = False) -> str:
    """A name that may travel: valid UTF-8, bounded."""
    try:
        length = len(text.encode())
    except (UnicodeEncodeError, AttributeError):
        raise CodecError(f"{name}: {text!r} is not UTF-8 text") from None
    if length > MAX_NAME_BYTES or not (length or may_be_empty):
        raise CodecError(f"{name}: {length} bytes, wanted 1 to {MAX_NAME_BYTES}")
    return text


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _serialized(message: pb.Batch | pb.Envelope, name: str) -> bytes:
    try:
        data = message.SerializeToString()
    except EncodeError as error:
        raise CodecError(f"{name}: {error}") from None
    if len(data) > MAX_MESSAGE_BYTES:
        raise CodecError(f"{name}: {len(data)} bytes, at most {MAX_MESSAGE_BYTES}")
    return data


def _parsed(target: _Parsed, data: bytes | bytearray | memoryview, name: str) -> _Parsed:
    if len(data) > MAX_MESSAGE_BYTES:
        raise CodecError(f"{name}: {len(data)} bytes, at most {MAX_MESSAGE_BYTES}")
    try:
        target.ParseFromString(data if isinstance(data, bytes) else bytes(data))
    except DecodeError as error:
        raise CodecError(f"{name}: {error}") from None
    return target
