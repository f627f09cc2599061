"""What every attack matches: one observed gradient, the public model at the observed weights, and how exact both are.

In: an `Observation` and the declared `Knowledge`. Out: a `Target` in float64, or `Refused`. It knows no truth, and
decides nothing about how to search.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attack.averaged import average
from attack.defense import PublicDefense
from attack.engine.clipping import clipping_factor
from attack.engine.normalization import floating_buffers, seen_statistics, set_modes
from attack.engine.rank import highest_ranks
from attack.errors import AttackError
from attack.feedback import settle
from attack.left_out import disbelieve
from attack.observation import BATCH_NORM_MODES, Basis, Knowledge, Observation
from harness.models import LOSSES, Tokens, load_model

FLOAT32_ERROR = 2.5e-7
"""Error of a gradient element computed in float32, in units of its tensor's root mean square: four times the unit
roundoff. Measured on LeNet, float32 against float64: 2e-7 to 1e-6 over the whole gradient."""


class Refused(Exception):
    """An observation that no attack can start on, with the reason in one line."""

    def __init__(self, reason: str, *, observed: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.observed = observed
        """False where the wire did not show enough; True where what it showed cannot be inverted."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One gradient to be explained by a batch."""

    model: nn.Module
    """At the observed weights, float64. Evaluation mode, so that dropout is off; but each batch norm in the mode in
    which the job has it, and it leaves its running statistics alone."""
    loss: Callable[[Tensor, Tensor], Tensor]
    gradient: Tensor
    """float64, shape (parameters,); 0 where unknown."""
    known: Tensor
    """float64, shape (parameters,): 1 where the gradient is known, else 0."""
    noise: Tensor
    """float64, shape (parameters,): standard deviation of each known element's error; infinite where unknown."""
    bound: Tensor
    """float64, shape (parameters,): largest error that observing added to each known element; 0 where unknown."""
    shapes: tuple[torch.Size, ...]
    input_shape: tuple[int, ...]
    input_range: tuple[float, float]
    classes: int
    batch_size: int
    batch_size_assumed: bool
    """Whether `batch_size` is a guess, because it was not told."""
    labels: Tensor | None
    """int64, shape (batch,), where told."""
    tokens: Tokens | None = None
    """Where inputs are tokens: int64, shape (batch, length), padded, with at most `input_shape` of them."""
    batch_norm: str | None = None
    """How its batch norms normalize, and how that is known; None where there are none."""
    step: int = 0
    again: tuple[Target, ...] = ()
    """The same batch's gradients at other steps, by other weights, where that was declared."""
    joined: tuple[int, ...] = ()
    """Steps beside its own that `gradient` is put together of."""
    bases: tuple[Basis, ...] = ()
    """In which some parameters' gradients are given: `gradient`, and what is said of its elements, is of these."""
    statistics: Mapping[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    """Mean and unbiased variance of what this very batch gave each batch norm in training mode, float64, shape
    (channels,), by the module's name; empty where they were not seen."""
    _asked: list[tuple[Tensor, Tensor, float]] = dataclasses.field(default_factory=list, init=False, repr=False)
    """The last batch whose residual was asked for, and that: a method, the judge and the certificate ask for the
    same."""

    @property
    def device(self) -> torch.device:
        """Where the arithmetic runs."""
        return self.gradient.device

    @property
    def norm(self) -> float:
        """Euclidean norm of the known gradient."""
        return float(torch.linalg.vector_norm(self.gradient))

    @property
    def expected_residual(self) -> float:
        """The relative residual that the truth itself would leave, from the observation's own error."""
        return float(torch.linalg.vector_norm(torch.where(self.known > 0, self.noise, 0.0))) / self.norm

    @property
    def tolerance(self) -> float:
        """Largest relative residual of an answer that may be called converged.

        On the paper's LeNet a search has a mean squared error of 1e-4 at residuals of 6e-5 to 2e-4 (eight pictures)
        and of 1e-6 at 1e-5. A wrong model or a wrong picture leaves more than 1e-2; a batch norm that hides the
        scale, 5e-5. Errors of rounding on the way are thousands and independent: their norm is known to a few percent,
        and two examples taken for one were seen to leave 1.6 times as much.
        """
        return self._exact_tolerance + 1.3 * float(torch.linalg.vector_norm(self.bound)) / math.sqrt(3) / self.norm

    @property
    def _exact_tolerance(self) -> float:
        """What of `tolerance` is there without bounds."""
        noise = torch.where(self.known > 0, self.noise, 0.0)
        arithmetic = (noise.square().sum() - self.bound.square().sum() / 3).clamp(min=0).sqrt()
        return 3e-5 + 4 * float(arithmetic) / self.norm

    def misfit(self, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        """The residual of an answer, and the largest that would be a match there: `tolerance`, or, where that does not
        do, what leaves each element within its own bound but for arithmetic, or as much more as the sender's own
        arithmetic is off at this answer.

        Of a small tensor that was pruned, as the last layer's bias, errors are neither many nor independent: all may
        lie just below the threshold. And where softmax is almost sure of a label, 1 - p is left with few digits, and
        all of the gradient with it: on trained nets up to 1e-4 of it is rounding. What the answer's gradient is off in
        float32 says so.
        """
        residual = self.residual(inputs, labels)
        if residual <= self.tolerance:
            return residual, self.tolerance
        beyond = (self.mismatch(inputs, labels).detach().abs() - self.bound).clamp(min=0)
        if float(torch.linalg.vector_norm(beyond)) <= self._exact_tolerance * self.norm:
            return residual, residual
        error = torch.linalg.vector_norm(self.replay(inputs, labels).gradient - self.gradient_of(inputs, labels))
        return residual, self.tolerance + 4 * float(error) / self.norm

    def explained_by(self, inputs: Tensor, labels: Tensor) -> bool:
        """Whether this batch's gradient is a match."""
        residual, tolerance = self.misfit(inputs, labels)
        return residual <= tolerance

    def gradient_of(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """What `mismatch` compares with the observed gradient: of a batch, over the known elements, in float64."""
        return self.mismatch(inputs, labels) + self.gradient

    def replay(self, inputs: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> Target:
        """The target that this batch would have set: its gradient in float32 as a rank computes it, with the holes of
        the observed one.

        Args:
            inputs: rounded to float32.
            generator: draws what observing adds, uniform within the bound; without it nothing is added.
        """
        single = _single_precision(self.model)
        labels = labels if labels.dtype == torch.int64 else labels.float()
        inputs = inputs.detach() if self.tokens else inputs.detach().float()
        loss = self.loss(functional_call(self.model, single, (inputs,)), labels)
        parameters = [single[name] for name, _ in self.model.named_parameters()]
        parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        gradient = self.turned(torch.cat([part.flatten() for part in parts]).double())
        if generator is not None and self.bound.any():
            uniform = 2 * torch.rand(gradient.shape, generator=generator, dtype=gradient.dtype) - 1
            gradient = gradient + self.bound * uniform.to(self.device)
        return dataclasses.replace(self, gradient=gradient * self.known)

    @property
    def places(self) -> dict[int, int]:
        """By the identity of a parameter of the model: which it is, of those that `tensors` gives."""
        return {id(parameter): place for place, parameter in enumerate(self.model.parameters())}

    def tensors(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Splits a flat vector into views of the parameters' shapes."""
        parts = flat.split([math.prod(shape) for shape in self.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))

    def mismatch(self, inputs: Tensor, labels: Tensor, *, differentiable: bool = False) -> Tensor:
        """Gradient of a batch less the observed one, over the known elements; flat.

        Args:
            inputs: float64, shape (batch, *input_shape), or tokens.
            labels: int64, shape (batch,), for a loss of tokens (batch, length), or probabilities, (batch, classes).
            differentiable: whether a derivative of the result will be asked for.
        """
        loss = self.loss(self.model(inputs), labels)
        parameters = list(self.model.parameters())
        gradients = torch.autograd.grad(
            loss, parameters, create_graph=differentiable, allow_unused=True, materialize_grads=True
        )
        return (self.turned(torch.cat([gradient.flatten() for gradient in gradients])) - self.gradient) * self.known

    def turned(self, flat: Tensor, *, parameters: int | None = None) -> Tensor:
        """Gradients in the bases in which the observed one is given.

        Args:
            flat: shape (..., elements), of the parameters, or of so many of the first.
        """
        if not self.bases:
            return flat
        rows = {basis.parameter: basis.rows for basis in self.bases}
        shapes = self.shapes[:parameters]
        parts = list(flat.split([math.prod(shape) for shape in shapes], dim=-1))
        for place, shape in enumerate(shapes):
            if place in rows:
                matrix = parts[place].unflatten(-1, (shape[0], -1))
                parts[place] = (rows[place].to(matrix) @ matrix).flatten(-2)
        return torch.cat(parts, dim=-1)

    def residual(self, inputs: Tensor, labels: Tensor) -> float:
        """||gradient of the batch - observed|| / ||observed||, over the known elements."""
        for before, its_labels, residual in self._asked:
            if before.equal(inputs) and its_labels.equal(labels):
                return residual
        residual = float(torch.linalg.vector_norm(self.mismatch(inputs, labels))) / self.norm
        self._asked[:] = [(inputs.detach().clone(), labels.detach().clone(), residual)]
        return residual


@functools.lru_cache(maxsize=1)
def _single_precision(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers, in float32 where they are of floating point."""
    parameters = {name: parameter.detach().float().requires_grad_() for name, parameter in model.named_parameters()}
    buffers = {name: b.float() if b.is_floating_point() else b.clone() for name, b in model.named_buffers()}
    return {**parameters, **buffers}


def prepare(observation: Observation, knowledge: Knowledge, *, device: torch.device) -> Target:
    """The target that an observation sets.

    Raises:
        Refused: nothing can be matched: weights or gradient not seen, not finite, or zero.
        AttackError: the knowledge does not fit the observation.
    """
    if observation.weights is None:
        raise Refused("the weights at this step were not seen", observed=False)
    with torch.random.fork_rng(devices=[]):  # a fresh model draws weights; the caller's generator stays as it was
        model = load_model(knowledge.model)
    observation = _in_parts(observation, model, knowledge)
    defense = PublicDefense.read(observation.defense or "")
    told = _told(observation, knowledge)
    examples = told or 1  # over the fewest, noise on a sum is largest
    ranks = _ranks(model, knowledge, told) if defense.rank else {}
    observation = settle(disbelieve(observation), ranks=ranks, turn=knowledge.tokens is None)
    observation = average(observation, examples=examples)
    known = observation.limited
    if not known.any():
        raise Refused("no element of the gradient was seen", observed=False)
    assert observation.weights is not None
    seen = observation.gradient[known]
    if not (seen.isfinite().all() and observation.weights.isfinite().all()):
        raise Refused("the gradient or the weights hold NaN or infinite values", observed=True)
    if not seen.any():
        raise Refused("the gradient is zero: it says nothing of the batch", observed=True)
    if knowledge.loss not in LOSSES:
        raise AttackError(f"loss {knowledge.loss!r} is not known; there are: {', '.join(LOSSES)}")

    model, batch_norm, statistics = _model(model, observation, knowledge)
    if observation.ranks and knowledge.batch_size is not None:  # of several ranks the batches are one
        knowledge = dataclasses.replace(knowledge, batch_size=len(observation.ranks) * knowledge.batch_size)
    batch_size, classes = _fit(model, knowledge)
    if knowledge.labels is not None and not all(0 <= label < classes for label in knowledge.labels):
        raise AttackError(f"labels {list(knowledge.labels)}: model {knowledge.model!r} has {classes} classes")
    gradient = torch.where(known, observation.gradient, 0.0).double()
    bound = torch.zeros_like(gradient) if observation.bound is None else observation.bound.double()
    if observation.defense is not None:
        # Noise of a known law counts as an error that is uniform, with the same variance.
        bound = torch.hypot(
            bound, torch.tensor(math.sqrt(3) * PublicDefense.read(observation.defense).noise_of(examples))
        )
    bound = torch.where(known, bound, 0.0)
    noise = element_noise(observation, known, gradient, bound)
    if defense.norm is not None and batch_size == 1 and knowledge.tokens is None:
        label = None if knowledge.labels is None else knowledge.labels[0]
        factor = clipping_factor(model, gradient, noise, norm=defense.norm, label=label)
        gradient, noise, bound = gradient / factor, noise / factor, bound / factor
    return Target(
        model=model.to(device),
        loss=LOSSES[knowledge.loss],
        gradient=gradient.to(device),
        known=known.double().to(device),
        noise=noise.to(device),
        bound=bound.to(device),
        shapes=tuple(parameter.shape for parameter in model.parameters()),
        input_shape=knowledge.input_shape,
        input_range=knowledge.input_range,
        tokens=knowledge.tokens,
        classes=classes,
        batch_size=batch_size,
        batch_size_assumed=knowledge.batch_size is None and knowledge.labels is None,
        labels=None if knowledge.labels is None else torch.tensor(knowledge.labels, device=device),
        batch_norm=batch_norm,
        step=observation.step,
        again=_again(observation, knowledge, device),
        joined=observation.joined,
        bases=observation.bases,
        statistics={name: (mean.to(device), variance.to(device)) for name, (mean, variance) in statistics.items()},
    )


def _again(observation: Observation, knowledge: Knowledge, device: torch.device) -> tuple[Target, ...]:
    """The other steps' targets, but for those on which no attack could start."""
    targets = []
    for other in observation.again:
        with contextlib.suppress(Refused):
            targets.append(prepare(other, knowledge, device=device))
    return tuple(targets)


def _told(observation: Observation, knowledge: Knowledge) -> int | None:
    """Examples in a rank's batch, where they are told, or how many labels there are of them."""
    labels = len(knowledge.labels or ()) // max(1, len(observation.ranks))
    return knowledge.batch_size or labels or None


def _ranks(model: nn.Module, knowledge: Knowledge, examples: int | None) -> dict[int, int]:
    """The highest rank of each linear layer's gradient, by the parameter's place, where it can be told: of tokens it
    cannot, as nobody knows how many there were."""
    if examples is None or knowledge.tokens is not None:
        return {}
    try:
        return highest_ranks(model.double().eval(), _blank(knowledge, examples))
    except (RuntimeError, ValueError):
        return {}  # `_fit` says what is wrong


def _in_parts(observation: Observation, model: nn.Module, knowledge: Knowledge) -> Observation:
    """In the parameters' shapes. Raises: AttackError: they do not fit the traffic.

    A job that exchanges one flat vector shows none; then a vector as long as the model is taken for the model's.
    """
    shapes = tuple(tuple(parameter.shape) for parameter in model.parameters())
    seen = tuple(observation.shapes)
    if shapes != seen and not (len(seen) == 1 and sum(map(math.prod, shapes)) == math.prod(seen[0])):
        raise AttackError(
            f"model {knowledge.model!r} does not fit the traffic: it has {len(shapes)} parameter tensors of "
            f"{sum(map(math.prod, shapes))} elements, the wire shows {len(seen)} of {observation.gradient.numel()}; "
            "name the model that the job trains"
        )
    return dataclasses.replace(observation, shapes=shapes)


def _model(
    model: nn.Module, observation: Observation, knowledge: Knowledge
) -> tuple[nn.Module, str | None, dict[str, tuple[Tensor, Tensor]]]:
    """The model at the observed weights, what is to be said of its batch norms, and what this batch gave them.

    Raises: Refused, AttackError.
    """
    shapes = observation.shapes
    sizes = [math.prod(shape) for shape in shapes]
    if knowledge.batch_norm not in (None, *BATCH_NORM_MODES):
        raise AttackError(
            f"batch_norm: wanted {' or '.join(BATCH_NORM_MODES)}, got {knowledge.batch_norm!r}; leave it out where it "
            "is not known"
        )
    assert observation.weights is not None
    model = model.double().eval()
    buffers = floating_buffers(model)
    before, after = (_split(seen, buffers) for seen in (observation.buffers, observation.buffers_after))
    with torch.no_grad():
        _fill(list(model.parameters()), observation.weights)
        if before is not None:
            _fill(buffers, torch.cat(before) if before else torch.zeros(0))
    parts = zip(observation.gradient.double().split(sizes), observation.limited.split(sizes), shapes, strict=True)
    seen = [(gradient.view(shape), known.view(shape)) for gradient, known, shape in parts]
    described, frozen = set_modes(
        model,
        knowledge.input_shape,
        [gradient for gradient, _ in seen],
        [known for _, known in seen],
        told=knowledge.batch_norm,
        before=before or [],
        after=after if before is not None else None,
    )
    if frozen and before is None:
        raise Refused(f"{described}; the running statistics that this takes were not seen", observed=False)
    # Only rank 0's buffers are ever sent.
    seen_by = before is not None and after is not None and observation.rank == 0
    return model, described, seen_statistics(model, before or [], after or []) if seen_by else {}


def _split(flat: Tensor | None, like: list[Tensor]) -> list[Tensor] | None:
    """Parts of a flat vector, as large as those tensors, where their sizes add up to its own."""
    sizes = [tensor.numel() for tensor in like]
    return None if flat is None or flat.numel() != sum(sizes) else list(flat.split(sizes))


def _fill(tensors: list[Tensor] | list[nn.Parameter], flat: Tensor) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _fit(model: nn.Module, knowledge: Knowledge) -> tuple[int, int]:
    """Batch size and classes, told or, where the size is not told, the smallest that the model takes.

    Raises: AttackError: the model does not take such a batch.
    """
    size = _batch_size(knowledge)
    try:
        with torch.no_grad():
            try:
                logits = model(_blank(knowledge, size))
            except ValueError as error:
                if size > 1 or "more than 1 value per channel" not in str(error):
                    raise
                if knowledge.batch_size is not None or knowledge.labels is not None:
                    raise AttackError(
                        f"model {knowledge.model!r}: batch norm in training mode cannot normalize a channel of one "
                        f"value, as it has with inputs of shape {knowledge.input_shape} and one example (torch would "
                        "raise in the job): the batch is larger, or --batch-norm is eval"
                    ) from error
                size = 2
                logits = model(_blank(knowledge, size))
    except (RuntimeError, ValueError) as error:
        raise AttackError(
            f"model {knowledge.model!r} does not take inputs of shape {knowledge.input_shape}: {error}"
        ) from error
    if logits.ndim != 2 and not (knowledge.tokens and logits.ndim == 3):
        raise AttackError(f"model {knowledge.model!r}: wanted logits (batch, classes), got shape {tuple(logits.shape)}")
    return size, logits.shape[-1]


def _blank(knowledge: Knowledge, size: int) -> Tensor:
    """A batch that any model for such inputs takes."""
    if knowledge.tokens is None:
        return torch.zeros(size, *knowledge.input_shape, dtype=torch.float64)
    return torch.full((size, min(2, *knowledge.input_shape)), (knowledge.tokens.pad + 1) % knowledge.tokens.vocab)


def _batch_size(knowledge: Knowledge) -> int:
    told = len(knowledge.labels) if knowledge.labels is not None else 1
    size = told if knowledge.batch_size is None else knowledge.batch_size
    if size < 1 or (knowledge.labels is not None and size != told):
        raise AttackError(f"batch size {size} and {told} labels do not fit together")
    return size


def element_noise(observation: Observation, known: Tensor, gradient: Tensor, bound: Tensor) -> Tensor:
    """float32 rounding of the sender's arithmetic and, where differenced, an error uniform within the bound."""
    parts = []
    sizes = [math.prod(shape) for shape in observation.shapes]
    smallest = FLOAT32_ERROR * torch.finfo(torch.float32).eps * float(gradient.abs().max())
    for part, seen, error in zip(gradient.split(sizes), known.split(sizes), bound.split(sizes), strict=True):
        scale = part.square().sum().div(seen.sum().clamp(min=1)).sqrt()
        rounding = (FLOAT32_ERROR * scale).clamp(min=smallest)
        parts.append(torch.where(seen, torch.hypot(rounding, error / math.sqrt(3)), math.inf))
    return torch.cat(parts)
