"""The collectives before the first step -> what the job is going to exchange: a `Plan`, or None where it is not known.

DistributedDataParallel, when built, gathers the number of parameters and broadcasts their shapes and rank 0's state:
first all of the type of the first parameter, parameters and then buffers (torch/csrc/distributed/c10d/reducer.cpp,
comm.cpp). The project's own all-reduce broadcasts one flat state and nothing else. Knows no steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from attack.decode.gloo.formats import FLOAT16, FLOAT32, FLOAT64, WIDTHS, Float, Format, numbers
from attack.decode.gloo.head import Kind
from attack.decode.gloo.parameters import Tensors, in_logical_order, parse_shapes
from attack.decode.notes import Notes
from attack.observation import Shapes

MAX_PARAMETERS = 1 << 20
"""Tensors of a model."""
_STATE_CUT_BYTES = 200 << 20
"""torch ends a broadcast of state with the tensor that brings it to 250 MiB; a shorter one is the last."""


class Collective(NamedTuple):
    """One that is over."""

    kind: Kind | None
    """None: nothing was seen of it."""
    content: bytearray | None
    """What it moved, where all of it was seen and no copy differs."""
    size: int | None = None
    """Bytes of that, as a broadcast's messages or announcements say it."""


class State(NamedTuple):
    """One way to read what rank 0 broadcast of its model."""

    width: int
    """Bytes of an element."""
    weights: memoryview
    buffers: memoryview
    confirmed: bool
    """Whether the buffers came once more, as DDP sends them in each forward pass; or there are none."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Plan:
    """What a job exchanges."""

    flat: bool
    """Whether it is the project's own all-reduce: one vector, whose length the first step will tell."""
    tensors: Tensors | None
    """None: not yet known."""
    weights: Float | None = None
    """What the first step begins with; with the buffers behind it where the vector is flat. Of other jobs it is known
    once the first step has told the format."""
    buffers: Float | None = None
    offsets: tuple[int, ...] = ()
    """Of each parameter in the flat gradient, and behind the last."""
    states: tuple[State, ...] = ()
    """How the broadcast state can be read, the likeliest way first."""
    parts: tuple[bytearray | None, ...] = ()
    """The state as it was broadcast."""
    format: Format | None = None
    """Of the model's state; None: not known, or several."""

    @property
    def count(self) -> int:
        """Parameters."""
        return len(self.offsets) - 1

    @property
    def shapes(self) -> Shapes | None:
        """Of each parameter."""
        return None if self.tensors is None else tuple(tensor.shape for tensor in self.tensors)

    @property
    def state_bytes(self) -> int:
        """Of all that was broadcast."""
        return max((len(state.weights) + len(state.buffers) for state in self.states), default=0)

    def settle(self, fmt: Format) -> None:
        """The first step's gradients have this format: so the state has it too, or a hook has made them shorter."""
        hooked = fmt.bytes == FLOAT16.bytes
        state = next((state for state in self.states if hooked or state.width == fmt.bytes), None)
        if state is None:
            return
        self.format = {FLOAT32.bytes: FLOAT32, FLOAT64.bytes: FLOAT64}.get(state.width, fmt)
        self.weights = numbers(state.weights, self.format)
        self.buffers = numbers(state.buffers, self.format) if state.buffers else None

    def settle_each(self, formats: dict[int, Format]) -> None:
        """Parameters have different formats: each one's state is in the broadcast of its own, before its buffers."""
        weights = np.zeros(self.offsets[-1], np.result_type(*(fmt.container for fmt in formats.values())))
        for part, fmt in zip(self.parts, dict.fromkeys(formats[index] for index in sorted(formats)), strict=False):
            own = [slice(*self.offsets[index : index + 2]) for index in sorted(formats) if formats[index] is fmt]
            size = fmt.bytes * sum(where.stop - where.start for where in own)
            if part is None or len(part) < size:
                return
            values, at = numbers(memoryview(part)[:size], fmt), 0
            for where in own:
                weights[where] = values[at : at + where.stop - where.start]
                at += where.stop - where.start
        self.weights, self.states = weights, ()

    def reorder(self, flat: np.ndarray[Any, Any]) -> None:
        """A flat vector, in the order in which its tensors lie in memory: in the order of their indices, from now on.

        So buckets hold the gradients of parameters that are not contiguous (channels last).
        """
        for index, tensor in enumerate(self.tensors or ()):
            if not tensor.contiguous:
                part = flat[slice(*self.offsets[index : index + 2])]
                part[:] = in_logical_order(part, tensor)


