"""One namespace: nodes talk, the tap hears it all, and nothing is left however it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import ConfigError
from nodes.errors import NetworkError
from nodes.lab import LabConfig, private_network, run_lab
from nodes.node import PROJECT, Node
from tests.nodes.labs import LINGER, LISTEN, TALK, from_port, living, said, script, small_lab, to_port, until

pytestmark = pytest.mark.usefixtures("token")

SIZE = 1_000_000


def conversation(run: Path, **more: object) -> LabConfig:
    listen = script("listen", LISTEN, "127.0.0.1", 7000, 1, SIZE)
    talk = script("talk", TALK, "127.0.0.1", 7000, "x", SIZE)
    return small_lab(run, listen, talk, **more)


@pytest.mark.lab
def test_capture_holds_what_was_said_and_nothing_else(tmp_path: Path) -> None:
    result = run_lab(conversation(tmp_path))
    assert result.ok, result
    assert result.exit_codes == {"listen": 0, "talk": 0}
    assert result.dropped == 0
    assert result.capture == tmp_path / "wire.pcapng"
    with open(result.capture, "rb") as file:
        heard = said(file)
    assert heard.num_packets == result.packets
    assert to_port(heard, 7000) == {"127.0.0.1": b"x" * SIZE}
    assert from_port(heard, 7000) == {"127.0.0.1": b"thank you"}
    assert json.loads((tmp_path / "lab.json").read_text()) == result.to_json()


@pytest.mark.lab
def test_without_a_tap_there_is_no_capture(tmp_path: Path) -> None:
    result = run_lab(conversation(tmp_path, tap=None))
    assert result.ok and result.capture is None and result.packets == 0
    assert not (tmp_path / "wire.pcapng").exists()


@pytest.mark.lab
def test_network_is_private_and_speaks_both_versions_of_ip(tmp_path: Path) -> None:
    look = (
        "import os, socket; assert [name for _, name in socket.if_nameindex()] == ['lo']; "
        "assert socket.gethostbyname(socket.gethostname()) == '127.0.0.1'; "
        "socket.create_server(('::1', 7000), family=socket.AF_INET6); print(os.environ['EXTRA'])"
    )
    node = Node(name="look", argv=(sys.executable, "-c", look), env={"EXTRA": "of its own"})
    result = run_lab(small_lab(tmp_path, node, tap=None))
    assert result.ok, result
    assert (tmp_path / "logs/look.log").read_text() == "of its own\n"


@pytest.mark.lab
def test_node_that_dies_is_named_and_ends_the_others(tmp_path: Path) -> None:
    die = "import os, time; print('so long', flush=True); time.sleep(0.3); os.kill(os.getpid(), 9)"
    result = run_lab(small_lab(tmp_path, script("stay", LINGER), script("die", die)))
    assert not result.ok
    assert result.exit_codes == {"stay": -signal.SIGTERM, "die": -signal.SIGKILL}
    assert result.message.startswith("die: killed by SIGKILL after 0.")
    assert result.message.endswith(f"so long; its log: {tmp_path}/logs/die.log")
    assert result.log_tail == ("so long",)


@pytest.mark.lab
def test_deadline_ends_even_a_node_that_ignores_sigterm(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    result = run_lab(small_lab(tmp_path, script("deaf", deaf), script("stay", LINGER), deadline_s=1.5, grace_s=0.3))
    assert not result.ok
    assert result.message == "deadline of 1.5 s passed; still running: tap, deaf, stay"
    assert result.exit_codes == {"deaf": -signal.SIGKILL, "stay": -signal.SIGTERM}
    assert result.seconds < 10


@pytest.mark.lab
def test_service_ends_after_the_job_and_may_not_fail(tmp_path: Path) -> None:
    forever = script("server", LINGER, service=True)
    result = run_lab(small_lab(tmp_path / "well", forever, script("job", "pass"), tap=None))
    assert result.ok, result
    assert result.exit_codes == {"server": -signal.SIGTERM, "job": 0}
    result = run_lab(
        small_lab(
            tmp_path / "ill", script("server", "raise OSError('port taken')", service=True), script("job", LINGER)
        )
    )
    assert not result.ok
    assert "server: exit code 1" in result.message and "OSError: port taken" in result.message


FULL_DISK = """
import subprocess
from pathlib import Path
from nodes.lab import run_lab
from tests.nodes.test_lab import conversation
run = Path({run!r})
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(run)], check=True)
result = run_lab(conversation(run))
print(result.ok, result.message)
"""


@pytest.mark.lab
def test_full_disk_ends_the_lab_with_one_line(tmp_path: Path) -> None:
    argv = [*private_network(), sys.executable, "-c", FULL_DISK.format(run=str(tmp_path))]
    ran = subprocess.run(argv, cwd=PROJECT, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert ran.stdout.startswith("False tap: exit code 1 after")
    assert f"{tmp_path}/wire.pcapng: cannot be written: No space left on device (ENOSPC)" in ran.stdout


@pytest.mark.lab
def test_program_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = run_lab(small_lab(tmp_path, Node(name="job", argv=("no-such-program",)), tap=None))
    assert not result.ok
    assert result.message == "job: cannot be started: no-such-program: No such file or directory"


@pytest.mark.lab
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_caller_that_is_stopped_takes_the_lab_along(tmp_path: Path, token: str, number: signal.Signals) -> None:
    caller = subprocess.Popen([sys.executable, "-c", CALLER.format(run=str(tmp_path))], cwd=PROJECT)
    log = tmp_path / "logs/stay.log"
    until(lambda: log.exists() and log.read_text() == "up\n")
    assert len(living(token)) >= 5  # caller, leader, tap, node, grandchild
    caller.send_signal(number)
    code = caller.wait(timeout=20)
    if number == signal.SIGKILL:
        until(lambda: not living(token))
    else:
        assert code == 130
        assert not living(token), "the caller ended before its lab"
        assert json.loads((tmp_path / "lab.json").read_text())["message"] == "ended by its caller"
    with open(tmp_path / "wire.pcapng", "rb") as file:
        assert said(file).num_packets == 0


CALLER = f"""
import sys
from pathlib import Path
from nodes.lab import LabConfig, run_lab
from nodes.node import Node
try:
    run_lab(LabConfig(nodes=(Node(name="stay", argv=(sys.executable, "-c", {LINGER!r})),),
                      run=Path({{run!r}}), grace_s=1.0, ring_mib=16))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.lab
