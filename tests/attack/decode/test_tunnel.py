"""A Gloo job through real TLS 1.3: named, its sizes and times reported, and no gradient pretended."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from shutil import which

import pytest

from attack.capture.streams import Flow
from attack.decode.recording import Desk
from nodes.commands.inspect import describe_sealed
from tests.attack.decode.gloo.jobs import PaperJob, events
from tests.helpers import missing

SHAPES, STEPS = ((300, 200), (300,)), 12
NUMBERS = 300 * 200 + 300


class Tunnel:
    """Both ends of a TLS connection in memory: clear writes in, what crosses the wire out."""

    def __init__(self, flow: Flow, certificate: Path) -> None:
        self.flow = flow
        client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client.load_verify_locations(certificate / "cert.pem")
        server.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client.wrap_bio(down, up, server_hostname="job")
        self.server = server.wrap_bio(up, down, server_side=True)
        self.pipes = {flow: (self.client, self.server), flow.reverse: (self.server, self.client)}
        self.wire = {flow: up, flow.reverse: down}
        self.writes: list[tuple[Flow, bytes]] = []
        for _ in range(3):
            for end, sent in ((self.client, flow), (self.server, flow.reverse)):
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    pass
                self._cross(sent)
        assert self.client.version() == "TLSv1.3"

    def send(self, flow: Flow, data: bytes) -> None:
        sender, receiver = self.pipes[flow]
        sender.write(data)
        self._cross(flow)
        got = b""
        while len(got) < len(data):
            got += receiver.read(1 << 20)
        assert got == data

    def _cross(self, flow: Flow) -> None:
        """Takes what an end has to send, leaves it where the other reads, and notes it."""
        sealed = self.wire[flow].read()
        if sealed:
            self.writes.append((flow, sealed))
            self.wire[flow].write(sealed)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if which("openssl") is None:
        missing("openssl", "no program of this name")
    folder = tmp_path_factory.mktemp("certificate")
    argv = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=job".split()
    subprocess.run([*argv, "-addext", "subjectAltName=DNS:job"], cwd=folder, check=True, capture_output=True)
    return folder


def test_a_job_inside_tls_is_named_and_measured_and_not_decoded(certificate: Path) -> None:
    job = PaperJob(world=2, steps=STEPS, shapes=SHAPES, buckets=((0, 1),))
    tunnels: dict[Flow, Tunnel] = {}
    writes: list[tuple[Flow, bytes]] = []
    for flow, data in job.writes:
        key = min(flow, flow.reverse, key=lambda one: one.source)
        tunnel = tunnels.setdefault(key, Tunnel(key, certificate))
        tunnel.send(flow, data)
        writes += tunnel.writes
        tunnel.writes.clear()
    desk = Desk(events(writes))
    found = desk.inspect()
    assert (found["protocols"], found["encrypted"], found["steps"]) == (["tls"], True, [])
    assert found["world_size"] is None and found["parameters"]["count"] is None
    assert {entry["mechanism"] for entry in found["sealed"]} == {"TLS"}
    busiest = max(found["sealed"], key=lambda entry: entry["bytes"])
    # Of a ring of two, each sends as much as the gradient has, a step: in four equal parts, which is what repeats.
    assert busiest["bytes"] > STEPS * 4 * NUMBERS
    estimate = busiest["estimate"]
    assert estimate is not None and estimate["bytes_per_step"] == pytest.approx(NUMBERS, rel=0.01)
    assert estimate["steps"] == pytest.approx(4 * STEPS, abs=4)
    said = describe_sealed(busiest)
    assert "TLS, no gradient is decoded" in said and "a step, or one of its equal parts" in said
