"""The strongest method for what was observed: the closed form where the model is a chain, else a search.

A batch size that was not told is read from the gradient of the last layer or the first, where that has a clear rank.

Goes on to the next method when one does not converge, and says why it took each.
"""

from __future__ import annotations

import contextlib
import dataclasses

from torch import nn

from attack.algorithms.base import Answer, Method
from attack.algorithms.coarse import coarse
from attack.algorithms.coarse_text import coarse_text
from attack.algorithms.dager import dager
from attack.algorithms.dlg import dlg
from attack.algorithms.gauss_newton import gauss_newton
from attack.algorithms.idlg import idlg
from attack.algorithms.inverting_gradients import inverting_gradients
from attack.algorithms.patterns import patterns
from attack.algorithms.residual import residual as walk_residual
from attack.algorithms.rgap import rgap
from attack.algorithms.spear import count_at_first_layer, first_layer, spear
from attack.algorithms.unmix import unmix
from attack.engine.chain import NoChain, layers, trace
from attack.engine.context import Context
from attack.engine.cut import count
from attack.engine.features import NoFeatures, count_examples
from attack.engine.peeling import NotApart
from attack.engine.rivals import doubt
from attack.engine.target import Target
from attack.engine.unmixing import check_connected

COARSE = 1e-4
"""Error of a gradient, relative to its size, above which the closed forms are not tried first."""
KINKED = (nn.ReLU, nn.LeakyReLU, nn.MaxPool2d)
"""Layers at whose kinks the gradient jumps: an L-BFGS search from afar sticks there."""


def auto(target: Target, context: Context) -> Answer:
    """The first answer within the target's tolerance; else the best of what was tried."""
    if target.tokens is not None:
        return _text(target, context)
    if target.bases:
        why = "matrices known along some directions alone: solve for the pixels by these"
        return dataclasses.replace(coarse(target, context), method="coarse", route=f"coarse ({why})")
    plan: list[tuple[str, Method, str]] = []
    examples, source = _batch_size(target)
    if examples == 1 and _coarse(target):
        plan.append(("coarse", coarse, "one example, its gradient rounded, noisy or not all sent: weigh what is known"))
    if examples == 1 and any(isinstance(layer, nn.MaxPool2d) for layer in layers(target.model, target.input_shape)):
        plan.append(("patterns", patterns, "one example through max pooling: find which positions passed"))
    elif examples == 1 and target.again and not _connected(target):
        steps = f"one example at {1 + len(target.again)} steps"
        plan.append(("gauss-newton", gauss_newton, f"{steps}: walk back in closed form, then all together if need be"))
    elif examples == 1 and any(isinstance(module, nn.BatchNorm2d) for module in target.model.modules()):
        plan.append(
            ("residual", walk_residual, "one example through batch norm: walk down layer by layer, then the pixels")
        )
    elif examples == 1 and not _connected(target):
        plan.append(("rgap", rgap, "one example: walk back in closed form"))
    elif examples == 1:
        plan.append(("unmix", unmix, "one example through fully connected layers: each solved on its own"))
    else:
        what = f"{examples} examples{source}"
        if _peelable(target):
            plan.append(("spear", spear, f"{what}: taken apart at the first layer, where each has units that are off"))
        plan.append(_batch(target, examples, what))
    if _kinked(target) and (examples == 1 or target.labels is not None):
        why = "the gradient has kinks, where a search from afar sticks: match its direction, with a prior"
        plan.append(("inverting-gradients", inverting_gradients, why))
    else:
        if examples == 1 or target.labels is not None:
            plan.append(("idlg", idlg, "the label is read or told: search the input alone"))
        elif not _kinked(target):
            plan.append(("idlg", idlg, "the likeliest labels of the batch: search the inputs alone"))
        plan.append(("dlg", dlg, "search inputs and labels together"))
    counted = dataclasses.replace(target, batch_size=examples)

    best, least, route = None, float("inf"), []
    for name, method, why in plan:
        if best is not None and not context.seconds_left:
            break
        answer = dataclasses.replace(method(counted, context), method=name)
        route.append(f"{name} ({why})")
        residual, tolerance = float("inf"), 0.0
        if answer.inputs is not None and answer.labels is not None:
            residual, tolerance = target.misfit(answer.inputs, answer.labels)
        if best is None or residual < least:
            best, least = answer, residual
        if residual <= tolerance:
            break
        route[-1] += f": {answer.reason or f'its gradient differs by {residual:.1e}'}"
    assert best is not None
    return dataclasses.replace(best, route="; then ".join(route), batch_size_read=bool(source))


