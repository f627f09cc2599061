"""What transformers share: attention, written out so that it can be differentiated twice, and their drawn weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SPREAD = 0.02
"""Standard deviation of weights, as BERT and GPT-2 draw them."""


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, *, heads: int, dropout: nn.Module) -> Tensor:
    """softmax(QK^T / sqrt(width of a head)) V, for each head.

    Args:
        query, key, value: shape (batch, length, hidden); a head has consecutive columns.
        seen: bool, broadcast to (batch, heads, length, length): whether a token, the third axis, looks at another.

    Returns: shape (batch, length, hidden).
    """
    q_BHLD, k_BHLD, v_BHLD = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    scores = q_BHLD @ k_BHLD.transpose(-1, -2) / math.sqrt(q_BHLD.shape[-1])
    weights = dropout(scores.masked_fill(~seen, -torch.inf).softmax(-1))
    return (weights @ v_BHLD).transpose(1, 2).flatten(-2)


def draw(module: nn.Module) -> None:
    """Draws all weights as BERT does: normal, biases zero, norms one."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=SPREAD)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def check_heads(hidden: int, heads: int) -> None:
    """Raises: ValueError."""
    if hidden % heads:
        raise ValueError(f"hidden {hidden} does not split into {heads} heads")


def check_tokens(tokens: Tensor, length: int) -> None:
    """Raises: ValueError for anything but int64 tokens, shape (batch, at most `length`)."""
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[1] > length:
        raise ValueError(
            f"wanted int64 tokens, shape (batch, {length} or fewer), got {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
