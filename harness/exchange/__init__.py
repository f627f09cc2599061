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
]
