"""What pictures are like, as penalties: for where the equations leave many inputs open.

Takes inputs, gives a number for each search. Knows no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def total_variation(inputs: Tensor) -> Tensor:
    """Mean absolute difference of neighboring elements, along height plus along width; 0 for inputs that are no
    pictures.

    Args:
        inputs: shape (searches, batch, channels, height, width), or of fewer axes and then no pictures.

    Returns: shape (searches,).

    Reference: Rudin, Osher, Fatemi 1992; in this form in Geiping et al., arXiv 2003.14053, section 4.
    """
    if inputs.ndim != 5:
        return inputs.new_zeros(len(inputs))
    across = (inputs[..., 1:] - inputs[..., :-1]).abs().flatten(1).mean(1)
    down = (inputs[..., 1:, :] - inputs[..., :-1, :]).abs().flatten(1).mean(1)
    return across + down


class Variation:
    """Total variation of a picture as weighted squares of its differences, which touch it at one picture.

    Args:
        x: that picture, shape (channels, height, width).
        weight: of a difference's size.
        smooth: below this size, differences are taken as Gaussian.
    """

    def __init__(self, x: Tensor, weight: float, smooth: float) -> None:
        self._weights = [
            weight / (x.diff(dim=axis).square().sum(0, keepdim=True) + smooth**2).sqrt() for axis in (1, 2)
        ]

    def normal(self, p: Tensor) -> Tensor:
        """The second derivative times p."""
        out = torch.zeros_like(p)
        for axis, weights in zip((1, 2), self._weights, strict=True):
            flow = weights * p.diff(dim=axis)
            size = p.shape[axis]
            out.narrow(axis, 1, size - 1).add_(flow)
            out.narrow(axis, 0, size - 1).sub_(flow)
        return out

    @property
    def diagonal(self) -> float:
        """About that of the second derivative: its mean."""
        return 2 * float(sum(weights.mean() for weights in self._weights))


class BatchStatistics:
    """How far inputs are from giving a model's batch norms their running statistics.

    Reference: Yin et al., DeepInversion, CVPR 2020, arXiv 1912.08795, equation 4.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._norms = [
            module
            for module in model.modules()
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
        ]

    def distance(self, inputs: Tensor) -> Tensor:
        """Mean over the batch norms of ||mean - running|| + ||variance - running||, each relative to the running ones.

        Args:
            inputs: shape (searches, batch, channels, height, width).

        Returns: shape (searches,); zeros for a model without batch norms.
        """
        if not self._norms:
            return inputs.new_zeros(len(inputs))
        return torch.stack([self._one(each) for each in inputs])

    def _one(self, inputs: Tensor) -> Tensor:
        distances: list[Tensor] = []

        def watch(norm: nn.Module, taken: tuple[Tensor, ...]) -> None:
            assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
            variance, mean = torch.var_mean(taken[0], dim=(0, 2, 3), correction=0)
            size = norm.running_var.sum()
            distances.append((mean - norm.running_mean).square().sum().add(1e-12).sqrt() / size.sqrt())
            distances.append((variance - norm.running_var).square().sum().add(1e-12).sqrt() / size)

        hooks = [norm.register_forward_pre_hook(watch) for norm in self._norms]
        try:
            self._model(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(distances).sum() / len(self._norms)
