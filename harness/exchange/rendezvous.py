"""How ranks find each other before the first message: a small store of texts that all of them can reach.

Under torchrun it is the store that `torch.distributed` itself meets in. Knows keys and values; nothing of sockets.
"""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta

from torch.distributed import Store
from torch.distributed.rendezvous import rendezvous

from harness.errors import ConfigError, DeadlineError, ExchangeError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meeting:
    """A rank's view of the store. Hold it while peers may still read it: rank 0's end may be the one that serves."""

    store: Store
    rank: int
    world_size: int
    deadline_s: float = 30.0
    """Longest wait for one peer's word."""

    @classmethod
    def from_environment(cls, *, deadline_s: float = 30.0) -> Meeting:
        """As torchrun tells each rank: RANK, WORLD_SIZE, and the store at MASTER_ADDR and MASTER_PORT.

        torch knows whether torchrun's agent serves that store (TORCHELASTIC_USE_AGENT_STORE) or rank 0 has to.

        Raises: ConfigError outside of torchrun, ExchangeError where the store cannot be reached.
        """
        if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ConfigError(f"the environment lacks {', '.join(missing)}: start the ranks with torchrun")
        try:
            store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=deadline_s)))
        except RuntimeError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            rank = os.environ["RANK"]
            raise ExchangeError(f"rank {rank}: cannot reach the store at {where}: {_first(error)}") from error
        return cls(store=store, rank=rank, world_size=world_size, deadline_s=deadline_s)

    def agree_on_run(self) -> bytes:
        """8 random bytes, drawn by rank 0, the same on every rank."""
        if self.rank == 0:
            self._set("run", os.urandom(8).hex())
        return bytes.fromhex(self._get("run", from_rank=0))

    def swap(self, name: str, value: str) -> list[str]:
        """What each rank gave under this name, in rank order. Raises: DeadlineError naming a rank that gave nothing."""
        self._set(f"{name}/{self.rank}", value)
        return [self._get(f"{name}/{rank}", from_rank=rank) for rank in range(self.world_size)]

    def _set(self, key: str, value: str) -> None:
        try:
            self.store.set(f"gradtap/{key}", value)
        except RuntimeError as error:
            raise ExchangeError(f"rank {self.rank}: cannot write {key} to the store: {_first(error)}") from error

    def _get(self, key: str, *, from_rank: int) -> str:
        try:
            self.store.wait([f"gradtap/{key}"], timedelta(seconds=self.deadline_s))
            return self.store.get(f"gradtap/{key}").decode()
        except RuntimeError as error:
            raise DeadlineError(
                f"rank {self.rank}: no {key} from rank {from_rank} within {self.deadline_s:g} s; is it running?"
            ) from error


def _first(error: BaseException) -> str:
    """The first line of one of torch's long messages."""
    return (str(error).splitlines() or [""])[0][:200]
