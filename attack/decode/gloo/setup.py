"""The collectives before the first step -> what the job is going to exchange: a `Plan`, or None where it is not known.

DistributedDataParallel, when built, gathers the number of parameters and broadcasts their shapes and rank 0's state.
The project's own all-reduce broadcasts one flat state and nothing else. Knows no steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from attack.decode.gloo.head import Kind
from attack.decode.gloo.inversion import Float32
from attack.decode.gloo.parameters import parse_shapes
from attack.decode.notes import Notes
from attack.observation import Shapes

MAX_PARAMETERS = 1 << 20
"""Tensors of a model."""
_STATE_CUT_BYTES = 200 << 20
"""torch ends a broadcast of state with the tensor that brings it to 250 MiB; a shorter one is the last."""


class Collective(NamedTuple):
    """One that is over."""

    kind: Kind
    content: bytearray | None
    """What it moved, where all of it was seen and no copy differs."""
    size: int | None = None
    """Bytes of that, as a broadcast's messages or announcements say it."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Plan:
    """What a job exchanges."""

    flat: bool
    """Whether it is the project's own all-reduce: one vector, whose length the first step will tell."""
    shapes: Shapes | None
    """None: not yet known."""
    weights: Float32 | None
    """What the first step begins with; with the buffers behind it where the vector is flat."""
    buffers: Float32 | None = None
    offsets: tuple[int, ...] = ()
    """Of each parameter in the flat gradient, and behind the last."""

    @property
    def count(self) -> int:
        """Parameters."""
        return len(self.offsets) - 1


def recognize(setup: Sequence[Collective], notes: Notes) -> Plan | None:
    """What a job is, whose first all-reduce comes next."""
    if [one.kind for one in setup] == [Kind.BROADCAST]:
        state = setup[0].content
        return Plan(flat=True, shapes=None, weights=_floats(state)) if state else None
    for start in range(len(setup) - 1, -1, -1):
        if setup[start].kind is Kind.ALLGATHER:
            return _recognize_ddp(setup[start:], notes)
    return None


def _recognize_ddp(setup: Sequence[Collective], notes: Notes) -> Plan | None:
    """All-gather of an i64, the number of parameters; broadcasts of shapes, of float32 state, of other state."""
    contents = [one.content for one in setup[1:] if one.kind is Kind.BROADCAST]
    sizes = [one.size for one in setup[1:]]
    number = setup[0].content
    count: int | None = int.from_bytes(number[:8], "little") if number is not None else 0
    if len(contents) != len(setup) - 1 or len(contents) < 2:
        return None
    if not count or count > MAX_PARAMETERS:
        count = None  # a part of the number may be missing on every link
    # torch cuts the state at 250 MiB; what is behind it is of other types, then what the first step sends.
    cut = next((at for at, size in enumerate(sizes[1:], 1) if size is None or size < _STATE_CUT_BYTES), 1)
    known = [size for size in sizes[1 : cut + 1] if size is not None]
    most = sum(known) // 4 if len(known) == cut else None
    shapes = parse_shapes(contents[0], count, most) if contents[0] is not None else None
    if shapes is None:
        notes.add(f"DDP: the shapes of {count or 'its'} parameters cannot be told from what was broadcast")
        return None
    plan = Plan(flat=False, shapes=shapes, weights=None, offsets=(0, *accumulate(map(math.prod, shapes))))
    want, state, at = 4 * plan.offsets[-1], bytearray(), 1
    while at < len(contents) and len(state) < want and (part := contents[at]) is not None:
        state += part
        at += 1
    values = _floats(state)
    if values is None or len(state) < want:
        notes.add("DDP: the initial state was not seen whole, or is not float32: no step's weights are known")
        return plan
    plan.weights = values[: want // 4]
    if len(state) > want:
        buffers = values[want // 4 :]
        # Rank 0 broadcasts them once more in its first forward pass.
        again = [part for part in contents[at:] if part is not None and len(part) == buffers.nbytes]
        plan.buffers = _floats(again[-1]) if again else buffers
    return plan


def _floats(content: bytearray | None) -> Float32 | None:
    return np.frombuffer(content, "<f4") if content is not None and len(content) % 4 == 0 else None
