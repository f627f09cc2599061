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

    @classmethod
    def read(cls, chain: str) -> PublicDefense:
        """Never fails: what cannot be read says nothing."""
        variance, norm, prunes, keeps = 0.0, None, False, False
        for link in re.split(r"\+(?!\d)", chain):
            name, _, options = link.partition(":")
            value = _number(options.partition(",")[0])
            if name in ("noise-gaussian", "noise-laplace") and value is not None:
                variance += value**2
            elif name == "clip" and value is not None:
                norm = value
            prunes = prunes or name == "prune"
            keeps = keeps or name in ("topk", "topk-dgc", "sign")
        return cls(noise=math.sqrt(variance), norm=norm, prunes=prunes, keeps=keeps)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
