"""`gradtap lab`: runs a job in a private network, and records what its nodes say to each other."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Annotated, Self

import tyro

from harness.config import TrainConfig, write_config
from harness.errors import ConfigError
from harness.privacy import read_spent
from nodes.commands.base import Command, Result
from nodes.lab import CAPTURE_NAME, RESULT_NAME, LabConfig, LabResult, run_lab
from nodes.network import address
from nodes.node import Node, module_argv, module_environment
from nodes.torchrun import MASTER_PORT, TORCHRUN, split_launcher, split_placement, start_apart, start_together
from nodes.tunnel import address_of

SERVER_PORTS = range(5555, 6555)
"""Of the parameter servers, in the order of their shards."""
SERVERS = "servers"
"""The host of the parameter servers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lab(Command):
    """Run a training job in a private network of its own, and record its traffic to RUN/wire.pcapng.

    Without a command, the job is this project's own, set up by the options below. With one, it is yours:
    gradtap lab --out RUN -- torchrun --nproc-per-node 2 train.py
    """

    out: Path
    """Run folder to write: wire.pcapng, lab.json, logs/ and what the job leaves there."""
    overwrite: bool = False
    """Replace the run folder if it is there. A folder that is not a run is never replaced."""
    num_workers: int = 2
    """Ranks of the own job."""
    num_servers: int = 1
    """Parameter servers of the own job over ZeroMQ; 0: the ranks serve each other."""
    keys: Path | None = None
    """Folder of `gradtap keys`: the own job's ZeroMQ exchange is then encrypted by CURVE."""
    tunnel: Path | None = None
    """Folder of `gradtap keys`: with --hosts, all that the ranks say to each other goes through an encrypted tunnel
    (`gradtap tunnel`), whatever their transport."""
    hosts: bool = False
    """Give each rank a host of its own, with a network namespace and an address, and join them by a switch."""
    relay: bool = False
    """Where no private network can be had: record the own job's ZeroMQ exchange through a relay, on this host's own
    loopback."""
    tap: str = "all"
    """Where to listen: all (every packet once); with --hosts also rank:K or servers (what that host's link carries,
    both ways); or none."""
    link_mbit: float | None = None
    """With --hosts: speed of each host's link, in Mbit/s."""
    ring_mib: int | None = None
    """Memory for packets that are not yet written, in MiB; otherwise an eighth of what is available, at most 1024."""
    quiet: bool = False
    """Do not repeat on standard error what the nodes print; RUN/logs has it."""
    time_limit_s: float = 3600.0
    """End everything after this long, in seconds."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TrainConfig)
    """The own job."""
    command: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """What follows --."""

    def with_command(self, argv: tuple[str, ...]) -> Self:
        return dataclasses.replace(self, command=argv)

    def run(self) -> Result:
        config = self.config()
        train = None
        if not self.command:
            from harness.training import Trainer  # torch takes a second to import, and somebody else's job is not ours

            # What cannot be trained is said here, in one line, and not by every rank and by torchrun.
            train = Trainer(self.train, rank=0, world_size=self.num_workers).config
        new_run_folder(self.out, overwrite=self.overwrite)
        if train is not None:
            write_config(self.out, train, world_size=self.num_workers)
        result = run_lab(config)
        found, text = result.to_json(), describe(result)
        if (privacy := read_spent(self.out)) is not None:
            found, text = found | {"privacy": dataclasses.asdict(privacy)}, f"{text}\n{privacy}"
        return Result(json=found, text=text, ok=result.ok)

    def config(self) -> LabConfig:
        """What to run, and where to listen. Raises: ConfigError."""
        if self.num_workers < 1 or self.num_servers < 0:
            raise ConfigError(
                f"lab: wanted 1 worker or more and 0 servers or more, got {self.num_workers} and {self.num_servers}"
            )
        if self.command and self.train != TrainConfig():
            raise ConfigError("lab: options of the own job have no effect on a command after --; leave out one of them")
        if self.relay and (self.command or self.hosts or self.train.exchange != "zeromq" or self.num_servers < 1):
            raise ConfigError("lab: --relay is for the own job with --exchange zeromq, servers and no --hosts")
        if self.keys is not None and (self.command or self.train.exchange != "zeromq"):
            raise ConfigError("lab: --keys is for the own job with --exchange zeromq")
        nodes, routes = (foreign_job(self.command, hosts=self.hosts), ()) if self.command else self.own_job()
        if self.tunnel is not None:
            nodes = self._through_tunnel(nodes, self.tunnel)
        hosts = tuple(dict.fromkeys(node.host for node in nodes if node.host is not None))
        return LabConfig(
            nodes=nodes,
            run=self.out,
            hosts=hosts,
            relay=routes,
            tap=None if self.tap == "none" else self.tap.replace("rank:", "rank"),
            ring_mib=self.ring_mib,
            link_mbit=self.link_mbit,
            deadline_s=self.time_limit_s,
            echo=not self.quiet,
        )

    def _through_tunnel(self, nodes: tuple[Node, ...], keys: Path) -> tuple[Node, ...]:
        """The same nodes, each behind its end of a tunnel, and with the first one's address in there."""
        if not self.hosts or any(node.service for node in nodes):
            raise ConfigError("lab: --tunnel needs --hosts, and ranks alone: no parameter servers (for these: --keys)")
        peers = ",".join(address(rank) for rank in range(len(nodes)))
        inside = {address(rank): address_of(rank) for rank in range(len(nodes))}
        return tuple(
            dataclasses.replace(
                node,
                argv=module_argv(
                    "nodes.cli",
                    *("tunnel", "--keys", str(keys.absolute()), "--rank", str(rank), "--peers", peers, "--"),
                    *(inside.get(argument, argument) for argument in node.argv),
                ),
            )
            for rank, node in enumerate(nodes)
        )

    def own_job(self) -> tuple[tuple[Node, ...], tuple[str, ...]]:
        """The workers, and the parameter servers if the exchange has any; and the routes of a relay between them."""
        env = module_environment() | environment(hosts=self.hosts, private=not self.relay)
        num_servers = self.num_servers if self.train.exchange == "zeromq" else 0
        place = address(self.num_workers) if self.hosts else "127.0.0.1"
        # A private network has no other users of its ports.
        master_port, *ports = (
            free_ports(1 + 2 * num_servers) if self.relay else (MASTER_PORT, *SERVER_PORTS[:num_servers])
        )
        keys = () if self.keys is None else ("--keys", str(self.keys.absolute()))
        endpoints = [f"{place}:{port}" for port in ports[:num_servers]]
        routes = [f"{place}:{port}={server}" for port, server in zip(ports[num_servers:], endpoints, strict=False)]
        servers = tuple(
            Node(
                name=f"server{shard}",
                argv=module_argv(
                    "nodes.server",
                    *("--bind", f"tcp://{endpoint}", "--world-size", str(self.num_workers)),
                    *("--shard", str(shard), "--num-shards", str(num_servers)),
                    *("--deadline-s", str(self.train.deadline_s)),
                    *keys,
                ),
                env=env,
                host=SERVERS if self.hosts else None,
                service=True,
            )
            for shard, endpoint in enumerate(endpoints)
        )
        arguments = ["-m", "nodes.worker", "--config", str(self.out.absolute()), *keys]
        if endpoints:
            reached = [route.split("=")[0] for route in routes] or endpoints
            arguments += ["--servers", ",".join(f"tcp://{endpoint}" for endpoint in reached)]
        if self.hosts:
            workers = tuple(
                dataclasses.replace(worker, argv=(*worker.argv, "--host", address(rank)))
                for rank, worker in enumerate(start_apart(arguments, num_ranks=self.num_workers, env=env))
            )
        else:
            workers = start_together(arguments, num_ranks=self.num_workers, env=env, master_port=master_port)
        # Workers come first: the hosts are numbered in the order of their nodes.
        return (*workers, *servers), tuple(routes)


