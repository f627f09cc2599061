"""Public update rules: what every rank does with the averaged gradient, and the eavesdropper's shadow after them.

    sgd:lr=0.1,momentum=0.9                                       an optimizer of torch, with its keyword arguments
    clip:norm=1+adamw:lr=0.001,betas=0.9/0.95+cosine:T_max=100    clipped before, scheduled behind

Optimizers are torch's own single-tensor code paths, which a stock script runs on a CPU too: the fused and multi-tensor
ones may round differently, and the shadow must stay equal to the bit. `foreach=true` or `fused=true` asks for those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from harness.models.schedules import SCHEDULES, Clock, load_clocks
from harness.models.spec import choose, parse_spec

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
}
CLIP = "clip"
_WITH_FUSED = {"sgd", "adam", "adamw", "adagrad"}


class UpdateRule:
    """Clipping, an optimizer and its schedules: `step` does what a script's last lines of a step do."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None = None,
        max_value: float | None = None,
        clocks: tuple[Clock, ...] = (),
    ) -> None:
        self._optimizer = optimizer
        self._max_norm, self._max_value = max_norm, max_value
        self._clocks = clocks
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(self) -> None:
        """Clips the gradients in place, takes a step, and lets the schedules set the next step's learning rate."""
        if self._max_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        if self._max_value is not None:
            nn.utils.clip_grad_value_(self._parameters, self._max_value)
        self._optimizer.step()
        for clock in self._clocks:
            clock.tick()

    @property
    def clips(self) -> bool:
        """Whether it changes the gradients, before it takes a step."""
        return self._max_norm is not None or self._max_value is not None

    @property
    def momentum(self) -> bool:
        """Whether it is SGD with momentum."""
        return any(group.get("momentum", 0) for group in self._optimizer.param_groups)

    def zero_grad(self) -> None:
        """Lets go of the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[int, dict[str, torch.Tensor]]:
        """The optimizer's state, by index of the parameter and name."""
        state = self._optimizer.state_dict()["state"]
        return {
            index: {name: value for name, value in entry.items() if isinstance(value, torch.Tensor)}
            for index, entry in state.items()
        }

    def resume(self, state: dict[int, dict[str, torch.Tensor]], *, steps_done: int) -> None:
        """Goes on from a state behind so many steps; the schedules are fixed by their number."""
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        for clock in self._clocks:
            clock.wind(steps_done)


def load_optimizer(spec: str, parameters: Iterable[nn.Parameter]) -> UpdateRule:
    """The update rule that `spec` names; options are torch's keyword arguments, and `lr` must be given.

    Several numbers are written 0.9/0.999. `decay=matrices` is ours: weight decay for tensors of two or more dimensions
    alone.

    Raises: ValueError, naming the specification and what was wrong with it.
    """
    parts = re.split(r"\+(?=[A-Za-z])", spec)  # 1e+3 is a number
    names = [part.partition(":")[0] for part in parts]
    chosen = [part for part, name in zip(parts, names, strict=True) if name not in SCHEDULES and name != CLIP]
    if len(chosen) != 1:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"optimizer {spec!r}: wanted one optimizer ({known}), got {', '.join(chosen) or 'none'}")
    optimizer = _optimizer(chosen[0], list(parameters))
    clips: dict[str, Any] = {}
    for part in (part for part, name in zip(parts, names, strict=True) if name == CLIP):
        clips |= parse_spec(part)[1]
    if CLIP in names and (not clips or not clips.keys() <= {"norm", "value"}):
        raise ValueError(f"optimizer {spec!r}: wanted clip:norm=1 or clip:value=0.5, got {parts[names.index(CLIP)]}")
    clocks = load_clocks([part for part, name in zip(parts, names, strict=True) if name in SCHEDULES], optimizer)
    return UpdateRule(optimizer, max_norm=clips.get("norm"), max_value=clips.get("value"), clocks=clocks)


def _optimizer(spec: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    build, options = choose("optimizer", spec, OPTIMIZERS)
    name = spec.partition(":")[0]
    if "lr" not in options:
        raise ValueError(f"optimizer {spec!r}: the learning rate is missing; e.g. {name}:lr=0.1")
    decay = options.pop("decay", "all")
    if decay not in ("all", "matrices"):
        raise ValueError(f"optimizer {spec!r}: decay: wanted all or matrices, got {decay}")
    plain: dict[str, Any] = {"foreach": False} | ({"fused": False} if name in _WITH_FUSED else {})
    # torch refuses the two together, and means the single-tensor path where neither is asked for.
    plain = {key: value for key, value in plain.items() if not {"foreach", "fused"} & options.keys()}
    groups: list[Any] = list(parameters)
    if decay == "matrices":
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
        others = [parameter for parameter in parameters if parameter.ndim < 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    try:
        return build(groups, **plain, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"optimizer {spec!r}: {error}") from error
