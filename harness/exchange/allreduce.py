"""`torch.distributed` all-reduce of flat buckets: the plain collective, without DistributedDataParallel around it.

Gloo on CPU, NCCL where the gradient lies on a CUDA device. Knows vectors and buckets; the sum's order is the backend's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.exchange.base import flat_state, load_flat_state
from harness.exchange.process_group import BUCKET_BYTES, ProcessGroupExchange, all_reduced_bytes


class AllReduceExchange(ProcessGroupExchange):
    """Sums buckets of 25 MB, all under way at once, then divides by the number of ranks."""

    def start(self, model: nn.Module, *, step: int) -> None:
        self._step = step
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

    def average(self, gradient: Tensor, *, step: int) -> Tensor:
        self._step = step
        self._sum.copy_(gradient.detach())
        with self._one_line(f"gradients of all {self.world_size} ranks"):
            works = [dist.all_reduce(bucket, async_op=True) for bucket in torch.split(self._sum, BUCKET_BYTES // 4)]
            for work in works:
                if work is not None:
                    work.wait()
        moved = all_reduced_bytes(self._sum.numel(), rank_count=self.world_size)
        self.traffic.bytes_out += moved
        self.traffic.bytes_in += moved
        return self._sum.div_(self.world_size)
