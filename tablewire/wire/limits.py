"""Limits of the wire. What exceeds one is refused before memory is allocated for it."""

from __future__ import annotations

from typing import Final

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""Of one encoded Batch, and therefore of one message, in both directions; gRPC has the same limit."""
MAX_ROWS_PER_MESSAGE: Final = 2**21
"""Of all columns together: a constant column of a few bytes may stand for millions of rows."""
MAX_ROWS_PER_BATCH: Final = 2**22
MAX_MESSAGES_PER_BATCH: Final = 65_536
MAX_ACTIVE_CHANGEFEEDS: Final = 65_536
MAX_NAME_BYTES: Final = 1_024
"""Of a capture id, a namespace or a changefeed id, in UTF-8."""
MAX_ERROR_CHARS: Final = 4_096
"""Of the error text of one span; the sender cuts longer ones."""
