"""Codes that ranks gather from each other, on paper: nothing known of a gradient is wrong, whatever was missed."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from attack.capture.streams import Data, Gap
from attack.observation import EVERYONE, Known, Observation
from harness.defenses import load_defense
from harness.defenses.secure import private_of
from harness.exchange.base import as_coded
from harness.exchange.secure import Member
from harness.wire import Header, Layout
from harness.wire import Kind as Word
from harness.wire.coded import Coded
from harness.wire.masked import Masked, average_of
from tests.attack.decode.gloo.jobs import PaperJob, descended, events
from tests.attack.decode.gloo.recordings import name_of, observe

SHAPES = ((37, 20), (37,), (10, 37), (10,))
SIZES = tuple(map(math.prod, SHAPES))
SPECS = ("prune:0.5", "topk:0.8", "int8", "qsgd:7", "ternary", "sign", "powersgd:2")


@dataclasses.dataclass(kw_only=True)
class GatheringJob(PaperJob):
    """Ranks that gather what they send in a code, as over `allreduce`, or as DDP's hook does."""

    shapes: tuple[tuple[int, ...], ...] = SHAPES
    spec: str = "int8"
    ddp: bool = False
    chunk: int = 500
    """Elements of a message, within a parameter where DDP's hook sends it."""

    def _train(self) -> None:
        layout = Layout(world=self.world, parameters=self.shapes)
        if self.ddp:
            weights = self._build()
        else:
            weights = self.generator.standard_normal(layout.parameter_count).astype("<f4")
            self._broadcast(weights.tobytes())
        model = nn.Module()
        model.parts = nn.ParameterList([torch.zeros(shape) for shape in self.shapes])
        chain = load_defense(self.spec).fit(model)
        members = [Member(run=bytes(8), rank=rank, world_size=self.world) for rank in range(self.world)]
        for member in members:
            member.meet([other.public_key for other in members])
        states = [chain.begin(SIZES) for _ in range(self.world)]
        ends, total = np.cumsum(SIZES), layout.parameter_count
        for step in range(self.steps):
            gradients = self.generator.standard_normal((self.world, total)).astype("<f4")
            coded: list[Coded] = []
            for rank, gradient in enumerate(gradients):
                self.truth[f"step{step}.rank{rank}.gradient"] = gradient
                self.truth[f"step{step}.rank{rank}.weights"] = weights
                sent, states[rank] = chain(
                    torch.from_numpy(gradient), SIZES, states[rank], seed=0, rank=rank, step=step
                )
                private = private_of(sent)
                coded.append(as_coded(sent) if private is None else members[rank].mask(private, step=step, own=False))
            buckets = (((0, 1, 2, 3),) if step == 0 else self.buckets) if self.ddp else (None,)
            if self.ddp and step == 1:
                self._broadcast_layout()
            for index, bucket in enumerate(buckets):
                spans = [(0, total)] if bucket is None else [(ends[i] - SIZES[i], ends[i]) for i in bucket]
                places = [
                    (at, min(self.chunk, end - at)) for begin, end in spans for at in range(begin, end, self.chunk)
                ]
                hello = layout.pack() if step == 0 and index == 0 else None
                self._gather_messages([self._words(rank, step, code, places, hello) for rank, code in enumerate(coded)])
            average = coded[0].values().copy()
            for code in coded[1:]:
                average = average + code.values()
            average = average / np.float32(self.world)
            if isinstance(coded[0], Masked):
                words = sum((code.words for code in coded), np.zeros(total, np.uint32))
                average = average_of(words, coded[0].unit, self.world)
            weights = descended(weights, average)

    def _words(self, rank: int, step: int, code: Coded, places: list[tuple[int, int]], hello: bytes | None) -> bytes:
        said = (
            []
            if hello is None
            else [(Header(kind=Word.HELLO, run=bytes(8), rank=rank, step=step, size=len(hello)), hello)]
        )
        for at, count in places:
            codec, params, payload = code.part(int(at), int(count))
            header = Header(
                kind=Word.GRADIENT, run=bytes(8), rank=rank, step=step, at=int(at), count=int(count), total=code.size,
                codec=codec, params=params, size=memoryview(payload).nbytes,
            )  # fmt: skip
            said.append((header, bytes(payload)))
        return b"".join(
            len(packed := header.pack()).to_bytes(4, "little") + packed + payload for header, payload in said
        )

    def _gather_messages(self, words: list[bytes]) -> None:
        longest = max(map(len, words))
        self._gather([len(one).to_bytes(8, "little") for one in words])
        self._gather([one.ljust(longest, b"\0") for one in words])


def check(job: GatheringJob, seen: list[Observation]) -> list[Observation]:
    """Fails where anything is said to be known that is not so."""
    for one in seen:
        truth = torch.from_numpy(job.truth[f"{name_of(one)}.gradient"])
        raw, bounded = one.known == Known.RAW, one.known > Known.RAW
        assert torch.equal(one.gradient[raw], truth[raw])
        assert one.bound is not None or not bounded.any()
        if one.bound is not None:
            assert bool(((one.gradient - truth).abs()[bounded] <= one.bound[bounded]).all())
        if one.weights is not None:
            assert np.array_equal(one.weights.numpy(), job.truth[f"{name_of(one)}.weights"])
    assert [(one.step, one.rank) for one in seen] == sorted({(one.step, one.rank) for one in seen})
    return seen


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("world", "ddp"), [(2, False), (3, True), (4, False), (2, True)])
def test_each_rank_s_gradient_is_known_as_its_code_says(spec: str, world: int, ddp: bool) -> None:
    job = GatheringJob(world=world, spec=spec, ddp=ddp)
    found, desk = observe(list(events(job.writes)))
    assert len(check(job, found)) == 3 * world and not desk.notes.lines()
    for seen in found:
        assert seen.complete and seen.defense == spec and seen.shapes == SHAPES and seen.weights is not None
        assert seen.average is not None
    if spec in ("prune:0.5", "int8", "qsgd:7", "ternary"):
        assert all(seen.known_fraction == 1 for seen in found)


