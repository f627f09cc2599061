"""The collectives of a job whose ranks gather each other's coded gradients -> its steps, each rank's within its code.

Over the project's own all-reduce a step is one gathering, over DistributedDataParallel one for each bucket, with what
DDP broadcasts in between; what the parts are and where they belong, they say themselves. Takes over from `Job` where
the first of them comes, with what was set up before. Knows no optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from attack.decode.assembly import RankGradient
from attack.decode.defended import PublicSide
from attack.decode.gloo.allreduce import Gradients, Vector
from attack.decode.gloo.formats import FLOAT32, Float, numbers
from attack.decode.gloo.gathered import GatheredSteps, words_of
from attack.decode.gloo.head import Kind
from attack.decode.gloo.network import Network
from attack.decode.gloo.parameters import Layout, begins_layout, joined
from attack.decode.gloo.setup import Collective, Plan, recognize
from attack.decode.gloo.step import Step
from attack.decode.notes import Notes
from attack.decode.proof import DecodedStep

PATIENCE_BYTES = 64 << 20
"""Payloads that may wait for links that were never seen, or are silent."""


def plan_coded(setup: Sequence[Collective], total: int, notes: Notes) -> Plan:
    """What a job of `total` parameters exchanges, from what came before the first gradients; of shapes and initial
    state as much as is certain.

    Directly before them is the all-gather of their sizes. If there is another one, steps may have been missed, and the
    state that was broadcast need not be the one that the first step seen began with.
    """
    before = setup[:-1] if setup and setup[-1].kind is Kind.ALLGATHER else setup
    plan = recognize(before, notes)
    if plan is not None and plan.flat and plan.weights is not None and plan.weights.size >= total:
        plan.weights, rest = plan.weights[:total], plan.weights[total:]
        plan.buffers = rest if rest.size else None
    elif plan is not None and not plan.flat and plan.offsets[-1] == total:
        plan.settle(FLOAT32)
    else:
        plan = Plan(flat=True, tensors=None)
    if plan.flat:
        plan.tensors, plan.offsets = (Layout.contiguously((total,)),), (0, total)
    kinds = [one.kind for one in before]
    if len(before) == len(setup) or None in kinds or kinds.count(Kind.ALLGATHER) != (0 if plan.flat else 1):
        plan.weights = plan.buffers = None
    return plan


class CodedJob:
    """Reads on from the first collective that holds the project's messages."""

    def __init__(self, network: Network, plan: Plan, notes: Notes, *, tag: int) -> None:
        self._network, self._plan, self._notes, self._tag = network, plan, notes, tag
        self._named = not plan.flat  # whether shapes are known
        self._gathered = GatheredSteps(notes)
        self._public = PublicSide()
        self._buffers: Float | None = plan.buffers  # for the next step
        self._looking = False  # for the buffers, which come first of all that is broadcast between steps
        self._sizes_next = False  # the second part of a layout comes next

    def steps(self, *, end: bool) -> Iterator[Step]:
        """The steps that are over; at the end, what there is of the last one too."""
        network, world = self._network, self._network.world
        assert world is not None
        while network.newest >= self._tag and (end or self._is_over(self._tag)):
            tag, kinds = self._tag, network.kinds(self._tag)
            if kinds == {Kind.ALLGATHER}:
                links = network.next_ranks()
                if words := words_of(links, tag, world=world):
                    if self._gathered.begins(words):
                        yield from self._finish(world)
                    seen = [link.slots.get((Kind.ALLGATHER, tag), []) for link in links.values()]
                    unsure = len(links) < world or any(
                        len(slot) != 2 * (world - 1) or any(one.message.holes for one in slot) for slot in seen
                    )
                    self._gathered.add(words, world=world, unsure=unsure)
                    self._name_shapes()
            elif kinds == {Kind.BROADCAST}:
                yield from self._finish(world)
                self._take_broadcast(joined(network.copies(Kind.BROADCAST, tag)))
            network.release(tag)
            network.settle(tag)
            self._tag += 1
        if end:
            yield from self._finish(world)

    def _name_shapes(self) -> None:
        """The ranks' greetings say the shapes, where nothing else did."""
        layout, plan = self._gathered.layout, self._plan
        if plan.flat and layout is not None and not self._named and layout.parameter_count == plan.offsets[-1]:
            self._named = True
            plan.tensors = tuple(Layout.contiguously(shape) for shape in layout.parameters)
            plan.offsets = (0, *accumulate(math.prod(shape) for shape in layout.parameters))

    def _is_over(self, tag: int) -> bool:
        """Whether nothing more of a collective is to come. One is under way at a time."""
        network = self._network
        links = network.next_ranks().values()
        crowded = network.held_bytes > PATIENCE_BYTES and all(link.newest > tag or link.ended for link in links)
        return network.passed_on(tag) or crowded

    def _take_broadcast(self, content: bytearray | None) -> None:
        """Between two steps: the layout of DDP's buckets, in two parts, which nobody needs here; then the buffers."""
        if self._sizes_next:
            self._sizes_next = False
        elif content is not None and begins_layout(content, self._plan.count):
            self._sizes_next = True
        elif self._looking and self._plan.buffers is not None:
            whole = content is not None and len(content) == FLOAT32.bytes * self._plan.buffers.size
            self._buffers = numbers(memoryview(content), FLOAT32) if whole and content is not None else None
            self._looking = False

    def _finish(self, world: int) -> Iterator[Step]:
        found = self._gathered.finish(world=world)
        if found is not None:
            yield self._step(found, world)
            self._buffers, self._looking = None, not self._plan.flat

    def _masked_step(self, found: DecodedStep) -> Step:
        """Of secure aggregation: the mean alone."""
        assert found.mean is not None
        self._notes.add("gradients are masked (secure aggregation): of no rank's alone anything is known, but the mean")
        total, known = _totals(found, found.mean.values.size)
        return Step(
            step=found.step,
            seen=Gradients(ranks=[_vector(found.mean)], total=total, total_known=known),
            buffers=self._buffers,
            defenses=[found.mean.defense],
            masked=True,
        )

    def _step(self, found: DecodedStep, world: int) -> Step:
        if found.mean is not None:
            return self._masked_step(found)
        shapes = self._plan.shapes if self._named else None
        limited = [self._public.limit(rank, found.step, found.gradients[rank], shapes) for rank in range(world)]
        total, known = _totals(found, limited[0].values.size)
        return Step(
            step=found.step,
            seen=Gradients(ranks=[_vector(one) for one in limited], total=total, total_known=known),
            buffers=self._buffers,
            defenses=[one.defense for one in limited],
        )


def _totals(found: DecodedStep, size: int) -> tuple[Float, npt.NDArray[np.bool_]]:
    """The mean, as far as it is known."""
    total = np.zeros(size, np.float32) if found.average is None else found.average
    return total, np.full(size, found.average is not None)


def _vector(gradient: RankGradient) -> Vector:
    bound = np.zeros(gradient.values.size, np.float32) if gradient.bound is None else gradient.bound
    return Vector(values=gradient.values, known=gradient.known, bound=bound)
