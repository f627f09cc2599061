"""Which update rule explains what the ranks' gradients say of their weights, and how sure that is.

The right rule makes every later gradient fit its weights to rounding; a wrong one leaves thousands of times that. What
no rule of `VARIANTS` explains is said to be unknown, and so is a job whose weights hardly move.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Iterable

import torch

from attack.engine.context import Context
from attack.inference.evidence import NoEvidence, collect
from attack.inference.fit import LIMIT, Evidence, Fit, fit
from attack.inference.variants import DEFAULTS, VARIANTS, rounded
from attack.observation import Observation

DEADLINE_S = 60.0
SURELY = 5.0
"""Standard deviations within which a number is rounded."""
LOOSE = 0.01
"""Relative error of a learning rate from which on it is not called known."""
DIFFERENT = 2.0
"""Ratio of two rules' residuals, over all checks, from which on the larger one is not as good: each check has tens of
equations, of which so much is no chance."""
PROBES = {
    "sgd": ("momentum=0.9", "weight_decay=0.0001"),
    "adam": ("betas=0.9/0.95", "weight_decay=0.0001"),
    "adamw": ("betas=0.9/0.95", "weight_decay=0.1"),
    "rmsprop": ("momentum=0.9", "alpha=0.9"),
}
"""What scripts often add, and the evidence must exclude before a rule without it is called determined."""


class Verdict(enum.StrEnum):
    """How sure an inference is."""

    DETERMINED = "determined"
    """One rule of those tried explains every check, and none of the others does."""
    AMBIGUOUS = "ambiguous"
    """It explains every check, but so do others, or its numbers are no round ones: the weights at these steps are
    known, the rule is not."""
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Inference:
    """What the traffic says of the update rule."""

    verdict: Verdict
    reason: str
    """One line."""
    optimizer: str | None = None
    """As `harness.models.load_optimizer` reads it; None where it cannot be told."""
    rounded: bool = False
    """Whether its numbers are round within their errors; else its weights come near the job's, and are not they."""
    checks: int = 0
    """Gradients, each of one rank at one step after the first, that the rule's weights were checked with; all fit."""
    steps: int = 0
    """Steps after the first that these belong to."""
    equations: int = 0
    """That these had to fulfill, beyond unknowns."""
    residual: float | None = None
    """The largest of a check, root mean square in units of the gradient's own noise: about 1 for the right weights."""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """Standard deviation of each number, before it was rounded."""
    runner_up: str | None = None
    """The best of those that do not explain the checks."""
    runner_up_residual: float | None = None
    as_good: tuple[str, ...] = ()
    """Rules that explain the checks as well."""

    def summary(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "verdict": self.verdict.value, "as_good": list(self.as_good)}


def infer_optimizer(observations: Iterable[Observation], *, seed: int = 0, deadline_s: float = DEADLINE_S) -> Inference:
    """Infers the update rule from the first steps, of which only the initial weights need be known; reads no further.

    It supposes cross-entropy on a linear layer, and checks that on the first step. Batches may have up to half as many
    examples as there are classes.
    """
    context = Context(generator=torch.Generator().manual_seed(seed), deadline=time.monotonic() + deadline_s)
    try:
        evidence = collect(observations, context)
    except NoEvidence as none:
        return Inference(verdict=Verdict.UNKNOWN, reason=str(none))
    if _stands_still(evidence, context):
        return Inference(verdict=Verdict.UNKNOWN, reason="the weights do not move by more than the gradients' noise")
    fits = _fit_all(evidence, context)
    if not context.seconds_left:
        return Inference(verdict=Verdict.UNKNOWN, reason=f"not found out within {deadline_s:g} s")
    explain = [one for one in fits if _explains(one, evidence)]
    others = [one for one in fits if not _explains(one, evidence)]
    runner_up = max(others, key=lambda one: (one.steps, -one.worst), default=None)
    if not explain:
        best = (
            "" if runner_up is None else f"; the best, {runner_up.spec}, leaves {runner_up.worst:.1g} times the noise"
        )
        return Inference(verdict=Verdict.UNKNOWN, reason=f"none of {len(VARIANTS)} rules explains the gradients{best}")
    return _conclude(explain, runner_up, evidence, context)


