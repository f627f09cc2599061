"""Soteria: of a linear layer's input, the elements that tell most of the batch for their size are pruned, in that
layer's gradient alone.

    score of an element r_i of the layer's input   sum over the batch of |r_i| / ||d r_i / d x||
    sent                                           the gradient with 0 for the layer's weights of the highest scores

    soteria:0.4            a share of 0.4 of the elements; the last linear layer
    layer=NAME             another, as `model.named_modules()` calls it

Public side: which elements were pruned, as all of their weights' gradients are zero. The rest of the gradient is as it
was, of the convolutions, too, so whoever matches only that is not hindered (Balunović et al. 2022, arXiv 2111.04706).

Reference: Sun et al. 2021, Provable Defense against Privacy Leakage in Federated Learning from Representation
Perspective, arXiv 2012.06043, section 4.2, for l2 of the input and l0 of the representation. The paper has one example;
for several, one mask for all, as in its authors' code, which sums quotients the other way round, with their signs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from harness.defenses.base import BatchStep
from harness.defenses.prune import check_share
from harness.errors import ConfigError
from harness.types import Batch

_TOGETHER = 64
"""Elements of the representation that are differentiated at once: as many copies of the batch are in memory."""


@dataclasses.dataclass(frozen=True, slots=True)
class Soteria(BatchStep):
    """Pruning of a representation."""

    share: float
    layer: str = ""
    """Empty: the last linear one."""
    _weight: slice | None = None
    """Where the layer's weights lie in the flat gradient of the model that this was fitted to."""

    def __post_init__(self) -> None:
        check_share(self.share)

    def fit(self, model: nn.Module) -> Self:
        """Raises: ConfigError, where there is no such layer."""
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        wanted, at = str(self.layer), 0  # a number on the command line is the name of one in a Sequential
        if not linear or wanted not in ("", *linear):
            there = ", ".join(linear) or "none"
            raise ConfigError(f"soteria: wanted a linear layer {wanted or 'to defend'}; the model has: {there}")
        name = wanted or linear[-1]
        for parameter in model.parameters():
            if parameter is model.get_submodule(name).weight:
                break
            at += parameter.numel()
        return dataclasses.replace(self, layer=name, _weight=slice(at, at + parameter.numel()))

    def __call__(self, gradient: Tensor, model: nn.Module, batch: Batch) -> Tensor:
        assert self._weight is not None, "fit comes first"
        scores = self._scores(model, batch)
        pruned = scores.argsort(descending=True, stable=True)[: round(self.share * len(scores))]
        sent = gradient.clone()
        sent[self._weight].view(-1, len(scores))[:, pruned] = 0
        return sent

    def _scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """float32, shape (elements of the layer's input,). Raises: ConfigError."""
        if not batch.inputs.is_floating_point():
            raise ConfigError("soteria: wanted inputs of real numbers, e.g. pictures, got tokens")
        inputs = batch.inputs.detach().requires_grad_()
        # Batch norm takes note of what it sees, and has seen this batch already.
        state = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with _inputs_of(model.get_submodule(self.layer)) as seen:
            functional_call(model, state, (inputs,))
        (features,) = seen
        if features.ndim != 2:
            shape = "x".join(map(str, features.shape))
            raise ConfigError(f"soteria: layer {self.layer}: wanted an input of batch x features, got {shape}")
        norms = []
        for some in torch.eye(features.shape[1], device=features.device).split(_TOGETHER):
            directions = some[:, None].expand(-1, *features.shape)
            (slopes,) = torch.autograd.grad(features, inputs, directions, retain_graph=True, is_grads_batched=True)
            norms.append(torch.linalg.vector_norm(slopes.flatten(2), dim=2))
        sizes = features.detach().abs()
        # What is 0 has nothing to prune, whatever its slope.
        return torch.where(sizes > 0, sizes / torch.cat(norms).T, 0.0).sum(0)


@contextmanager
def _inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What the layer is given while the block runs."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()
