"""What the exchanges over `torch.distributed` share: joining its process group, leaving it, its errors in one line.

Takes a meeting and a device, gives a group; knows nothing of what is sent over it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist

# Its functions take the group that exists when they are defined as their default. DDP imports it, by way of
# torch._dynamo, once the group is there, which then outlives `destroy_process_group`, with Gloo's threads: one of them
# may want the interpreter's lock while that ends, and aborts the process (seen with torch 2.13). So it comes first.
import torch.distributed.nn
from torch import Tensor

from harness.defenses.secure import private_of
from harness.errors import DeadlineError, ExchangeError, PeerError
from harness.exchange.base import Exchange, Traffic
from harness.exchange.gathering import Gathering
from harness.exchange.rendezvous import Meeting
from harness.exchange.secure import Member
from harness.wire import Layout
from harness.wire.coded import Coded, Defended, Float32

SHORT_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""By the name of their code."""
BUCKET_BYTES = 25 << 20
"""DistributedDataParallel's default (`bucket_cap_mb=25`)."""


class ProcessGroupExchange(Exchange):
    """One rank of the default process group: Gloo, or NCCL where gradients lie on a CUDA device."""

    def __init__(self, meeting: Meeting, *, device: torch.device | str = "cpu", deadline_s: float = 30.0) -> None:
        """Waits for all ranks to join. `deadline_s` is the group's timeout, of each operation."""
        self.rank, self.world_size, self.traffic = meeting.rank, meeting.world_size, Traffic()
        self._deadline_s, self._step, self._device = deadline_s, 0, torch.device(device)
        self._layout = Layout(world=meeting.world_size, parameters=(), buffers=())
        """Of the model that was started with."""
        self._member: Member | None = None
        """This rank in secure aggregation, from the first masked gradient on."""
        if dist.is_initialized():
            raise ExchangeError(f"rank {self.rank}: torch.distributed is in use; close the other exchange first")
        with self._one_line("every rank in the process group"):
            dist.init_process_group(
                "nccl" if torch.device(device).type == "cuda" else "gloo",
                store=meeting.store,
                rank=meeting.rank,
                world_size=meeting.world_size,
                timeout=timedelta(seconds=deadline_s),
            )
        self._meeting: Meeting | None = meeting  # its store must live as long as the group

    def close(self) -> None:
        if self._meeting is not None:
            self._meeting = None
            dist.destroy_process_group()

    @cached_property
    def gathering(self) -> Gathering:
        """How coded gradients are averaged here."""
        assert self._meeting is not None, "not after close"
        return Gathering(run=self._meeting.agree_on_run(), rank=self.rank, layout=self._layout, traffic=self.traffic)

    def mean(self, vector: Float32) -> Float32:
        """Over the ranks; the vector is given away."""
        summed = torch.from_numpy(vector).to(self._device)
        dist.all_reduce(summed)
        moved = all_reduced_bytes(summed.numel(), rank_count=self.world_size)
        self.traffic.bytes_out += moved
        self.traffic.bytes_in += moved
        return summed.div_(self.world_size).cpu().numpy()

    def shown(self, gradient: Tensor | Coded) -> Tensor | Coded:
        """What may be sent of a gradient: the same, or, where its chain ends in secure aggregation, that under masks.

        They cancel in the sum over all ranks: one that is lost ends the run here anyway.
        """
        private = private_of(gradient)
        if private is None:
            return gradient
        with self._one_line("every rank's key"):
            if self._member is None:
                self._member = Member(run=self.gathering.run, rank=self.rank, world_size=self.world_size)
                self._member.meet(self.gathering.meet(self._member.public_key, step=self._step))
        masked = self._member.mask(private, step=self._step, own=False)
        return Defended(masked, gradient.defense) if isinstance(gradient, Defended) else masked

    @contextmanager
    def _one_line(self, wanted: str) -> Iterator[None]:
        """torch raises RuntimeError, with paths and a C++ trace in it, whatever went wrong."""
        try:
            yield
        except RuntimeError as error:
            got = re.sub(r"^(\[\S+\]\s*)+", "", str(error)).split("\n")[0].split(". ")[0][:160]
            where = f"rank {self.rank}, step {self._step}"
            if re.search("time[d]?[ -]?out", got, re.IGNORECASE):
                raise DeadlineError(
                    f"{where}: no {wanted} within {self._deadline_s:g} s; a rank is gone or slow ({got})"
                ) from error
            raise PeerError(f"{where}: wanted {wanted}, got: {got}; a rank is gone") from error


def all_reduced_bytes(elements: int, *, rank_count: int, element_bytes: int = 4) -> int:
    """Payload bytes that each rank sends, and receives, in a ring all-reduce."""
    return 2 * (rank_count - 1) * elements * element_bytes // rank_count


def short_floats(gradient: Coded) -> Tensor | None:
    """A gradient coded in floats of two bytes as a tensor of these, which torch can sum; None: another code."""
    if gradient.codec not in SHORT_FLOATS:
        return None
    payload = gradient.part(0, gradient.size).payload
    return torch.from_numpy(payload.view(np.int16).copy()).view(SHORT_FLOATS[gradient.codec])
