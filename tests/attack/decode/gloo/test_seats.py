"""Who sits where: against every job that there could be, a choice is never made where two of them fit."""

from __future__ import annotations

import itertools
import random

import pytest

from attack.capture.streams import Flow
from attack.decode.gloo.seats import Connection, seat


def job(world: int, order: tuple[int, ...]) -> dict[Flow, tuple[Connection, int, int]]:
    """All connections of a job whose ranks listen at addresses in this order: of two, the higher address connects."""
    connections = {}
    for rank, other in itertools.permutations(range(world), 2):
        if order[rank] > order[other]:
            flow = Flow(source=f"10.0.0.1:{100 * order[rank] + order[other]}", destination=f"10.0.0.1:{order[other]}")
            one = Connection(rank, other == (rank - 1) % world, rank == (other - 1) % world)
            connections[flow] = (one, rank, other)
    return connections


@pytest.mark.parametrize("seed", range(60))
def test_ranks_are_those_of_the_job_whatever_was_not_seen(seed: int) -> None:
    draw = random.Random(seed)
    world = draw.randint(2, 6)
    order = tuple(draw.sample(range(1, 9), world))
    everything = job(world, order)
    seen = {flow: one for flow, (one, _, _) in everything.items() if draw.random() < 0.8}
    for flow, one in seen.items():
        seen[flow] = Connection(
            one.greeting if draw.random() < 0.5 else None,
            one.forward and draw.random() < 0.7,
            one.backward and draw.random() < 0.7,
        )
    listeners = {f"10.0.0.1:{at}": rank if draw.random() < 0.5 else None for rank, at in enumerate(order)}
    here, there = seat(seen, listeners, world)
    assert {(everything[flow][1], rank) for flow, rank in here.items() if everything[flow][1] != rank} == set()
    assert all(order[rank] == int(address.split(":")[1]) for address, rank in there.items())


def test_the_ring_names_those_who_greeted_unheard() -> None:
    everything = job(4, (1, 2, 3, 4))
    seen = {flow: one._replace(greeting=None) for flow, (one, _, _) in everything.items()}
    here, there = seat(seen, {"10.0.0.1:1": 0, "10.0.0.1:2": 1, "10.0.0.1:3": None, "10.0.0.1:4": 3}, 4)
    assert there == {f"10.0.0.1:{rank + 1}": rank for rank in range(4)}
    assert here == {flow: rank for flow, (_, rank, _) in everything.items()}


def test_contradictions_seat_nobody() -> None:
    flows = [Flow(source=f"a:{port}", destination="b:1") for port in (1, 2)]
    greeted = Connection(2, False, False)
    assert seat(dict.fromkeys(flows, greeted), {"b:1": 0}, 3) == ({}, {})
    assert seat({flows[0]: greeted}, {"b:1": 2}, 3) == ({}, {})


def test_nobody_is_named_where_there_is_a_choice() -> None:
    flow = Flow(source="a:1", destination="b:1")
    assert seat({flow: Connection(None, False, False)}, {"b:1": 0}, 3) == ({}, {"b:1": 0})
