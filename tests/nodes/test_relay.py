"""The relay: the same file as a tap's, from a host that grants no private network."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import dpkt
import pytest

from nodes.commands.lab import free_ports
from nodes.lab import run_lab
from nodes.node import PROJECT
from nodes.relay import ACK, MAX_PAYLOAD, PUSH, checksum, frame, parse_route
from tests.nodes.labs import LISTEN, TALK, said, script, small_lab

pytestmark = pytest.mark.usefixtures("token")

SIZE = 1_000_000


def test_what_is_passed_on_is_recorded(tmp_path: Path) -> None:
    here, there = free_ports(2)
    listen = script("listen", LISTEN, "127.0.0.1", there, 2, SIZE)
    talks = [script(f"talk-{letter}", TALK, "127.0.0.1", here, letter, SIZE) for letter in "bc"]
    result = run_lab(small_lab(tmp_path, listen, *talks, relay=(f"127.0.0.1:{here}=127.0.0.1:{there}",)))
    assert result.ok, result
    with open(tmp_path / "wire.pcapng", "rb") as file:
        heard = said(file)
    assert heard.num_packets == result.packets
    assert sorted(data for flow, data in heard.payloads.items() if flow[3] == here) == [b"b" * SIZE, b"c" * SIZE]
    assert [data for flow, data in heard.payloads.items() if flow[1] == here] == [b"thank you"] * 2


@pytest.mark.parametrize("payload", [b"", b"odd", bytes(range(256)) * 4, bytes(MAX_PAYLOAD)])
def test_packets_are_those_of_the_standard(payload: bytes) -> None:
    made = frame(("127.0.0.1", 40_000), ("127.0.0.1", 5555), 2**32 + 7, 9, PUSH | ACK, payload)
    ip = dpkt.ethernet.Ethernet(made).data
    assert isinstance(ip, dpkt.ip.IP) and isinstance(ip.data, dpkt.tcp.TCP)
    tcp = ip.data
    assert (tcp.sport, tcp.dport, tcp.seq, tcp.ack, tcp.flags, tcp.data) == (40_000, 5555, 7, 9, PUSH | ACK, payload)
    assert ip.len == 40 + len(payload)
    sums = ip.sum, tcp.sum
    ip.sum = tcp.sum = 0  # dpkt computes a sum that is zero when it packs
    again = dpkt.ip.IP(bytes(ip))
    assert isinstance(again.data, dpkt.tcp.TCP)
    assert (again.sum, again.data.sum) == sums


def test_checksum_is_that_of_rfc_1071() -> None:
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2 ^ 0xFFFF  # its section 3 has this example


def test_route_is_two_endpoints() -> None:
    assert parse_route("127.0.0.1:1=10.0.0.2:22") == (("127.0.0.1", 1), ("10.0.0.2", 22))


def test_file_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    here, there = free_ports(2)
    out = tmp_path / "wire.pcapng"
    relay = subprocess.Popen(
        [sys.executable, "-m", "nodes.relay", "--route", f"127.0.0.1:{here}=127.0.0.1:{there}", "--out", str(out)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert relay.stdout is not None and relay.stdout.readline() == '{"ready": true}\n'
    resource.prlimit(relay.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    listen = subprocess.Popen([sys.executable, "-c", LISTEN, "127.0.0.1", str(there), "1", str(SIZE)], stderr=-3)
    talk = subprocess.Popen([sys.executable, "-c", TALK, "127.0.0.1", str(here), "x", str(SIZE)], stderr=-3)
    _, errors = relay.communicate(timeout=20)
    for node in (listen, talk):
        node.kill()
        node.wait()
    assert relay.returncode == 1
    assert errors == (
        f"relay: {out}: cannot be written: File too large (EFBIG); what was recorded until then can be read\n"
    )
    with open(out, "rb") as file:
        assert said(file).num_packets > 0