@pytest.mark.parametrize("loss", [0.0, 0.003, 0.03, 0.2])
@pytest.mark.parametrize(("world", "ddp"), [(2, False), (3, True)])
def test_of_masked_gradients_the_mean_is_known_and_no_more(world: int, ddp: bool, loss: float) -> None:
    job, draw = GatheringJob(world=world, spec="secure-aggregation", ddp=ddp, chunk=64), random.Random(1)
    missed = {at for at in range(100_000) if draw.random() < loss}
    found, desk = observe(list(events(job.writes, segment=150, lost=lambda at, flow: at in missed)))
    for one in found:
        each = [job.truth[f"step{one.step}.rank{rank}.gradient"] for rank in range(world)]
        plain = np.mean(each, axis=0, dtype=np.float64)
        known = (one.known == Known.DIFFERENCED).numpy()
        assert (one.rank, one.ranks) == (EVERYONE, tuple(range(world))) and one.bound is not None
        assert (abs(one.gradient.numpy() - plain) <= one.bound.numpy())[known].all() and known.any() | (loss > 0)
        if one.weights is not None:
            assert np.array_equal(one.weights.numpy(), job.truth[f"step{one.step}.rank0.weights"])
    if not loss:
        assert [one.step for one in found if one.complete and one.weights is not None] == [0, 1, 2]
        assert any("masked" in note for note in desk.notes.lines())


@pytest.mark.parametrize("chunk", [64, 100_000])
@pytest.mark.parametrize("loss", [0.003, 0.03, 0.2])
@pytest.mark.parametrize(("world", "ddp"), [(2, False), (3, False), (3, True)])
def test_nothing_known_is_wrong_whatever_was_missed(world: int, ddp: bool, loss: float, chunk: int) -> None:
    some = 0.0
    for seed, spec in enumerate(SPECS):
        job = GatheringJob(world=world, spec=spec, ddp=ddp, chunk=chunk, seed=seed)
        draw = random.Random(seed)
        missed = {at for at in range(100_000) if draw.random() < loss}
        seen = check(
            job, observe(list(events(job.writes, segment=150, lost=lambda at, _, missed=missed: at in missed)))[0]
        )
        some += sum(float((one.known != Known.UNKNOWN).float().mean()) for one in seen) / (3 * world * len(SPECS))
    assert some >= {0.003: 0.5, 0.03: 0.05, 0.2: 0.0}[loss] and (some < 1 or loss == 0.003)


def test_a_code_that_is_seen_on_two_links_is_put_together_from_both() -> None:
    """With three ranks each block goes over two links: of a hole in one, the other knows."""
    job = GatheringJob(world=3, chunk=100_000)
    source = job._flow(1, 2)
    found, _ = observe(list(events(job.writes, lost=lambda at, flow: flow == source and at % 2 == 0)))
    known = {rank: [seen for seen in check(job, found) if seen.rank == rank and seen.complete] for rank in range(3)}
    assert len(known[0]) == 3  # it comes over 0 -> 1, too


def test_steps_are_given_out_while_the_job_goes_on() -> None:
    job = GatheringJob(world=3, steps=4)
    seen = [event for event in events(job.writes) if isinstance(event, Data | Gap) or "Opened" in type(event).__name__]
    found, _ = observe(seen)  # nothing is ever closed
    assert len(check(job, found)) == 12 and all(one.complete for one in found)


def test_the_weights_of_a_job_whose_first_steps_were_missed_are_not_known() -> None:
    job = GatheringJob(world=2, steps=4)
    begins = [at for at, (_, data) in enumerate(job.writes) if len(data) > 400]
    missed = set(begins[1:5])  # all of the first step's messages
    found, _ = observe(list(events(job.writes, segment=1 << 20, lost=lambda at, flow: at in missed)))
    assert {one.step for one in check(job, found)} <= {1, 2, 3}
    assert not any(one.weights is not None for one in found)


@pytest.mark.parametrize("field", ["rank", "step", "at", "total"])
def test_a_header_that_contradicts_the_others_is_not_believed(field: str) -> None:
    class Altered(GatheringJob):
        def _words(self, rank, step, code, places, hello):
            said = super()._words(rank, step, code, places, hello)
            if (rank, step) != (0, 1):
                return said
            wrong = {"rank": 1, "step": 2, "at": 37, "total": 9000}[field]
            end = 4 + int.from_bytes(said[:4], "little")
            header = Header.unpack(said[4:end])
            packed = dataclasses.replace(header, **{field: wrong}).pack()
            return len(packed).to_bytes(4, "little") + packed + said[end:]

    job = Altered(world=2)
    found, desk = observe(list(events(job.writes)))
    check(job, found)
    assert desk.notes.lines()
    assert not any(one.complete for one in found if (one.step, one.rank) == (1, 0))
