"""`gradtap decode FILE --out OBS.safetensors`: each rank's gradient at each step, and the weights it was taken at."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from attack.decode.export import write_observations
from attack.inference.source import Source
from nodes.commands.base import Command, Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(Command):
    """Exports what the wire said of each rank and step: gradient, mask of what is known, weights."""

    file: tyro.conf.Positional[Path]
    """Capture file: pcapng, or classic pcap."""
    out: Path
    """File to write (safetensors)."""
    optimizer: str | None = None
    """The job's update rule, e.g. sgd:lr=0.1 (docs/optimizers.md), if you know it: keeps the weights in step beyond the
    first. Left out, it is inferred from the traffic where that can be done."""

    def run(self) -> Result:
        """Decodes, and writes the file whole or not at all."""
        source = Source(self.file, optimizer=self.optimizer)
        summary = write_observations(source.observations(), self.out, update_rule=source.summary)
        text = (
            f"{self.out}: {summary['observations']} gradients of {summary['steps']} steps, "
            f"{100 * summary['exact_fraction']:.4g} % of their elements exact\n{source.text()}"
        )
        return Result(
            json={"out": str(self.out), **summary, **source.summary()}, text=text, ok=summary["observations"] > 0
        )
