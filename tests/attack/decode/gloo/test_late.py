"""A tap that came late, connections of which the first bytes were missed, and pairs that greet and then say nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from attack.capture.reassembly import read_streams
from attack.capture.streams import Closed, Data, Flow, Gap, Opened, StreamEvent
from attack.decode.gloo.head import Kind, Opcode, Slot, pack_head
from tests.attack.decode.gloo.jobs import PaperJob, events
from tests.attack.decode.gloo.recordings import CASES, FOLDER, Case, check, observe


def joined_late(recorded: list[StreamEvent], missed: Callable[[Flow], int]) -> Iterator[StreamEvent]:
    """What a tap gives that misses so many first bytes of each flow, and its SYN where that is more than none."""
    opened: set[Flow] = set()
    for event in recorded:
        flow, skip = event.flow, missed(event.flow)
        if isinstance(event, Closed):
            if flow in opened:
                yield event
        elif isinstance(event, Data | Gap) and skip:
            assert isinstance(event, Data)
            if event.offset + len(event.payload) <= skip:
                continue
            if flow not in opened:
                yield Opened(flow=flow, time=event.time, from_start=False)
            cut = max(0, skip - event.offset)
            yield Data(flow=flow, time=event.time, offset=event.offset + cut - skip, payload=bytes(event.payload[cut:]))
            opened.add(flow)
        elif not skip:
            opened.add(flow)
            yield event


def recorded(case: Case) -> tuple[list[StreamEvent], dict[str, np.ndarray]]:
    with np.load(FOLDER / f"{case.name}.npz") as truth:
        return list(read_streams(FOLDER / f"{case.name}.pcapng")), dict(truth)


def sizes(seen: list[StreamEvent]) -> dict[Flow, int]:
    return {event.flow: event.offset + len(event.payload) for event in seen if isinstance(event, Data)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_a_late_tap_knows_the_protocol_and_claims_nothing_wrong(case: Case, share: float) -> None:
    seen, truth = recorded(case)
    length = sizes(seen)
    found, desk = observe(list(joined_late(seen, lambda flow: max(1, int(share * length.get(flow, 0))))))
    check(truth, found)
    notes = " ".join(desk.notes.lines())
    if share > 0.1:  # the job's beginning was missed
        assert not any(one.known.any() for one in found)
        assert "which rank is which" in notes or "not seen how the job began" in notes
    assert "joined in the middle" in notes
    assert "gloo" in {stream.protocol for stream in desk._streams.values()}


@pytest.mark.parametrize("seed", range(40))
def test_what_is_known_is_right_whatever_each_stream_lacks_at_its_start(seed: int) -> None:
    generator = random.Random(seed)
    seen, truth = recorded(generator.choice(CASES)) if seed % 2 else paper(generator.choice((2, 3, 4)), seed)
    length = sizes(seen)
    skip = {
        flow: generator.choice((0, 8, 48, 56, 57, generator.randrange(length[flow]))) if generator.random() < 0.5 else 0
        for flow in sorted(length, key=str)
    }
    check(truth, observe(list(joined_late(seen, lambda flow: skip.get(flow, 0))))[0])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_store_and_the_other_greetings_name_the_rank_whose_greeting_was_missed(world: int) -> None:
    job = PaperJob(world=world)
    [greeting] = [at for at, (flow, data) in enumerate(job.writes) if len(data) == 8 and flow == job._flow(1, 0)]
    found, desk = observe(list(events(job.writes, lost=lambda index, _: index == greeting)))
    check(job.truth, found)
    assert [(one.step, one.rank) for one in found] == [(s, r) for s in range(3) for r in range(world)]
    assert all(one.known.any() for one in found), desk.notes.lines()


def test_the_ring_names_the_ranks_whose_greetings_were_missed() -> None:
    job = PaperJob(world=3)
    missed = [
        at for at, (flow, data) in enumerate(job.writes) if len(data) == 8 and flow.destination.startswith("10.0.0.1:")
    ]
    assert len(missed) == 2
    found, _ = observe(list(events(job.writes, lost=lambda index, _: index in missed)))
    check(job.truth, found)
    assert len(found) == 9 and any(one.complete for one in found)


@pytest.mark.parametrize("world", [4, 5, 6])
def test_idle_pairs_count_among_the_greetings(world: int) -> None:
    job = PaperJob(world=world, steps=2)
    writes = [(flow, data) for flow, data in job.writes if flow != job.store]
    assert any(sum(flow in (one, one.reverse) for flow, _ in writes) == 1 for one in {flow for flow, _ in writes})
    found, desk = observe(list(events(writes)))
    check(job.truth, found)
    assert len(found) == 2 * world and all(one.complete for one in found), desk.notes.lines()


def test_foreign_streams_of_eight_bytes_are_no_ranks() -> None:
    job = PaperJob(world=4, steps=2)
    foreign = Flow(source="10.0.0.9:1", destination="10.0.0.8:2")
    writes = [(foreign, (3).to_bytes(8, "little")), *(write for write in job.writes if write[0] != job.store)]
    found, _ = observe(list(events(writes)))
    check(job.truth, found)
    assert len(found) == 8


def test_a_connection_without_a_greeting_spoils_what_the_others_prove() -> None:
    """Of three ranks, the greetings of one pair alone look like those of a job of two."""
    job = PaperJob(world=3)
    seen = list(events([write for write in job.writes if write[0] != job.store]))
    pair = {job._flow(1, 0), job._flow(0, 1)}
    found, _ = observe(list(joined_late(seen, lambda flow: 0 if flow in pair else 20)))
    check(job.truth, found)
    assert not any(one.known.any() for one in found)


def test_a_stream_that_begins_at_a_head_may_lack_what_came_before() -> None:
    """A late tap may begin exactly between two messages, and the bytes before a head may look like a greeting."""
    head = pack_head(Opcode.SEND_UNBOUND_BUFFER, Slot(Kind.ALLREDUCE, 9, 0), 4)
    flow = Flow(source="10.0.0.2:1", destination="10.0.0.1:2")
    for before in (b"", bytes(8)):
        _, desk = observe(
            [
                Opened(flow=flow, time=0.0, from_start=False),
                Data(flow=flow, time=0.0, offset=0, payload=before + 3 * (head + b"1234")),
            ]
        )
        assert desk._streams[flow].protocol == "gloo"
        assert not desk._readers[-1]._everyone.network._greetings  # type: ignore[attr-defined]


def paper(world: int, seed: int) -> tuple[list[StreamEvent], dict[str, np.ndarray]]:
    job = PaperJob(world=world, seed=seed)
    return list(events(job.writes)), job.truth


def test_payloads_of_nobody_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attack.decode.gloo.group.MAX_WAITING_BYTES", 1000)
    job = PaperJob(world=3)
    seen = list(events([write for write in job.writes if write[0] != job.store]))
    found, desk = observe(list(joined_late(seen, lambda flow: 20)))
    network = desk._readers[-1]._everyone.network  # type: ignore[attr-defined]
    assert not found and network.held_bytes == 0 and not any(link.slots for link in network.links.values())
    assert "not waited for longer" in " ".join(desk.notes.lines())
