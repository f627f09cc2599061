"""Batches to attack, drawn at random from one seed: pictures, a net, its training so far, and how well it was observed.

A case is a rank's honest gradient as a tap would have it, beside the batch behind it. Attacks get the first; scores
are taken with the second.
"""

from __future__ import annotations

import dataclasses
import functools
import random

import numpy as np
import torch
from torch import Tensor, nn

from attack.observation import Knowledge, Known, Observation
from harness.data import PictureSet, load_pictures
from harness.errors import ConfigError
from harness.gradients import mean_gradient
from harness.models import LOSSES, load_model
from harness.seeding import derive, generator
from harness.types import Batch

SETS = ("cifar10", "cifar100", "mnist", "fashion-mnist", "faces", "photos")
OBSERVED = ("raw", "differenced", "holes", "float16")
"""As it was sent; from float32 sums with another rank's; with unknown elements before the last layer; rounded."""
HOLES = 0.3
MIRRORED = "mirrored"
"""After a data set's name and a plus: twice the pictures, each label at least twice."""
TRAINING_BATCH = 16
TRAINING_RATE = {"lenet": 0.3, "mlp": 0.1, "convnet": 0.1, "resnet": 0.05}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What to attack."""

    model: str
    """Specification, without the input's shape and the classes, which are the data set's."""
    data: str
    batch_size: int
    trained: int
    """Steps of SGD that came before."""
    observed: str
    """One of `OBSERVED`."""
    seed: int
    """Of the weights, the training and the pictures."""

    @property
    def specification(self) -> str:
        """The model, as `load_model` reads it."""
        data = dataset(self.data)
        shape = "x".join(map(str, data.input_shape))
        return f"{self.model}{',' if ':' in self.model else ':'}input={shape},classes={data.classes}"


@functools.cache
def dataset(spec: str) -> PictureSet:
    """`load_pictures`, once; of several sets joined by a plus, with the mirror image of every picture after `MIRRORED`.

    Raises: ConfigError where they do not fit together.
    """
    *names, last = spec.split("+")
    sets = [load_pictures(name) for name in (*names, last) if name != MIRRORED]
    if len({(each.input_shape, each.classes) for each in sets}) != 1:
        raise ConfigError(f"data {spec!r}: wanted sets of one input shape and number of classes, joined by a plus")
    pictures = np.concatenate([each.pictures for each in sets])
    labels = np.concatenate([each.labels for each in sets])
    if last == MIRRORED:
        pictures, labels = np.concatenate([pictures, pictures[..., ::-1]]), np.concatenate([labels, labels])
    return dataclasses.replace(sets[0], pictures=pictures, labels=labels)


def draw(
    seed: int, *, models: dict[str, tuple[int, ...]], trained: tuple[int, ...], observed: tuple[str, ...]
) -> Subject:
    """One subject: every choice is uniform.

    Args:
        models: batch sizes to draw from, for each model.
        trained: steps of training to draw from.
        observed: of `OBSERVED`.
    """
    dice = random.Random(seed)
    model = dice.choice(sorted(models))
    return Subject(
        model=model,
        data=dice.choice(SETS),
        batch_size=dice.choice(models[model]),
        trained=dice.choice(trained),
        observed=dice.choice(observed),
        seed=seed,
    )


def stage(subject: Subject, *, steps: int = 1, rate: float = 0.1) -> tuple[Observation, Knowledge, Batch]:
    """What a tap would have of the subject, what it is told (neither batch size nor labels), and the truth.

    Args:
        steps: of SGD at this rate in which both ranks take the same batches again; the first has the others beside it.
    """
    data = dataset(subject.data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(subject.seed, "weights"))
        model = load_model(subject.specification)
    _train(model, data, subject)
    batch = _batch(data, subject.batch_size, generator(subject.seed, "batch"))
    other = _batch(data, subject.batch_size, generator(subject.seed, "other rank"))
    first, *again = [_observe(subject, model, batch, other, step=step, rate=rate) for step in range(steps)]
    observation = dataclasses.replace(first, again=tuple(again))
    return observation, Knowledge(model=subject.specification, input_shape=data.input_shape), batch


def _observe(subject: Subject, model: nn.Module, batch: Batch, other: Batch, *, step: int, rate: float) -> Observation:
    """What is seen of one step, which the model then takes."""
    before, own = _buffers(model), _gradient(model, batch)
    after, others = _buffers(model), _gradient(model, other)
    gradient, known, bound = _see(subject, model, own, others)
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    observation = Observation(
        rank=0,
        step=step,
        world_size=2,
        exchange="gloo",
        gradient=gradient,
        known=known,
        bound=bound,
        weights=weights,
        buffers=before,
        buffers_after=after,
        shapes=tuple(tuple(parameter.shape) for parameter in model.parameters()),
    )
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(weights - rate * (own + others) / 2, model.parameters())
    return observation


def _train(model: nn.Module, data: PictureSet, subject: Subject) -> None:
    rate = TRAINING_RATE[subject.model.partition(":")[0]]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    draws = generator(subject.seed, "training")
    for _ in range(subject.trained):
        batch = _batch(data, TRAINING_BATCH, draws)
        optimizer.zero_grad()
        LOSSES["cross_entropy"](model(batch.inputs), batch.labels).backward()
        optimizer.step()


def _batch(data: PictureSet, size: int, draws: torch.Generator) -> Batch:
    chosen = torch.randperm(len(data.labels), generator=draws)[:size].numpy()
    return Batch(
        inputs=torch.from_numpy(data.pictures[chosen]).float() / 255, labels=torch.from_numpy(data.labels[chosen])
    )


def _buffers(model: nn.Module) -> Tensor | None:
    """As DDP broadcasts them; None where there are none."""
    floating = [buffer.flatten().clone() for buffer in model.buffers() if buffer.is_floating_point()]
    return torch.cat(floating) if floating else None


def _gradient(model: nn.Module, batch: Batch) -> Tensor:
    return mean_gradient(model, LOSSES["cross_entropy"], batch).flat


def _see(subject: Subject, model: nn.Module, sent: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is seen of a gradient: values, `Known` of each, and bounds of their errors."""
    known = torch.full(sent.shape, Known.RAW, dtype=torch.uint8)
    if subject.observed == "raw":
        return sent, known, None
    if subject.observed == "holes":
        last_layer = sum(parameter.numel() for parameter in list(model.parameters())[-2:])
        missing = torch.rand(sent.shape, generator=generator(subject.seed, "holes")) < HOLES
        missing[-last_layer:] = False
        known[missing] = Known.UNKNOWN
        return torch.where(missing, 0.0, sent), known, None
    if subject.observed == "float16":
        seen, bound = sent.half().float(), _half_ulp(sent, torch.float16)
    else:
        after = other + sent
        seen = after - other
        bound = _half_ulp(after, torch.float32) + _half_ulp(seen, torch.float32)
    return seen, known.fill_(Known.DIFFERENCED), bound


def _half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place."""
    numbers = torch.finfo(dtype)
    return (
        torch.frexp(values.abs().clamp(min=numbers.tiny).double())
        .exponent.sub(1)
        .double()
        .exp2()
        .mul(numbers.eps / 2)
        .float()
    )
