"""Sentences as tokens: prose that comes with Python, or the user's own text files. Nothing is downloaded.

The prose is the reference that `help()` shows (`pydoc_data.topics`), without its code, tables and grammar. It is the
same in every installation of one version of Python.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.errors import ConfigError, DataError
from harness.models import IGNORED, Tokenizer, load_tokenizer
from harness.seeding import generator
from harness.types import Batch

MASKED, REPLACED, KEPT = 0.15, 0.1, 0.1
"""Share of tokens that a masked language model is asked for; and of these, shown as another token or as they are, the
rest hidden by the mask. Devlin et al. 2019, section 3.1."""
SHORTEST = 4
"""Words of a sentence of the prose."""
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'“(])")
_MARKUP = re.compile(r"[`*]|\[\d+\]")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextSet:
    """Sentences as tokens, those of one source a class. See `Dataset`."""

    name: str
    sentences: tuple[tuple[int, ...], ...]
    """Tokens of each, with the tokenizer's special ones."""
    labels: np.ndarray
    """int64, shape (sentences,): the source of each."""
    classes: int
    """Number of sources, at least 2."""
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        if not self.sentences:
            raise DataError(f"{self.name}: holds no sentence that is short enough; raise length=")

    def __len__(self) -> int:
        return len(self.sentences)

    @property
    def kind(self) -> str:
        """See `Dataset`."""
        return "sentences"

    @property
    def size(self) -> str:
        """See `Dataset`."""
        return f"up to {max(map(len, self.sentences))} tokens"

    def model_options(self, loss: str) -> dict[str, Any]:
        """See `Dataset`."""
        options = {"vocab": self.tokenizer.vocab, "pad": self.tokenizer.pad}
        return options | ({"head": "classify", "classes": self.classes} if loss == "cross_entropy" else {})

    def outputs(self, loss: str) -> int:
        """See `Dataset`."""
        if loss == "masked_lm" and self.tokenizer.mask is None:
            raise ConfigError(f"loss masked_lm: tokenizer {self.tokenizer.name!r} has no mask token; take causal_lm")
        return self.classes if loss == "cross_entropy" else self.tokenizer.vocab

    def part(self, chosen: np.ndarray) -> TextSet:
        """See `Dataset`."""
        sentences = tuple(self.sentences[place] for place in chosen)
        return dataclasses.replace(self, sentences=sentences, labels=self.labels[chosen])

    def take(self, chosen: np.ndarray, *, loss: str, seed: int) -> Batch:
        """See `Dataset`. Padded to the longest; which tokens are masked is drawn for each sentence on its own."""
        pad = self.tokenizer.pad
        rows = [torch.tensor(self.sentences[index]) for index in chosen]
        inputs = _padded(rows, pad)
        if loss == "causal_lm":
            return Batch(inputs=inputs, labels=_padded(rows, IGNORED))
        if loss == "masked_lm":
            hidden = [self._hide(row, seed, int(index)) for row, index in zip(rows, chosen, strict=True)]
            return Batch(
                inputs=_padded([shown for shown, _ in hidden], pad),
                labels=_padded([asked for _, asked in hidden], IGNORED),
            )
        return Batch(inputs=inputs, labels=torch.from_numpy(self.labels[chosen].astype(np.int64)))

    def _hide(self, row: Tensor, seed: int, index: int) -> tuple[Tensor, Tensor]:
        """What is shown of a sentence, and what is asked for: at least one token, `IGNORED` elsewhere."""
        draw = generator(seed, "mask", index)
        words = torch.tensor([token not in self.tokenizer.special for token in row.tolist()])
        chance = torch.rand(len(row), generator=draw).masked_fill(~words, 2.0)
        asked = (chance < MASKED) | (chance == chance.min()) & words
        how, others = (
            torch.rand(len(row), generator=draw),
            torch.randint(self.tokenizer.vocab, row.shape, generator=draw),
        )
        assert self.tokenizer.mask is not None
        shown = torch.where(how < REPLACED, others, self.tokenizer.mask)
        shown = torch.where(how > 1 - KEPT, row, shown)
        return torch.where(asked, shown, row), torch.where(asked, row, IGNORED)


def prose(*, length: int = 32, tokenizer: str = "minilm") -> TextSet:
    """Sentences of Python's reference, up to `length` tokens long; each topic is a class."""
    from pydoc_data.topics import topics

    sources = [_sentences(_paragraphs(topics[name])) for name in sorted(topics)]
    return _tokenized("prose", sources, length, tokenizer)


def files(*, path: str | None = None, length: int = 32, tokenizer: str = "minilm") -> TextSet:
    """Sentences of a text file, or of all files *.txt below a folder, each file a class.

    Raises: DataError, naming the folder or the first file that is not text.
    """
    if path is None:
        raise DataError("text: the file is missing; wanted text:path=FILE, or a folder of *.txt")
    root = Path(path)
    found = sorted(root.rglob("*.txt")) if root.is_dir() else [root]
    try:
        sources = [_sentences(re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))) for file in found]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{root}: not a text file in UTF-8 that can be read: {error}") from error
    return _tokenized(f"text:{root}", sources, length, tokenizer)


def _tokenized(name: str, sources: Sequence[Iterable[str]], length: int, spec: str) -> TextSet:
    try:
        tokenizer = load_tokenizer(spec)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    sentences: list[tuple[int, ...]] = []
    labels: list[int] = []
    for label, source in enumerate(sources):
        for sentence in dict.fromkeys(source):
            tokens = tuple(tokenizer.encode(sentence))
            if 1 < len(tokens) <= length and not tokenizer.special.issuperset(tokens):
                sentences.append(tokens)
                labels.append(label)
    return TextSet(
        name=name,
        sentences=tuple(sentences),
        labels=np.array(labels, dtype=np.int64),
        classes=max(len(sources), 2),
        tokenizer=tokenizer,
    )


def _paragraphs(topic: str) -> Iterator[str]:
    """The running text of a topic: neither headings nor what is indented."""
    for block in re.split(r"\n\s*\n", topic):
        if not re.search(r"^ |^\W*$|::=|^\*\*|\|", block, re.MULTILINE):
            yield _MARKUP.sub("", block)


def _sentences(paragraphs: Iterable[str]) -> Iterator[str]:
    for paragraph in paragraphs:
        for sentence in _END.split(" ".join(paragraph.split())):
            if len(sentence.split()) >= SHORTEST and sentence[-1] in ".!?":
                yield sentence


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
