"""The collectives of one group, in the order of their tags -> the steps of a job, and each rank's gradient at each.

DistributedDataParallel sums one bucket after the other, divided by the number of ranks beforehand: first all parameters
in their order (or, where unused ones are looked for, from the last to the first); then in the layout that rank 0
broadcasts. The project's own all-reduce sums a flat gradient in buckets of 25 MiB, undivided; floats of two bytes it
divides first, as DDP's hooks do.

What comes between steps and is no bucket (a loss, a barrier) is passed over. What does not fit within a step ends the
reading: nothing behind it is believed. A collective of which nothing at all was seen is taken for the bucket that would
be next only once the layout is settled and the job was never seen to do anything else. Knows no optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from attack.decode.gloo.allreduce import Gradients, agrees, is_whole, solve_total, take_apart
from attack.decode.gloo.coded import CodedJob, plan_coded
from attack.decode.gloo.formats import FLOAT16, FLOAT32, Float, Format, numbers
from attack.decode.gloo.gathered import totals_of, words_of
from attack.decode.gloo.head import HEAD_BYTES, Kind
from attack.decode.gloo.inversion import Rule, Sending
from attack.decode.gloo.layout import Bucket, Finder, is_layout
from attack.decode.gloo.lowrank import factors_of, solve_compression
from attack.decode.gloo.network import Network
from attack.decode.gloo.parameters import Layout, begins_layout, gathered, joined, parse_layout
from attack.decode.gloo.placement import Step as Beside
from attack.decode.gloo.ring import Ring
from attack.decode.gloo.setup import Collective, Plan, recognize
from attack.decode.gloo.step import Step
from attack.decode.notes import Notes

MAX_SKIPPED = 16
"""All-reduces before the first step that are none of its buckets."""
MIN_PATIENCE_BYTES = 64 << 20
SMALL_BYTES = 256
"""What scripts sum between steps is no larger: losses, metrics. Of DDP's own map the size is known."""


