"""`gradtap keys`: what encrypts a job's traffic."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from harness.errors import ConfigError
from nodes.certificates import make_certificates
from nodes.commands.base import Command, Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keys(Command):
    """Makes keys: for CURVE on the ZeroMQ exchange, and for the tunnel between the hosts of any other job.

    CURVE: each rank's machine needs its own rankR.secret and .public and server.public; a server's machine needs
    server.secret and .public and every rankR.public. Where ranks serve, each needs all ranks' .public.
    Tunnel: each rank's machine needs its own rankR.pem, and every rankR.crt.
    """

    out: Path
    """Folder to write them to. None is ever replaced."""
    num_workers: int = 2
    """Ranks of the job."""

    def run(self) -> Result:
        """Raises: ConfigError, OSError."""
        from harness.exchange.curve import make_keys  # torch takes a second to import, with the package

        if self.num_workers < 1:
            raise ConfigError(f"keys: wanted 1 worker or more, got {self.num_workers}")
        files = make_keys(self.out, num_ranks=self.num_workers)
        files += make_certificates(self.out, num_ranks=self.num_workers)
        return Result(
            json={"folder": str(self.out), "files": [file.name for file in files]},
            text=f"{len(files)} files in {self.out}; each .secret and .pem belongs to its owner's machine alone",
        )
