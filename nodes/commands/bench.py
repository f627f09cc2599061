"""`gradtap bench NAME`: the project's benchmarks, each with options of its own."""

from __future__ import annotations

import dataclasses

from nodes.commands.base import Command, Result

BENCHMARKS = {
    "exchange": "Exchange",
    "decode": "Decode",
    "attack": "Attack",
    "certificate": "Certificate",
    "labels": "Labels",
    "batches": "Batches",
    "patterns": "Patterns",
    "codec": "Codec",
    "step": "Step",
    "sentences": "Sentences",
}
"""Each benchmark is the class of that name in `nodes.benchmarks.<benchmark>`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Runs one of the project's benchmarks: exchange, decode, attack, certificate, labels, batches, patterns,
    codec, step, sentences.

    `gradtap bench NAME --help` tells its options.
    """

    def run(self) -> Result:
        """A name must follow, and that is another command."""
        raise AssertionError("the command line takes the benchmark's own class")
