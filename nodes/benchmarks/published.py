"""The published attacks as plain loops, to measure against: torch's own optimizers, one picture, nothing of ours.

They differ from the released code in bookkeeping alone: none prints, and the first can be watched, so that a benchmark
can say when it arrived. They take all their steps, as released.

References: Zhu, Liu, Han, NeurIPS 2019, github.com/mit-han-lab/dlg; Zhao, Mopuri, Bilen 2020, arXiv 2001.02610,
github.com/PatrickZH/Improved-Deep-Leakage-from-Gradients; Geiping et al., NeurIPS 2020, arXiv 2003.14053,
github.com/JonasGeiping/invertinggradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Watch = Callable[[Tensor], None]
"""Is shown the present inputs after every outer step, shape (1, *input_shape)."""


def read_label(gradients: Sequence[Tensor]) -> Tensor:
    """iDLG's rule: the class whose row of the last weight's gradient has the least sum. int64, shape (1,)."""
    return gradients[-2].sum(-1).argmin()[None]


def deep_leakage(
    model: nn.Module,
    gradients: Sequence[Tensor],
    input_shape: Sequence[int],
    classes: int,
    *,
    watch: Watch,
    generator: torch.Generator,
    label: Tensor | None = None,
    outer_steps: int = 300,
) -> tuple[Tensor, Tensor]:
    """DLG; or iDLG, where the label is given: torch's L-BFGS at its defaults but a rate of 1, 300 steps of up to 20.

    Args:
        gradients: of the model's parameters, in order.
        generator: draws the dummy data and the dummy label.

    Returns: inputs, shape (1, *input_shape), and label, shape (1,). Not finite where the loop blew up.
    """
    inputs = torch.randn(1, *input_shape, generator=generator).requires_grad_()
    dummy_label = torch.randn(1, classes, generator=generator).requires_grad_()
    variables = [inputs, dummy_label] if label is None else [inputs]
    optimizer = torch.optim.LBFGS(variables, lr=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = model(inputs)
        if label is None:
            loss = (-dummy_label.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        else:
            loss = functional.cross_entropy(logits, label)
        own = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        distance = torch.stack([((a - b) ** 2).sum() for a, b in zip(own, gradients, strict=True)]).sum()
        distance.backward()
        return distance

    for _ in range(outer_steps):
        optimizer.step(closure)
        watch(inputs.detach())
        if not inputs.isfinite().all():
            break
    return inputs.detach(), dummy_label.detach().argmax(-1) if label is None else label


def inverting_gradients(
    model: nn.Module,
    gradients: Sequence[Tensor],
    input_shape: Sequence[int],
    label: Tensor,
    *,
    total_variation: float,
    generator: torch.Generator,
    iterations: int = 4000,
) -> Tensor:
    """Geiping's `cost_fn="sim"`, `signed`, `boxed`, `lr_decay`, Adam at 0.1: cosine distance and total variation.

    Args:
        input_shape: (channels, height, width).
        label: int64, shape (1,).
        total_variation: weight; the model takes pictures from 0 to 1, and so the loop runs on these.

    Returns: inputs from 0 to 1, shape (1, *input_shape).
    """
    x = torch.randn(1, *input_shape, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    milestones = [int(iterations // part) for part in (2.667, 1.6, 1.142)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=milestones, gamma=0.1)
    size = torch.stack([b.square().sum() for b in gradients]).sum().sqrt()
    for _ in range(iterations):
        loss = functional.cross_entropy(model(x), label)
        own = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        product = torch.stack([(a * b).sum() for a, b in zip(own, gradients, strict=True)]).sum()
        own_size = torch.stack([a.square().sum() for a in own]).sum().sqrt()
        cost = 1 - product / own_size / size
        variation = (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
        (slope,) = torch.autograd.grad(cost + total_variation * variation, x)
        x.grad = slope.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return x.detach()
