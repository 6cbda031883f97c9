"""Configuration: its sources, which of them wins, and the errors for invalid values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from owner.core.scheduler_config import SchedulerConfig
from owner.owner_config import OwnerConfig, SchedulerSection
from processor.processor_config import ProcessorConfig
from tablewire.errors import ConfigError
from tablewire.runtime.config import Section, describe, flatten, key, load, load_with_origins

WITHOUT_UNIT = ("interval", "timeout", "ttl", "delay", "period", "age", "size", "margin", "wait", "backoff", "memory", "rate")
"""How the name of a time or a size would end without its unit."""


class Lease(Section, frozen=True, kw_only=True):
    ttl_ms: Annotated[int, key("How long", ge=10, le=1000)] = 100
    share: Annotated[float, key("How much", gt=0, lt=1)] = 0.5


class Demo(Section, frozen=True, kw_only=True):
    name: Annotated[str, key("A name", min_length=1, max_length=8)] = "demo"
    hosts: Annotated[tuple[str, ...], key("Hosts", min_length=1)] = ("a",)
    labels: Annotated[dict[str, str], key("Labels")] = msgspec.field(default_factory=dict)
    mode: Annotated[Literal["fast", "slow"], key("A mode")] = "fast"
    enabled: Annotated[bool, key("A switch")] = False
    lease: Lease = Lease()

    def __post_init__(self) -> None:
        if self.mode == "slow" and self.lease.ttl_ms < 50:
            raise ValueError("mode slow needs lease.ttl_ms of at least 50")


def demo(
    tmp_path: Path, text: str = "", environ: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> Demo:
    file = tmp_path / "demo.toml"
    file.write_text(text, encoding="utf-8")
    return load(Demo, files=[file], environ=environ, flags=flags)


def test_without_sources_the_defaults_apply() -> None:
    """Without a file, variables and flags the defaults apply."""
    assert load(Demo) == Demo()


def test_flags_beat_the_environment_beats_the_file(tmp_path: Path) -> None:
    """Each source overrides the previous one, key by key."""
    text = 'name = "file"\nmode = "slow"\n[lease]\nttl_ms = 60\nshare = 0.25\n'
    environ = {"TABLEWIRE_LEASE__TTL_MS": "70", "TABLEWIRE_NAME": "env", "HOME": "/"}
    found = demo(tmp_path, text, environ, {"lease.ttl_ms": 80, "mode": None})
    assert found == Demo(name="env", mode="slow", lease=Lease(ttl_ms=80, share=0.25))


def test_a_later_file_overrides(tmp_path: Path) -> None:
    """A later file overrides an earlier one, key by key."""
    (tmp_path / "a.toml").write_text('name = "a"\n[lease]\nttl_ms = 20\n')
    (tmp_path / "b.toml").write_text('name = "b"\n[lease]\nshare = 0.1\n')
    found, origins = load_with_origins(Demo, files=[tmp_path / "a.toml", tmp_path / "b.toml"])
    assert found == Demo(name="b", lease=Lease(ttl_ms=20, share=0.1))
    assert origins == {
        "name": f"file {tmp_path / 'b.toml'}",
        "lease.ttl_ms": f"file {tmp_path / 'a.toml'}",
        "lease.share": f"file {tmp_path / 'b.toml'}",
    }


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({"TABLEWIRE_HOSTS": "a:1, b:2,"}, Demo(hosts=("a:1", "b:2"))),
        ({"TABLEWIRE_HOSTS": '["a,b"]'}, Demo(hosts=("a,b",))),
        ({"TABLEWIRE_LABELS": "zone=a,rack=7=8"}, Demo(labels={"zone": "a", "rack": "7=8"})),
        ({"TABLEWIRE_LABELS": '{"zone":"a"}'}, Demo(labels={"zone": "a"})),
        ({"TABLEWIRE_ENABLED": "true"}, Demo(enabled=True)),
        ({"TABLEWIRE_ENABLED": "0"}, Demo(enabled=False)),
        ({"TABLEWIRE_LEASE__SHARE": "0.75"}, Demo(lease=Lease(share=0.75))),
        ({"TABLEWIRE_NAME": "7"}, Demo(name="7")),
        ({"TABLEWIRE_ETCD_BIN": "/somewhere", "OTHER": "x"}, Demo()),
    ],
)
def test_text_becomes_what_the_key_is(environ: Mapping[str, str], wanted: Demo) -> None:
    """Numbers, booleans, lists and maps can be given as text."""
    assert load(Demo, environ=environ) == wanted


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nam = 1", "unknown key nam (did you mean name?)"),
        ("zzz = 1", "unknown key zzz"),
        ("name = 1", "name: Expected `str`, got `int`: '1'"),
        ("[lease]\nttl = 1", "unknown key lease.ttl (did you mean lease.ttl_ms?)"),
        ("[lease]\nttl_ms = 5", "lease.ttl_ms: Expected `int` >= 10: '5'"),
        ("[lease]\nttl_ms = 5000", "lease.ttl_ms: Expected `int` <= 1000: '5000'"),
        ('[lease]\nttl_ms = "50"', "lease.ttl_ms: Expected `int`, got `str`: '50'"),
        ("[lease]\nshare = 1.0", "lease.share: Expected `float` < 1.0: '1.0'"),
        ("lease = 5", "lease is a section, write [lease]"),
        ("hosts = []", "hosts: Expected `array` of length >= 1: '[]'"),
        ('hosts = ["a", 1]', "hosts[1]: Expected `str`, got `int`"),
        ("[labels]\nzone = 1", "labels[...]: Expected `str`, got `int`"),
        ('mode = "x"', "mode: Invalid enum value 'x' (one of fast, slow): 'x'"),
        ('mode = "slow"\n[lease]\nttl_ms = 20', "configuration: mode slow needs lease.ttl_ms of at least 50"),
        ("name = ", "not valid TOML"),
        ('name = "a"\nname = "b"', "not valid TOML"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, reason: str) -> None:
    """The error names the file, the path of the key and the reason."""
    with pytest.raises(ConfigError) as caught:
        demo(tmp_path, text)
    assert str(caught.value).startswith(f"file {tmp_path / 'demo.toml'}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({"TABLEWIRE_NAM": "x"}, "environment variable TABLEWIRE_NAM: no such key (did you mean TABLEWIRE_NAME?)"),
        ({"TABLEWIRE_LEASE_TTL_MS": "5"}, "no such key (did you mean TABLEWIRE_LEASE__TTL_MS?)"),
        ({"TABLEWIRE_LEASE__TTL_MS": "x"}, "environment variable TABLEWIRE_LEASE__TTL_MS: lease.ttl_ms: Expected `int`"),
        ({"TABLEWIRE_LEASE__TTL_MS": ""}, "lease.ttl_ms: Expected `int`"),
        ({"TABLEWIRE_LABELS": "zone"}, "labels: expected name=value,name=value"),
        ({"TABLEWIRE_HOSTS": "[1"}, "hosts: not valid JSON"),
        ({"TABLEWIRE_LEASE__SHARE": "nan"}, "lease.share"),
        ({"TABLEWIRE_NAME": "postgresql://u:secret@h/d"}, "postgresql://u:***@h/d"),
    ],
)
def test_a_wrong_variable_is_one_line(environ: Mapping[str, str], reason: str) -> None:
    """The error names the variable, the key and the reason, and contains no password."""
    with pytest.raises(ConfigError) as caught:
        load(Demo, environ=environ)
    assert reason in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_wrong_flag_is_refused() -> None:
    """An unknown flag and an invalid value are refused."""
    with pytest.raises(ConfigError, match=r"flag lease\.tt: no such key"):
        load(Demo, flags={"lease.tt": 1})
    with pytest.raises(ConfigError, match=r"flag lease\.ttl_ms: lease\.ttl_ms: Expected `int` >= 10"):
        load(Demo, flags={"lease.ttl_ms": "1"})


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    """A missing file, a folder, and bytes that are not text are refused."""
    with pytest.raises(ConfigError, match=r"file .*gone\.toml: No such file"):
        load(Demo, files=[tmp_path / "gone.toml"])
    with pytest.raises(ConfigError, match="Is a directory"):
        load(Demo, files=[tmp_path])
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(Demo, files=[tmp_path / "b.toml"])


@pytest.mark.parametrize("kind", [OwnerConfig, ProcessorConfig])
def test_every_key_of_the_services_is_complete(kind: type[Section]) -> None:
    """Each key has a description, each number has bounds and a unit in its name, and each key can
    be given in every source.
    """
    rows = describe(kind)
    assert [row.path for row in rows] == [path for path, _ in flatten(kind())]
    for row in rows:
        assert row.doc, row.path
        assert row.environment == "TABLEWIRE_" + row.path.replace(".", "__").upper()
        if row.type in ("int", "float"):
            assert row.bounds, row.path
            assert re.split("[._]", row.path)[-1] not in WITHOUT_UNIT, f"{row.path} has no unit in its name"
        assert load(kind, flags={row.path: row.default}) == kind()
        if isinstance(row.default, str | int | float):
            assert load(kind, environ={row.environment: str(row.default).lower()}) == kind()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"etcd.endpoints": "http://h:1"}, "is not host:port"),
        ({"etcd.endpoints": "h:0"}, "is not host:port"),
        ({"etcd.endpoints": ""}, "length >= 1"),
        ({"etcd.lease_margin_ms": 6000}, "at most half of lease_ttl_ms"),
        ({"etcd.tls.cert_file": "a"}, "belong together"),
        ({"tls.enabled": True}, "needs cert_file"),
        ({"tls.enabled": True, "tls.cert_file": "a", "tls.key_file": "b"}, "require_client_cert needs ca_file"),
        ({"tls.allowed_common_names": "a"}, "allowed_common_names needs"),
    ],
)
def test_sections_check_what_goes_together(flags: Mapping[str, Any], reason: str) -> None:
    """Contradicting keys are one clear error."""
    with pytest.raises(ConfigError, match=reason):
        load(ProcessorConfig, flags=flags)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"scheduler.capture_silent_ms": 100}, "above heartbeat_interval_ms"),
        ({"scheduler.error_backoff_max_ms": 500}, "not be below error_backoff_initial_ms"),
        ({"scheduler.balance_start_percent": 5}, "above balance_stop_percent"),
        ({"scheduler.prepare_timeout_ms": 10}, "scheduler.prepare_timeout_ms: Expected `int` >= 1000"),
        ({"scheduler.brake_percent": 101}, "scheduler.brake_percent: Expected `int` <= 100"),
        ({"source.retry_max_ms": 10}, "not be below retry_min_ms"),
    ],
)
def test_the_owners_sections_check_what_goes_together(flags: Mapping[str, Any], reason: str) -> None:
    """Contradicting keys of the owner are one clear error."""
    with pytest.raises(ConfigError, match=reason):
        load(OwnerConfig, flags=flags)


def test_every_setting_of_a_scheduler_is_a_key_with_the_same_default() -> None:
    """Every setting of the core can be configured, and reaches the scheduler."""
    settings = [field.name for field in dataclasses.fields(SchedulerConfig)]
    assert not set(settings) - {field.name for field in dataclasses.fields(SchedulerSection)}
    defaults = {name: getattr(SchedulerConfig(), name) for name in settings}
    scheduler = OwnerConfig().scheduler
    assert isinstance(scheduler, SchedulerConfig)
    assert {name: getattr(scheduler, name) for name in settings} == defaults
    one_more = {name: value + 1 for name, value in defaults.items()}
    loaded = load(OwnerConfig, flags={f"scheduler.{name}": value for name, value in one_more.items()}).scheduler
    assert {name: getattr(loaded, name) for name in settings} == one_more


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"scheduler.heartbeat_interval_ms": "9"},
            "flag scheduler.heartbeat_interval_ms: scheduler.heartbeat_interval_ms: Expected `int` >= 10: '9'",
        ),
        (
            {"scheduler.add_batch_spans": "many"},
            "flag scheduler.add_batch_spans: scheduler.add_batch_spans: Expected `int`, got `str`: 'many'",
        ),
        (
            {"scheduler.capture_silent_ms": "100"},
            "flag scheduler.capture_silent_ms: scheduler: capture_silent_ms must be above heartbeat_interval_ms",
        ),
        (
            {"scheduler.error_backoff_max_ms": "10"},
            "flag scheduler.error_backoff_max_ms: scheduler: error_backoff_max_ms must not be below error_backoff_initial_ms",
        ),
    ],
)
def test_a_bad_setting_of_a_scheduler_is_named_with_its_path(flags: dict[str, str], message: str) -> None:
    """The dataclass of the core is read like any other section, with bounds and paths."""
    with pytest.raises(ConfigError) as failure:
        load(OwnerConfig, flags=flags)
    assert str(failure.value) == message
