"""What is known of a capture besides its packets: how many, what was not there, what could not be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CaptureStatistics:
    """What one pass over a capture has seen so far."""

    packets: int
    bytes: int
    """Of the packets, as captured."""
    dropped: int | None
    """Packets that the recorder says it missed. None where the file does not say."""
    skipped: Mapping[str, int]
    """Packets that carry no TCP segment, by reason. Empty where only packets were asked for."""
    cut_at: int | None
    """Where the file ends in the middle of a record, as a recorder leaves it that was killed: that record's first byte.
    None where the last record is whole."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Progress:
    """What the reader of a format says while it goes through a file."""

    position: int = 0
    """Everything before has been handed out."""
    dropped: int | None = None
    cut_at: int | None = None
