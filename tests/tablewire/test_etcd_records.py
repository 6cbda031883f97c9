"""Records in etcd, their keys, and URIs with passwords."""

from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tablewire.errors import ConfigError, OperatingError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.records import (
    CaptureRecord,
    ChangefeedInfo,
    ChangefeedState,
    ChangefeedStatus,
    DrainRecord,
    EvictionRecord,
    LeaderRecord,
    Record,
    decode,
    encode,
    next_epoch,
    now,
)
from tablewire.model.ids import TS_MAX, CaptureInfo, ChangefeedID
from tablewire.model.states import LivenessState
from tablewire.runtime.uris import redact_uri, resolve_uri

INFO = ChangefeedInfo(
    id="orders", source_uri="postgresql://u:${PW}@h/db", sink_uri="blackhole:", tables=["public.*"], created_at=now()
)


@pytest.mark.parametrize(
    "record",
    [
        INFO,
        CaptureRecord(id="c1", address="127.0.0.1:1", started_at=now(), labels={"zone": "a"}, liveness=LivenessState.STOPPING),
        LeaderRecord(id="o1", address="127.0.0.1:1", version="0.1.0"),
        ChangefeedStatus(checkpoint_ts=TS_MAX, resolved_ts=TS_MAX),
        DrainRecord(capture_id="c1", requested_at=now(), requested_by="operator"),
        EvictionRecord(id="c1", address="127.0.0.1:1", labels={"zone": "a"}, lease=2**62, fenced=True, requested_at=now()),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_comes_back_as_it_was_written(record: Record) -> None:
    """Every kind of record survives a round trip, and is JSON with its format."""
    value = encode(record)
    assert decode(type(record), "/k", value) == record
    fields = msgspec.json.decode(value)
    assert fields["format"] == 1
    assert "unknown" not in fields


def test_fields_of_a_newer_version_are_kept() -> None:
    """An unknown field is written back unchanged when the record is changed (rolling upgrade)."""
    newer = msgspec.json.encode({**msgspec.json.decode(encode(INFO)), "later": {"a": [1]}})
    changed = msgspec.structs.replace(decode(ChangefeedInfo, "/k", newer), state=ChangefeedState.STOPPED)
    written = msgspec.json.decode(encode(changed))
    assert written["later"] == {"a": [1]}
    assert written["state"] == "stopped"


def test_missing_fields_of_an_older_version_have_defaults() -> None:
    """Missing fields get their defaults."""
    assert decode(LeaderRecord, "/k", b'{"id":"a","address":"b"}') == LeaderRecord(id="a", address="b")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "truncated"),
        (b"\xff\xfe", "malformed"),
        (b"[]", "not a JSON object"),
        (b"{}", "required field"),
        (b'{"format":2}', "of format 2, this version reads up to 1"),
        (encode(INFO).replace(b'"epoch":1', b'"epoch":-1'), r"\$\.epoch"),
        (encode(INFO).replace(b'"start_ts":0', b'"start_ts":18446744073709551616'), "start_ts"),
        (encode(INFO).replace(b'"normal"', b'"odd"'), r"\$\.state"),
        (encode(INFO).replace(b'"tables":["public.*"]', b'"tables":"public.*"'), r"\$\.tables"),
    ],
)
def test_an_unreadable_value_names_its_key(value: bytes, reason: str) -> None:
    """An unreadable value is one OperatingError with the key and the reason."""
    with pytest.raises(OperatingError, match=reason) as caught:
        decode(ChangefeedInfo, "/tablewire/c/changefeeds/default/orders/info", value)
    assert "/tablewire/c/changefeeds/default/orders/info" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_epochs_grow_over_a_removal() -> None:
    """The next epoch is above the last one, and above all previous ones if the record was removed."""
    assert next_epoch(7, 5) == 8
    assert next_epoch(0, 5) == 5
    assert next_epoch(7, 900) == 900


def test_a_capture_record_is_a_capture_info() -> None:
    """The record contains what the scheduler needs."""
    record = CaptureRecord(id="c1", address="h:1", started_at=now(), version="1", labels={"a": "b"})
    assert record.info == CaptureInfo("c1", "h:1", "1", {"a": "b"})


def test_keys_are_those_of_the_design() -> None:
    """Each key has its path, and is converted back to what it belongs to."""
    orders = ChangefeedID("default", "orders")
    assert etcd_keys.owner_key("c", 0x1F) == "/tablewire/c/owner/000000000000001f"
    assert etcd_keys.capture_key("c", "p-1") == "/tablewire/c/captures/p-1"
    assert etcd_keys.changefeed_info_key("c", orders) == "/tablewire/c/changefeeds/default/orders/info"
    assert etcd_keys.changefeed_status_key("c", orders) == "/tablewire/c/changefeeds/default/orders/status"
    assert etcd_keys.drain_key("c", "p-1") == "/tablewire/c/drains/p-1"
    assert etcd_keys.evicted_key("c", "p-1") == "/tablewire/c/evicted/p-1"
    assert etcd_keys.event_key("c", 9) < etcd_keys.event_key("c", 10)
    assert etcd_keys.drain_of("c", "/tablewire/c/drains/p-1") == "p-1"
    assert etcd_keys.drain_of("c", "/tablewire/c/drains/p-1/x") is None
    assert etcd_keys.drain_of("c", "/tablewire/c/captures/p-1") is None
    assert etcd_keys.evicted_of("c", "/tablewire/c/evicted/p-1") == "p-1"
    assert etcd_keys.evicted_of("c", "/tablewire/c/drains/p-1") is None
    info = etcd_keys.changefeed_info_key("c", orders)
    assert etcd_keys.changefeed_of("c", info) == (orders, etcd_keys.ChangefeedKey.INFO)
    assert etcd_keys.changefeed_of("c", info + "/x") is None
    assert etcd_keys.changefeed_of("other", info) is None