def recognize(setup: Sequence[Collective], notes: Notes) -> Plan | None:
    """What a job is, whose first all-reduce comes next."""
    if [one.kind for one in setup] == [Kind.BROADCAST]:
        state = setup[0].content
        whole = bool(state) and len(state or b"") % FLOAT32.bytes == 0
        return Plan(flat=True, tensors=None, weights=numbers(memoryview(state), FLOAT32)) if state and whole else None
    problem = None
    for start in range(len(setup) - 1, -1, -1):
        if setup[start].kind is Kind.ALLGATHER:
            found = _recognize_ddp(setup[start:])
            if isinstance(found, Plan):
                if not found.states:
                    notes.add("DDP: the initial state was not seen whole: no step's weights are known")
                return found
            problem = problem or found
    if problem is not None:
        notes.add(problem)
    return None


def _recognize_ddp(setup: Sequence[Collective]) -> Plan | str | None:
    """All-gather of an i64, the number of parameters; broadcasts of shapes, of the state by type; and, later, whatever
    comes before the first step's gradients: buffers once more, or what the script itself has to say.

    Returns: in place of a plan, why there is none; None where this is no DDP.
    """
    end = next((at for at, one in enumerate(setup) if at and one.kind not in (Kind.BROADCAST, None)), len(setup))
    built, later = setup[1:end], [one.content for one in setup[end:] if one.kind is Kind.BROADCAST]
    contents, number = [one.content for one in built], setup[0].content
    if len(contents) < 2:
        return None
    count: int | None = int.from_bytes(number[:8], "little") if number is not None else 0
    if not count or count > MAX_PARAMETERS:
        count = None  # a part of the number may be missing on every link
    # torch cuts the state at 250 MiB; what is behind it is of other types, then what the first step sends.
    sizes = [one.size for one in built]
    cut = next((at for at, size in enumerate(sizes[1:], 1) if size is None or size < _STATE_CUT_BYTES), 1)
    known = [size for size in sizes[1 : cut + 1] if size is not None]
    tensors = None
    if contents[0] is not None:
        for width in WIDTHS:
            most = sum(known) // width if len(known) == cut else None
            tensors = tensors or parse_shapes(contents[0], count, most)
    if tensors is None:
        return f"DDP: the shapes of {count or 'its'} parameters cannot be told from what was broadcast"
    offsets = (0, *accumulate(math.prod(tensor.shape) for tensor in tensors))
    states = _states(contents[1 : cut + 1], [*contents[cut + 1 :], *later], offsets[-1])
    return Plan(flat=False, tensors=tensors, offsets=offsets, states=states, parts=tuple(contents[1:]))


def _states(parts: Sequence[bytearray | None], later: Sequence[bytearray | None], elements: int) -> tuple[State, ...]:
    """Every way to read the state: so many elements of one width, and the buffers behind them."""
    seen = [part for part in parts if part is not None]
    if len(seen) < len(parts):
        return ()
    whole = memoryview(seen[0] if len(seen) == 1 else bytearray().join(seen))
    states = []
    for width in WIDTHS:
        if len(whole) % width or len(whole) < width * elements:
            continue
        weights, buffers = whole[: width * elements], whole[width * elements :]
        # Rank 0 broadcasts them once more in its first forward pass.
        again = [part for part in later if part is not None and len(part) == len(buffers)] if buffers else []
        newest = memoryview(again[-1]) if again else buffers
        states.append(State(width, weights, newest, not buffers or bool(again)))
    best = [state for state in states if state.confirmed] or states
    return tuple(sorted(best, key=lambda state: len(state.buffers)))
