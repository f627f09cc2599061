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

    @classmethod
    def read(cls, chain: str) -> PublicDefense:
        """Never fails: what cannot be read says nothing."""
        variance, found = 0.0, cls()
        for link in re.split(r"\+(?!\d)", chain):
            name, _, options = link.partition(":")
            value = _number(options.partition(",")[0])
            if name in ("noise-gaussian", "noise-laplace") and value is not None:
                variance += value**2
            elif name == "clip" and value is not None:
                found = dataclasses.replace(found, norm=value)
            elif name == "prune":
                found = dataclasses.replace(found, prunes=True)
            elif name in ("topk", "topk-dgc"):
                momentum = _option(options, "momentum", 0.9 if name == "topk-dgc" else 0.0)
                found = dataclasses.replace(found, keeps=True, momentum=momentum)
            elif name == "sign":
                found = dataclasses.replace(found, keeps=True, signs=True)
            elif name == "powersgd" and value is not None and value >= 1:
                found = dataclasses.replace(found, rank=int(value))
        return dataclasses.replace(found, noise=math.sqrt(variance))


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
