"""Batch norm's mode, of which nobody tells: it normalizes by the batch (training), or by running statistics
(evaluation, as in jobs that fine-tune with frozen statistics).

The gradient itself says which. A norm by the batch undoes the scale of what comes in, so the loss does not change when
all weights W_c that make one channel grow alike:

    <W_c, d loss / d W_c> = 0, but for the norm's epsilon        (Ioffe and Szegedy 2015, arXiv 1502.03167, section 3.3)

Of a norm by running statistics that is nowhere near zero. It is asked of each norm, so that a net of which only a part
is frozen is read as it is. Where a channel of one example has one value, two examples would leave a gradient of nothing
but the epsilon: such a norm is taken to be as the others. Knows no input and no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attack.observation import BATCH_NORM_MODES

ORTHOGONAL = 0.03
"""Cosine of a channel's weights and their gradient, in units of that of two random vectors, below which they count as
orthogonal. Medians over channels, of all layers of ResNets that were trained and not: up to 2.4e-3 in training mode,
from 0.14 on in evaluation mode."""


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Whose weights have a channel of the output along their first axis."""


def set_modes(
    model: nn.Module,
    input_shape: tuple[int, ...],
    gradient: Sequence[Tensor],
    known: Sequence[Tensor],
    *,
    told: str | None,
    before: Sequence[Tensor],
    after: Sequence[Tensor] | None,
) -> tuple[str | None, bool]:
    """Puts each batch norm into the mode in which the job has it; none of them will ever change its running statistics.

    Args:
        model: in evaluation mode, at the observed weights.
        gradient, known: of each parameter, in order.
        told: `train`, `eval`, or None.
        before, after: the model's floating-point buffers as they were seen before and after the step.

    Returns: what the modes are and how that is known, one line, None without batch norms; and whether any of them
    needs its running statistics.
    """
    assert told in (None, *BATCH_NORM_MODES)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return None, False
    moved = _moved(model, before, after)
    by_gradient = {} if told else _by_gradient(model, input_shape, gradient, known)
    training: list[bool] = []
    reasons: list[str] = []
    for norm in norms:
        norm.train()
        if norm.running_mean is None:
            mode, reason = True, "it keeps no running statistics"
        elif not norm.training:
            mode, reason = False, "the model keeps it there"
        elif told:
            mode, reason = told == "train", "told"
        elif id(norm) in moved:
            mode = moved[id(norm)]
            reason = f"the running statistics {'moved' if mode else 'did not move'}"
        elif id(norm) in by_gradient:
            mode = by_gradient[id(norm)]
            reason = f"the gradient is {'' if mode else 'not '}orthogonal to the weights before it"
        elif by_gradient:
            mode, reason = sum(by_gradient.values()) * 2 >= len(by_gradient), "as most others"
        else:
            mode, reason = True, "assumed: nothing on the wire tells"
        norm.train(mode)
        norm.track_running_stats = not mode
        training.append(mode)
        reasons.append(reason)
    return _say(training, reasons), not all(training)


def _say(training: list[bool], reasons: list[str]) -> str:
    parts = []
    for mode, name in ((True, "training"), (False, "evaluation")):
        mine = [reason for each, reason in zip(training, reasons, strict=True) if each == mode]
        if mine:
            count = "" if len(mine) == len(training) else f"{len(mine)} of {len(training)} "
            parts.append(f"{count}in {name} mode ({', '.join(dict.fromkeys(mine))})")
    return "batch norms: " + "; ".join(parts)


def _moved(model: nn.Module, before: Sequence[Tensor], after: Sequence[Tensor] | None) -> dict[int, bool]:
    """By norm, whether its running statistics did; of those that were seen before and after the step."""
    if after is None:
        return {}
    same = {id(b): o.equal(n) for b, o, n in zip(floating_buffers(model), before, after, strict=True)}
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]
    return {id(norm): not (same[id(norm.running_mean)] and same[id(norm.running_var)]) for norm in norms}


def seen_statistics(
    model: nn.Module, before: Sequence[Tensor], after: Sequence[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of what one batch gave to each norm in training mode, shape (channels,), by name.

    Running statistics move by new = (1 - momentum) old + momentum batch: what they moved by is the batch's own. Empty
    where that makes no sense: another number of passes came between.

    Args:
        before, after: floating-point buffers, of the rank whose batch it was.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    buffers = zip(floating_buffers(model), before, after, strict=True)
    moved = {id(buffer): (old.double(), new.double()) for buffer, old, new in buffers}
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm) or not norm.training or norm.running_mean is None or not norm.momentum:
            continue
        mean, variance = (
            (new - (1 - norm.momentum) * old) / norm.momentum
            for old, new in (moved[id(norm.running_mean)], moved[id(norm.running_var)])
        )
        if not (mean.isfinite().all() and variance.isfinite().all() and variance.min() > -1e-4 * variance.max()):
            return {}
        found[name] = mean, variance.clamp(min=0)
    return found


def floating_buffers(model: nn.Module) -> list[Tensor]:
    """In the order in which an exchange sends them."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _by_gradient(
    model: nn.Module, input_shape: tuple[int, ...], gradient: Sequence[Tensor], known: Sequence[Tensor]
) -> dict[int, bool]:
    """By norm, whether it normalizes by the batch; of those whose layer before says so."""
    weights = [parameter.detach() for parameter in model.parameters()]
    found: dict[int, bool] = {}
    single: dict[int, bool] = {}
    for norm, (place, positions) in _made_by(model, input_shape).items():
        orthogonal = _is_orthogonal(weights[place], gradient[place], known[place])
        if orthogonal is not None:
            (found if positions > 1 else single)[norm] = orthogonal
    return found or single


def _made_by(model: nn.Module, input_shape: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """By norm that takes the very output of a layer: the place of that layer's weight among the parameters, and the
    positions that a channel of one example has."""
    places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    outputs: list[tuple[Tensor, int]] = []
    made_by: dict[int, tuple[int, int]] = {}

    def leave(layer: nn.Module, taken: Any, output: Tensor) -> None:
        if id(layer.weight) in places:  # a weight that is reparametrized is none
            outputs.append((output, places[id(layer.weight)]))

    def enter(norm: nn.Module, taken: tuple[Tensor, ...]) -> None:
        made_by.update({id(norm): (place, out[0, 0].numel()) for out, place in outputs if out is taken[0]})

    hooks: list[Any] = []
    for module in model.modules():
        if isinstance(module, LAYERS):
            hooks.append(module.register_forward_hook(leave))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(enter))
    try:
        parameter = next(model.parameters())
        with torch.no_grad():
            model(torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device))
    except (RuntimeError, ValueError):  # a shape that does not fit is named where the model is used
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return made_by


def _is_orthogonal(weight: Tensor, gradient: Tensor, known: Tensor) -> bool | None:
    """Whether the gradient of a layer is orthogonal to its weights; None where too little is known of it.

    Args:
        weight, gradient, known: shape (channels, ...).
    """
    weight, gradient, known = (tensor.flatten(1) for tensor in (weight, gradient, known))
    sizes = torch.linalg.vector_norm(weight, dim=1) * torch.linalg.vector_norm(gradient, dim=1)
    clear = known.all(1) & (sizes > 0)
    if not clear.any():
        return None
    cosines = (weight * gradient).sum(1).abs()[clear] / sizes[clear] * weight.shape[1] ** 0.5
    return float(cosines.median()) < ORTHOGONAL