def _text(target: Target, context: Context) -> Answer:
    """Spans, or each token's slope; the second first where the gradient is known coarsely."""
    plan: list[tuple[str, Method, str]] = [
        ("dager", dager, "text: tokens whose inputs are in the span of the first layer's gradient")
    ]
    if target.batch_size == 1:
        plan.append(("coarse-text", coarse_text, "one sentence: each token by the rows that its slope stands in"))
    if _coarse(target):
        plan.reverse()
    best, route = None, []
    for name, method, why in plan:
        answer = dataclasses.replace(method(target, context), method=name)
        route.append(f"{name} ({why})")
        best = best or answer
        if answer.inputs is None or answer.labels is None:
            route[-1] += f": {answer.reason}"
        elif target.explained_by(answer.inputs, answer.labels):
            # What is known coarsely, a wrong text explains as well.
            coarsely = _coarse(target)
            against = doubt(target, answer.inputs, answer.labels, context) if coarsely else None
            if against is None:
                best = dataclasses.replace(answer, rivals_ruled_out=coarsely)
                break
            route[-1] += f": {against}"
        else:
            route[-1] += ": its gradient differs"
    assert best is not None
    return dataclasses.replace(best, route="; then ".join(route))


def _coarse(target: Target) -> bool:
    """Whether the gradient is known far less well than float32, or its last layer not in full."""
    if target.expected_residual > COARSE:
        return True
    return len(target.shapes) > 1 and not all(bool(known.all()) for known in target.tensors(target.known)[-2:])


def _kinked(target: Target) -> bool:
    return any(isinstance(layer, KINKED) for layer in layers(target.model, target.input_shape))


def _connected(target: Target) -> bool:
    """Whether all that has weights is fully connected."""
    try:
        check_connected(trace(target.model, target.input_shape))
    except NoChain:
        return False
    return True


def _peelable(target: Target) -> bool:
    """Whether the first layer is fully connected, with a ReLU on it."""
    try:
        first_layer(target)
    except NoChain:
        return False
    return True


def _batch(target: Target, examples: int, what: str) -> tuple[str, Method, str]:
    """What takes a batch apart: least squares alone where every layer is fully connected."""
    try:
        links = trace(target.model, target.input_shape)
    except NoChain:
        return "unmix", unmix, f"{what}: taken apart layer by layer"
    if _connected(target):
        return "unmix", unmix, f"{what}: taken apart layer by layer"
    steps = 1 + len(target.again)
    known = count(links, examples, steps=steps)
    seen = f" of {steps} steps" if target.again else ""
    return "gauss-newton", gauss_newton, f"{what}, {known}{seen}: solved from the last layer down, then the pixels"


def _batch_size(target: Target) -> tuple[int, str]:
    """The batch size to go by, and where it is from if it is neither told nor a guess."""
    if not target.batch_size_assumed:
        return target.batch_size, ""
    counts = {}
    with contextlib.suppress(NoFeatures):
        counts["last"] = count_examples(target)
    with contextlib.suppress(NoChain, NotApart):
        counts["first"] = count_at_first_layer(target)
    # Neither has a higher rank than the batch has examples; but the last layer's is below the number of classes, and
    # an example all of whose units are off is not in the first's.
    layer = max(counts, key=lambda layer: counts[layer], default="")
    if counts.get(layer, 1) == 1:
        return target.batch_size, ""
    return counts[layer], f" by the rank of the {layer} layer's gradient"
