"""The JSON objects that `-o json` prints: the records of admin.proto, with their fields in order.

A field is never removed and never changes its meaning; new ones may be added at any time. An absent
field is null, and so is an empty one that NULL_IF_EMPTY names; keys are hexadecimal; Ts and counts
are whole numbers (unsigned, up to 64 bits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor, FieldDescriptor
    from google.protobuf.message import Message

Json: TypeAlias = dict[str, Any]

NULL_IF_EMPTY = {
    "GetStatusResponse": {"leader_revision"},
    "DrainCaptureResponse": {"note"},
    "TableRow": {"table", "start_key", "end_key", "primary", "secondary", "stall_reason", "error"},
    "Job": {"capture", "reason", "id", "by"},
    "Changefeed": {"error", "target_ts", "last_synced_ts", "source_ts"},
    "PlannedMove": {"table", "start_key", "end_key", "source"},
    "Plan": {"note"},
    "Event": {"changefeed", "subject", "text", "why", "by", "job"},
}


def to_object(record: Message) -> Json:
    """Return the record as a JSON object."""
    return {name: read(record) for name, read in _readers(record.DESCRIPTOR)}


def to_objects(records: Iterable[Message]) -> list[Json]:
    """Return each record as a JSON object."""
    return [to_object(record) for record in records]


def map_value(field: FieldDescriptor) -> FieldDescriptor | None:
    """Return the field that describes the values of a map; None if the field is not a map."""
    entry = field.message_type
    return entry.fields_by_name["value"] if entry is not None and entry.GetOptions().map_entry else None


def is_null_if_empty(field: FieldDescriptor) -> bool:
    """Return whether an empty value of the field is null in JSON."""
    record, name = field.full_name.split(".")[-2:]
    return name in NULL_IF_EMPTY.get(record, ())


@cache
def _readers(record: Descriptor) -> tuple[tuple[str, Callable[[Any], Any]], ...]:
    return tuple((field.name, _reader(field)) for field in record.fields)


def _reader(field: FieldDescriptor) -> Callable[[Any], Any]:
    """Return a function from a record to the JSON value of one of its fields."""
    name = field.name
    if map_value(field):
        return lambda record: dict(sorted(getattr(record, name).items()))
    if field.is_repeated:
        return lambda record: (to_objects if field.message_type else list)(getattr(record, name))
    if field.has_presence:
        convert = to_object if field.message_type else lambda value: value
        return lambda record: convert(getattr(record, name)) if record.HasField(name) else None
    if field.type == field.TYPE_BYTES:
        return lambda record: getattr(record, name).hex() or None
    if is_null_if_empty(field):
        return lambda record: getattr(record, name) or None
    return lambda record: getattr(record, name)
