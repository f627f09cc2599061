"""The parameter server of the ZeroMQ exchange: one process, one shard.

python -m nodes.server --bind tcp://127.0.0.1:5555 --world-size 2
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from harness.errors import GradtapError
from nodes.console import console


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Averages one shard of the ranks' gradients, until every rank has said goodbye."""

    bind: str = "tcp://127.0.0.1:5555"
    """Endpoint to listen at. Without keys, anybody who reaches it can join: loopback, unless you know the network."""
    world_size: int
    """Number of ranks."""
    shard: int = 0
    """Which shard this server owns."""
    num_shards: int = 1
    """Number of servers."""
    keys: Path | None = None
    """Folder with the server's keys and the ranks' public ones, as `gradtap keys` makes them, for CURVE."""
    deadline_s: float = 60.0
    """Longest wait for a rank, in seconds."""


def main() -> int:
    """Returns the exit code."""
    config = tyro.cli(Annotated[ServerConfig, tyro.conf.arg(name="")], prog="python -m nodes.server")
    from harness.exchange import CurveKeys, ShardServer  # torch takes a second to import: not for --help

    try:
        keys = None if config.keys is None else CurveKeys.of_server(config.keys, num_ranks=config.world_size)
        with ShardServer(
            world_size=config.world_size,
            bind=config.bind,
            index=config.shard,
            servers=config.num_shards,
            deadline_s=config.deadline_s,
            keys=keys,
        ) as server:
            server.serve()
    except (GradtapError, OSError) as error:
        console.print(f"server {config.shard}: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
