"""A chain of defenses, as a person names it, e.g. `clip:1.0+noise-gaussian:1e-3` or `topk-dgc:0.99,momentum=0.9`.

A link is `name`, `name:value`, `name:key=value` or `name:value,key=value`; links are applied from left to right.
What belongs to a gradient comes before what codes it, of which there is one at most.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from harness.defenses.base import BatchStep, Coder, ExampleStep, Link, Moment, Sizes, State, Step
from harness.defenses.clip import Clip, ClipExamples
from harness.defenses.dp_sgd import DPSGD
from harness.defenses.half import Short
from harness.defenses.int8 import Int8
from harness.defenses.noise import Gaussian, Laplace
from harness.defenses.powersgd import PowerSGD
from harness.defenses.powersgd_averaged import PowerSGDAveraged
from harness.defenses.prune import Prune
from harness.defenses.qsgd import Qsgd
from harness.defenses.secure import SecureAggregation
from harness.defenses.sign import Sign
from harness.defenses.soteria import Soteria
from harness.defenses.ternary import Ternary
from harness.defenses.topk import TopK
from harness.errors import ConfigError
from harness.wire.coded import Coded, Defended

DEFENSES: dict[str, Callable[..., Link]] = {
    "clip-examples": ClipExamples,
    "dp-sgd": DPSGD,
    "clip": Clip,
    "noise-gaussian": Gaussian,
    "noise-laplace": Laplace,
    "prune": Prune,
    "topk": TopK,
    "topk-dgc": functools.partial(TopK, momentum=0.9),
    "fp16": functools.partial(Short, "fp16"),
    "bf16": functools.partial(Short, "bf16"),
    "int8": Int8,
    "qsgd": Qsgd,
    "ternary": Ternary,
    "sign": Sign,
    "powersgd": PowerSGD,
    "powersgd-averaged": PowerSGDAveraged,
    "soteria": Soteria,
    "secure-aggregation": SecureAggregation,
}
"""The first argument is what may stand without a name, unless it has a default."""


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """Links in order; without any, what is sent is the gradient as it is."""

    spec: str
    links: tuple[Link, ...]

    @property
    def of_examples(self) -> ExampleStep | None:
        """What takes the gradients of a batch's examples, where the chain begins so."""
        first = self.links[0] if self.links else None
        return first if isinstance(first, ExampleStep) else None

    @property
    def of_batch(self) -> BatchStep | None:
        """What looks at the batch, where the chain begins so."""
        first = self.links[0] if self.links else None
        return first if isinstance(first, BatchStep) else None

    @property
    def private(self) -> DPSGD | None:
        """What epsilon is told of, where the chain begins so: what comes behind it takes nothing away."""
        return self.of_examples if isinstance(self.of_examples, DPSGD) else None

    @property
    def summed(self) -> bool:
        """Whether it needs an exchange that sums."""
        return any(isinstance(link, PowerSGDAveraged) for link in self.links)

    @property
    def momentum(self) -> bool:
        """Whether it takes the part of the optimizer's momentum."""
        return any(isinstance(link, TopK) and link.momentum > 0 for link in self.links)

    def fit(self, model: nn.Module) -> Chain:
        """The chain for this model. Raises: ConfigError, where it has not what a link needs."""
        return Chain(self.spec, tuple(link.fit(model) for link in self.links))

    def begin(self, sizes: Sizes) -> State:
        """What the chain remembers before the first step: the links' tensors, by `{place}.{name}`."""
        return {
            f"{at}.{name}": tensor for at, link in enumerate(self.links) for name, tensor in link.begin(sizes).items()
        }

    def __call__(
        self, gradient: Tensor, sizes: Sizes, state: State, *, seed: int, rank: int, step: int
    ) -> tuple[Tensor | Coded, State]:
        """What is sent in place of a gradient, which is not changed, and what to remember. The state is handed over.

        Args:
            gradient: float32, shape (parameters,), on any device; what `of_examples` or `of_batch` made, where there
                is one.
            sizes: elements of each parameter.

        Raises: DefenseError.
        """
        sent: Tensor | Coded = gradient
        after: State = {}
        for at, link in enumerate(self.links):
            own = {name.partition(".")[2]: tensor for name, tensor in state.items() if name.startswith(f"{at}.")}
            moment = Moment(seed=seed, rank=rank, step=step, link=at)
            assert isinstance(sent, Tensor), "what codes is last"
            if isinstance(link, Step):
                sent, own = link(sent, own, moment)
            elif isinstance(link, Coder):
                sent, own = link(sent.detach().cpu(), sizes, own, moment)
            after |= {f"{at}.{name}": tensor for name, tensor in own.items()}
        return (sent if isinstance(sent, Tensor) else Defended(sent, self.spec)), after


def load_defense(spec: str) -> Chain:
    """The chain that `spec` names; the empty text names the one without links.

    Raises: ConfigError, in one line: the link, what was wanted and what was got.
    """
    parts = re.split(r"\+(?!\d)", spec) if spec else []  # 1e+3 is a number
    links = [_link(spec, part) for part in parts]
    for before, link in itertools.pairwise(links):
        if isinstance(before, Coder):
            raise ConfigError(f"defense {spec!r}: {parts[links.index(before)]} codes what is sent, so it comes last")
        if isinstance(link, ExampleStep | BatchStep):
            takes = "each example's gradient" if isinstance(link, ExampleStep) else "the batch itself"
            raise ConfigError(f"defense {spec!r}: {parts[links.index(link)]} takes {takes}: put it first")
    return Chain(spec, tuple(links))


def _link(spec: str, part: str) -> Link:
    name, _, rest = part.partition(":")
    if name not in DEFENSES:
        raise ConfigError(f"defense {spec!r}: {name!r} is not known; there are: {', '.join(DEFENSES)}")
    parameters = inspect.signature(DEFENSES[name]).parameters
    wanted = {key: parameter for key, parameter in parameters.items() if not key.startswith("_")}
    form = f"{name}:" + ",".join(
        f"{key}={parameter.default}" if parameter.default is not parameter.empty else key.upper()
        for key, parameter in wanted.items()
    )
    values = list(filter(None, rest.split(",")))
    positional = [key for key, parameter in wanted.items() if parameter.default is parameter.empty]
    options: dict[str, Any] = {}
    for key in positional:
        if values and "=" not in values[0]:
            options[key] = _value(values.pop(0))
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or key not in wanted or key in options:
            raise ConfigError(f"defense {spec!r}: {value!r} is not an option of {name}; wanted {form.rstrip(':')}")
        options[key] = _value(text)
    for key in positional:
        if key not in options:
            raise ConfigError(f"defense {spec!r}: {name} needs its {key}; wanted {form}")
    try:
        return DEFENSES[name](**options)
    except TypeError:  # a text where a number is compared
        raise ConfigError(
            f"defense {spec!r}: {part!r} holds a text where {name} takes a number; wanted {form}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"defense {spec!r}: {name}: {error}") from error


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
