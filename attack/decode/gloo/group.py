"""One process group: its network, what its ranks do there, and what that proves of each rank.

Steps in, observations out, with the ranks as they count in the whole job. Knows nothing of streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from attack.decode.directory import DEFAULT, Directory
from attack.decode.gloo.formats import BFLOAT16, FLOAT16, FLOAT64
from attack.decode.gloo.job import Job
from attack.decode.gloo.network import ALL_TAGS, Network
from attack.decode.gloo.step import Step
from attack.decode.notes import Notes
from attack.observation import EVERYONE, Known, Observation
from attack.shadow import Shadow

MAX_WAITING_BYTES = 256 << 20
"""Payloads that are kept for as long as no rank is known: ranks say who they are before they send any."""


class Group:
    """The collectives of one group of ranks."""

    def __init__(self, label: str, *, directory: Directory, notes: Notes, optimizer: str | None) -> None:
        """
        Args:
            label: as torch names the group.
            directory: where ranks listen.
            notes: where it tells a person what it could not read.
            optimizer: the job's update rule, where it was declared.
        """
        self.label = None if label == DEFAULT else label
        """None: the group of all ranks."""
        self.network = Network(directory)
        self._directory = directory
        self._notes = notes.within("" if self.label is None else f"group {label}")
        self.job = Job(self.network, self._notes)
        self._optimizer = optimizer
        self._shadow: Shadow | None = None
        self._began = False

    def observations(self, *, end: bool = False) -> Iterator[Observation]:
        """Steps of which nothing more is to come."""
        for step in self.job.steps(end=end):
            yield from self._observe(step)
        if self.network.world is None and self.network.held_bytes > MAX_WAITING_BYTES:
            self.network.release(ALL_TAGS + 1)
            self._notes.add(
                f"Gloo: ranks still unknown after {MAX_WAITING_BYTES} bytes of payload: not waited for longer"
            )

    def ranks(self) -> tuple[int, ...] | None:
        """The ranks of the job, in the group's order; None where they are not certain."""
        if self.label is None:
            return None if self.network.world is None else tuple(range(self.network.world))
        named = [group for group in self._directory.groups() if group.label == self.label]
        return self._directory.global_ranks(named[0]) if len(named) == 1 else None

    def describe(self) -> dict[str, Any]:
        """What `inspect` says of it: plain values."""
        plan, ranks = self.job.plan, self.ranks()
        return {
            "group": self.label,
            "world_size": self.network.world,
            "ranks": None if ranks is None else list(ranks),
            "shapes": None if plan is None or plan.shapes is None else [list(shape) for shape in plan.shapes],
            "collectives": [
                {"kind": kind.name.lower(), "count": count.count, "messages": count.messages, "bytes": count.bytes}
                for kind, count in sorted(self.network.tally.counts.items())
            ],
        }

    def _observe(self, step: Step) -> Iterator[Observation]:
        plan = self.job.plan
        assert plan is not None and plan.shapes is not None
        if not self._began:
            self._began = True
            if plan.weights is not None:
                several = not plan.flat and plan.format is None
                if several:
                    self._notes.add("parameters have different formats: the weights are known in the first step only")
                initial = torch.from_numpy(plan.weights)
                self._shadow = Shadow(
                    weights=initial if plan.flat or several else initial.to(self._dtype),
                    step=step.step,
                    shapes=plan.shapes,
                    optimizer=None if several else self._optimizer,
                )
            else:
                self._notes.add("the initial weights were not seen whole: no step's weights are known")
        weights = self._shadow.weights(step.step) if self._shadow is not None else None
        if weights is not None:
            weights = weights.to(torch.from_numpy(step.seen.total).dtype)
        wire = f"{self.job.format.name} on the wire" if self.job.format in (FLOAT16, BFLOAT16) else None
        average = torch.from_numpy(step.seen.total) if step.seen.total_known.all() else None
        if plan.flat and average is not None and step.defenses is None and wire is None:
            average.div_(len(step.seen.ranks))  # as the exchange does it, after the sum
        if (ranks := self.ranks()) is None:
            self._notes.add("it is not certain which ranks of the job these are: their gradients are left out")
        of = (EVERYONE,) if step.masked and ranks is not None else ranks
        for at, (rank, vector) in enumerate(zip(of or (), step.seen.ranks, strict=of is not None)):
            yield Observation(
                rank=rank,
                step=step.step,
                world_size=self.network.world or 0,
                exchange="gloo",
                group=self.label,
                gradient=torch.from_numpy(vector.values),
                known=torch.from_numpy(vector.known),
                bound=torch.from_numpy(vector.bound) if (vector.known >= Known.DIFFERENCED).any() else None,
                average=average,
                weights=weights,
                buffers=None if step.buffers is None else torch.from_numpy(step.buffers),
                shapes=plan.shapes,
                ranks=ranks if step.masked and ranks is not None else (),
                factors=step.factors[at] if step.factors is not None else (),
                defense=wire if step.defenses is None else step.defenses[at],
            )
        if self._shadow is not None:
            self._shadow.advance(step.step, None if average is None else average.to(self._dtype))

    @property
    def _dtype(self) -> torch.dtype:
        """Of the model."""
        fmt = self.job.plan.format if self.job.plan is not None else None
        narrow = {FLOAT64: torch.float64, FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}
        return torch.float32 if fmt is None else narrow.get(fmt, torch.float32)
