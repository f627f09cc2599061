"""`torch.distributed` all-reduce of flat buckets: the plain collective, without DistributedDataParallel around it.

A gradient coded in floats of two bytes is reduced in these; factors that are averaged, in rounds; any other code is
gathered (`harness.exchange.gathering`).

Gloo on CPU, NCCL where the gradient lies on a CUDA device. Knows vectors and buckets; the sum's order is the backend's.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.defenses.powersgd_averaged import rounds_of
from harness.exchange.base import flat_state, layout_of, load_flat_state
from harness.exchange.chunks import shard_chunks
from harness.exchange.process_group import BUCKET_BYTES, ProcessGroupExchange, all_reduced_bytes, short_floats
from harness.wire.coded import Coded


class AllReduceExchange(ProcessGroupExchange):
    """Sums buckets of 25 MB, all under way at once, then divides by the number of ranks."""

    def start(self, model: nn.Module, *, step: int) -> None:
        self._step, self._layout = step, layout_of(model, world_size=self.world_size)
        state = flat_state(model)
        with self._one_line("weights of rank 0"):
            dist.broadcast(state, src=0)
        load_flat_state(model, state)
        # One buffer for all steps: fresh memory for each would cost more in page faults than the copy into it.
        self._sum = torch.empty(sum(parameter.numel() for parameter in model.parameters()), device=state.device)
        if self.rank == 0:
            self.traffic.bytes_out += state.numel() * 4
        else:
            self.traffic.bytes_in += state.numel() * 4

    def average(self, gradient: Tensor | Coded, *, step: int) -> Tensor:
        self._step = step
        gradient = self.shown(gradient)
        if isinstance(gradient, Tensor):
            self._sum.copy_(gradient.detach())
            return self._reduce(self._sum).div_(self.world_size)
        if (rounds := rounds_of(gradient)) is not None:
            with self._one_line(f"factors of all {self.world_size} ranks"):
                return torch.from_numpy(rounds.average(range(len(rounds.matrices)), self.mean))
        short = short_floats(gradient)
        if short is not None:
            # Divided first, as torch's own hooks for such floats do: their sum could be beyond the largest.
            self._sum.copy_(self._reduce(short.to(self._sum.device).div_(self.world_size)))
            return self._sum
        average, chunks = np.empty(gradient.size, np.float32), shard_chunks(gradient.size, index=0, servers=1)
        with self._one_line(f"gradients of all {self.world_size} ranks"):
            self.gathering.average(gradient, chunks, step=step, into=average)
        return torch.from_numpy(average)

    def _reduce(self, summed: Tensor) -> Tensor:
        """Sums over the ranks, in place."""
        size = summed.element_size()
        with self._one_line(f"gradients of all {self.world_size} ranks"):
            works = [dist.all_reduce(bucket, async_op=True) for bucket in torch.split(summed, BUCKET_BYTES // size)]
            for work in works:
                if work is not None:
                    work.wait()
        moved = all_reduced_bytes(summed.numel(), rank_count=self.world_size, element_bytes=size)
        self.traffic.bytes_out += moved
        self.traffic.bytes_in += moved
        return summed
