"""Everything that a run needs to go on to the same bits: weights, buffers and the optimizer's state.

    RUN/checkpoints/step{S}.safetensors
        model.{name}                   parameters and buffers
        optimizer.{parameter}.{name}   tensors of the optimizer's state, by index of the parameter
        metadata["gradtap"]            JSON: step, and the options that must be the same to go on
    RUN/checkpoints/step{S}.rank{R}.safetensors
        {name}                         what the defense of each rank remembers, where it remembers anything

Random draws need no state: each is derived from (seed, purpose, step); nor do schedules, which the step fixes. Written
by rank 0, but for what each rank's defense remembers; whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from harness.config import TrainConfig
from harness.defenses import State
from harness.errors import CheckpointError
from harness.models import UpdateRule
from harness.tensors import save_tensors

FREE = {"steps", "deadline_s", "checkpoint_every", "truth", "tensorboard", "device", "weights"}
"""Options that may change when a run goes on; all others decide its bits."""


def save_checkpoint(
    run: Path, *, step: int, model: nn.Module, rule: UpdateRule, config: TrainConfig, world_size: int
) -> Path:
    """Writes the state after `step` steps, and returns the file."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in rule.state_tensors().items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    file = run / "checkpoints" / f"step{step}.safetensors"
    identity = json.dumps({"step": step, "options": _identity(config, world_size)})
    save_tensors(tensors, file, metadata={"gradtap": identity})
    return file


def save_remembered(run: Path, *, step: int, rank: int, remembered: State) -> None:
    """Writes what a rank's defense remembers after `step` steps."""
    save_tensors(remembered, _beside(run / "checkpoints" / f"step{step}.safetensors", rank))


def load_remembered(file: Path, *, rank: int, like: State) -> State:
    """What a rank's defense remembered when the checkpoint `file` was written.

    Args:
        like: tensors of the same names and shapes.

    Raises: CheckpointError, naming the file.
    """
    own = _beside(file, rank)
    try:
        found = load_file(own)
    except Exception as error:  # as below
        raise CheckpointError(f"{own}: cannot be read: {error}") from error
    shapes = {name: tensor.shape for name, tensor in like.items()}
    if {name: tensor.shape for name, tensor in found.items()} != shapes:
        raise CheckpointError(f"{own}: wanted {', '.join(shapes)} as the defense has them, got {', '.join(found)}")
    return found


def last_checkpoint(run: Path, *, ranks: int = 0) -> Path:
    """The file of the latest step that is whole. Raises: CheckpointError, where there is none.

    Args:
        ranks: how many have a file of their own beside it.
    """
    found = {
        int(match[1]): file
        for file in (run / "checkpoints").glob("step*.safetensors")
        if (match := re.fullmatch(r"step(\d+)\.safetensors", file.name))
        and all(_beside(file, rank).exists() for rank in range(ranks))
    }
    if not found:
        raise CheckpointError(f"{run}: no checkpoint to go on from; train with --checkpoint-every N first")
    return found[max(found)]


def load_checkpoint(file: Path, *, model: nn.Module, rule: UpdateRule, config: TrainConfig, world_size: int) -> int:
    """Puts a saved state into `model` and `rule`, and returns the number of steps that it has behind it.

    Raises: CheckpointError, naming the file, and the option that is not the same or what is damaged.
    """
    identity, tensors = _read(file)
    for name, value in _identity(config, world_size).items():
        if identity["options"].get(name) != value:
            raise CheckpointError(
                f"{file}: was written with {name} = {identity['options'].get(name)!r}, and this run has {value!r}"
            )
    state: dict[int, dict[str, torch.Tensor]] = {}
    weights: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "model":
            weights[name] = tensor
        else:
            index, _, name = name.partition(".")
            state.setdefault(int(index), {})[name] = tensor
    _fill(model, weights, file)
    rule.resume(state, steps_done=int(identity["step"]))
    return int(identity["step"])


def load_weights(file: Path, model: nn.Module) -> None:
    """Puts the weights and buffers of a checkpoint into `model`, and nothing else of it.

    Raises: CheckpointError, naming the file.
    """
    _, tensors = _read(file)
    _fill(model, {key[6:]: tensor for key, tensor in tensors.items() if key.startswith("model.")}, file)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            identity = json.loads(opened.metadata()["gradtap"])
            return identity, {name: opened.get_tensor(name) for name in opened.keys()}
    except Exception as error:  # safetensors' own error class is not public in every version that is allowed
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


def _fill(model: nn.Module, weights: dict[str, torch.Tensor], file: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{file}: does not fit the model: {error}") from error


def _beside(file: Path, rank: int) -> Path:
    return file.with_name(f"{file.stem}.rank{rank}.safetensors")


def _identity(config: TrainConfig, world_size: int) -> dict[str, object]:
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    return options | {"world_size": world_size}