class Job:
    """Reads the collectives of a network's group."""

    def __init__(self, network: Network, notes: Notes) -> None:
        self.plan: Plan | None = None
        self._network = network
        self._notes = notes
        self._tag = 0  # the next collective
        self._step = 0
        self._setup: list[Collective] = []
        self._unrecognized = -1  # as many collectives were no known job's
        self._layout: list[Bucket] = []
        self._layout_settled = False
        self._formats: dict[int, Format] = {}  # of the parameters' gradients; those of no element have none
        self._indices: bytearray | None = None  # of a new layout, whose sizes come next
        self._alone = False  # nothing is ever under way beside the buckets
        self._between: float = 0  # bytes that a link may have carried since the last step
        self._regular = True  # never anything but buckets and broadcasts before each step
        self._prologue = 0  # broadcasts before the next step, so far
        self._usual_prologue: int | None = None  # before the last step, once the layout was settled
        self._buffers: Float | None = None  # for the next step
        self._looked = -1  # the collective that all had come past when the layout was last looked for
        self._open: Step | None = None
        self._done = 0  # buckets of the open step
        self._compressed = False  # a step's gradients came as factors
        self._coded: CodedJob | None = None  # reads on, where codes are gathered
        self._without_code = -1  # the last all-gather that was found to hold none
        self._over = False
        self._world: int | None = None

    def steps(self, *, end: bool = False) -> Iterator[Step]:
        """The steps that are over; at the end, what there is of the last one too."""
        if not (self._network.changed or end) or self._network.world is None:
            return
        self._network.changed = False
        if self._world not in (None, self._network.world) and self._tag and not self._over:
            self._refuse(f"wanted {self._world} ranks as before, got {self._network.world}")
        self._world = self._network.world
        moved = self._coded is None
        while moved and not self._over:
            before = self._tag, self.plan
            self._advance(end=end)
            moved = before != (self._tag, self.plan) and self._coded is None
            if self._open is not None and self._done and self._done == len(self._layout):
                yield self._finish_step()
        if end and self._open is not None:
            yield self._finish_step()
        if self._coded is not None and not self._over:
            yield from self._coded.steps(end=end)

    def _advance(self, *, end: bool) -> None:
        """Reads the next collective, if enough was seen of it."""
        network, tag = self._network, self._tag
        kinds, closed = network.kinds(tag), self._closed(tag) or end
        if self.plan is None and (end or network.passed_on(tag)):  # nothing else is under way before the first step
            if kinds == {Kind.ALLGATHER} and self._begin_coded():
                return
            closed = closed or not network.reduces  # of a job that sums nothing, all-gathers go the other way round
        # Of two collectives that are under way, the later one may be seen first.
        if not kinds and not ((self._closed(self._horizon) or end) and network.newest > tag):
            return
        if self.plan is None:
            if kinds == {Kind.ALLREDUCE} and len(self._setup) != self._unrecognized:
                plan = recognize(self._setup, self._notes)
                self.plan = None if plan is not None and plan.flat and network.by_root else plan
                self._unrecognized = len(self._setup)
            elif closed and not kinds and network.is_empty(tag, self._horizon):
                self._pass()
                network.settle(tag)
            elif closed and (read := self._read(tag, kinds, end=end)) is not None:
                self._setup.append(read)
                self._pass()
                network.settle(tag)
        elif not kinds and network.is_empty(tag, self._horizon):
            self._alone = self._open is None and self._alone
            self._pass()  # monitored_barrier counts twice, and so does who sums nothing
        elif kinds == {Kind.ALLREDUCE}:
            self._read_bucket(closed=closed, end=end)
        elif not kinds and self._layout_settled and self._regular and self._usual_prologue is not None:
            if self._open is None and self._prologue < self._usual_prologue:
                self._take_broadcast(Collective(Kind.BROADCAST, None))
                self._pass()
            else:
                self._read_bucket(closed=closed, end=end)
        elif self._open is not None or not kinds:
            names = ", ".join(sorted(kind.name.lower() for kind in kinds)) or "nothing"
            self._refuse(f"wanted a bucket's all-reduce, got {names}")
        elif closed and (read := self._read(tag, kinds, end=end)) is not None:
            self._take_broadcast(read)
            self._pass()

    def _begin_coded(self) -> bool:
        """Whether the next collective holds messages of the project: then all that follows is theirs."""
        network, world = self._network, self._network.world
        assert world is not None
        if self._without_code == self._tag:
            return False
        self._without_code = self._tag
        words = words_of(network.next_ranks(), self._tag, world=world)
        totals = totals_of(words)
        if totals:
            self.plan = plan_coded(self._setup, max(totals, key=totals.count), self._notes)
            self._coded = CodedJob(network, self.plan, self._notes, tag=self._tag)
        return bool(totals)

    def _closed(self, tag: int) -> bool:
        """Whether all ranks have come past a collective; of a link of which nothing was seen, nobody waits forever."""
        whole = len(self._network.ring()) == self._network.world
        return self._network.closed(tag) and (whole or self._network.held_bytes > self._patience)

    @property
    def _horizon(self) -> int:
        """The last collective that may be under way beside the next one: of the same step, or, beside its last bucket,
        DDP's map of the parameters that were not used. Before the first step there is one at a time; in the first one,
        a parameter may have a bucket of its own."""
        if self.plan is None:
            return self._tag
        if not self._layout:
            return self._tag + max(self.plan.count, 0)
        last = self._tag + len(self._layout) - self._done - 1
        kinds = self._network.kinds(last + 1)
        alone = (self._alone and self._regular) or (kinds and Kind.ALLREDUCE not in kinds)
        return last if alone else last + 1

    def _read(self, tag: int, kinds: set[Kind], *, end: bool) -> Collective | None:
        """What a collective moved, that is over; None while a copy may come that has what the others lack."""
        if len(kinds) != 1:
            return Collective(Kind.ALLREDUCE if kinds else None, None)
        [kind] = kinds
        copies, sizes = self._network.copies(kind, tag), self._network.sizes(kind, tag)
        content = (gathered(copies) if kind is Kind.ALLGATHER else None) or joined(copies)
        if content is None and kind in (Kind.BROADCAST, Kind.ALLGATHER):
            # A hole may be waited for that nobody will fill: a link that is idle does not say so before its end.
            holes = kind is Kind.BROADCAST or any(message.holes for copy in copies for message in copy)
            if holes and not end and self._network.held_bytes <= self._patience:
                return None
        return Collective(kind, content, sizes.pop() if len(sizes) == 1 else None)

    def _take_broadcast(self, broadcast: Collective) -> None:
        """Between two steps: the layout of the buckets, in two parts; or the buffers."""
        assert self.plan is not None
        if broadcast.kind is not Kind.BROADCAST:
            self._regular = False
            self._between = float("inf")
            return
        content, plan = broadcast.content, self.plan
        # Its message, and as many announcements as a link can have of it.
        self._between += float("inf") if broadcast.size is None else 3 * HEAD_BYTES + broadcast.size
        if self._indices is not None:
            layout = parse_layout(self._indices, content, plan.count)
            self._indices = None
            if layout is None:
                self._refuse("wanted the layout of the buckets, got other numbers, or not all of them")
                return
            parameters = [slice(*plan.offsets[index : index + 2]) for index in range(plan.count)]
            self._layout = [
                Bucket(
                    tuple(parameters[index] for index in bucket),
                    next((self._formats[index] for index in bucket if index in self._formats), self.format),
                )
                for bucket in layout
            ]
            self._layout_settled = self._alone = True  # DDP maps unused parameters only where it keeps its buckets
            return
        unsettled = not self._layout_settled
        if content is None and unsettled and (broadcast.size is None or is_layout({broadcast.size}, plan)):
            self._refuse("a broadcast that may be the layout of the buckets was not seen whole")
        elif content is not None and unsettled and begins_layout(content, plan.count):
            self._indices = content
            return
        elif plan.buffers is not None and not self._prologue:
            fmt, size = plan.format or FLOAT32, plan.buffers.size
            whole = content is not None and len(content) == size * fmt.bytes
            self._buffers = numbers(memoryview(content), fmt) if whole and content is not None else None
        self._prologue += 1

    def _read_bucket(self, *, closed: bool, end: bool) -> None:
        assert self._network.world is not None and self.plan is not None
        if not self._layout and not self._find_layout(closed=closed, end=end):
            return
        links, tag, bucket = self._network.ring(), self._tag, self._layout[self._done]
        ring = bucket.ring(self._network.world)
        if not (is_whole(ring, links, tag) or end or self._closed(self._horizon)):
            return
        if not agrees(ring, links, tag):
            if self._open is None and not self.plan.flat and len(self._layout) == 1:
                if not (end or self._closed(tag + 2)):
                    return
                if self._read_factors(bucket):
                    return
            if self._open is None:
                self._skip("an all-reduce of another size than the next bucket's")
            else:
                self._refuse(f"wanted a bucket of {ring.total} bytes, got an all-reduce of another size")
            return
        if self._open is None and not self.plan.flat and not self._is_first_bucket(ring, end=end):
            return
        step = self._open if self._open is not None else self._begin_step()
        plain = self.plan.flat and bucket.format is FLOAT32
        sending = Sending.PLAIN if plain else self._sending(bucket.format)
        take_apart(
            ring,
            links,
            tag=tag,
            step=Beside(self._rings(), self._horizon, self._between),
            rule=Rule(bucket.format, sending, ring.world),
            bucket=bucket.parts,
            into=step.seen,
            notes=self._notes,
        )
        self._done += 1
        self._pass()

    def _is_first_bucket(self, ring: Ring, *, end: bool) -> bool:
        """Whether the next sum, of which nothing contradicts it, begins a step; passes over it or refuses it if not.

        Between steps come DDP's map of the parameters that were used, an int32 for each that counts ranks, and what a
        script sums besides. A part of such a sum may look like a part of a small bucket.
        """
        assert self.plan is not None
        links, tag, mapped = self._network.ring(), self._tag, 4 * max(self.plan.count, 0)
        if not self._network.is_certain(self._horizon):
            others = [
                Ring(total, ring.world, element)
                for element in {4, 8, ring.element}
                for total in range(element, max(SMALL_BYTES, mapped) + 1, element)
                if total != ring.total
            ]
            if mapped == ring.total or any(agrees(other, links, tag) for other in others):
                if not (end or self._closed(self._horizon)):
                    return False
                # If a whole one was none, what follows is not the next bucket: then the step is left out.
                if mapped == ring.total or len(self._layout) == 1 or not is_whole(ring, links, tag):
                    self._refuse(
                        "too little was seen of a small sum to tell a step's first bucket from what comes between"
                    )
                    return False
        elif not is_whole(ring, links, tag):
            self._skip("an all-reduce of another size than the next bucket's")
            return False
        elif mapped == ring.total and self._step and agrees(Ring(mapped, ring.world, 4), links, tag):
            seen = [one for link in links.values() for one in link.slots[Kind.ALLREDUCE, tag]]
            counts = {int(np.frombuffer(one.message.payload, "<u4").max(initial=0)) for one in seen}
            if 0 < max(counts) <= ring.world:
                self._skip("DDP's map of the parameters that were used")
                return False
            if not max(counts) and not (self._regular and self._step > 1):
                self._refuse("zeros, which may be a bucket or a map of parameters")
                return False
        return True

    def _rings(self) -> dict[int, Ring]:
        """Of the open step, by tag."""
        assert self._open is not None
        world = self._network.world or 0
        return {self._open.first_tag + at: bucket.ring(world) for at, bucket in enumerate(self._layout)}

    def _read_factors(self, bucket: Bucket) -> bool:
        """Whether the next two or three sums are what PowerSGD makes of a step's one bucket: then they are read.

        With several buckets the hook hung when it was tried: it waits, in one of Gloo's two threads, for other sums.
        """
        assert self.plan is not None and self.plan.shapes is not None and self._network.world is not None
        links, world, fmt = self._network.ring(), self._network.world, bucket.format
        starts = {start: index for index, start in enumerate(self.plan.offsets[:-1])}
        order = [starts[part.start] for part in bucket.parts]
        ways = []
        for tags in ((None, self._tag, self._tag + 1), (self._tag, self._tag + 1, self._tag + 2)):
            totals = [
                0 if tag is None else solve_total(links, tag, world=world, element=fmt.bytes) or 0 for tag in tags
            ]
            sizes = (totals[0] // fmt.bytes, totals[1] // fmt.bytes, totals[2] // fmt.bytes)
            if totals[1] and totals[2] and (way := solve_compression(self.plan.shapes, order, sizes)):
                ways.append((tags, sizes, way))
        if len(ways) != 1:
            return False
        tags, sizes, way = ways[0]
        sums = [Gradients.unknown(size, world=world, dtype=fmt.container) for size in sizes]
        for tag, size, into in zip(tags, sizes, sums, strict=True):
            if tag is not None:
                ring = Bucket((slice(0, size),), fmt).ring(world)
                take_apart(
                    ring,
                    links,
                    tag=tag,
                    step=Beside({tag: ring}, tag, float("inf")),
                    rule=Rule(fmt, Sending.PLAIN, world),
                    bucket=(slice(0, size),),
                    into=into,
                    notes=self._notes,
                )
        step = self._begin_step()
        step.factors = [factors_of(way, self.plan.shapes, [one.ranks[rank] for one in sums]) for rank in range(world)]
        if not self._compressed and self._regular:
            for vector, plain in zip(step.seen.ranks, sums[0].ranks, strict=True):
                at = 0
                for where in (slice(*self.plan.offsets[index : index + 2]) for index in way.plain):
                    part = slice(at, at := at + where.stop - where.start)
                    vector.values[where], vector.known[where] = plain.values[part], plain.known[part]
                    vector.bound[where] = plain.bound[part]
        self._notes.add("PowerSGD: the ranks' parts of its factors are given as what they are; they are no gradients")
        self._compressed = True
        self._done = len(self._layout)
        while self._tag <= tags[2]:
            self._pass()
        return True

    def _find_layout(self, *, closed: bool, end: bool) -> bool:
        """Looks for the buckets of the first step, once there is enough to tell them by; False where there is not.

        Buckets are under way at the same time, so the messages of a large one, in the middle of it, can look like all
        of a small one. So the whole step must fit, and be over.
        """
        if not closed or not (end or self._network.oldest > self._looked):
            return False
        self._looked = self._network.oldest
        assert self.plan is not None
        finder = Finder(self._network, self.plan, lambda tag: end or self._closed(tag))
        for tag in range(self._tag, min(self._network.newest, self._tag + MAX_SKIPPED) + 1):
            if tag > self._tag and any(link.floor < len(link.losses) for link in self._network.ring().values()):
                break  # what does not fit may be the first step with a loss, and what fits behind it the second
            found = finder.flat(tag) if self.plan.flat else finder.model(tag, next_one=tag == self._tag)
            mixed = not found and not self.plan.flat and tag == self._tag
            if found or (mixed and (found := finder.mixed(tag))):
                for _ in range(self._tag, tag):
                    self._skip("an all-reduce before the first step")
                self._begin(found, mixed=mixed)
                return True
            if self.plan.flat:
                break
        if end or self._network.held_bytes > self._patience:
            self._refuse(
                "the sizes of the first step's sums are not those of its parameters, or it cannot be told in which "
                "number format they are"
            )
        return False

    def _begin(self, layout: list[Bucket], *, mixed: bool) -> None:
        """The first step's buckets are known, and with them what the state is."""
        plan, self._layout = self.plan, layout
        assert plan is not None
        if plan.flat:
            assert plan.weights is not None
            size, rest = layout[-1].parts[-1].stop, None
            plan.tensors, plan.offsets = (Layout((size,), (1,)),), (0, size)
            plan.weights, rest = plan.weights[:size], plan.weights[size:]
            plan.buffers = rest if rest.size else None
        else:
            starts = {part.start: bucket.format for bucket in layout for part in bucket.parts if part.start < part.stop}
            self._formats = {at: starts[start] for at, start in enumerate(plan.offsets[:-1]) if start in starts}
            plan.settle_each(self._formats) if mixed else plan.settle(layout[0].format)
        self._layout_settled, self._alone = plan.flat or (len(layout) > 1 and not mixed), plan.flat

    @property
    def format(self) -> Format:
        """Of the gradients on the wire."""
        return self._layout[0].format if self._layout else FLOAT32

    @property
    def _dtype(self) -> type[np.float32] | type[np.float64]:
        """Of what is decoded: as wide as the gradients on the wire, and as the model's state."""
        assert self.plan is not None
        wide = {bucket.format.container for bucket in self._layout} | {(self.plan.format or FLOAT32).container}
        return np.float64 if np.float64 in wide else np.float32

    def _sending(self, fmt: Format) -> Sending:
        """Two bytes are a hook's work, unless the model has no more; where that is not known, the wider bound holds."""
        assert self.plan is not None
        return Sending.CAST if fmt.bytes == FLOAT16.bytes and fmt is not self.plan.format else Sending.DIVIDED

    @property
    def _patience(self) -> int:
        """Bytes of payloads that may wait for the first step's layout: those of two or three steps."""
        plan = self.plan
        if plan is None:
            return MIN_PATIENCE_BYTES
        state = plan.state_bytes if plan.weights is None else plan.weights.nbytes
        size = max(state, 4 * plan.offsets[-1] if plan.offsets else 0)
        return MIN_PATIENCE_BYTES + 6 * (self._network.world or 0) * size

    def _begin_step(self) -> Step:
        assert self.plan is not None and self._network.world is not None
        if self._layout_settled:
            self._usual_prologue = self._prologue
        if self._step == 0:
            self._buffers = self.plan.buffers
        sizes = [bucket.ring(self._network.world).total for bucket in self._layout]
        self._open = Step(
            step=self._step,
            seen=Gradients.unknown(self.plan.offsets[-1], world=self._network.world, dtype=self._dtype),
            buffers=self._buffers,
            first_tag=self._tag,
            small=not self.plan.flat and sizes[0] <= max(SMALL_BYTES, 4 * self.plan.count) and len(sizes) > 1,
        )
        return self._open

    def _finish_step(self) -> Step:
        done, self._open = self._open, None
        assert done is not None
        assert self.plan is not None
        if done.small and self._done < len(self._layout):
            self._notes.add(f"step {done.step}: its first sum may have been none of its buckets: left out")
            world = len(done.seen.ranks)
            done.seen = Gradients.unknown(self.plan.offsets[-1], world=world, dtype=self._dtype)
        for array in done.seen.arrays():
            self.plan.reorder(array)
        self._network.settle(self._tag - 1)
        self._step += 1
        self._done = self._prologue = 0
        self._buffers, self._between = None, 0
        return done

    def _pass(self) -> None:
        """Goes on to the next collective."""
        self._network.release(self._tag)
        self._tag += 1

    def _skip(self, what: str) -> None:
        """Passes over an all-reduce between two steps that is no bucket."""
        self._regular = False
        self._between = float("inf")
        self._notes.add(f"{what}: passed over")
        self._network.passed_over.add(self._tag)
        self._pass()

    def _refuse(self, why: str) -> None:
        self._over = True
        self._notes.add(f"collective {self._tag}, in step {self._step}: {why}: nothing from there on is believed")
        self._network.release(1 << 32)
