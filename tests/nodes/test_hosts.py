"""A host for each rank: who hears what depends on where the tap is placed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodes.lab import LabConfig, run_lab
from nodes.network import hosts_file
from tests.nodes.labs import LISTEN, TALK, Said, from_port, said, script, small_lab, to_port

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("token")]

SIZE = 300_000
HOSTS = ("rank0", "rank1", "rank2")


def three_hosts(run: Path, *, size: int = SIZE, **more: object) -> LabConfig:
    """The first host listens; the second says b, the third c."""
    talks = [
        script(f"talk{index}", TALK, "10.77.0.1", 7000, letter, size, host=HOSTS[index])
        for index, letter in ((1, "b"), (2, "c"))
    ]
    return small_lab(
        run, script("listen", LISTEN, "10.77.0.1", 7000, 2, size, host=HOSTS[0]), *talks, hosts=HOSTS, **more
    )


def record(config: LabConfig) -> Said:
    result = run_lab(config)
    assert result.ok, result
    assert result.dropped == 0 and result.capture is not None
    with open(result.capture, "rb") as file:
        heard = said(file)
    assert heard.num_packets == result.packets
    return heard


def test_tap_at_the_switch_hears_each_packet_once(tmp_path: Path) -> None:
    heard = record(three_hosts(tmp_path, tap="all"))  # `said` fails where a segment is there twice
    assert to_port(heard, 7000) == {"10.77.0.2": b"b" * SIZE, "10.77.0.3": b"c" * SIZE}
    assert from_port(heard, 7000) == {"10.77.0.2": b"thank you", "10.77.0.3": b"thank you"}


def test_tap_at_a_link_hears_both_its_ways_and_no_other(tmp_path: Path) -> None:
    heard = record(three_hosts(tmp_path, tap="rank1"))
    assert to_port(heard, 7000) == {"10.77.0.2": b"b" * SIZE}
    assert from_port(heard, 7000) == {"10.77.0.2": b"thank you"}


def test_link_has_the_speed_that_was_asked_for(tmp_path: Path) -> None:
    size, link_mbit = 1_000_000, 20.0
    result = run_lab(three_hosts(tmp_path, size=size, tap="all", link_mbit=link_mbit))
    assert result.ok, result
    # Both come through the listener's one link. A full bucket passes at once, hence the tenth.
    assert result.seconds > 0.9 * 2 * size * 8 / (link_mbit * 1e6)


def test_hosts_know_each_other_by_name(tmp_path: Path) -> None:
    look = "import socket; assert socket.gethostbyname('rank1') == '10.77.0.2', open('/etc/hosts').read()"
    result = run_lab(small_lab(tmp_path, script("look", look, host="rank0"), hosts=HOSTS, tap=None))
    assert result.ok, result
    assert (tmp_path / "hosts").read_text() == hosts_file(HOSTS)
