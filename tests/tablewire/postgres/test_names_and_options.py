"""Slot names, table filters, options and URIs: what can be said without a server."""

from __future__ import annotations

import pytest

from tablewire.errors import OperatingError
from tablewire.model.ids import ChangefeedID
from tablewire.postgres import new_source
from tablewire.postgres.connections import parse_uri
from tablewire.postgres.filters import TableFilter, split_patterns
from tablewire.postgres.lsn import format_lsn, parse_lsn
from tablewire.postgres.names import is_stream_slot, slot_name, temporary_slot_name
from tablewire.postgres.options import PostgresOptions, parse_options
from tablewire.source import SourceRequest


def test_plain_id_gives_a_plain_slot_name() -> None:
    """The slot of `default/orders` is what an operator expects."""
    assert slot_name(ChangefeedID("default", "orders")) == "tablewire_orders"


def test_only_streams_of_the_changefeed_itself_can_restore_its_slot() -> None:
    """Neither the slot of a first copy counts, whose changes begin later, nor that of a changefeed with a longer name."""
    for changefeed in (ChangefeedID("default", "a"), ChangefeedID("default", "a" * 80)):
        for token, is_stream in (("shared_0123456789", True), ("catchup_0123456789", True), ("snapshot_0123456789", False)):
            assert is_stream_slot(changefeed, temporary_slot_name(changefeed, token)) is is_stream
        assert not is_stream_slot(changefeed, slot_name(changefeed))
    longer = temporary_slot_name(ChangefeedID("default", "a_b"), "shared_0123456789")
    assert not is_stream_slot(ChangefeedID("default", "a"), longer)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("default", "a_b"), ("default", "A-B")),
        (("a", "b_c"), ("a_b", "c")),
        (("default", "x" * 80), ("default", "x" * 81)),
        (("default", "a-b"), ("default", "a.b")),
    ],
)
def test_slot_names_are_unique_short_and_legal(left: tuple[str, str], right: tuple[str, str]) -> None:
    """Two changefeeds never share a slot, and the server takes every name."""
    names = [slot_name(ChangefeedID(*left)), slot_name(ChangefeedID(*right))]
    assert names[0] != names[1]
    for name in names:
        assert len(name) <= 63
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_")


def test_an_id_cannot_spell_the_digest_of_another() -> None:
    """An id that looks like a name with a digest gets a digest of its own."""
    other = slot_name(ChangefeedID("ns", "id"))
    assert slot_name(ChangefeedID("default", other.removeprefix("tablewire_"))) != other


def test_temporary_slot_names_fit() -> None:
    """The token is kept whole, the name is cut."""
    name = temporary_slot_name(ChangefeedID("default", "x" * 80), "t_1234")
    assert len(name) <= 63
    assert name.endswith("_t_1234")


def test_filter_matches_and_excludes() -> None:
    """`*` and `?` stay within their part, and `!` wins."""
    table_filter = TableFilter(["public.*", "s?.t", "!public.tmp_*"])
    assert table_filter.matches("public", "orders")
    assert table_filter.matches("public", "a.b")
    assert table_filter.matches("s1", "t")
    assert not table_filter.matches("s12", "t")
    assert not table_filter.matches("public", "tmp_1")
    assert not table_filter.matches("other", "orders")


@pytest.mark.parametrize("patterns", [[], ["orders"], ["!public.*"], ["public."], [".x"]])
def test_filter_refuses_what_cannot_match(patterns: list[str]) -> None:
    """A pattern without both parts, or only exclusions, is an error at once."""
    with pytest.raises(OperatingError):
        TableFilter(patterns)


def test_options_are_checked_by_name_and_bound() -> None:
    """Every wrong key or value is one text that names it."""
    assert parse_options({}) == PostgresOptions()
    assert parse_options({"sink_connections": "2", "binary": "off"}) == PostgresOptions(sink_connections=2, binary=False)
    for options in (
        {"nope": "1"},
        {"sink_connections": "0"},
        {"binary": "maybe"},
        {"existing_rows": "keep"},
        {"sink_connections": "x"},
    ):
        with pytest.raises(OperatingError, match=next(iter(options))):
            parse_options(options)


def test_positions_are_written_and_read() -> None:
    """pg_lsn text and number are the same thing."""
    assert parse_lsn("16/B374D848") == 0x16_B374D848
    assert format_lsn(0x16_B374D848) == "16/B374D848"


def test_uri_errors_never_hold_the_password() -> None:
    """Neither libpq's nor our own words show a secret."""
    uris = ("postgresql://u:s3cret@h/d?nonsense=1", "postgresql://u:s3cret@h/d?%zz=1", "mysql://u:s3cret@h/d")
    for uri in (*uris, "postgresql://u:s3cret/x@h/d", "postgresql://u:x/s3cret@h:1/d?sslmode=require"):
        with pytest.raises(OperatingError) as caught:
            parse_uri(uri)
        assert "s3cret" not in str(caught.value)


def test_factory_refuses_bad_requests_without_a_server() -> None:
    """new_source does no I/O and names what is wrong."""
    with pytest.raises(OperatingError, match="sink_connections"):
        new_source(
            SourceRequest(
                ChangefeedID("default", "a"),
                "postgresql://h/d",
                "blackhole://",
                ["public.*"],
                options={"sink_connections": "no"},
            )
        )


def test_quoted_parts_of_a_pattern_are_literal() -> None:
    """Dots, wildcards, commas and quotes inside of double quotes are part of the name, as in psql."""
    table_filter = TableFilter(
        ['"my.schema".*', 'public."Order"', 'public."a*b"', 's."say ""x"""', 'größe."Ä b"', '!"my.schema"."x.y"']
    )
    assert table_filter.matches("my.schema", "t")
    assert table_filter.matches("public", "Order")
    assert table_filter.matches("public", "a*b")
    assert table_filter.matches("s", 'say "x"')
    assert table_filter.matches("größe", "Ä b")
    assert not table_filter.matches("my.schema", "x.y")
    assert not table_filter.matches("my", "schema.t")
    assert not table_filter.matches("public", "order")
    assert not table_filter.matches("public", "axb")
    for pattern in ('public."t', '"public.t"', '"".t', '!"a'):
        with pytest.raises(OperatingError, match="table pattern"):
            TableFilter([pattern])
    assert split_patterns('public.*, "a,b".t ,,!x.y') == ["public.*", '"a,b".t', "!x.y"]


def test_operations_are_a_list_of_words() -> None:
    """The order does not matter, an unknown or empty word is named, and only inserts need no key."""
    assert parse_options({"operations": "delete, insert"}).operations == ("insert", "delete")
    assert parse_options({"operations": "insert,truncate"}).rules.needs_identity is False
    for text in ("insert,merge", "", "insert,"):
        with pytest.raises(OperatingError, match="operations"):
            parse_options({"operations": text})
