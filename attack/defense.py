"""What a defense's name says to whoever knows the configuration: the eavesdropper's reading of `--defense`.

In: a chain such as `clip:1.0+noise-gaussian:1e-3`, as the wire or a person says it. Out: what follows for a gradient.
It knows no gradient; a link that it does not know says nothing.
"""

from __future__ import annotations

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PublicDefense:
    """What a chain says of the gradient behind what was sent."""

    noise: float = 0.0
    """Standard deviation of what was added to each element."""
    noise_of_sum: float = 0.0
    """The same of what was added to each element of the sum over the examples."""
    laplace: bool = False
    """Whether all noise is of Laplace's law."""
    draws: bool = False
    """Whether elements were rounded up or down by chance, without bias."""
    columns: bool = False
    """Whether columns of a linear layer were left out."""
    norm: float | None = None
    """The largest norm that was left; None: it was not clipped."""
    prunes: bool = False
    """Whether the smallest elements of each tensor were left out, and forgotten."""
    keeps: bool = False
    """Whether what was not sent is added to later steps."""
    signs: bool = False
    """Whether of each element its sign alone was sent."""
    momentum: float = 0.0
    """Of what is kept: what was added to it last is added once more, times this."""
    rank: int = 0
    """Matrices were sent as products of this rank, and what these are off is added to later steps; 0: they were not."""

    def noise_of(self, examples: int) -> float:
        """Standard deviation of what was added to each element of the mean over so many examples."""
        return math.hypot(self.noise, self.noise_of_sum / examples)

    @classmethod
    def read(cls, chain: str) -> PublicDefense:
        """Never fails: what cannot be read says nothing."""
        variance, laws, found = 0.0, set[str](), cls()
        for link in re.split(r"\+(?!\d)", chain):
            name, _, options = link.partition(":")
            value = _number(options.partition(",")[0])
            if name in ("noise-gaussian", "noise-laplace") and value is not None:
                variance += value**2
                laws.add(name)
            elif name == "dp-sgd":
                norm = _option(options, "clip", 0.0)
                found = dataclasses.replace(
                    found, noise_of_sum=_option(options, "noise", 0.0) * norm, norm=norm or None
                )
            elif name == "soteria":
                found = dataclasses.replace(found, columns=True)
            elif (name == "ternary" and "clip=" not in options) or name == "qsgd":
                found = dataclasses.replace(found, draws=True)
            elif name == "int8" and "rounding=stochastic" in options:
                found = dataclasses.replace(found, draws=True)
            elif name in ("clip", "clip-examples") and value is not None:
                found = dataclasses.replace(found, norm=value)
            elif name == "prune":
                found = dataclasses.replace(found, prunes=True)
            elif name in ("topk", "topk-dgc"):
                momentum = _option(options, "momentum", 0.9 if name == "topk-dgc" else 0.0)
                clipped = _option(options, "clip", 0.0) or found.norm
                found = dataclasses.replace(found, keeps=True, momentum=momentum, norm=clipped)
            elif name == "sign":
                found = dataclasses.replace(found, keeps=True, signs=True)
            elif name == "powersgd" and value is not None and value >= 1:
                found = dataclasses.replace(found, rank=int(value))
        laplace = laws == {"noise-laplace"} and not found.noise_of_sum
        return dataclasses.replace(found, noise=math.sqrt(variance), laplace=laplace)


def _option(options: str, name: str, default: float) -> float:
    given = re.search(rf"(?:^|,){name}=([^,]*)", options)
    value = _number(given[1]) if given else None
    return default if value is None else value


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
