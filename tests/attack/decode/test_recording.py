"""From a capture file to figures and observations; protocols told apart; what is encrypted named as such."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import dpkt
import numpy as np
import pytest

from attack.capture.streams import Conflict, Data, Flow, StreamEvent
from attack.decode.recording import Desk, Recording
from attack.errors import AttackError, CaptureError
from attack.observation import Known
from harness.wire import Header
from tests.attack.decode.checking import check
from tests.attack.decode.job import RUN, Job, Write, events, frame

CLIENT, SERVER = "10.0.0.1:40000", "10.0.1.1:5555"
UP = Flow(source=CLIENT, destination=SERVER)


def write_capture(path: Path, writes: list[Write], *, segment: int = 1448) -> Path:
    """A pcapng file of the traffic, each connection with its SYN and FIN; written by dpkt."""
    sequence: dict[Flow, int] = {}
    with path.open("wb") as file:
        writer = dpkt.pcapng.Writer(file)

        def put(flow: Flow, flags: int, data: bytes = b"") -> None:
            (source, sport), (target, dport) = (end.split(":") for end in (flow.source, flow.destination))
            tcp = dpkt.tcp.TCP(sport=int(sport), dport=int(dport), seq=sequence[flow], flags=flags, data=data)
            addresses = {"src": bytes(map(int, source.split("."))), "dst": bytes(map(int, target.split(".")))}
            ip = dpkt.ip.IP(**addresses, p=dpkt.ip.IP_PROTO_TCP, data=tcp)
            ip.len = 40 + len(data)
            writer.writepkt(bytes(dpkt.ethernet.Ethernet(data=ip)), ts=1.0)
            sequence[flow] += len(data) + bool(flags & (dpkt.tcp.TH_SYN | dpkt.tcp.TH_FIN))

        for write in writes:
            if write.flow not in sequence:
                sequence[write.flow] = 1000
                put(write.flow, dpkt.tcp.TH_SYN)
            for at in range(0, len(write.data), segment):
                put(write.flow, 0, write.data[at : at + segment])
        for flow in list(sequence):
            put(flow, dpkt.tcp.TH_FIN)
    return path


def test_a_capture_file_from_end_to_end(tmp_path: Path) -> None:
    job = Job(optimizer="sgd:lr=0.1,momentum=0.9", buffers=((4,),))
    recording = Recording(write_capture(tmp_path / "wire.pcapng", job.writes), optimizer=job.optimizer)
    found = check(job, recording.observations())
    assert len(found) == 6 and all(seen.exact_fraction == 1 and seen.weights is not None for seen in found)
    assert len(list(recording.observations())) == 6  # and again
    figures = recording.inspect()
    json.dumps(figures, allow_nan=False)
    assert (figures["protocols"], figures["encrypted"], figures["world_size"]) == (["zmtp"], False, 2)
    assert figures["parameters"] == {"count": 1532, "shapes": [[12, 3, 5, 5], [12], [10, 61], [10]]}
    assert [step["step"] for step in figures["steps"]] == [0, 1, 2]
    assert all(rank["complete"] and rank["known_fraction"] == 1 for step in figures["steps"] for rank in step["ranks"])
    assert (figures["gaps"], figures["notes"]) == ([], [])
    sizes = {str(flow): sum(len(w.data) for w in job.writes if w.flow == flow) for flow in {w.flow for w in job.writes}}
    assert {f"{flow['source']} -> {flow['destination']}": flow["bytes"] for flow in figures["flows"]} == sizes


def test_holes_are_listed() -> None:
    job = Job()
    figures = Desk(events(job.writes, lost=lambda index: index == 40)).inspect()
    [gap] = figures["gaps"]
    [flow] = [flow for flow in figures["flows"] if flow["gaps"]]
    assert gap["flow"] == f"{flow['source']} -> {flow['destination']}"
    assert flow["gaps"] == [{"offset": gap["offset"], "length": gap["length"]}]
    assert any("1 holes, " in note for note in figures["notes"])


def test_options_and_files_that_are_wrong_are_one_line(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "wire.pcapng", Job(steps=1).writes)
    with pytest.raises(AttackError, match="the learning rate is missing"):
        Recording(path, optimizer="sgd")
    with pytest.raises(AttackError, match="wanted hexadecimal digits, got 'run1'"):
        Recording(path, run="run1")
    (tmp_path / "other").write_text("not a capture")
    with pytest.raises(CaptureError, match="not a capture"):
        Recording(tmp_path / "other")


def test_of_several_runs_the_first_is_read_or_the_one_that_was_asked_for() -> None:
    one, two = Job(seed=1), Job(seed=2, run=b"\xffsecond\xff", world=3)
    moved = [
        dataclasses.replace(w, flow=Flow(source=w.flow.source, destination=w.flow.destination, incarnation=1))
        for w in two.writes
    ]
    desk = Desk(events(one.writes + moved))
    assert len(check(one, desk.observations())) == 6
    assert any(two.run.hex() in line for line in desk.notes.lines())
    assert len(check(two, Desk(events(one.writes + moved), run=two.run).observations())) == 9
    assert list(Desk(events(one.writes + moved), run=b"no such.").observations()) == []


def test_both_sides_of_a_byte_captured_twice_are_not_believed() -> None:
    job = Job(steps=2)
    clean = list(events(job.writes))
    data = [e for e in clean if isinstance(e, Data) and e.flow == job.up(0, 0) and b"gradient" in bytes(e.payload)]
    for late in (False, True):
        stream: list[StreamEvent] = list(clean)
        doubt = Conflict(flow=data[1].flow, time=0.0, offset=data[1].offset + 400, length=5)
        stream.insert(clean.index(data[1]) + (5 if late else 0), doubt)
        desk = Desk(stream, optimizer=job.optimizer)
        found = check(job, desk.observations())
        assert [int((seen.known == Known.UNKNOWN).sum()) for seen in found] in ([1, 0, 0, 0], [2, 0, 0, 0])
        assert any("captured twice" in line for line in desk.notes.lines())
    header = Conflict(flow=data[1].flow, time=0.0, offset=data[1].offset + 30, length=1)
    found = check(job, Desk([*clean[: clean.index(data[1])], header, *clean[clean.index(data[1]) :]]).observations())
    assert int((found[0].known == Known.UNKNOWN).sum()) == 256


def test_ranks_that_disagree_on_the_layout_are_named_and_neither_is_believed() -> None:
    job, other = Job(), Job(shapes=((1532,),))
    swapped = [
        theirs if b"hello" in ours.data and ours.flow == job.up(1, 0) else ours
        for ours, theirs in zip(job.writes, other.writes, strict=False)
    ]
    swapped += job.writes[len(swapped) :]
    desk = Desk(events(swapped), optimizer=job.optimizer)
    found = check(job, desk.observations())
    assert all(seen.shapes == ((1532,),) and seen.complete for seen in found)
    assert [seen.weights is not None for seen in found] == [True, True, False, False, False, False]
    assert any("disagree on the model's layout" in line for line in desk.notes.lines())


def test_a_codec_that_is_not_read_is_named_and_nothing_is_known_of_it() -> None:
    for codec, note in (("magic", "coded as magic float32, which is not read"), ("sparse", "sparse: wanted 0 to 256")):
        job = Job(alter=lambda header, codec=codec: dataclasses.replace(header, codec=codec))
        desk = Desk(events(job.writes))
        assert not any(seen.known.any() for seen in desk.observations())
        assert any(note in line for line in desk.notes.lines())


def test_what_a_header_says_of_a_defense_is_told() -> None:
    job = Job(alter=lambda header: dataclasses.replace(header, params={"clip": 1.0, "noise": 0.5}))
    assert {seen.defense for seen in Desk(events(job.writes)).observations()} == {"dense:clip=1.0,noise=0.5"}


def test_another_zeromq_application_is_zmtp_without_observations() -> None:
    greeting = Job().writes[0]
    talk = Write(flow=greeting.flow, data=frame(b"hello", more=True) + frame(b"world"))
    figures = Desk(events([greeting, *[talk] * 5])).inspect()
    assert (figures["protocols"], figures["steps"], figures["world_size"]) == (["zmtp"], [], None)
    assert any("not a message of this project" in note for note in figures["notes"])


def test_curve_says_encrypted_and_what_sizes_and_timing_give_away() -> None:
    job, sealed = Job(steps=20, chunk=500), []
    for write in job.writes:
        up = write.flow == job.up(write.flow.source.startswith("10.0.0.2"), 0)
        if write.data[0] == 0xFF:
            hello = b"\x05HELLO" + bytes(194) if up else b"\x07WELCOME" + bytes(160)
            last = b"\x08INITIATE" + bytes(287) if up else b"\x05READY" + bytes(59)
            greeting = write.data[:12] + b"CURVE".ljust(20, b"\0") + write.data[32:64]
            sealed.append(
                Write(flow=write.flow, data=greeting + frame(hello, command=True) + frame(last, command=True))
            )
            continue
        head = 2 + write.data[1]
        body = write.data[head + (9 if write.data[head] & 2 else 2) :]
        boxes = [frame(b"\x07MESSAGE" + bytes(25 + len(part))) for part in (write.data[2:head], body)]
        sealed.append(Write(flow=write.flow, data=b"".join(boxes)))
    figures = Desk(events(sealed)).inspect()
    assert (figures["encrypted"], figures["steps"], figures["world_size"]) == (True, [], None)
    assert len(figures["sealed"]) == 4
    for entry in figures["sealed"]:
        assert entry["mechanism"] == "CURVE" and entry["server"] == (entry["source"] == SERVER)
        assert 4 * 1532 < entry["estimate"]["bytes_per_step"] < 4 * 1532 + 4 * 200  # four chunks and their headers
        assert abs(entry["estimate"]["steps"] - 20) <= 2 and entry["estimate"]["step_seconds"] > 0
    json.dumps(figures, allow_nan=False)


def test_tls_is_named_with_its_records() -> None:
    def record(kind: int, body: bytes) -> bytes:
        return bytes([kind, 3, 3]) + len(body).to_bytes(2, "big") + body

    up = record(22, b"\x01" + bytes(200)) + b"".join(record(23, bytes(size)) for size in [5000, 700] * 30)
    down = record(22, b"\x02" + bytes(100)) + record(23, bytes(50))
    writes = [Write(flow=UP, data=up), Write(flow=UP.reverse, data=down)]
    figures = Desk(events(writes, lost=lambda index: index == 2)).inspect()
    assert (figures["protocols"], figures["encrypted"]) == (["tls"], True)
    client, server = figures["sealed"]
    assert (client["server"], server["server"], server["messages"]) == (False, True, 1)
    assert client["messages"] == 60 and client["estimate"]["bytes_per_step"] == 5700 - 2 * 17


def test_what_nobody_knows_is_unknown() -> None:
    generator = np.random.default_rng(0)
    for data in (b"GET / HTTP/1.1\r\n\r\n", generator.bytes(100_000), b"\xff", b"\x16"):
        figures = Desk(events([Write(flow=UP, data=data)])).inspect()
        assert (figures["protocols"], figures["encrypted"], figures["steps"]) == (["unknown"], False, [])


def test_memory_is_bounded_by_the_steps_in_flight() -> None:
    import tracemalloc

    def peak(steps: int) -> int:
        job = Job(steps=steps, shapes=((50_000,),), chunk=10_000)
        stream = list(events(job.writes, segment=20_000))
        tracemalloc.start()
        for _ in Desk(stream, optimizer=job.optimizer).observations():
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)
    assert peak(24) < 1.3 * peak(6)


def test_the_header_vectors_of_the_public_format() -> None:
    # Written by hand from the byte table of `harness.wire.message`, so that a mistake shared by both ends still shows.
    packed = (
        b"\x8c\xa7gradtap\x01\xa4kind\xa8gradient\xa3run\xc4\x08" + RUN + b"\xa4rank\x01\xa4step\xcd\x01\x00\xa2at\x00"
        b"\xa5count\x02\xa5total\x04\xa5dtype\xa7float32\xa5codec\xa5dense\xa6params\x80\xa4size\x08"
    )
    header = Header.unpack(packed)
    assert (header.rank, header.step, header.count, header.total, header.size) == (1, 256, 2, 4, 8)
    assert header.pack() == packed
