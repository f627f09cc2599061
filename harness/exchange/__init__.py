"""Exchanges: "take the weights of rank 0, then average these with my peers, step after step". See `base.Exchange`.

| name      | how                                          | made by                                         |
| --------- | -------------------------------------------- | ----------------------------------------------- |
| local     | in one process, float64: the oracle          | `LocalExchange()`, `LocalExchange.group(ranks)` |
| zeromq    | over servers of their own, each with a shard | `ZeroMQExchange(run=..., endpoints=...)`        |
|           | over the ranks themselves, each with a shard | `ZeroMQExchange.among_ranks(meeting)`           |
| allreduce | `torch.distributed` all-reduce, Gloo or NCCL | `AllReduceExchange(meeting)`                    |
| ddp       | stock DistributedDataParallel, Gloo or NCCL  | `DDPExchange(meeting)`                          |

A `Meeting` is how ranks find each other: `Meeting.from_environment()` under torchrun.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from harness.errors import ConfigError
from harness.exchange.allreduce import AllReduceExchange
from harness.exchange.base import Exchange, Traffic
from harness.exchange.curve import SERVER, CurveKeys, make_keys
from harness.exchange.ddp import DDPExchange
from harness.exchange.local import LocalExchange
from harness.exchange.rendezvous import Meeting
from harness.exchange.zeromq import ZeroMQExchange
from harness.exchange.zeromq_server import ShardServer


def connect(
    name: str,
    *,
    device: torch.device,
    servers: Sequence[str] = (),
    deadline_s: float = 30.0,
    host: str = "127.0.0.1",
    keys: Path | None = None,
) -> Exchange:
    """This rank's end of the exchange that `name` names, among the ranks that torchrun started.

    Args:
        name: zeromq, allreduce or ddp.
        device: where the gradients lie; `allreduce` and `ddp` take NCCL where that is a GPU.
        servers: endpoints of the parameter servers of `zeromq`, in order of their shards; none: the ranks serve.
        deadline_s: longest wait for a peer.
        host: the address of this rank by which the others reach it, where ranks serve.
        keys: folder with this rank's keys, as `make_keys` writes them, for CURVE over `zeromq`.

    Raises: ConfigError outside of torchrun, or for keys that are not there or have no use; ExchangeError where the
        peers cannot be reached.
    """
    if keys is not None and name != "zeromq":
        raise ConfigError(f"keys are for the exchange zeromq; {name} has no CURVE (docs/defenses.md, Encryption)")
    meeting = Meeting.from_environment(deadline_s=deadline_s)
    if name == "allreduce":
        return AllReduceExchange(meeting, device=device, deadline_s=deadline_s)
    if name == "ddp":
        return DDPExchange(meeting, device=device, deadline_s=deadline_s)
    if not servers:
        return ZeroMQExchange.among_ranks(meeting, host=host, deadline_s=deadline_s, keys=keys)
    return ZeroMQExchange(
        rank=meeting.rank,
        world_size=meeting.world_size,
        run=meeting.agree_on_run(),
        endpoints=servers,
        deadline_s=deadline_s,
        keys=None if keys is None else CurveKeys.of_rank(keys, rank=meeting.rank, servers=[SERVER] * len(servers)),
    )


__all__ = [
    "AllReduceExchange",
    "CurveKeys",
    "DDPExchange",
    "Exchange",
    "LocalExchange",
    "Meeting",
    "ShardServer",
    "Traffic",
    "ZeroMQExchange",
    "connect",
    "make_keys",
]
