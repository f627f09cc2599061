"""Where a text model keeps what names its words: the embeddings of words and positions, and the last layer.

Knows BERT's and GPT-2's names, as Hugging Face has them, however they are wrapped; no gradient.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from attack.engine.labels import NoLabel
from attack.engine.target import Target
from harness.models import LOSSES


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Names of parameters and modules."""

    words: str
    """The word embeddings, shape (vocabulary, width)."""
    positions: str
    """The position embeddings, shape (length, width)."""
    head: str
    """The last layer's weights, a row a label; those of `words` where they are tied."""
    bias: str | None
    """The last layer's bias."""
    states: str
    """The module that gives the last layer its input, or, of a classifier, the last layer."""

    @property
    def tied(self) -> bool:
        """Whether the word embeddings are the last layer as well."""
        return self.head == self.words

    @classmethod
    def of(cls, target: Target) -> Layout:
        """Raises: NoLabel."""
        names = [name for name, _ in target.model.named_parameters()]
        words = ending(names, r"(word_embeddings|wte)\.weight", "word embeddings")
        positions = ending(names, r"(position_embeddings|wpe)\.weight", "position embeddings")
        bias: str | None
        if target.loss is LOSSES["cross_entropy"]:
            layer = next(
                (
                    name
                    for name, module in reversed(list(target.model.named_modules()))
                    if isinstance(module, nn.Linear) and module.out_features == target.classes
                ),
                None,
            )
            if layer is None:
                raise NoLabel("the model does not end in a linear layer with an output a class")
            head, states = f"{layer}.weight", layer
            bias = f"{layer}.bias" if f"{layer}.bias" in names else None
        else:
            head = next((name for name in names if re.search(r"(lm_head|predictions\.decoder)\.weight$", name)), words)
            bias = next((name for name in names if re.search(r"predictions\.(decoder\.)?bias$", name)), None)
            modules = [name for name, _ in target.model.named_modules()]
            states = ending(modules, r"(predictions\.transform\.LayerNorm|ln_f)", "layer norm before the last layer")
        return cls(words=words, positions=positions, head=head, bias=bias, states=states)


def ending(names: list[str], pattern: str, what: str) -> str:
    """The last name that ends like this.

    Args:
        pattern: of whole parts of a name, between dots.
        what: for the error: what is called so.

    Raises: NoLabel.
    """
    found = [name for name in names if re.search(rf"(^|\.){pattern}$", name)]
    if not found:
        raise NoLabel(f"the model has no {what} by the name that BERT's or GPT-2's have")
    return found[-1]


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What a module is given, and gives, each time that it is called."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((given[0], output))

    handle = module.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
