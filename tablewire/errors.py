"""Errors of Tablewire, split by whose fault they are.

OperatingError is expected: it is handled where it arises, retried by the next tick, or told to the operator in one line.
The RuntimeErrors tell a caller that it broke the contract; InvariantError is a bug of ours and ends the process.
"""

from __future__ import annotations


class TablewireError(Exception):
    """Base of every error that this project raises on purpose."""


class OperatingError(TablewireError):
    """Expected trouble (a peer, etcd, a source, a bad request): one clear text that names what and where."""


class ConfigError(OperatingError):
    """A configuration key or value is wrong; the text holds its path."""


class CodecError(OperatingError):
    """Bytes from a peer that cannot be a message; nothing of them was applied."""


class EtcdError(OperatingError):
    """etcd did not answer or refused; the caller may retry."""


class NotLeaderError(OperatingError):
    """A guarded write was refused because this owner's leader key is gone: step down."""


class ConflictError(OperatingError):
    """A guarded write lost a race for its key while leadership holds: read again."""


class UnknownCaptureError(OperatingError, LookupError):
    """No capture of this id is known."""


class UnknownChangefeedError(OperatingError, LookupError):
    """No changefeed of this id is known."""


class EpochRefusedError(OperatingError):
    """The sink holds a newer assignment_epoch: another processor has taken the span over."""


class ConcurrentTickError(TablewireError, RuntimeError):
    """tick was called while another tick of the same scheduler was running."""


class ClosedError(TablewireError, RuntimeError):
    """The object was used after close."""


class InvariantError(TablewireError):
    """A bug of ours. `story` tells what the row had been through."""

    def __init__(self, what: str, story: str = "") -> None:
        super().__init__(f"{what}: {story}" if story else what)
        self.what = what
        self.story = story
