"""docs/metrics.md is what the code says: every family of both services. `python tests/test_metrics_docs.py` writes it anew."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from owner.owner_metrics import OwnerMetrics
from processor.service.processor_metrics import ProcessorMetrics

PAGE = Path(__file__).resolve().parent.parent / "docs/metrics.md"
HEAD = """# Metrics

What `/metrics` of both services has, in Prometheus' format; the processes' own families (`process_*`, `python_*`) are left
out. A name ends with its unit (`_seconds`, `_bytes`, `_ts`: positions of the source, for PostgreSQL bytes of WAL); what has no
unit is a count. A counter's samples end with `_total`. The series of a changefeed end when it is removed, those of a
processor when it has gone, and never another's.

Only the owner that leads has series by changefeed and by processor: take the max over the owners
([monitoring.md](monitoring.md) has the reason, a dashboard and alerts).

What to alert on: `tablewire_owner_checkpoint_lag_seconds` above what you promise; `max(tablewire_owner_is_leader) < 1`;
`tablewire_owner_changefeed_state{state=~"warning|failed"} == 1`; `tablewire_owner_source_retained_bytes` near the source's disk;
`tablewire_owner_stalled_spans` that stays above 0; `tablewire_owner_brake == 1`; any increase of
`tablewire_owner_two_writers_total`.

| metric | kind | labels | meaning |
|---|---|---|---|
"""


class _Nothing:
    """A service in which nothing runs: every family is there, without a sample."""

    capture = None
    restarts = 0

    def ready(self) -> str:
        return "not registered"

    def is_leading(self) -> bool:
        return False

    def margin_s(self) -> float | None:
        return None

    def runs(self) -> Mapping[Any, Any]:
        return {}

    def peers(self) -> tuple[Any, ...]:
        return ()


def families() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """(name, kind, labels, meaning) of all of ours, in the order of the code."""
    nothing = cast(Any, _Nothing())
    for registry in (OwnerMetrics("1", nothing).registry, ProcessorMetrics("1", nothing).registry):
        for collector in collectors(registry):
            for family in collector.collect():
                labels = tuple(getattr(family, "_labelnames", None) or getattr(collector, "_labelnames", ()))
                if family.name.startswith("tablewire_"):
                    yield family.name, family.type, labels, family.documentation


def collectors(registry: CollectorRegistry) -> list[Collector]:
    return list(registry._collector_to_names)


def page() -> str:
    rows = [
        f"| `{name}` | {kind} | {', '.join(labels)} | {doc} |".replace("|  |", "| |") for name, kind, labels, doc in families()
    ]
    return HEAD + "\n".join(dict.fromkeys(rows)) + "\n"


def test_the_page_is_up_to_date() -> None:
    """Generated from the families themselves."""
    assert PAGE.read_text() == page(), "run `python tests/test_metrics_docs.py`"


def test_every_family_has_help_and_a_good_name() -> None:
    """Units come last, labels are few and bounded, and nothing is called by two names."""
    seen: dict[str, str] = {}
    for name, kind, labels, doc in families():
        assert len(doc) > 5, name
        assert re.fullmatch(r"tablewire_(build_info|(owner|processor)_[a-z_]+)", name), name
        assert not re.search(r"_(ms|s|kb|mb)$", name), f"{name}: seconds and bytes are the units"
        assert set(labels) <= {"changefeed", "capture", "state", "reason", "outcome", "why", "kind", "service", "version"}, name
        assert seen.setdefault(name, kind) == kind


def test_a_hung_tick_is_unhealthy() -> None:
    """/healthz of a leader whose loop does not come round says so, and of one whose loop does is fine."""
    from owner.service import HANGS_AFTER_S, OwnerService

    def healthy(silence_s: float, is_loaded: bool = True) -> str:
        service = OwnerService.__new__(OwnerService)
        service._term = cast(Any, SimpleNamespace(is_loaded=is_loaded, silence_s=lambda: silence_s))
        return service._healthy()

    assert healthy(HANGS_AFTER_S + 1) == f"no tick for {HANGS_AFTER_S + 1:.0f} s"
    assert healthy(HANGS_AFTER_S + 1, is_loaded=False) == ""
    assert healthy(0.1) == ""


if __name__ == "__main__":
    PAGE.write_text(page())
