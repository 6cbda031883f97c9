"""docs/metrics.md is generated from the metrics of both services, which follow rules for names and labels."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from docs.tools.metrics_page import families, render

PAGE = Path(__file__).resolve().parent.parent / "docs/metrics.md"


def test_the_page_is_up_to_date() -> None:
    """The page is what the generator writes."""
    assert PAGE.read_text() == render(), "run `python -m docs.tools.metrics_page --write docs/metrics.md`"


def test_every_family_has_help_and_a_good_name() -> None:
    """Names end with their unit, labels have a bounded number of values, and no name has two types."""
    seen: dict[str, str] = {}
    for name, kind, labels, doc in families():
        assert len(doc) > 5, name
        assert re.fullmatch(r"tablewire_(build_info|(owner|processor)_[a-z_]+)", name), name
        assert not re.search(r"_(ms|s|kb|mb)$", name), f"{name}: seconds and bytes are the units"
        assert set(labels) <= {"changefeed", "capture", "state", "reason", "outcome", "why", "kind", "service", "version"}, name
        assert seen.setdefault(name, kind) == kind


def test_a_hung_tick_is_unhealthy() -> None:
    """/healthz of a leader reports an error if its tick hangs, and no error otherwise."""
    from owner.service import HANGS_AFTER_S, OwnerService

    def healthy(since_tick_s: float, is_loaded: bool = True) -> str:
        service = OwnerService.__new__(OwnerService)
        service.term = cast(Any, SimpleNamespace(is_loaded=is_loaded, since_tick_s=lambda: since_tick_s))
        return service._healthy()

    assert healthy(HANGS_AFTER_S + 1) == f"no tick for {HANGS_AFTER_S + 1:.0f} s"
    assert healthy(HANGS_AFTER_S + 1, is_loaded=False) == ""
    assert healthy(0.1) == ""
