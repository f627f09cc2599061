"""Where an attack's observations come from, and what keeps their weights in step: declared, inferred, or unknown.

In: a capture, or observations that `gradtap decode` wrote, and the declared optimizer if there is one. Out: the
observations, and what is to be said about their weights. A rule that nobody declared is used only where it explains
what was seen, and its weights only at steps at which a gradient confirms them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attack.decode.export import read_header, read_observations
from attack.decode.recording import Recording
from attack.errors import AttackError
from attack.inference.confirm import Confirmation
from attack.inference.infer import Inference, infer_optimizer
from attack.observation import Observation


class Origin(enum.StrEnum):
    """How an update rule is known."""

    DECLARED = "declared"
    INFERRED = "inferred"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What keeps the weights in step after the first one."""

    optimizer: str | None
    """As `harness.models.load_optimizer` reads it."""
    source: Origin
    evidence: str | None = None
    """Of one that is not declared, one line: what speaks for it, or why it cannot be told."""
    inference: dict[str, Any] | None = None
    """`Inference.summary`, where it was inferred, or tried to be."""

    def summary(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "optimizer": self.optimizer,
            "optimizer_source": self.source.value,
            "optimizer_evidence": self.evidence,
            "inference": self.inference,
        }

    def text(self) -> str:
        """For people."""
        if self.source is Origin.UNKNOWN:
            return f"Optimizer: cannot be told ({self.evidence}); only the first step's weights are known."
        if self.source is Origin.DECLARED:
            return f"Optimizer: {self.optimizer}, declared."
        return f"Optimizer: {self.optimizer}, inferred ({self.evidence})."


class Source:
    """Observations, with weights as far as they are known."""

    def __init__(self, file: Path, *, optimizer: str | None = None) -> None:
        """Blocks while it infers: at most a minute.

        Raises: CaptureError, DecodeError: the file cannot be read. AttackError: the optimizer is wrong, or cannot be
        declared any more.
        """
        self._file = file
        self._confirmation: Confirmation | None = None
        if file.suffix == ".safetensors":
            self.rule = _decoded_with(file, optimizer)
            self._inferred_here = False
            return
        if optimizer is not None:
            Recording(file, optimizer=optimizer)  # a typing error should not wait
            self.rule = Rule(optimizer=optimizer, source=Origin.DECLARED)
        else:
            self.rule = _inferred(infer_optimizer(Recording(file).observations()))
        self._inferred_here = self.rule.source is Origin.INFERRED

    def observations(self) -> Iterator[Observation]:
        """In order of step and rank. Ask once. Raises: CaptureError, DecodeError where the file is damaged."""
        if self._file.suffix == ".safetensors":
            yield from read_observations(self._file)
            return
        recording = Recording(self._file, optimizer=self.rule.optimizer)
        if not self._inferred_here:
            yield from recording.observations()
            return
        self._confirmation = Confirmation(recording.observations())
        yield from self._confirmation

    def summary(self) -> dict[str, Any]:
        """Plain values, for JSON; after the observations, also how many steps confirm an inferred rule."""
        checked = self._confirmation
        if checked is None:
            return self.rule.summary()
        return self.rule.summary() | {"steps_confirmed": checked.confirmed, "steps_not_confirmed": checked.refused}

    def text(self) -> str:
        """For people."""
        refused = self._confirmation.refused if self._confirmation is not None else []
        if not refused:
            return self.rule.text()
        return f"{self.rule.text()} At {len(refused)} steps no gradient confirms its weights, first at {refused[0]}."


def _inferred(found: Inference) -> Rule:
    return Rule(
        optimizer=found.optimizer,
        source=Origin.UNKNOWN if found.optimizer is None else Origin.INFERRED,
        evidence=found.reason,
        inference=found.summary(),
    )


def _decoded_with(file: Path, optimizer: str | None) -> Rule:
    """What the weights in a file of observations were kept in step with."""
    said = read_header(file).get("update_rule") or {}
    rule = Rule(
        optimizer=said.get("optimizer"),
        source=Origin(said.get("optimizer_source", Origin.UNKNOWN)),
        evidence=said.get("optimizer_evidence", "decoded without one"),
        inference=said.get("inference"),
    )
    if optimizer not in (None, rule.optimizer):
        had = f"{rule.optimizer}, {rule.source}" if rule.optimizer else "none"
        raise AttackError(
            f"{file}: its weights were decoded with optimizer {had}, not {optimizer}; "
            f"run first: gradtap decode CAPTURE --out {file} --optimizer {optimizer}"
        )
    return rule