def _stands_still(evidence: Evidence, context: Context) -> bool:
    """Whether the initial weights explain the later gradients too: then any small learning rate does."""
    initial = evidence.layer.matrix(evidence.initial.double())
    asked = [one for step in evidence.witnesses[1:] for one in step]
    if asked[0].batch > 1 and not asked[0].hear(initial, context):
        return False
    return all(float(one.residual(initial).square().mean().sqrt()) <= LIMIT for one in asked if one.heard)


def _fit_all(evidence: Evidence, context: Context) -> list[Fit]:
    """Every variant's best, but of those that contain one that explains all: they do too."""
    fits: list[Fit] = []
    for variant in VARIANTS:
        explain = [one for one in fits if _explains(one, evidence)]
        if not any(variant.contains(one.variant) for one in explain):
            found = fit(variant, evidence, context, hear=not explain)
            fits += [] if found is None else [found]
        if not context.seconds_left:
            break
    return fits


def _explains(one: Fit, evidence: Evidence) -> bool:
    return one.worst <= LIMIT and one.steps == evidence.depth


def _merit(one: Fit) -> tuple[int, float]:
    return one.steps, -one.worst


def _conclude(explain: list[Fit], runner_up: Fit | None, evidence: Evidence, context: Context) -> Inference:
    best = explain[0]
    spec, is_round = _round(best, evidence)
    as_good = [one.spec for one in explain[1:] if one.total <= DIFFERENT * best.total]
    for probe in PROBES.get(best.variant.optimizer, ()):
        if probe.partition("=")[0].replace("betas", "beta1") in best.variant.free:
            continue
        fixed = ",".join(filter(None, (best.variant.fixed, probe)))
        changed = fit(dataclasses.replace(best.variant, fixed=fixed), evidence, context, hear=False)
        if changed is not None and _explains(changed, evidence) and changed.total <= DIFFERENT * best.total:
            as_good.append(changed.spec)
    checks = evidence.heard(evidence.depth)
    errors = dict(best.errors or {})
    loose = errors.get("lr", 0.0) > LOOSE * best.values["lr"]
    verdict = Verdict.DETERMINED if is_round and not (as_good or loose) else Verdict.AMBIGUOUS
    steps = len({step for step, _ in checks})
    reason = f"explains {len(checks)} gradients of {steps} steps after the first, to {best.worst:.2g} times their noise"
    if runner_up is not None:
        reason += f"; the next best, {runner_up.variant.name}, leaves {runner_up.worst:.1g} times"
    if as_good:
        reason += f"; {len(as_good)} others explain them as well"
    if not is_round:
        reason += "; its numbers are not round: another rule may be the job's, and the weights are near but not its own"
    return Inference(
        verdict=verdict,
        reason=reason,
        optimizer=spec,
        rounded=is_round,
        checks=len(checks),
        steps=steps,
        equations=sum(one.equations for _, one in checks),
        residual=max(evidence.residuals(spec, evidence.depth, dtype=evidence.initial.dtype)),
        errors=errors,
        runner_up=None if runner_up is None else runner_up.spec,
        runner_up_residual=None if runner_up is None else runner_up.worst,
        as_good=tuple(as_good),
    )


def _round(best: Fit, evidence: Evidence) -> tuple[str, bool]:
    """The rule with round numbers, where these explain the checks in the job's own float32; else with all digits."""
    values, errors = dict(best.values), best.errors or {}
    for name, value in best.values.items():
        within = SURELY * errors.get(name, 0.0) + 1e-7 * abs(value)
        near = rounded(name, value, within, default=DEFAULTS.get(name))
        if near is None:
            return best.spec, False
        values[name] = near
    spec = best.variant.spec(values)
    if max(evidence.residuals(spec, evidence.depth, dtype=evidence.initial.dtype)) > max(LIMIT / 2, 1.5 * best.worst):
        return best.spec, False
    return spec, True
