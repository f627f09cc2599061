"""What the defenses that send whole levels share: rounding to the units of segments.

Knows numbers and segments; nothing of why a unit was chosen.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from harness.defenses.blocks import BLOCK, Borders, blocks, spread
from harness.seeding import Draws
from harness.wire.coded import Float32


def round_levels(values: Float32, cut: Borders, units: Float32, most: int, draws: Draws | None) -> npt.NDArray[np.int8]:
    """Levels of `values` in their segments' units, at most `most` in magnitude; shape (elements,).

    Args:
        draws: round down or up by chance, 15 bits of it, so that the expectation is the value but for 2**-16 of a unit;
            None: to the nearest.
    """
    levels = np.empty(values.size, np.int8)
    with np.errstate(divide="ignore"):
        inverse = np.where(units > 0, 1 / units, np.float32(0)).astype(np.float32)
    scratch, dither = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for block in blocks(cut):
        size = block.elements.stop - block.elements.start
        scaled, chance = scratch[:size], dither[:size]
        np.multiply(values[block.elements], spread(inverse[block.segments], block), out=scaled)
        if draws is not None:
            np.copyto(chance, draws.words(np.int16, size) | np.int16(1))  # as many above 0 as below
            chance *= np.float32(2.0**-16)
            scaled += chance
        np.rint(scaled, out=scaled)
        levels[block.elements] = np.clip(scaled, -most, most, out=scaled)
    return levels