@pytest.mark.parametrize("name", ["", "a/b", "..", "-a", "a b", "a\n", "é", "x" * 129])
def test_a_bad_name_never_becomes_a_key(name: str) -> None:
    """A name that is not one path element is refused, and the error says what it names."""
    with pytest.raises(OperatingError, match=r"^changefeed "):
        etcd_keys.changefeed_info_key("c", ChangefeedID("default", name))
    with pytest.raises(OperatingError, match=r"^cluster "):
        etcd_keys.owner_prefix(name)


def test_uris_are_resolved_where_they_are_used() -> None:
    """A variable is percent-encoded in the user part and the query, literal elsewhere, and not
    expanded twice.
    """
    environ = {"PW": "a@b/c${X}", "URI": "postgresql://u:p@h/d", "HOST": "h:5432"}
    assert resolve_uri("postgresql://u:${PW}@h/db", environ) == "postgresql://u:a%40b%2Fc%24%7BX%7D@h/db"
    assert resolve_uri("postgresql://h/db?password=${PW}", environ) == "postgresql://h/db?password=a%40b%2Fc%24%7BX%7D"
    assert resolve_uri("${URI}", environ) == "postgresql://u:p@h/d"
    assert resolve_uri("postgresql://u@${HOST}/d", environ) == "postgresql://u@h:5432/d"
    assert resolve_uri("file:///data/$x/{y}", {}) == "file:///data/$x/{y}"


def test_a_missing_variable_is_named() -> None:
    """An unset variable is a ConfigError with its name and without any password."""
    with pytest.raises(ConfigError, match="variable PW is not set") as caught:
        resolve_uri("postgresql://u:secret@h/db?sslpassword=${PW}", {})
    assert ":secret@" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:pw@h/db", "postgresql://u:***@h/db"),
        ("postgresql://:pw@h/db", "postgresql://:***@h/db"),
        ("postgresql://u:p/w@x@h/db?x=1", "postgresql://u:***@h/db?x=1"),
        ("postgresql://u:1/w@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:${PW}@h/db", "postgresql://u:${PW}@h/db"),
        ("postgresql://u:${PW}x@h/db", "postgresql://u:***@h/db"),
        ("postgresql://h/db?password=x&user=b", "postgresql://h/db?password=***&user=b"),
        ("postgresql://h1:1,h2:2/db", "postgresql://h1:1,h2:2/db"),
        ("postgresql://u@h:5432/db", "postgresql://u@h:5432/db"),
        ("http://[::1]:234/x", "http://[::1]:234/x"),
        ("file:///tmp/a:b@c", "file:///tmp/a:b@c"),
        ("to postgresql://u:pw@h/db and 'postgresql://v:qw@g'", "to postgresql://u:***@h/db and 'postgresql://v:***@g'"),
        ("host=h password=abc user=y", "host=h password=*** user=y"),
        ("host=h password='a b' user=y", "host=h password=*** user=y"),
        ("no secret here: 12:30, a@b", "no secret here: 12:30, a@b"),
        ("postgresql://u:pa?ss@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:p#ss@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:pa ss@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:12?34@h/db", "postgresql://u:***@h/db"),
        ("'postgresql://u:a'b@h/db' failed", "'postgresql://u:***@h/db' failed"),
        ("postgresql://h:5432/db?user=me@server", "postgresql://h:5432/db?user=me@server"),
        ("http://h:8080 failed for a@b", "http://h:8080 failed for a@b"),
        ("postgresql://h/db?password=a,b'c;d&user=x", "postgresql://h/db?password=***&user=x"),
        ("'postgresql://h/db?password=${PW}'", "'postgresql://h/db?password=${PW}'"),
        ("host=h password=a,b&c;d user=y", "host=h password=*** user=y"),
        ("host=h password=a\\ b user=y", "host=h password=*** user=y"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    """Passwords are hidden, in malformed URIs too; the rest stays readable."""
    assert redact_uri(text) == shown
    assert redact_uri(shown) == shown


@given(st.text(st.characters(exclude_characters="@\n\r", exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_any_password_is_hidden(password: str) -> None:
    """A password is hidden in a URI, alone or within a text, whatever characters it contains
    without encoding.
    """
    secret = f"\N{SNOWMAN}{password}\N{SNOWMAN}"
    for text in (f"postgresql://me:{secret}@host/db", f"cannot connect to 'postgresql://me:{secret}@host/db?x=1': timeout"):
        assert "\N{SNOWMAN}" not in redact_uri(text)
    assert "\N{SNOWMAN}" not in redact_uri(f"host=h password='{secret.replace(chr(92), '').replace(chr(39), '')}' user=me")


def test_hiding_is_fast() -> None:
    """The time is linear for any text; these took minutes when it was not."""
    start = time.monotonic()
    for text in ("a" * 50_000, "a://" * 12_000, "a://b:c" * 8_000, "token" * 10_000, "a:" * 25_000, "x://y:" + "@" * 50_000):
        redact_uri(text)
    assert time.monotonic() - start < 20
