"""What an attack on text needs of a transformer: its first attention, and the gradients of the weights around it.

    embeddings -> x -> [query, key, value] -> attention -> c -> [output] -> ...

The gradient of a linear layer is a sum over all tokens of the batch, sum_n dY_n x_n^T: its rows are combinations of
that layer's inputs. Serves BERT's encoder and GPT-2's decoder under Hugging Face's names, however they are wrapped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attack.engine.target import Target


class NoTransformer(ValueError):
    """A model without a first attention that is known how to read; one line that says why."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The gradient of linear layers that share their input, one row an output."""

    values: Tensor
    """float64, shape (rows, width)."""
    noise: float
    """Standard deviation of an element's error, root mean square."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entrance:
    """Embeddings that are normalized first, x = norm(word + position): what is needed to go back through it."""

    words: Callable[[Tensor], Tensor]
    """Tokens, int64, shape (n,) -> all of the sum but the position's part, float64, shape (n, width)."""
    positions: Tensor
    """float64, shape (length, width)."""
    scale: Tensor
    """Of the norm, shape (width,)."""
    shift: Tensor
    """Of the norm, shape (width,)."""
    weight: Tensor
    """Of query, key and value, stacked, shape (rows, width)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """A transformer's first attention, at the observed weights."""

    causal: bool
    """Whether a token looks at those before it only."""
    heads: int
    words: Rows
    """Gradient of the word embeddings, shape (vocabulary, width)."""
    positions: Rows
    """Gradient of the position embeddings, shape (length, width)."""
    inputs: Rows
    """Of query, key and value, stacked: combinations of the first attention's inputs x."""
    contexts: Rows
    """Of the attention's output layer: combinations of what the heads make of them, c."""
    states: Rows
    """Of the network behind the attention: combinations of what that is given, y."""
    embed: Callable[[Tensor, Tensor], Tensor]
    """Tokens and positions, int64, shape (n,) -> x, float64, shape (n, width)."""
    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    """x -> query, key and value, each of shape (n, heads, width of a head)."""
    behind: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Contexts c, shape (..., width), tokens and positions, shape (...) -> y."""
    entrance: Entrance | None = None
    """None where the embeddings are passed on as they are beside x."""

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """What attention's softmax is taken of, shape (n, m, heads), for n queries and m keys."""
        return torch.einsum("nhd,mhd->nmh", query, key) / math.sqrt(query.shape[-1])


def dissect(target: Target) -> Anatomy:
    """Raises: NoTransformer."""
    names = [name for name, _ in target.model.named_parameters()]
    for ending, build in (("embeddings.word_embeddings.weight", _bert), ("wte.weight", _gpt2)):
        prefix = next((name.removesuffix(ending) for name in names if name.endswith(ending)), None)
        if prefix is not None:
            try:
                return build(target, prefix)
            except (AttributeError, KeyError) as error:
                raise NoTransformer(f"parameter {error} is missing: not as BERT or GPT-2 name theirs") from error
    raise NoTransformer("no word embeddings under the names of BERT or GPT-2")


def _bert(target: Target, prefix: str) -> Anatomy:
    model, rows = target.model, _Gradients(target)
    layer = prefix + "encoder.layer.0.attention."
    embeddings: Any = model.get_submodule(prefix + "embeddings")
    parts: list[Any] = [model.get_submodule(f"{layer}self.{name}") for name in ("query", "key", "value")]
    output: Any = model.get_submodule(layer + "output")
    heads = _heads(model.get_submodule(layer + "self"))

    def words(tokens: Tensor) -> Tensor:
        return (embeddings.word_embeddings.weight[tokens] + embeddings.token_type_embeddings.weight[0]).detach()

    def embed(tokens: Tensor, places: Tensor) -> Tensor:
        return embeddings.LayerNorm(words(tokens) + embeddings.position_embeddings.weight[places]).detach()

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (part(x).detach().unflatten(-1, (heads, -1)) for part in parts)
        return query, key, value

    def behind(contexts: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        return output.LayerNorm(output.dense(contexts) + embed(tokens, places)).detach()

    return Anatomy(
        causal=False,
        heads=heads,
        words=rows.of(prefix + "embeddings.word_embeddings.weight"),
        positions=rows.of(prefix + "embeddings.position_embeddings.weight"),
        inputs=rows.of(*(f"{layer}self.{name}.weight" for name in ("query", "key", "value"))),
        contexts=rows.of(layer + "output.dense.weight"),
        states=rows.of(prefix + "encoder.layer.0.intermediate.dense.weight"),
        embed=embed,
        project=project,
        behind=behind,
        entrance=Entrance(
            words=words,
            positions=embeddings.position_embeddings.weight.detach(),
            scale=embeddings.LayerNorm.weight.detach(),
            shift=embeddings.LayerNorm.bias.detach(),
            weight=torch.cat([part.weight.detach() for part in parts]),
        ),
    )


def _gpt2(target: Target, prefix: str) -> Anatomy:
    model, rows = target.model, _Gradients(target)
    decoder: Any = model.get_submodule(prefix.rstrip("."))
    norm, attention = decoder.h[0].ln_1, decoder.h[0].attn
    heads = _heads(attention)

    def embed(tokens: Tensor, places: Tensor) -> Tensor:
        return norm(decoder.wte.weight[tokens] + decoder.wpe.weight[places]).detach()

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (part.unflatten(-1, (heads, -1)) for part in attention.c_attn(x).detach().chunk(3, -1))
        return query, key, value

    def behind(contexts: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        stream = decoder.wte.weight[tokens] + decoder.wpe.weight[places]
        return decoder.h[0].ln_2(stream + attention.c_proj(contexts)).detach()

    return Anatomy(
        causal=True,
        heads=heads,
        words=rows.of(prefix + "wte.weight"),
        positions=rows.of(prefix + "wpe.weight"),
        inputs=rows.of(prefix + "h.0.attn.c_attn.weight", transposed=True),
        contexts=rows.of(prefix + "h.0.attn.c_proj.weight", transposed=True),
        states=rows.of(prefix + "h.0.mlp.c_fc.weight", transposed=True),
        embed=embed,
        project=project,
        behind=behind,
    )


def _heads(attention: nn.Module) -> int:
    for name in ("heads", "num_attention_heads", "num_heads"):
        if hasattr(attention, name):
            return int(getattr(attention, name))
    raise NoTransformer("the first attention does not say how many heads it has")


class _Gradients:
    """Parameters' gradients by their names."""

    def __init__(self, target: Target) -> None:
        names = [name for name, _ in target.model.named_parameters()]
        self._values = dict(zip(names, target.tensors(target.gradient), strict=True))
        self._noise = dict(zip(names, target.tensors(target.noise), strict=True))

    def of(self, *names: str, transposed: bool = False) -> Rows:
        """One below the other. Raises: NoTransformer where a part was not seen."""
        values = torch.cat([self._values[name].T if transposed else self._values[name] for name in names])
        noise = math.sqrt(sum(float(self._noise[name].square().mean()) for name in names) / len(names))
        if not math.isfinite(noise):
            raise NoTransformer(f"the gradient of {names[0]} was not seen in full")
        return Rows(values=values, noise=noise)
