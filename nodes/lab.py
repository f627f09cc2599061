"""The lab: a private network with nodes and a tap in it, from the outside.

In: the nodes to run and where to listen. Out: the capture, and how each node ended.
Refuses to know what the nodes do. The first process inside is `nodes.leader`; it is process 1 of a PID namespace of its
own, so the kernel ends every process of the lab with it, and then the network, which nothing outside refers to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from nodes.errors import NetworkError, NodeError
from nodes.network import MAX_HOSTS
from nodes.node import Node, module_argv
from nodes.signals import sigterm_interrupts

NAMESPACES = ("--net", "--mount", "--pid", "--uts", "--fork", "--kill-child")
"""What `unshare` makes for a lab. With --kill-child, the leader dies with `unshare`."""

BACKSTOP_S = 60.0
"""How long after its own deadline a leader that does not answer is killed."""

CAPTURE_NAME, RESULT_NAME, LOGS_NAME = "wire.pcapng", "lab.json", "logs"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LabConfig:
    """What runs in a private network, and where the eavesdropper sits."""

    nodes: tuple[Node, ...]
    run: Path
    """The run folder, which exists: gets `wire.pcapng`, `lab.json`, `hosts` (names and addresses) and `logs/`."""
    hosts: tuple[str, ...] = ()
    """Names of hosts with a network namespace and an address each, joined by a switch. Empty: one namespace, where all
    nodes talk over loopback."""
    relay: tuple[str, ...] = ()
    """Routes of a recording relay, `HOST:PORT=HOST:PORT`, which then takes the place of private network and tap: for
    machines that grant neither. A process that leaves its process group may then outlive the lab."""
    tap: str | None = "all"
    """`all`: every packet once. The name of a host: what its link carries, both ways. None: nobody listens."""
    ring_mib: int | None = None
    """See `TapConfig.ring_mib`."""
    link_mbit: float | None = None
    """Speed of each host's link, in Mbit/s, each way. None: as fast as the machine can."""
    deadline_s: float = 3600.0
    """From the start; whatever runs then is ended."""
    grace_s: float = 5.0
    """What a node gets between SIGTERM and SIGKILL."""
    echo: bool = True
    """Repeat the nodes' output on standard error."""

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        names = [node.name for node in self.nodes]
        if len(set(names)) != len(names) or "tap" in names:
            raise ConfigError(f"lab: wanted nodes of different names, none of them tap, got {', '.join(names)}")
        if len(self.hosts) > MAX_HOSTS:
            raise ConfigError(f"lab: wanted at most {MAX_HOSTS} hosts, got {len(self.hosts)}")
        for node in self.nodes:
            if (node.host is None) != (not self.hosts) or (node.host is not None and node.host not in self.hosts):
                raise ConfigError(f"lab: node {node.name}: wanted a host of {self.hosts or None}, got {node.host}")
        if self.tap not in (None, "all", *self.hosts):
            raise ConfigError(f"lab: tap: wanted one of {', '.join(('all', *self.hosts))}, got {self.tap}")
        if self.relay and (self.hosts or self.tap != "all"):
            raise ConfigError("lab: a relay has no hosts, and hears all that it passes on; leave out hosts and tap")
        if self.link_mbit is not None and not (self.hosts and self.link_mbit > 0):
            raise ConfigError(f"lab: a link's speed needs hosts, and must be more than 0; got {self.link_mbit}")

    @property
    def capture(self) -> Path | None:
        """The file that the tap writes."""
        return None if self.tap is None else self.run / CAPTURE_NAME

    @property
    def logs(self) -> Path:
        """The folder of the nodes' logs."""
        return self.run / LOGS_NAME

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"run": str(self.run.absolute())})

    @classmethod
    def from_json(cls, text: str | bytes) -> LabConfig:
        fields = json.loads(text)
        fields["nodes"] = tuple(Node(**node | {"argv": tuple(node["argv"])}) for node in fields["nodes"])
        fields["run"] = Path(fields["run"])
        fields |= {name: tuple(fields[name]) for name in ("hosts", "relay")}
        return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LabResult:
    """How a lab ended."""

    ok: bool
    message: str
    """One line: which node ended how, where one failed; else how much was recorded."""
    exit_codes: dict[str, int]
    """By name, of the nodes that were started; minus the signal's number where one was killed."""
    seconds: float
    capture: Path | None = None
    packets: int = 0
    bytes: int = 0
    dropped: int = 0
    log_tail: tuple[str, ...] = ()
    """The last lines of the log of the node that failed."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        capture = None if self.capture is None else str(self.capture)
        return dataclasses.asdict(self) | {"capture": capture, "log_tail": list(self.log_tail)}


def run_lab(config: LabConfig) -> LabResult:
    """Runs the nodes to their end. Blocks until nothing of the lab is left.

    Returns: the result, `ok` or not, which is also in `RUN/lab.json`.

    Raises:
        NetworkError: no private network can be had here; says why and what to do.
        NodeError: the lab itself failed.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, and after the nodes were ended in order.
    """
    argv = (*(() if config.relay else private_network()), *module_argv("nodes.leader"))
    config.logs.mkdir(parents=True, exist_ok=True)
    # A session of its own: Ctrl-C reaches this process alone, and the nodes are then ended in order.
    leader = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdin is not None and leader.stdout is not None
    interrupted = False
    try:
        with sigterm_interrupts():
            try:
                leader.stdin.write(config.to_json().encode() + b"\n")
                leader.stdin.flush()
                answer = _answer(leader, config.deadline_s + 2 * config.grace_s + BACKSTOP_S)
            except KeyboardInterrupt:
                interrupted = True
                leader.stdin.close()
                answer = _answer(leader, 2 * config.grace_s + BACKSTOP_S)
    finally:
        leader.kill()
        leader.wait()
        leader.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            leader.stdin.close()
    if "error" in answer:
        raise NodeError(answer["error"])
    result = LabResult(**answer | {"capture": config.capture, "log_tail": tuple(answer["log_tail"])})
    try:
        (config.run / RESULT_NAME).write_text(json.dumps(result.to_json(), indent=2) + "\n")
    except OSError:
        if result.ok:  # otherwise the disk is full, and the message says so
            raise
    if interrupted:
        raise KeyboardInterrupt
    return result


def _answer(leader: subprocess.Popen[bytes], patience_s: float) -> dict[str, Any]:
    """The leader's last word."""
    assert leader.stdout is not None
    ready, _, _ = select.select([leader.stdout], [], [], patience_s)
    line = leader.stdout.readline() if ready else b""
    if not line:
        leader.kill()
        code = leader.wait()
        raise NodeError(
            f"lab: its leader {'ended' if ready else 'was still silent after its deadline and was killed'}"
            f" with exit code {code} and no result; the lines above say why"
        )
    with contextlib.suppress(subprocess.TimeoutExpired):
        leader.wait(timeout=BACKSTOP_S)  # the kernel ends what is left of the lab
    answer: dict[str, Any] = json.loads(line)
    return answer


