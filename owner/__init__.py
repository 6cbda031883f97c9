"""The owner service: an elected process that ticks one Scheduler a changefeed.

Read in this order: core/tick.py (the recipe), core/transitions.py (the rules), scheduler.py (the thread-safe face),
service.py (the loop round it), election.py, changefeeds.py, transport.py, api.py, cli/.
"""

from owner.scheduling.scheduler import (
    CHECKPOINT_CANNOT_PROCEED,
    CaptureView,
    InfoProvider,
    Scheduler,
    SchedulerConfig,
    Snapshot,
    SpanView,
    new_scheduler,
)

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
