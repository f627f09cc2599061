"""Public update rules: `sgd:lr=0.1,momentum=0.9`, `adam:lr=0.001`, `adamw:lr=0.001,weight_decay=0.01`.

The ranks and the eavesdropper's shadow build theirs here, from torch's own single-tensor code paths: the fused and
multi-tensor ones may round differently, and the shadow must stay equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from harness.models.spec import choose

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def load_optimizer(spec: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `spec` names; options are torch's keyword arguments, and `lr` must be given.

    Raises: ValueError, naming the specification and what was wrong with it.
    """
    build, options = choose("optimizer", spec, OPTIMIZERS)
    if "lr" not in options:
        raise ValueError(f"optimizer {spec!r}: the learning rate is missing; e.g. {spec.partition(':')[0]}:lr=0.1")
    try:
        return build(parameters, foreach=False, fused=False, **options)
    except TypeError as error:
        raise ValueError(f"optimizer {spec!r}: {error}") from error