@functools.cache
def private_network() -> tuple[str, ...]:
    """The command that runs its arguments in a private network, as process 1 of it.

    Raises: NetworkError, with the reason and what to do.
    """
    program = shutil.which("unshare")
    if not sys.platform.startswith("linux") or program is None:
        need = "util-linux's `unshare`" if sys.platform.startswith("linux") else "Linux"
        raise NetworkError(f"private network: needs {need}, which this machine has not; {ELSEWHERE}")
    reason = ""
    for user in ((), ("--user", "--map-root-user")) if os.geteuid() == 0 else (("--user", "--map-root-user"),):
        argv = (program, *user, *NAMESPACES)
        tried = subprocess.run((*argv, "true"), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            return argv
        reason = tried.stderr.strip().splitlines()[0] if tried.stderr.strip() else f"exit code {tried.returncode}"
    raise NetworkError(f"private network: {reason}; {_remedy()}")


ELSEWHERE = "`gradtap lab --relay` records the ZeroMQ exchange without one, and `gradtap record` a job run elsewhere"

SWITCHES = (
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "as root: sysctl kernel.unprivileged_userns_clone=1"),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "as root: sysctl kernel.apparmor_restrict_unprivileged_userns=0",
    ),
    ("/proc/sys/user/max_user_namespaces", "0", "as root: sysctl user.max_user_namespaces=10000"),
)
"""Settings that forbid user namespaces, the value that does, and what to do."""


def _remedy() -> str:
    for file, forbids, remedy in SWITCHES:
        with contextlib.suppress(OSError):
            if Path(file).read_text().strip() == forbids:
                return f"{file} is {forbids}: {remedy}, or run this as root"
    return f"in a container, start it with --cap-add SYS_ADMIN --security-opt seccomp=unconfined; else {ELSEWHERE}"
