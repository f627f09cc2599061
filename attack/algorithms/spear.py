"""Batches of nets that begin with a fully connected layer and a ReLU, exactly: from that layer's gradient alone.

The first layer's gradient gives every example's input, and its error at that layer's outputs (`attack.engine.peeling`);
the label is the one with which the layers above make that error. So the last layer need not tell the examples apart:
there may be more of them than classes. Batch size and labels need not be told.

Differs from the paper: the examples are found one after the other where the units allow, which takes no search, and
SPEAR's own search goes for what is left. Its search over labels is not needed.

Reference: Dimitrov et al., SPEAR: Exact Gradient Inversion of Batches in Federated Learning, NeurIPS 2024, arXiv
2403.03945.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attack.algorithms.base import Answer
from attack.algorithms.rgap import rgap
from attack.engine.chain import Link, NoChain, trace
from attack.engine.context import Context, Progress
from attack.engine.film import Film
from attack.engine.layers import RESHAPES
from attack.engine.peeling import NotApart, count_inputs, peel, peel_near
from attack.engine.target import Target


def spear(target: Target, context: Context) -> Answer:
    """Inputs and labels of the whole batch."""
    try:
        layer = first_layer(target)
        apart = peel(*_gradient(target, layer), context)
        inputs = apart.inputs.view(-1, *target.input_shape)
        if not target.batch_size_assumed and len(inputs) != target.batch_size:
            raise NotApart(f"layer {layer.name} says {len(inputs)} examples, and {target.batch_size} were told")
        labels = _labels(target, layer, inputs, apart.error)
        if target.labels is not None:
            inputs, labels = _in_order(inputs, labels, target.labels)
    except (NoChain, NotApart) as error:
        if target.batch_size == 1:  # the walk back does with less
            walked = rgap(target, context)
            if walked.inputs is not None:
                return walked
        return Answer(inputs=None, labels=None, reason=str(error))
    residual = target.residual(inputs, labels)
    film = Film()
    film.take(0, residual, inputs)
    context.progress(Progress(method="spear", evaluations=1, residual=residual, seconds_left=context.seconds_left))
    return Answer(
        inputs=inputs,
        labels=labels,
        film=film,
        again=lambda moved: (_again(one, layer, inputs) for one in moved),
        batch_size_read=target.batch_size_assumed,
        evaluations=1,
    )


def first_layer(target: Target) -> Link:
    """The layer that takes the inputs as they are, with a ReLU on it. Raises: NoChain."""
    links = [link for link in trace(target.model, target.input_shape) if not isinstance(link.module, RESHAPES)]
    first, above = links[0], links[1] if len(links) > 1 else None
    if not isinstance(first.module, nn.Linear) or len(first.input_shape) != 1:
        raise NoChain(f"layer {first.name} ({type(first.module).__name__}): the first must be a fully connected one")
    if first.module.bias is None:
        raise NoChain(f"layer {first.name} has no bias, whose gradient tells the inputs' scale")
    if above is None or not isinstance(above.module, nn.ReLU):
        raise NoChain(f"no ReLU stands on layer {first.name}: no unit is off")
    return first


def count_at_first_layer(target: Target) -> int:
    """The rank of the first layer's gradient: the batch size, unless an example has no error there.

    Raises: NoChain, NotApart.
    """
    gradient, noise, _ = _gradient(target, first_layer(target))
    return count_inputs(gradient, noise)


def _gradient(target: Target, layer: Link) -> tuple[Tensor, Tensor, Tensor]:
    """[db, dW], the standard deviation of its elements, and [b, W]; each of shape (outputs, 1 + inputs)."""
    module = layer.module
    assert isinstance(module, nn.Linear)
    parameters = list(target.model.parameters())
    weight, bias = (
        next(place for place, parameter in enumerate(parameters) if parameter is wanted)
        for wanted in (module.weight, module.bias)
    )
    gradient, noise, public = (
        torch.cat([parts[bias][:, None], parts[weight]], 1)
        for parts in (target.tensors(target.gradient), target.tensors(target.noise), parameters)
    )
    return gradient, noise, public.detach()


def _again(moved: Target, layer: Link, inputs: Tensor) -> Tensor:
    try:
        apart = peel_near(*_gradient(moved, layer), inputs.flatten(1))
    except NotApart as error:
        raise NoChain(str(error)) from error
    return apart.inputs.view_as(inputs)


def _labels(target: Target, layer: Link, inputs: Tensor, error: Tensor) -> Tensor:
    """For each example the label whose error at the layer's outputs is nearest to the one found, int64."""
    taken: list[Tensor] = []
    hook = layer.module.register_forward_hook(lambda _module, _inputs, output: taken.append(output))
    try:
        logits = target.model(inputs)
    finally:
        hook.remove()
    distances = []
    for label in range(target.classes):
        loss = target.loss(logits, torch.full((len(inputs),), label, device=inputs.device))
        (would_be,) = torch.autograd.grad(loss, taken[0], retain_graph=True)
        distances.append(torch.linalg.vector_norm(would_be - error, dim=1))
    return torch.stack(distances).argmin(0)


def _in_order(inputs: Tensor, labels: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and labels in the order of the labels that were told. Raises: NotApart: they are others."""
    if not labels.sort().values.equal(told.sort().values):
        raise NotApart(f"the examples' labels are {labels.tolist()}, others were told")
    places = labels.argsort(stable=True)[told.argsort(stable=True).argsort()]
    return inputs[places], labels[places]
