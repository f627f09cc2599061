"""One observation -> one reconstruction: prepare the target, run a method on it, and judge what it proposes.

Every method is judged alike, by the gradient match and its conditioning. Nothing here has a way to the truth.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from attack.algorithms import METHODS, TEXT_METHODS, TEXT_ONLY, Answer, Reconstruction, Status
from attack.certificate import certify
from attack.engine.context import Context, Progress
from attack.engine.rivals import doubt
from attack.engine.target import Refused, Target, prepare
from attack.errors import AttackError
from attack.observation import Knowledge, Observation

DEADLINE_S = 300.0
"""For one victim: batches of convolutional nets take 20 to 150 s of CPU time, one example a second or two."""
UNDETERMINED = 1e-2
"""Predicted mean squared error, in units of the squared input range, above which a match is no reconstruction: many
different pictures match as well. 20 dB."""
COARSE = 1e-3
"""Tolerance from which on a match must come with a prediction of its error: of a gradient rounded to 8 bits pictures
were found that matched within its 1.5 % and had nothing in common with the true ones."""
UNSURE = "the gradient is known within {:.1e} of itself, so a match alone proves no"
UNKNOWN = 1 / 24
"""The same where a prior filled what the equations leave open: half the error of gray for a picture of noise."""


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is a GPU where there is one. Raises: AttackError for a device that torch does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise AttackError(f"device {name!r}: {str(error).splitlines()[0]}; wanted auto, cpu or cuda") from error
    return torch.device(name)


def reconstruct(
    observation: Observation,
    knowledge: Knowledge,
    *,
    method: str = "auto",
    seed: int = 0,
    device: str = "auto",
    deadline_s: float = DEADLINE_S,
    progress: Callable[[Progress], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Reconstruction:
    """Attacks one observation. The random draws depend on the seed, the rank and the step, and on nothing else.

    Args:
        deadline_s: on `clock`.

    Returns: a reconstruction with inputs and labels where it converged, else one with the reason why not.

    Raises: AttackError: the method, the device or the knowledge cannot be.
    """
    _, found = attempt(
        observation,
        knowledge,
        method=method,
        seed=seed,
        device=device,
        deadline_s=deadline_s,
        progress=progress,
        clock=clock,
    )
    return found


def attempt(
    observation: Observation,
    knowledge: Knowledge,
    *,
    method: str = "auto",
    seed: int = 0,
    device: str = "auto",
    deadline_s: float = DEADLINE_S,
    progress: Callable[[Progress], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Answer, Reconstruction]:
    """What a method proposes, whatever it is worth, and the reconstruction that it earns: `reconstruct`, for
    measurements that look at a search that did not converge as well."""
    if method not in METHODS:
        raise AttackError(f"method {method!r} is not known; there are: {', '.join(METHODS)}")
    here = pick_device(device)
    start, cpu_start = time.monotonic(), time.process_time()
    context = _context(observation, seed=seed, deadline_s=deadline_s, progress=progress, clock=clock)
    fields: dict[str, Any] = {"method": method}
    try:
        target = prepare(observation, knowledge, device=here)
        fields["batch_norm"] = target.batch_norm
        if target.tokens is not None and method not in TEXT_METHODS:
            raise AttackError(f"method {method!r} is for pictures; for text there are: {', '.join(TEXT_METHODS)}")
        if target.tokens is None and method in TEXT_ONLY:
            raise AttackError(f"method {method!r} is for text, and model {knowledge.model!r} takes no tokens")
        answer = METHODS[method](target, context)
        fields |= judge(target, answer, context)
    except Refused as refused:
        answer = Answer(inputs=None, labels=None, reason=refused.reason)
        fields["status"] = Status.NOT_CONVERGED if refused.observed else Status.NOT_OBSERVED
        fields["reason"] = refused.reason
    return answer, Reconstruction(
        rank=observation.rank,
        step=observation.step,
        seconds=time.monotonic() - start,
        cpu_seconds=time.process_time() - cpu_start,
        **fields,
    )


def best_match(
    observation: Observation,
    knowledge: Knowledge,
    *,
    method: str = "auto",
    seed: int = 0,
    device: str = "auto",
    deadline_s: float = DEADLINE_S,
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """What a method proposes, whatever it is worth: published attacks show their last picture, and do not judge it.

    For measurements that score such an attack; `reconstruct` is for whoever wants to know whether to believe it.
    """
    context = _context(observation, seed=seed, deadline_s=deadline_s, progress=lambda _: None, clock=clock)
    try:
        return METHODS[method](prepare(observation, knowledge, device=pick_device(device)), context)
    except Refused as refused:
        return Answer(inputs=None, labels=None, reason=refused.reason)


def _context(
    observation: Observation,
    *,
    seed: int,
    deadline_s: float,
    progress: Callable[[Progress], None],
    clock: Callable[[], float],
) -> Context:
    entropy = np.random.SeedSequence([seed, observation.rank % (1 << 32), observation.step]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(entropy))
    return Context(generator=generator, deadline=clock() + deadline_s, progress=progress, clock=clock)


def judge(target: Target, answer: Answer, context: Context) -> dict[str, Any]:
    """The fields of a `Reconstruction` that an answer earns: its picture only where it converged."""
    fields: dict[str, Any] = {
        "status": Status.NOT_CONVERGED,
        "route": answer.route,
        "batch_size_assumed": target.batch_size_assumed and not answer.batch_size_read,
        "history": tuple(answer.film.history),
        "evaluations": answer.evaluations,
        "restarts": answer.restarts,
    }
    if answer.method is not None:
        fields["method"] = answer.method
    if answer.inputs is None or answer.labels is None:
        return fields | {"reason": answer.reason}
    inputs = answer.inputs.detach()
    labels = answer.labels if answer.soft_labels is None else answer.soft_labels.detach()
    residual, tolerance = target.misfit(inputs, labels)
    fields["gradient_residual"] = residual if math.isfinite(residual) else None
    if not residual <= tolerance:
        reason = f"its gradient differs by {residual:.1e} of the observed one, at most {tolerance:.1e} is a match"
        return fields | {"reason": reason + (f" ({answer.reason})" if answer.reason else "")}
    if target.tokens is None:
        fields["predicted_mse"], against = _doubt(target, answer, tolerance, context)
    else:
        asked = tolerance > COARSE and not answer.rivals_ruled_out
        against = doubt(target, inputs, answer.labels, context) if asked else None
    if against is not None:
        return fields | {"reason": against}
    frames = answer.film.frames
    return fields | {
        "status": Status.FILLED if answer.filled else Status.CONVERGED,
        "steps": (
            target.step,
            *target.joined,
            *(other.step for other in target.again if other.explained_by(inputs, labels)),
        ),
        "reason": answer.reason if answer.filled else None,
        "inputs": inputs.cpu() if target.tokens else inputs.float().cpu(),
        "labels": answer.labels.cpu(),
        "soft_labels": None if answer.soft_labels is None else answer.soft_labels.detach().float().cpu(),
        "frames": torch.stack([frame for _, frame in frames]) if frames else None,
        "frame_iterations": tuple(iteration for iteration, _ in frames),
    }


def _doubt(target: Target, answer: Answer, tolerance: float, context: Context) -> tuple[float | None, str | None]:
    """The mean squared error to expect of a picture whose gradient matches; and why it is no answer yet, or None."""
    certificate = certify(target, answer, context)
    predicted = certificate.predicted_mse
    if predicted is None and tolerance > COARSE:
        return predicted, f"{UNSURE.format(tolerance)} picture"
    low, high = target.input_range
    error = max(certificate.left_open, predicted or 0.0)
    if not error <= (UNKNOWN if answer.filled else UNDETERMINED) * (high - low) ** 2:
        return predicted, f"the gradient matches, but so do other inputs: mean squared error {error:.1e} or so"
    return predicted, None
