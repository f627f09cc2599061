"""What a tap may miss, packet by packet: segments of a real capture -> what is left of them -> events of streams.

    python -m tests.attack.decode.gloo.loss RUN ...

prints how much is still known of jobs recorded by `recordings.record`, at each severity.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from attack.capture.packets import SYN, Segment
from attack.capture.reader import CaptureReader
from attack.capture.reassembly import Reassembler
from attack.capture.streams import StreamEvent
from attack.observation import Observation
from tests.attack.decode.gloo.recordings import check, observe, read_truth

Loss: TypeAlias = Callable[[list[Segment], random.Random], list[Segment]]
"""Takes packets away."""


def read_segments(path: Path, *, size: int = 1448) -> list[Segment]:
    """A capture's segments, none with more than so many bytes: a loopback's packets have up to 64 KiB."""
    return [piece for segment in CaptureReader(path).segments() for piece in _cut(segment, size)]


def _cut(segment: Segment, size: int) -> Iterator[Segment]:
    if segment.length <= size:
        yield segment
        return
    assert not segment.flags & SYN and len(segment.payload) == segment.length
    for at in range(0, segment.length, size):
        payload = segment.payload[at : at + size]
        yield segment._replace(seq=(segment.seq + at) & 0xFFFF_FFFF, payload=payload, length=len(payload))


def reassembled(segments: list[Segment]) -> list[StreamEvent]:
    """What the capture's side of the desk makes of them."""
    reassembler = Reassembler()
    events = [event for segment in segments for event in reassembler.feed(segment)]
    return [*events, *reassembler.finish()]


def at_random(share: float, *, burst: int = 1) -> Loss:
    """Each packet is missed with this probability; on average so many in a row."""

    def lose(segments: list[Segment], draw: random.Random) -> list[Segment]:
        left, missing = [], False
        for segment in segments:
            # A chain of two states, of which the missing one lasts `burst` packets and has the wanted share.
            begin = share / (burst * (1 - share))
            missing = draw.random() < (1 - 1 / burst if missing and burst > 1 else begin if burst > 1 else share)
            if not missing:
                left.append(segment)
        return left

    return lose


def one_connection(segments: list[Segment], draw: random.Random) -> list[Segment]:
    """Two ranks talk where nobody listens."""
    source, destination = draw.choice(busy(segments))
    return [one for one in segments if {one.source, one.destination} != {source, destination}]


def one_direction(segments: list[Segment], draw: random.Random) -> list[Segment]:
    """What one rank says to another."""
    gone = draw.choice(busy(segments))
    return [one for one in segments if (one.source, one.destination) != gone]


def start_cut(segments: list[Segment], draw: random.Random) -> list[Segment]:
    """A tap that came late."""
    return segments[int(draw.uniform(0.02, 0.6) * len(segments)) :]


def end_cut(segments: list[Segment], draw: random.Random) -> list[Segment]:
    """A tap that left early."""
    return segments[: int(draw.uniform(0.4, 0.98) * len(segments))]


def disordered(share: float) -> Loss:
    """Packets missed, others captured twice, and some too late."""
    lose = at_random(share)

    def mix(segments: list[Segment], draw: random.Random) -> list[Segment]:
        left = [one for one in lose(segments, draw) for _ in range(1 + (draw.random() < 0.1))]
        order = [index + draw.uniform(0, 8) * (draw.random() < 0.2) for index in range(len(left))]
        return [left[index] for index in sorted(range(len(left)), key=order.__getitem__)]

    return mix


def both(first: Loss, second: Loss) -> Loss:
    """One after the other."""
    return lambda segments, draw: second(first(segments, draw), draw)


SEVERITIES: dict[str, Loss] = {
    "nothing": lambda segments, draw: segments,
    "1 %": at_random(0.01),
    "5 %": at_random(0.05),
    "20 %": at_random(0.2),
    "50 %": at_random(0.5),
    "5 % in bursts of 20": at_random(0.05, burst=20),
    "20 % in bursts of 20": at_random(0.2, burst=20),
    "one connection": one_connection,
    "one direction": one_direction,
    "start cut off": start_cut,
    "end cut off": end_cut,
    "5 %, repeated and out of order": disordered(0.05),
    "5 % and one direction": both(one_direction, at_random(0.05)),
    "5 % and both ends cut off": both(both(start_cut, end_cut), at_random(0.05)),
}


def busy(segments: list[Segment]) -> list[tuple[str, str]]:
    """The directions that carry most: between ranks, not to the store."""
    sizes: dict[tuple[str, str], int] = {}
    for one in segments:
        sizes[one.source, one.destination] = sizes.get((one.source, one.destination), 0) + one.length
    return sorted(flow for flow, size in sizes.items() if 4 * size > max(sizes.values()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yield:
    """How much of what a job sent is known: shares, 0 to 1."""

    known: float
    exact: float
    weights: float


def measure(truth: dict[str, np.ndarray], observations: Sequence[Observation]) -> Yield:
    """Fails where anything is said to be known and is not so; what is not reported is not known."""
    check(truth, list(observations))
    count = sum(name.endswith(".gradient") for name in truth)
    return Yield(
        known=sum(one.known_fraction for one in observations) / count,
        exact=sum(one.exact_fraction for one in observations) / count,
        weights=sum(one.weights is not None for one in observations) / count,
    )


def main(*runs: str) -> None:
    """Mean of so many seeds, each severity."""
    for run in runs:
        truth = read_truth(Path(run) / "truth")
        for size in (1448, 1 << 16):
            segments = read_segments(Path(run) / "wire.pcapng", size=size)
            print(f"{run}: {len(segments)} packets of up to {size} bytes")
            for name, lose in SEVERITIES.items():
                seeds = range(1 if name == "nothing" else 8)
                found = [measure(truth, observe(reassembled(lose(segments, random.Random(seed))))[0]) for seed in seeds]
                shares = [np.mean([getattr(one, key) for one in found]) for key in ("known", "exact", "weights")]
                print(f"| {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
