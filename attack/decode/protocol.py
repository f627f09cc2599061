"""What the desk asks of everything that reads one protocol: streams in, observations and figures out.

A reader sees all connections of its protocol, as what one rank did is often said on several.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, ClassVar

from attack.capture.streams import Bytes, Flow
from attack.decode.directory import Directory
from attack.decode.notes import Notes
from attack.observation import Observation, Shapes


class ProtocolReader(abc.ABC):
    """Reads one protocol. For each flow: `open`, then `receive` and `gap` in the order of the stream, then `close`."""

    name: ClassVar[str]
    """As `inspect` prints it."""
    joins: ClassVar[bool] = False
    """Whether it can prove a boundary in the middle of a stream: then it is offered those that lack their start,
    and `recognizes` one once it has proven one."""
    marks_start: ClassVar[bool] = True
    """Whether a stream that `sniff` knows is then seen from its start, even where no SYN was."""

    def __init__(self, *, notes: Notes, directory: Directory, optimizer: str | None, run: bytes | None) -> None:
        """
        Args:
            notes: where it tells a person what it could not read, and why.
            directory: where ranks listen, as one protocol says it for another.
            optimizer: the job's update rule, where it was declared.
            run: the run to read, where a capture may hold several; None: the first.
        """
        self.notes = notes
        self.directory = directory
        self.optimizer = optimizer
        self.run = run

    @staticmethod
    @abc.abstractmethod
    def sniff(head: bytes) -> bool | None:
        """Whether a connection that begins with these bytes speaks it; None where more bytes must tell."""

    @abc.abstractmethod
    def open(self, flow: Flow, *, from_start: bool) -> None:
        """A stream begins. Where not `from_start`, `sniff` was not asked: it may speak anything."""

    def hint(self, flow: Flow, head: bytes) -> None:  # noqa: B027
        """A stream that is seen from its start, and perhaps never opened, began with these few bytes so far."""

    @abc.abstractmethod
    def receive(self, flow: Flow, time: float, data: Bytes) -> None:
        """Takes the next bytes; copies what it keeps."""

    @abc.abstractmethod
    def gap(self, flow: Flow, time: float, length: int) -> None:
        """Takes a hole."""

    def doubt(self, flow: Flow, start: int, stop: int) -> None:
        """Bytes of a stream, received or still to come, of which two different copies were captured."""
        self.notes.add(f"flow {flow}, byte {start}: {stop - start} bytes were captured twice, and differ")

    @abc.abstractmethod
    def close(self, flow: Flow, *, finished: bool) -> None:
        """A stream ends. `finished`: its sender said so; else it may have gone on, unseen."""

    def recognizes(self, flow: Flow) -> bool:
        """Whether a stream does speak this protocol, as far as it has been read."""
        return True

    def observations(self, *, end: bool = False) -> Iterator[Observation]:
        """What is ready, in order of step and rank; at the end, all that is left."""
        return iter(())

    @property
    def world_size(self) -> int | None:
        """Ranks of the job, where they were seen."""
        return None

    @property
    def shapes(self) -> Shapes | None:
        """Shape of each parameter, where it was seen."""
        return None

    def groups(self) -> list[dict[str, Any]]:
        """Groups of ranks that exchange among themselves, and what: one entry a group."""
        return []

    def sealed(self) -> list[dict[str, Any]]:
        """What encrypted traffic still gives away: one entry a flow."""
        return []
