"""GPT-2's causal decoder (Radford et al. 2019), as a language model or a classifier.

Parameters are named as in Hugging Face's GPT2LMHeadModel and GPT2ForSequenceClassification, so that their weights load.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.models.attention import SPREAD, attend, check_heads, check_tokens, draw
from harness.models.tokens import Tokens


class GPT2(nn.Module):
    """Small unless told otherwise; GPT-2 itself is vocab=50257,hidden=768,depth=12,heads=12,length=1024.

    Args:
        vocab: number of tokens.
        hidden: width.
        depth: layers.
        heads: attention heads of a layer.
        length: positions there are.
        head: `lm`, logits of each next token, or `classify`, logits of the whole, from its last token.
        classes: of `classify`.
        tied: whether the language model's last weights are the word embeddings.
        dropout: share of activations that training drops, where GPT-2 does.
        pad: the token behind an example's end.
    """

    def __init__(
        self,
        vocab: int = 30522,
        hidden: int = 384,
        depth: int = 4,
        heads: int = 6,
        length: int = 512,
        head: str = "lm",
        classes: int = 2,
        tied: bool = True,
        dropout: float = 0.0,
        pad: int = 0,
    ) -> None:
        super().__init__()
        check_heads(hidden, heads)
        if head not in ("lm", "classify"):
            raise ValueError(f"head {head!r} is not known; there are: lm, classify")
        self.tokens, self.input_shape = Tokens(vocab=vocab, pad=pad), (length,)
        self.transformer = Decoder(vocab, hidden, depth, heads, length, dropout)
        self.classifies = head == "classify"
        if self.classifies:
            self.score = nn.Linear(hidden, classes, bias=False)
        elif not tied:
            self.lm_head = nn.Linear(hidden, vocab, bias=False)
        draw(self)
        for name, weight in self.transformer.named_parameters():
            if name.endswith("c_proj.weight"):
                # What is added to the stream, by the number of additions: Radford et al. 2019, section 2.3.
                nn.init.normal_(weight, std=SPREAD / math.sqrt(2 * depth))

    def forward(self, tokens: Tensor, words: Tensor | None = None) -> Tensor:
        """
        Args:
            tokens: int64, shape (batch, length).
            words: shape (batch, length, hidden), in place of the tokens' word embeddings; `tokens` then say no more
                than where an example ends.

        Returns: logits, shape (batch, length, vocab) or (batch, classes).
        """
        states = self.transformer(tokens, words)
        if self.classifies:
            last = (tokens != self.tokens.pad).sum(1) - 1
            return self.score(states[torch.arange(len(tokens), device=tokens.device), last])
        return functional.linear(
            states, self.lm_head.weight if hasattr(self, "lm_head") else self.transformer.wte.weight
        )


class Decoder(nn.Module):
    """Embeddings, blocks and a last norm."""

    def __init__(self, vocab: int, hidden: int, depth: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, hidden), nn.Embedding(length, hidden)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(hidden, heads, dropout) for _ in range(depth))
        self.ln_f = nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor, words: Tensor | None = None) -> Tensor:
        """The states behind the last norm, shape (batch, length, hidden)."""
        check_tokens(tokens, self.wpe.num_embeddings)
        length = tokens.shape[1]
        words = self.wte(tokens) if words is None else words
        x = self.drop(words + self.wpe(torch.arange(length, device=tokens.device)))
        # Padding stands behind all that counts, where none looks.
        seen = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        for block in self.h:
            x = block(x, seen)
        return self.ln_f(x)


class Block(nn.Module):
    """Attention and a network for each token, each given the norm of the stream and added to it."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(hidden), CausalAttention(hidden, heads, dropout)
        self.ln_2 = nn.LayerNorm(hidden)
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(hidden, 4 * hidden), "c_proj": Conv1D(4 * hidden, hidden)})
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Shape (batch, length, hidden)."""
        x = x + self.dropout(self.attn(self.ln_1(x), seen))
        inner = functional.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.dropout(self.mlp["c_proj"](inner))


class CausalAttention(nn.Module):
    """Each token looks at itself and those before it."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = Conv1D(hidden, 3 * hidden), Conv1D(hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Shape (batch, length, hidden)."""
        query, key, value = self.c_attn(x).chunk(3, -1)
        return self.c_proj(attend(query, key, value, seen, heads=self.heads, dropout=self.dropout))


class Conv1D(nn.Module):
    """x W + b: a linear layer whose weight has shape (inputs, outputs), as GPT-2's code keeps it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs).normal_(std=SPREAD))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., outputs)."""
        return x @ self.weight + self.bias
