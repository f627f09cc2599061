"""The tap alone, on the loopback of a network made for it: it loses nothing in silence, and says nothing."""

from __future__ import annotations

import ast
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import dpkt
import pytest

from harness.errors import ConfigError
from nodes import ring, tap
from nodes.lab import private_network
from nodes.node import PROJECT
from nodes.tap import TapConfig

pytestmark = pytest.mark.usefixtures("token")

SCENE = """
import json, os, signal, socket, subprocess, sys, threading, time
from nodes.network import loopback_up
out, ring_mib = sys.argv[1], sys.argv[2]
loopback_up()

def start_tap():
    argv = [sys.executable, "-m", "nodes.tap", "--interface", "lo", "--out", out, "--ring-mib", ring_mib]
    tap = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert json.loads(tap.stdout.readline())["ready"] is True
    return tap

def end_tap(tap):
    tap.send_signal(signal.SIGTERM)
    said, errors = tap.communicate(timeout=20)
    print(json.dumps({"code": tap.returncode, "said": said, "errors": errors}))

def burst(size):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        peer, _ = server.accept()
        def drink():
            while peer.recv(1 << 20):
                pass
        drinker = threading.Thread(target=drink)
        drinker.start()
        sender.sendall(bytes(size))
        sender.shutdown(socket.SHUT_WR)
        drinker.join()
        peer.close()
"""
"""What each test's own process, inside a private network, begins with."""


def play(scene: str, out: Path, *, ring_mib: int = 32) -> dict[str, object]:
    """Runs a scene in a private network. Returns what it printed."""
    ran = subprocess.run(
        [*private_network(), sys.executable, "-c", SCENE + scene, str(out), str(ring_mib)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    printed: dict[str, object] = json.loads(ran.stdout)
    return printed


def read(file: Path) -> tuple[int, int]:
    """How many packets a capture holds, and the bytes that they carry."""
    with open(file, "rb") as opened:
        sizes = [len(frame) for _, frame in dpkt.pcapng.Reader(opened)]
    return len(sizes), sum(sizes)


@pytest.mark.lab
def test_burst_is_recorded_whole(tmp_path: Path) -> None:
    out = tmp_path / "wire.pcapng"
    ended = play("tap = start_tap(); burst(100_000_000); end_tap(tap)", out, ring_mib=256)
    assert ended["code"] == 0 and ended["errors"] == ""
    heard = json.loads(str(ended["said"]))
    assert heard["dropped"] == 0
    assert read(out) == (heard["packets"], heard["bytes"])
    assert heard["bytes"] > 100_000_000


@pytest.mark.lab
def test_drops_are_counted_in_the_result_and_in_the_file(tmp_path: Path) -> None:
    out = tmp_path / "wire.pcapng"
    # A tap that is stopped cannot empty its ring, which is smaller than the burst.
    scene = "tap = start_tap(); tap.send_signal(signal.SIGSTOP); burst(40_000_000); tap.send_signal(signal.SIGCONT)"
    ended = play(scene + "; end_tap(tap)", out, ring_mib=8)
    heard = json.loads(str(ended["said"]))
    assert heard["dropped"] > 0
    assert read(out) == (heard["packets"], heard["bytes"])
    kind, _, _, _, _, *options = struct.unpack_from("<IIIIIHHQHHQ", statistics_block(out))
    assert kind == 5
    assert options == [4, 8, heard["packets"] + heard["dropped"], 5, 8, heard["dropped"]]


@pytest.mark.lab
def test_few_packets_are_kept_while_the_tap_is_held_up(tmp_path: Path) -> None:
    """The kernel hands over a block every 20 ms, however little is in it: a ring of few blocks is soon gone."""
    out = tmp_path / "wire.pcapng"
    scene = """
tap = start_tap(); tap.send_signal(signal.SIGSTOP)
receiver, sender = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
receiver.bind(("127.0.0.1", 0))
for _ in range(10):
    sender.sendto(b"still here", receiver.getsockname())
    time.sleep(0.025)
tap.send_signal(signal.SIGCONT); end_tap(tap)
"""
    heard = json.loads(str(play(scene, out, ring_mib=8)["said"]))
    assert (heard["packets"], heard["dropped"]) == (10, 0)


def statistics_block(file: Path) -> bytes:
    """The last block of a capture."""
    data = file.read_bytes()
    (length,) = struct.unpack("<I", data[-4:])
    return data[-length:]


@pytest.mark.lab
def test_full_disk_is_one_line_and_leaves_whole_packets(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    kept = tmp_path / "kept.pcapng"
    scene = f"""
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", {str(full)!r}], check=True)
tap = start_tap(); burst(20_000_000); end_tap(tap)
import shutil; shutil.copy(out, {str(kept)!r})
"""
    ended = play(scene, full / "wire.pcapng")
    assert ended["code"] == 1 and ended["said"] == ""
    assert ended["errors"] == (
        f"tap: {full}/wire.pcapng: cannot be written: No space left on device (ENOSPC);"
        " what was recorded until then can be read\n"
    )
    read(kept)


@pytest.mark.lab
def test_interface_that_goes_away_is_one_line(tmp_path: Path) -> None:
    down = """
from pyroute2 import IPRoute
tap = start_tap(); burst(1000)
with IPRoute() as route: route.link("set", index=1, state="down")
tap.wait(timeout=20)
end_tap(tap)
"""
    ended = play(down, tmp_path / "wire.pcapng")
    assert ended["code"] == 1
    assert str(ended["errors"]).startswith("tap: interface lo: went away while it was recorded: Network is down")
    assert read(tmp_path / "wire.pcapng")[0] > 0


@pytest.mark.lab
def test_tap_sends_nothing(tmp_path: Path) -> None:
    idle = """
tap = start_tap(); time.sleep(0.3)
sent = open("/proc/net/dev").read().split("lo:")[1].split()[9]
tap.send_signal(signal.SIGTERM); tap.wait(timeout=20)
print(json.dumps({"sent": sent}))
"""
    assert play(idle, tmp_path / "wire.pcapng") == {"sent": "0"}


def test_tap_has_no_call_that_sends() -> None:
    for module in (ring, tap):
        calls = [
            node for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())) if isinstance(node, ast.Call)
        ]
        names = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
        assert not {name for name in names if name.startswith("send") or name in ("connect", "connect_ex")}


def test_without_the_right_to_listen_one_line_says_what_to_do(tmp_path: Path) -> None:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("needs setpriv")
    argv = [setpriv, "--bounding-set", "-net_raw", "--inh-caps", "-net_raw", sys.executable, "-m", "nodes.tap"]
    ran = subprocess.run(
        [*argv, "--interface", "lo", "--out", str(tmp_path / "wire.pcapng")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("tap: interface lo: recording needs CAP_NET_RAW")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interfaces": ()}, "interface: wanted at least one"),
        ({"ring_mib": 0}, "ring_mib: wanted 1 MiB or more, got 0"),
        ({"seconds": 0.0}, "seconds: wanted more than 0, got 0"),
    ],
)
def test_configuration_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TapConfig(**{"interfaces": ("lo",), "out": Path("wire.pcapng")} | fields)
