"""BERT's encoder (Devlin et al. 2019, arXiv 1810.04805), as a masked language model or a classifier.

Parameters are named as in Hugging Face's BertForMaskedLM and BertForSequenceClassification, so that their weights load.
"""

from __future__ import annotations

from collections.abc import Iterable

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.models.attention import attend, check_heads, check_tokens, draw
from harness.models.tokens import Tokens, minilm_folder

EPSILON = 1e-12


class Bert(nn.Module):
    """The shape of MiniLM-L6-H384 unless told otherwise: 22.7 million parameters without a head.

    Args:
        vocab: number of tokens.
        hidden: width.
        depth: layers.
        heads: attention heads of a layer.
        length: positions there are.
        head: `mlm`, logits of each token, or `classify`, logits of the whole.
        classes: of `classify`.
        tied: whether the masked language model's last weights are the word embeddings.
        dropout: share of activations that training drops, where BERT does.
        pad: the token behind an example's end.
        init: `random`, or `minilm`, real weights of that shape; a head's are drawn in any case.
    """

    def __init__(
        self,
        vocab: int = 30522,
        hidden: int = 384,
        depth: int = 6,
        heads: int = 12,
        length: int = 512,
        head: str = "mlm",
        classes: int = 2,
        tied: bool = True,
        dropout: float = 0.0,
        pad: int = 0,
        init: str = "random",
    ) -> None:
        super().__init__()
        check_heads(hidden, heads)
        if head not in ("mlm", "classify"):
            raise ValueError(f"head {head!r} is not known; there are: mlm, classify")
        if init not in ("random", "minilm"):
            raise ValueError(f"init {init!r} is not known; there are: random, minilm")
        self.tokens, self.input_shape = Tokens(vocab=vocab, pad=pad), (length,)
        self.bert = Encoder(vocab, hidden, depth, heads, length, dropout, pooled=head == "classify")
        if head == "mlm":
            self.cls = nn.ModuleDict({"predictions": Predictions(hidden, vocab, tied=tied)})
        else:
            self.dropout, self.classifier = nn.Dropout(dropout), nn.Linear(hidden, classes)
        draw(self)
        if init == "minilm":
            self._take(safetensors.torch.load_file(minilm_folder() / "model.safetensors"))

    def forward(self, tokens: Tensor, words: Tensor | None = None) -> Tensor:
        """
        Args:
            tokens: int64, shape (batch, length).
            words: shape (batch, length, hidden), in place of the tokens' word embeddings; `tokens` then say no more
                than where an example ends.

        Returns: logits, shape (batch, length, vocab) or (batch, classes).
        """
        hidden = self.bert(tokens, self.tokens.pad, words)
        if hasattr(self, "cls"):
            return self.cls["predictions"](hidden, self.bert.embeddings.word_embeddings.weight)
        return self.classifier(self.dropout(self.bert.pooler(hidden)))

    def _take(self, weights: dict[str, Tensor]) -> None:
        """An encoder's weights. Raises: ValueError where this one's shape is another."""
        own = self.bert.state_dict()
        for name, value in own.items():
            given = weights.get(name)
            if given is None or given.shape != value.shape:
                shape = "none" if given is None else str(tuple(given.shape))
                raise ValueError(f"init minilm: {name} has shape {tuple(value.shape)}, MiniLM's {shape}")
        self.bert.load_state_dict({name: weights[name] for name in own})


class Encoder(nn.Module):
    """Embeddings and layers."""

    def __init__(
        self, vocab: int, hidden: int, depth: int, heads: int, length: int, dropout: float, *, pooled: bool
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(vocab, hidden, length, dropout)
        self.encoder = Layers(Layer(hidden, heads, dropout) for _ in range(depth))
        if pooled:
            self.pooler = Pooler(hidden)

    def forward(self, tokens: Tensor, pad: int, words: Tensor | None = None) -> Tensor:
        """The last layer's states, shape (batch, length, hidden)."""
        x = self.embeddings(tokens, words)
        seen = (tokens != pad)[:, None, None, :]
        return self.encoder(x, seen)


class Layers(nn.Module):
    """One behind the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Shape (batch, length, hidden)."""
        for layer in self.layer:
            x = layer(x, seen)
        return x


class Embeddings(nn.Module):
    """Word, position and type (always the first), normalized."""

    def __init__(self, vocab: int, hidden: int, length: int, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, hidden)
        self.position_embeddings = nn.Embedding(length, hidden)
        self.token_type_embeddings = nn.Embedding(2, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, words: Tensor | None = None) -> Tensor:
        """Shape (batch, length, hidden)."""
        check_tokens(tokens, self.position_embeddings.num_embeddings)
        words = self.word_embeddings(tokens) if words is None else words
        places = self.position_embeddings(torch.arange(tokens.shape[1], device=tokens.device))
        kinds = self.token_type_embeddings(torch.zeros_like(tokens))
        return self.dropout(self.LayerNorm(words + kinds + places))


class Layer(nn.Module):
    """Attention and a network for each token, each added to what it was given and normalized behind that."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": Attention(hidden, heads, dropout), "output": Added(hidden, hidden, dropout)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, 4 * hidden)})
        self.output = Added(4 * hidden, hidden, dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Shape (batch, length, hidden)."""
        x = self.attention["output"](self.attention["self"](x, seen), x)
        return self.output(functional.gelu(self.intermediate["dense"](x)), x)


class Attention(nn.Module):
    """Each token looks at all that are none of padding."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Shape (batch, length, hidden)."""
        return attend(self.query(x), self.key(x), self.value(x), seen, heads=self.heads, dropout=self.dropout)


class Added(nn.Module):
    """norm(x + dense(y))."""

    def __init__(self, inputs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Shape (batch, length, hidden)."""
        return self.LayerNorm(self.dropout(self.dense(y)) + x)


class Pooler(nn.Module):
    """What a classifier is given: of the first token."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, states: Tensor) -> Tensor:
        """Shape (batch, hidden)."""
        return torch.tanh(self.dense(states[:, 0]))


class Predictions(nn.Module):
    """A masked language model's head: one more layer, then a logit for each token of the vocabulary."""

    def __init__(self, hidden: int, vocab: int, *, tied: bool) -> None:
        super().__init__()
        self.transform = nn.ModuleDict(
            {"dense": nn.Linear(hidden, hidden), "LayerNorm": nn.LayerNorm(hidden, eps=EPSILON)}
        )
        if tied:
            self.bias = nn.Parameter(torch.zeros(vocab))
        else:
            self.decoder = nn.Linear(hidden, vocab)

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """Logits, shape (batch, length, vocab), by the word embeddings, shape (vocab, hidden), where tied."""
        states = self.transform["LayerNorm"](functional.gelu(self.transform["dense"](states)))
        return self.decoder(states) if hasattr(self, "decoder") else functional.linear(states, words, self.bias)
