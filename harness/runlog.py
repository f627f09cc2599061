"""What a run leaves behind for people: `metrics.jsonl`, TensorBoard curves, progress, and the sealed truth.

RUN/metrics.jsonl                       a line for each step and rank, in the order in which they ended
RUN/tensorboard/                        rank 0's curves
RUN/truth/step{S}.rank{R}.safetensors   inputs, labels, gradient, weights, buffers: for `gradtap evaluate` alone
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.tensors import save_tensors
from harness.types import Batch, Gradients

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """One rank's pen. All ranks of a host write the same `metrics.jsonl`, each line in one append."""

    def __init__(self, run: Path, *, rank: int, tensorboard: bool, first_step: int) -> None:
        """Drops what a run that is resumed had written of steps from `first_step` on."""
        self.run, self.rank = run, rank
        run.mkdir(parents=True, exist_ok=True)
        self.file = run / "metrics.jsonl"
        if rank == 0:
            _keep_steps_before(self.file, first_step)
        self.curves: SummaryWriter | None = None
        if tensorboard and rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # takes half a second to import

            self.curves = SummaryWriter(str(run / "tensorboard"), purge_step=first_step or None)

    def step(
        self,
        step: int,
        *,
        gradients: Gradients,
        bytes_out: int,
        bytes_in: int,
        seconds: dict[str, float],
        cpu_seconds: dict[str, float],
        privacy: dict[str, float | None],
    ) -> None:
        """Writes what one step of this rank did.

        Args:
            bytes_out, bytes_in: payload bytes of this step.
            seconds: wall time by part, e.g. gradient, exchange, update.
            cpu_seconds: CPU time of this rank's process, by the same parts.
            privacy: what has been spent so far, where the defense is differentially private.
        """
        line: dict[str, Any] = {
            "step": step,
            "rank": self.rank,
            "loss": gradients.loss,
            "accuracy": gradients.correct,
            "bytes_out": bytes_out,
            "bytes_in": bytes_in,
            "seconds": {part: round(value, 6) for part, value in seconds.items()},
            "cpu_seconds": {part: round(value, 6) for part, value in cpu_seconds.items()},
        } | privacy
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)
        if self.curves is not None:
            self.curves.add_scalar("train/loss", gradients.loss, step)
            self.curves.add_scalar("train/accuracy", gradients.correct, step)
            self.curves.add_scalar("exchange/bytes_out", bytes_out, step)
            for part, value in seconds.items():
                self.curves.add_scalar(f"seconds/{part}", value, step)
            for name, epsilon in privacy.items():
                if epsilon is not None:
                    self.curves.add_scalar(f"privacy/{name}", epsilon, step)

    def truth(self, step: int, *, batch: Batch, gradient: Tensor, model: nn.Module) -> None:
        """Seals what the eavesdropper must never see, beside the weights that the gradient was taken at."""
        buffers = [buffer.reshape(-1) for buffer in model.buffers() if buffer.is_floating_point()]
        save_tensors(
            {
                "inputs": batch.inputs,
                "labels": batch.labels,
                "gradient": gradient,
                "weights": torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]),
                "buffers": torch.cat(buffers) if buffers else torch.zeros(0),
            },
            self.run / "truth" / f"step{step}.rank{self.rank}.safetensors",
        )

    def close(self) -> None:
        """Flushes what is buffered."""
        if self.curves is not None:
            self.curves.close()


def _keep_steps_before(file: Path, step: int) -> None:
    if not file.exists():
        return
    kept = [line for line in file.read_text().splitlines() if line and json.loads(line)["step"] < step]
    file.write_text("".join(line + "\n" for line in kept))
