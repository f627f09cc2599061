"""`gradtap tunnel ... -- COMMAND`: runs a rank's command in an encrypted network of the ranks' hosts."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Annotated, Self

import tyro

from harness.errors import ConfigError
from nodes.commands.base import Command, Result
from nodes.tunnel import INTERFACE, Tunnel, address_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunnelCommand(Command):
    """Runs a command on each rank's host, with a network between them in which everything is encrypted (TLS 1.3).

    It starts when all ranks are there, and is told to use that network (GLOO_SOCKET_IFNAME and the like); give it
    10.78.0.1, rank 0's address there, as its --master-addr. Needs the right to make a network interface.
    """

    keys: Path
    """Folder of `gradtap keys`: this rank's .pem, and every rank's .crt."""
    rank: int
    """Of this host, from 0."""
    peers: str
    """Where every rank's host is reached, in rank order, with commas between: HOST or HOST:PORT (7700)."""
    deadline_s: float = 60.0
    """Longest wait for all ranks to be there, in seconds."""
    command: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """What follows --."""

    def with_command(self, argv: tuple[str, ...]) -> Self:
        return dataclasses.replace(self, command=argv)

    def run(self) -> Result:
        """Raises: ConfigError, NetworkError."""
        if not self.command:
            raise ConfigError("tunnel: wanted a command after --, e.g. torchrun --master-addr 10.78.0.1 ... train.py")
        tunnel = Tunnel(keys=self.keys, rank=self.rank, hosts=self.peers.split(","), deadline_s=self.deadline_s)
        interfaces = {f"{library}_SOCKET_IFNAME": INTERFACE for library in ("GLOO", "TP", "NCCL")}
        with tunnel:
            try:
                code = subprocess.call(self.command, env=os.environ | interfaces)
            except OSError as error:
                raise ConfigError(f"tunnel: {self.command[0]}: {error.strerror}") from error
        return Result(
            json={"rank": self.rank, "address": address_of(self.rank), "exit_code": code},
            text="" if code == 0 else f"the command ended with exit code {code}",
            ok=code == 0,
            quiet=code == 0 and not self.json,
        )
