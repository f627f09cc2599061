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

from harness.exchange.allreduce import AllReduceExchange
from harness.exchange.base import Exchange, Traffic
from harness.exchange.ddp import DDPExchange
from harness.exchange.local import LocalExchange
from harness.exchange.rendezvous import Meeting
from harness.exchange.zeromq import ZeroMQExchange
from harness.exchange.zeromq_server import ShardServer

EXCHANGES: dict[str, type[Exchange]] = {
    "local": LocalExchange,
    "zeromq": ZeroMQExchange,
    "allreduce": AllReduceExchange,
    "ddp": DDPExchange,
}
"""Every exchange by its name. How one is made differs, as what each needs to find its peers does."""


def connect(
    name: str,
    *,
    rank: int,
    world_size: int,
    servers: Sequence[str] = (),
    deadline_s: float = 30.0,
    host: str = "127.0.0.1",
) -> Exchange:
    """This rank's end of the exchange that `name` names, among the ranks that torchrun started.

    Args:
        servers: endpoints of the parameter servers of `zeromq`, in order of their shards; none: the ranks serve.
        deadline_s: longest wait for a peer.
        host: the address of this rank by which the others reach it, where ranks serve.

    Raises: ConfigError outside of torchrun, ExchangeError where the peers cannot be reached.
    """
    meeting = Meeting.from_environment(deadline_s=deadline_s)
    if name == "allreduce":
        return AllReduceExchange(meeting)
    if name == "ddp":
        return DDPExchange(meeting)
    if not servers:
        return ZeroMQExchange.among_ranks(meeting, host=host, deadline_s=deadline_s)
    run = meeting.agree_on_run()
    return ZeroMQExchange(rank=rank, world_size=world_size, run=run, endpoints=servers, deadline_s=deadline_s)


__all__ = [
    "EXCHANGES",
    "AllReduceExchange",
    "DDPExchange",
    "Exchange",
    "LocalExchange",
    "Meeting",
    "ShardServer",
    "Traffic",
    "ZeroMQExchange",
    "connect",
]
