"""Errors of Tablewire, by whose fault they are.

An OperatingError is expected: it is handled where it arises, retried by the next tick, or shown to
the operator in one line. ConcurrentTickError and ClosedError mean that a caller broke a contract,
InvariantError that Tablewire has a bug.
"""

from __future__ import annotations


class TablewireError(Exception):
    """Base of every error that this project raises on purpose."""


class OperatingError(TablewireError):
    """An expected failure of a peer, etcd, a source or a request; the text says what and where."""


class ConfigError(OperatingError):
    """A configuration key or value is wrong; the text contains its path."""


class CodecError(OperatingError):
    """Bytes from a peer are not a valid message; nothing of them was applied."""


class EtcdError(OperatingError):
    """etcd did not answer or refused; the caller may retry."""


class NotLeaderError(OperatingError):
    """A guarded write was refused because this owner no longer leads: step down."""


class ConflictError(OperatingError):
    """A guarded write lost a race for its key although this owner still leads: read the key again."""


class UnknownCaptureError(OperatingError, LookupError):
    """There is no capture with this id."""


class UnknownChangefeedError(OperatingError, LookupError):
    """There is no changefeed with this id."""


class EpochRefusedError(OperatingError):
    """The sink holds a newer assignment_epoch: another processor has taken over the span."""


class ChangesLostError(OperatingError):
    """The source no longer has changes that the sink needs, or lacks changes that the sink holds: no retry can help."""


class ConcurrentTickError(TablewireError, RuntimeError):
    """tick was called while another tick of the same scheduler was running."""


class ClosedError(TablewireError, RuntimeError):
    """The object was used after close."""


class InvariantError(TablewireError):
    """A bug of Tablewire, which ends the process. story: what happened to the row before."""

    def __init__(self, what: str, story: str = "") -> None:
        super().__init__(f"{what}: {story}" if story else what)
        self.what = what
        self.story = story
