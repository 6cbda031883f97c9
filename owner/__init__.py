"""The owner service: an elected process that ticks one Scheduler for each changefeed.

core/ decides, scheduling/ is its thread-safe interface, events/ records what happens, changefeed/ runs one changefeed,
exchange/ calls the processors, leadership/ runs an elected term, admin/ and cli/ serve operators, and service.py
composes all of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from owner.core.scheduler_config import SchedulerConfig
    from owner.scheduling.scheduler import InfoProvider, Scheduler, new_scheduler
    from owner.scheduling.snapshot import Snapshot
    from tablewire.model.ids import CHECKPOINT_CANNOT_PROCEED
    from tablewire.model.progress import CaptureView, SpanView

__all__ = [
    "CHECKPOINT_CANNOT_PROCEED",
    "CaptureView",
    "InfoProvider",
    "Scheduler",
    "SchedulerConfig",
    "Snapshot",
    "SpanView",
    "new_scheduler",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import the names at their first use, so that the CLI starts without numpy."""
        if name in __all__:
            for module in ("owner.core.scheduler_config", "owner.scheduling.scheduler", "owner.scheduling.snapshot", "tablewire"):
                if hasattr(import_module(module), name):
                    return getattr(import_module(module), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