def foreign_job(command: tuple[str, ...], *, hosts: bool) -> tuple[Node, ...]:
    """Somebody else's command: as it is, or, if each rank is to have a host, one torchrun for each.

    Raises: ConfigError.
    """
    argv = resolve(command)
    env = environment(hosts=hosts)
    if not hosts:
        return (Node(name="command", argv=argv, env=env),)
    launcher, arguments = split_launcher(argv)
    num_ranks, arguments = split_placement(arguments)
    return start_apart(arguments, num_ranks=num_ranks, env=env, launcher=launcher)


def resolve(command: tuple[str, ...]) -> tuple[str, ...]:
    """Finds the program. `torchrun` and `python` are this interpreter's where PATH has none.

    Raises: ConfigError.
    """
    program, *arguments = command
    if shutil.which(program) is not None:
        return command
    if program == "torchrun":
        return (*TORCHRUN, *arguments)
    if program in ("python", "python3"):
        return (sys.executable, *arguments)
    raise ConfigError(f"lab: {program}: no such program; after -- comes a command such as: torchrun train.py")


def environment(*, hosts: bool, private: bool = True) -> dict[str, str]:
    """What makes the libraries of a job use the lab's interface, and one thread a rank unless the caller says more."""
    interface = "eth0" if hosts else "lo"
    libraries = ("GLOO", "TP", "NCCL") if private else ()
    return {f"{library}_SOCKET_IFNAME": interface for library in libraries} | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONUNBUFFERED": "1",
    }


def free_ports(count: int) -> tuple[int, ...]:
    """Ports of loopback that nobody uses now."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return tuple(server.getsockname()[1] for server in servers)


def new_run_folder(run: Path, *, overwrite: bool) -> None:
    """Makes an empty run folder. Raises: ConfigError where something is there that must not be lost."""
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run}: wanted a folder for the run, got a file")
    if run.is_dir() and any(run.iterdir()):
        if not overwrite:
            raise ConfigError(f"{run}: is not empty; name another folder, or add --overwrite to replace a run")
        if not any((run / name).exists() for name in (RESULT_NAME, CAPTURE_NAME, "config.json")):
            raise ConfigError(f"{run}: is not a run, so it is not replaced; name another folder")
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)


def describe(result: LabResult) -> str:
    """The result for people."""
    lines = [result.message]
    if result.capture is not None:
        lines.append(f"{result.packets} packets, {result.bytes} bytes, {result.dropped} dropped: {result.capture}")
    return "\n".join(lines)
