"""Everything that decides a training run, as one frozen value that is written beside its results."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

EXCHANGE_NAMES = ("zeromq", "allreduce", "ddp")
"""The exchanges between processes; `local` is the oracle of their tests and trains nothing on its own."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Synchronous data-parallel training: every rank takes a batch, all average their gradients, all take one step."""

    model: str = "lenet"
    """Model: a built-in name with options (lenet, mlp, convnet, resnet; for text bert, gpt2; e.g.
    resnet:depth=18,norm=frozen or bert:init=minilm), package.module:factory, path/file.py:factory, or hf:PATH for a
    folder of Hugging Face's transformers. Built-in models take their input shape, tokens and classes from the data."""
    weights: str = ""
    """Checkpoint file of another run whose weights to begin with; empty: fresh ones."""
    data: str = "cifar100"
    """Data set: cifar100, cifar10 (sample pictures), mnist (5000 digits), faces, photos; your own copy with
    mnist:path=DIR, fashion-mnist:path=DIR, cifar10:path=DIR, cifar100:path=DIR, images:path=DIR,size=32x32. Text: prose
    (sentences of Python's reference), or your own with text:path=FILE,length=32,tokenizer=minilm. Any
    set: part=train for all but every fifth example, part=test for those."""
    normalize: str = ""
    """Mean and deviation by which pictures are normalized before the model, by channel or one for all, e.g.
    mean=0.485/0.456/0.406,std=0.229/0.224/0.225; empty: they are from 0 to 1."""
    batch_size: int = 1
    """Examples per rank and step."""
    steps: int = 3
    """Steps to train."""
    optimizer: str = "sgd:lr=0.1"
    """Update rule: an optimizer with torch's options, with clipping before and schedules behind it where there are any,
    e.g. sgd:lr=0.1,momentum=0.9 or clip:norm=1+adamw:lr=0.001+cosine:T_max=100."""
    loss: str = "cross_entropy"
    """Loss: cross_entropy (one class an example), masked_lm or causal_lm (tokens); the mean over the batch's labels."""
    defense: str = ""
    """What each rank does to its gradient before it leaves: links with + between them, from left to right, e.g.
    clip:1.0+noise-gaussian:1e-3, prune:0.9, topk-dgc:0.99, int8, int8:rounding=stochastic, sign (docs/defenses.md)."""
    exchange: str = "zeromq"
    """How the ranks average: zeromq (parameter server), allreduce (torch.distributed), ddp (stock
    DistributedDataParallel)."""
    seed: int = 0
    """Fixes weights, order of examples and every other draw."""
    device: str = "cpu"
    """cpu, cuda, or auto: a GPU where there is one."""
    threads: int = 1
    """Torch threads of a rank. More can change the last bits of a result from machine to machine."""
    deadline_s: float = 60.0
    """Longest wait for a peer, in seconds."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 for none."""
    truth: bool = True
    """Keep each rank's batch, gradient and weights under RUN/truth, for `gradtap evaluate` alone."""
    tensorboard: bool = True
    """Write TensorBoard curves under RUN/tensorboard."""

    def __post_init__(self) -> None:
        """Raises: ConfigError, naming the option, what was wanted and what was got."""
        for name, low in (("batch_size", 1), ("steps", 1), ("threads", 1), ("checkpoint_every", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}: wanted {low} or more, got {getattr(self, name)}")
        if not self.deadline_s > 0:
            raise ConfigError(f"deadline_s: wanted more than 0 seconds, got {self.deadline_s}")
        if self.exchange not in EXCHANGE_NAMES:
            raise ConfigError(f"exchange {self.exchange!r} is not known; there are: {', '.join(EXCHANGE_NAMES)}")


def write_config(run: Path, config: TrainConfig, **more: Any) -> None:
    """Writes `RUN/config.json`: the options, and the versions and the command that they ran with."""
    record = {
        "train": dataclasses.asdict(config),
        "versions": versions(),
        "command": sys.argv,
        **more,
    }
    run.mkdir(parents=True, exist_ok=True)
    fresh = run / "config.json.partial"  # other ranks may be reading the present one
    fresh.write_text(json.dumps(record, indent=2) + "\n")
    fresh.replace(run / "config.json")


def read_config(run: Path) -> TrainConfig:
    """The options of the run in this folder. Raises: ConfigError, naming the file and what is wrong with it."""
    file = run / "config.json"
    try:
        return TrainConfig(**json.loads(file.read_text())["train"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not the configuration of a run: {error}") from error


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    return {"python": sys.version.split()[0]} | {
        name: metadata.version(name) for name in ("gradtap", "torch", "numpy", "pyzmq", "msgpack")
    }