def test_leader_that_is_killed_takes_the_lab_along(tmp_path: Path, token: str) -> None:
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER.format(run=str(tmp_path))], cwd=PROJECT, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "logs/stay.log"
    until(lambda: log.exists() and log.read_text() == "up\n")
    children = Path(f"/proc/{caller.pid}/task/{caller.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)  # unshare, whose death the kernel passes on to the leader
    _, errors = caller.communicate(timeout=20)
    assert "its leader ended with exit code -9 and no result" in errors
    until(lambda: not living(token))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tap": "rank1"}, "lab: tap: wanted one of all, got rank1"),
        ({"link_mbit": 1.0}, "a link's speed needs hosts"),
        ({"hosts": ("a",)}, "node job: wanted a host of"),
    ],
)
def test_configuration_that_cannot_be_is_refused(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_lab(tmp_path, script("job", "pass"), **fields)


def test_configuration_survives_the_way_to_the_leader(tmp_path: Path) -> None:
    config = small_lab(tmp_path, script("job", "pass", host="a"), hosts=("a", "b"), tap="b", link_mbit=1.5)
    assert LabConfig.from_json(config.to_json()) == config


def test_where_no_private_network_can_be_had_one_line_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_network.cache_clear()
    try:
        monkeypatch.setattr(shutil, "which", lambda _: None)
        with pytest.raises(NetworkError, match="needs util-linux's `unshare`"):
            private_network()
        monkeypatch.setattr(sys, "platform", "darwin")
        with pytest.raises(NetworkError, match="needs Linux"):
            private_network()
        monkeypatch.undo()
        refusing = tmp_path / "unshare"
        refusing.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2; exit 1\n")
        refusing.chmod(0o755)
        monkeypatch.setattr(shutil, "which", lambda _: str(refusing))
        with pytest.raises(NetworkError, match=r"Operation not permitted; .*gradtap lab --relay"):
            private_network()
    finally:
        private_network.cache_clear()
