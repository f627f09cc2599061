"""Recorded and fresh traffic of stock DDP jobs, whole and with holes, against what the ranks themselves left."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from attack.capture.reassembly import read_streams
from attack.capture.streams import Data, Gap, StreamEvent
from attack.decode.recording import Recording
from attack.observation import Known
from tests.attack.decode.gloo.recordings import CASES, FOLDER, LARGER, Case, check, observe, read_truth, record


def vector(case: Case) -> tuple[list[StreamEvent], dict[str, np.ndarray]]:
    """A recorded job."""
    with np.load(FOLDER / f"{case.name}.npz") as truth:
        return list(read_streams(FOLDER / f"{case.name}.pcapng")), dict(truth)


@pytest.mark.skipif("GRADTAP_WRITE_VECTORS" not in os.environ, reason="only on request: GRADTAP_WRITE_VECTORS=1")
@pytest.mark.parametrize("case", [*CASES, LARGER], ids=lambda case: case.name)
def test_record_the_vectors_again(case: Case, tmp_path: Path) -> None:
    run = record(case, tmp_path / "run")
    assert (run / "wire.pcapng").stat().st_size < 200_000
    FOLDER.mkdir(exist_ok=True)
    shutil.copyfile(run / "wire.pcapng", FOLDER / f"{case.name}.pcapng")
    np.savez_compressed(FOLDER / f"{case.name}.npz", **read_truth(run / "truth"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_gradient_of_every_rank_is_read(case: Case) -> None:
    events, truth = vector(case)
    found, _ = observe(events)
    assert [(seen.step, seen.rank) for seen in found] == [(s, r) for s in range(3) for r in range(case.world)]
    check(truth, found)
    for seen in found:
        assert seen.complete and seen.weights is not None and seen.exchange == "gloo"
        assert seen.shapes[:2] == ((11, 7), (11,))
        assert seen.buffers is None or (seen.buffers.numel() == 22 and "norm" in case.options)
        if "half" in case.options:
            assert seen.exact_fraction == 0.0 and seen.defense == "float16 on the wire"
        elif case.world == 2:
            assert seen.exact_fraction > 0.2  # half of it, less what ReLU made zero


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inspect_names_what_it_is(case: Case) -> None:
    found = Recording(FOLDER / f"{case.name}.pcapng").inspect()
    assert found["protocols"][0] == "gloo" and "tcpstore" in found["protocols"]
    assert found["world_size"] == case.world
    assert [len(step["ranks"]) for step in found["steps"]] == [case.world] * 3
    assert found["parameters"]["shapes"][0] == [11, 7]


def test_without_the_store_the_greetings_tell_the_ranks() -> None:
    for case in CASES[:2]:
        events, truth = vector(case)
        stores = {
            flow
            for event in events
            if isinstance(event, Data) and bytes(event.payload[:5]) == b"\0\xce\xf7\x85\x3c"
            for flow in (event.flow, event.flow.reverse)
        }
        assert stores
        found, desk = observe([event for event in events if event.flow not in stores])
        check(truth, found)
        assert len(found) == 3 * case.world or "which rank is which" in " ".join(desk.notes.lines())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5])
def test_what_is_known_is_right_whatever_was_missed(case: Case, share: float) -> None:
    events, truth = vector(case)
    for seed in range(4):
        check(truth, observe(list(with_holes(events, share=share, seed=seed)))[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_missed_packet_anywhere_spoils_no_more_than_it_held(case: Case) -> None:
    events, truth = vector(case)
    data = [(index, event) for index, event in enumerate(events) if isinstance(event, Data)]
    for index, event in random.Random(0).sample(data, 12):
        hole = Gap(flow=event.flow, time=event.time, offset=event.offset, length=len(event.payload))
        check(truth, observe([*events[:index], hole, *events[index + 1 :]])[0])


@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.0, 0.9), (0.3, 1.0), (0.6, 0.8)])
def test_a_capture_cut_at_either_end_says_nothing_wrong(start: float, stop: float) -> None:
    for case in CASES:
        events, truth = vector(case)
        check(truth, observe(list(cut(events, start, stop)))[0])


def test_one_link_gives_the_share_that_it_must() -> None:
    """World 2: one direction has its sender's half, raw; of the other rank, nothing."""
    events, truth = vector(CASES[0])
    sizes: dict[object, int] = {}
    for event in events:
        if isinstance(event, Data):
            sizes[event.flow] = sizes.get(event.flow, 0) + len(event.payload)
    greeted = next(e.flow for e in events if isinstance(e, Data) and len(e.payload) == 8 and e.offset == 0)
    silent = greeted if greeted in sizes else greeted.reverse
    for flow in (silent, silent.reverse):
        found, _ = observe([hole(event) if event.flow == flow and late(event) else event for event in events])
        check(truth, found)
        assert all((seen.known != Known.DIFFERENCED).all() or seen.exact_fraction < 1 for seen in found)


def late(event: StreamEvent) -> bool:
    return isinstance(event, Data) and event.offset > 3000


def hole(event: StreamEvent) -> StreamEvent:
    assert isinstance(event, Data)
    return Gap(flow=event.flow, time=event.time, offset=event.offset, length=len(event.payload))


def with_holes(events: list[StreamEvent], *, share: float, seed: int) -> Iterator[StreamEvent]:
    generator = random.Random(seed)
    return (hole(e) if isinstance(e, Data) and generator.random() < share else e for e in events)


def cut(events: list[StreamEvent], start: float, stop: float) -> Iterator[StreamEvent]:
    for index, event in enumerate(events):
        outside = not start * len(events) <= index <= stop * len(events)
        yield hole(event) if outside and isinstance(event, Data) else event


@pytest.mark.lab
@pytest.mark.parametrize(
    "case",
    [
        Case(world=3, options=("norm",)),
        Case(world=4, options=("lazy",)),  # two ranks connect when they have something to say
        Case(world=2, options=("ipv6",)),  # where no other address is left
    ],
    ids=lambda case: case.name,
)
def test_a_fresh_job_is_read(case: Case, tmp_path: Path) -> None:
    run = record(case, tmp_path / "run")
    events, truth = list(read_streams(run / "wire.pcapng")), read_truth(run / "truth")
    found, desk = observe(events)
    check(truth, found)
    assert len(found) == 3 * case.world and all(seen.complete and seen.weights is not None for seen in found)
    flows = {flow: stream.protocol for flow, stream in desk._streams.items()}
    if "ipv6" in case.options:
        assert all("[::1]:" in flow.source for flow in flows)
    stores = {end for flow, name in flows.items() if name == "tcpstore" for end in (flow, flow.reverse)}
    found, _ = observe([event for event in events if event.flow not in stores])
    check(truth, found)
    assert len(found) == 3 * case.world, "every pair has greeted, at the latest for the barrier: as good as the store"
