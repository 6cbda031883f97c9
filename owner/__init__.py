"""The owner service: an elected process that ticks one Scheduler for each changefeed.

core/ decides, scheduling/ is its thread-safe face, changefeed/ and leadership/ are the loop around it, exchange/ talks to the
processors, events/ records what happens, admin/ and cli/ serve operators, service.py puts all of it together.
"""

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
