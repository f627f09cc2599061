"""The leader: the first process inside a lab, which builds its network and runs its nodes.

In: a `LabConfig` as one line of standard input, which then stays open for as long as the lab is wanted. Out: a
`LabResult`, or an error, as one line of standard output. Refuses to outlive its caller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from nodes.errors import NodeError
from nodes.lab import LabConfig, LabResult
from nodes.namespaces import mount_file, mount_proc
from nodes.network import Host, build_hosts, hosts_file, loopback_up
from nodes.node import Node, NodeEnd, module_argv
from nodes.supervisor import Stopped, Supervisor
from nodes.tap import TapResult
from nodes.torchrun import root_cause

TAP = "tap"
TAIL_LINES = 20

TAP_GRACE_S = 30.0
"""A full ring of 1 GiB takes this long to write to a slow disk."""

GOODBYE_S = 2.0
"""A service that ends by itself when its clients have gone gets this long for it; any other is then told to end."""


class TapReport:
    """What the tap has said so far."""

    def __init__(self) -> None:
        self.ready = False
        self.result = TapResult(packets=0, bytes=0, dropped=0)

    def on_line(self, line: str) -> bool:
        if not line.startswith("{"):
            return False
        fields = json.loads(line)
        self.ready = True
        if "packets" in fields:
            self.result = TapResult(**fields)
        return True


def lead(config: LabConfig, *, control: int) -> LabResult:
    """Runs the lab. Raises: NodeError where its network cannot be made."""
    started = time.monotonic()
    hosts: dict[str, Host] = {}
    if not config.relay:
        name_things(config)
        loopback_up()
        if config.hosts:
            hosts = build_hosts(config.hosts, link_mbit=config.link_mbit)
    supervisor = Supervisor(logs=config.logs, deadline_s=config.deadline_s, control=control, echo=config.echo)
    report = TapReport()
    jobs = [node.name for node in config.nodes if not node.service]
    services = [node.name for node in config.nodes if node.service]
    stopped = ""
    try:
        if config.tap is not None:
            supervisor.start(tap_node(config, hosts), on_line=report.on_line)
            supervisor.wait(lambda: report.ready)
        for node in config.nodes:
            if not supervisor.failed:
                supervisor.start(node, namespace=None if node.host is None else hosts[node.host].namespace)
        supervisor.wait(lambda: supervisor.ended(jobs))
        supervisor.wait(lambda: supervisor.ended(services), patience_s=GOODBYE_S)
    except (Stopped, NodeError) as end:
        stopped = str(end)
    supervisor.end((node.name for node in config.nodes), grace_s=config.grace_s)
    supervisor.end([TAP], grace_s=TAP_GRACE_S)  # last, so that it hears them all to their end
    ends = supervisor.ends
    # A service, or the tap, that is told to end must still end well: the tap may find the disk full at its last write.
    failed = supervisor.failed or ([] if stopped else [end for end in ends if not end.ok])
    return LabResult(
        ok=not stopped and not failed,
        message=stopped or (describe(config, failed[0]) if failed else "every node ended well"),
        exit_codes={end.name: end.code for end in ends if end.name != TAP},
        seconds=round(time.monotonic() - started, 3),
        log_tail=tuple(log_lines(config, failed[0])[-TAIL_LINES:]) if failed else (),
        **dataclasses.asdict(report.result),
    )


def name_things(config: LabConfig) -> None:
    """Lets names and /proc say what is true inside. A locked container may forbid it, which most jobs survive."""
    # The machine's own name may stand for an address that this network has not: torchrun would wait for it.
    socket.sethostname("localhost")
    names = config.run / "hosts"
    for show in (
        mount_proc,
        lambda: names.write_text(hosts_file(config.hosts)),
        lambda: mount_file(names, "/etc/hosts"),
    ):
        with contextlib.suppress(OSError):
            show()


def tap_node(config: LabConfig, hosts: Mapping[str, Host]) -> Node:
    """The recorder, where the lab's configuration places it."""
    out = ("--out", str(config.capture))
    if config.relay:
        routes = [text for route in config.relay for text in ("--route", route)]
        return Node(name=TAP, argv=module_argv("nodes.relay", *routes, *out), service=True)
    if not hosts:
        places = ["--interface", "lo"]
    elif config.tap == "all":
        # What arrives at every end of the switch is what every host sent: each packet once.
        places = ["--incoming-only"]
        for host in hosts.values():
            places += ["--interface", host.outer_interface]
    else:
        places = ["--interface", hosts[str(config.tap)].outer_interface]
    ring = [] if config.ring_mib is None else ["--ring-mib", str(config.ring_mib)]
    return Node(name=TAP, argv=module_argv("nodes.tap", *places, *ring, *out), service=True)


def describe(config: LabConfig, end: NodeEnd) -> str:
    """One line about a node that failed."""
    lines = log_lines(config, end)
    said = [line.strip() for line in lines if any(character.isalnum() for character in line)]
    cause = root_cause(lines) or (said[-1] if said else "it printed nothing")
    return f"{end}: {cause}; its log: {config.logs / end.name}.log"


def log_lines(config: LabConfig, end: NodeEnd) -> list[str]:
    """What a node has printed."""
    return (config.logs / f"{end.name}.log").read_text(errors="replace").splitlines()


def main() -> int:
    config = LabConfig.from_json(sys.stdin.buffer.readline())
    answer: dict[str, Any]
    try:
        answer = lead(config, control=sys.stdin.fileno()).to_json()
    except NodeError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
