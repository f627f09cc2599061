"""Real bytes: libzmq under NULL, PLAIN and CURVE, and the project's own exchange. `vectors.py` says how they came."""

from __future__ import annotations

import os

import numpy as np
import pytest

from attack.capture.streams import Closed, Data, Flow, Opened
from attack.decode.frames import Command, Frame, Greeting, Sealed
from attack.decode.recording import Desk
from tests.attack.decode.checking import bits
from tests.attack.decode.feeding import decoder, feed, in_pieces
from tests.attack.decode.vectors import (
    FOLDER,
    MECHANISMS,
    MESSAGES,
    RANKS,
    SHAPES,
    STEPS,
    record,
    record_exchange,
)

SENT = {"client": MESSAGES, "server": [frames[::-1] for frames in MESSAGES]}


def read(mechanism: str, side: str) -> bytes:
    return (FOLDER / f"zmtp-{mechanism}.{side}.bin").read_bytes()


@pytest.mark.skipif("GRADTAP_WRITE_VECTORS" not in os.environ, reason="only on request: GRADTAP_WRITE_VECTORS=1")
def test_record_the_vectors_again() -> None:
    FOLDER.mkdir(exist_ok=True)
    for mechanism in MECHANISMS:
        for side, data in record(mechanism).items():
            assert len(data) < 100_000
            (FOLDER / f"zmtp-{mechanism}.{side}.bin").write_bytes(data)
    np.savez_compressed(FOLDER / "exchange.npz", **record_exchange())


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("mechanism", ["null", "plain"])
def test_messages_of_libzmq_are_read_as_they_were_sent(mechanism: str, side: str) -> None:
    data = read(mechanism, side)
    events = feed(decoder(), [data])
    greeting = events[0]
    assert isinstance(greeting, Greeting)
    assert (greeting.version, greeting.mechanism) == ((3, 1), mechanism.upper())
    assert not greeting.as_server  # whichever side it is: libzmq leaves the byte at zero
    commands = {event.name: event for event in events if isinstance(event, Command)}
    kind = b"DEALER" if side == "client" else b"ROUTER"
    assert kind in [command.metadata.get("Socket-Type") for command in commands.values()]
    messages: list[list[bytes]] = [[]]
    for event in events:
        if isinstance(event, Frame):
            messages[-1].append(bytes(event.body))
            if not event.more:
                messages.append([])
    assert messages == [*SENT[side], []]


@pytest.mark.parametrize("side", ["client", "server"])
def test_under_curve_only_sizes_are_read(side: str) -> None:
    events = feed(decoder(), [read("curve", side)])
    greeting, *rest = events
    assert isinstance(greeting, Greeting)
    assert (greeting.mechanism, greeting.as_server) == ("CURVE", False)
    names = [event.name for event in rest if isinstance(event, Command)]
    assert names == (["HELLO", "INITIATE"] if side == "client" else ["WELCOME", "READY"])
    assert not any(event.metadata for event in rest if isinstance(event, Command))
    sizes = [event.size for event in rest if isinstance(event, Sealed)]
    assert sizes == [len(frame) + 33 for frames in SENT[side] for frame in frames]


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("side", ["client", "server"])
def test_any_chunking_of_real_bytes_gives_the_same_events(mechanism: str, side: str) -> None:
    data = read(mechanism, side)
    want = feed(decoder(), [data])
    for size in (1, 13, 4096):
        assert feed(decoder(), in_pieces([data], size)) == want
    for at in range(0, len(data), 7):
        assert feed(decoder(), [data[:at], data[at:]]) == want


def test_the_exchange_is_decoded_to_the_bit() -> None:
    with np.load(FOLDER / "exchange.npz") as vector:
        golden = dict(vector)
    desk = Desk(_events(golden), optimizer="sgd:lr=0.1")
    found = list(desk.observations())
    assert [(seen.step, seen.rank) for seen in found] == [(s, r) for s in range(STEPS) for r in range(RANKS)]
    weights = golden["state"][:68]
    for seen in found:
        assert (seen.exact_fraction, seen.world_size, seen.shapes) == (1.0, RANKS, SHAPES)
        assert (bits(seen.gradient.numpy()) == bits(golden["gradients"][seen.step, seen.rank])).all()
        assert seen.weights is not None
        if seen.step == 0:
            assert seen.buffers is not None and (bits(seen.buffers.numpy()) == bits(golden["state"][68:])).all()
        expected = weights.copy()
        for step in range(seen.step):
            expected = expected - np.float32(0.1) * golden["averages"][step]
        np.testing.assert_allclose(seen.weights.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert desk.notes.lines() == []


def _events(golden: dict[str, np.ndarray]) -> list[Opened | Data | Closed]:
    ends = np.cumsum(golden["lengths"])
    offsets: dict[Flow, int] = {}
    events: list[Opened | Data | Closed] = []
    for index, end in enumerate(ends):
        client, server = f"127.0.0.1:{40000 + golden['connections'][index]}", "127.0.0.1:5555"
        up = Flow(source=client, destination=server)
        flow = up if golden["from_client"][index] else up.reverse
        if flow not in offsets:
            events.append(Opened(flow=flow, time=0.0, from_start=True))
        data = golden["bytes"][end - golden["lengths"][index] : end].tobytes()
        events.append(Data(flow=flow, time=float(index), offset=offsets.get(flow, 0), payload=data))
        offsets[flow] = offsets.get(flow, 0) + len(data)
    return [*events, *(Closed(flow=flow, time=float(len(ends)), how="fin") for flow in offsets)]
