"""The eavesdropper's own copy of the weights: the initial state, stepped with the averages that were seen.

In go what was broadcast, the declared optimizer and each step's averaged gradient; out come the weights that each
step's gradients were taken at, equal to the bit to the workers'. It never guesses: from the first step on whose average
is not wholly known, it has no weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attack.errors import AttackError
from attack.observation import Shapes
from harness.models import UpdateRule, load_optimizer


class Shadow:
    """Does to its parameters what every rank does to its own.

    The number of threads (a worker of torchrun has one, this process may have more), and whether the parameters are
    one flat tensor or of the model's shapes, changed no bit of SGD, Adam or AdamW when it was tried (torch 2.13 on CPU,
    one million elements): these rules work element by element, and the process-wide number of threads is left alone.
    Clipping by norm sums over whole tensors, in an order that depends on the number of threads: there it takes one, as
    torchrun gives a worker.
    """

    def __init__(self, *, weights: Tensor, step: int, shapes: Shapes, optimizer: str | None) -> None:
        """
        Args:
            weights: float32, shape (parameters,): the state that `step` begins with. It is copied.
            shapes: of each parameter, in order.
            optimizer: as `harness.models.load_optimizer` reads it; None where nobody declared one: then only the
                weights of the first step are known.

        Raises: AttackError, if the specification is wrong.
        """
        self._step = step
        sizes = [math.prod(shape) for shape in shapes]
        parts = weights.split(sizes)
        self._parameters = [nn.Parameter(part.clone().view(shape)) for part, shape in zip(parts, shapes, strict=True)]
        self._rule = None if optimizer is None else build_rule(optimizer, self._parameters)
        self._known = True

    def weights(self, step: int) -> Tensor | None:
        """float32, shape (parameters,), a copy: what the gradients of `step` were taken at; None where not known."""
        if not self._known or step != self._step:
            return None
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters])

    def advance(self, step: int, average: Tensor | None) -> None:
        """Takes the step that every rank takes with this average: float32, shape (parameters,), None if not known."""
        if step < self._step:
            return
        self._known = self._known and step == self._step and average is not None and self._rule is not None
        self._step = step + 1
        if not self._known or average is None or self._rule is None:
            return
        average, at = average.clone() if self._rule.clips else average, 0
        for parameter in self._parameters:
            parameter.grad = average[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()
        threads = torch.get_num_threads()
        if self._rule.clips:
            torch.set_num_threads(1)
        try:
            self._rule.step()
        finally:
            torch.set_num_threads(threads)


def build_rule(spec: str, parameters: list[nn.Parameter]) -> UpdateRule:
    """`load_optimizer`, in this side's error class. Raises: AttackError."""
    try:
        return load_optimizer(spec, parameters)
    except ValueError as error:
        raise AttackError(str(error)) from error
