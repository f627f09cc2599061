"""What pictures are like, as penalties: for where the equations leave many inputs open.

Takes inputs, gives a number for each search. Knows no model and no gradient.
"""

from __future__ import annotations

from torch import Tensor


def total_variation(inputs: Tensor) -> Tensor:
    """Mean absolute difference of neighboring elements, along height plus along width; 0 for inputs that are no
    pictures.

    Args:
        inputs: shape (searches, batch, channels, height, width), or of fewer axes and then no pictures.

    Returns: shape (searches,).

    Reference: Rudin, Osher, Fatemi 1992; in this form in Geiping et al., arXiv 2003.14053, section 4.
    """
    if inputs.ndim != 5:
        return inputs.new_zeros(len(inputs))
    across = (inputs[..., 1:] - inputs[..., :-1]).abs().flatten(1).mean(1)
    down = (inputs[..., 1:, :] - inputs[..., :-1, :]).abs().flatten(1).mean(1)
    return across + down
