"""Dummy text: embeddings in place of a batch's tokens, whose gradient can be compared and descended.

    z -> (words, label logits) -> gradients of all parameters but the word embeddings

Tokens are discrete; what a model looks up for them is not. Text models take `words`, embeddings in place of those that
they would look up (see `harness.models.bert`), so nothing is hooked into. The word embeddings' own gradient says which
tokens there are, not how an embedding should change, and takes no part; nor do parameters whose gradient is rounding,
as that of a key's bias, which is zero.

Sentences of a batch are taken to be equally long, as long as the position embeddings say; special tokens are searched
like others. It computes in float32: it proposes tokens, and others judge them in float64.

Reference: Zhu, Liu, Han, NeurIPS 2019, arXiv 1906.08935, section 4.2: embeddings are matched, then read as the nearest
tokens.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from attack.engine.anatomy import dissect
from attack.engine.dummy_labels import dummy_labels
from attack.engine.target import Target
from attack.engine.vocabulary import longest, rms, words_of
from harness.models import LOSSES

ROUNDING = 1e-7
"""Of the largest gradient of a parameter, by their root mean squares: what float32 leaves of one that is zero. On
BERTs of all widths tried a key's bias had 1e-10 and less, all others 1e-5 and more."""


class NoText(ValueError):
    """A model or a gradient without what dummy text needs; one line that says why."""


class DummyText:
    """What a search changes: z, float32, shape (size,), of order one.

    Args:
        narrowed: whether the word embeddings' gradient is asked which tokens there are, so that others are never read.

    Raises: NoText, NoTransformer, NoLabel.
    """

    def __init__(self, target: Target, generator: torch.Generator, *, narrowed: bool = False) -> None:
        if target.tokens is None:
            raise NoText("the model takes numbers: it has no embeddings of words to search")
        self._model, self._pad = copy.deepcopy(target.model).float(), target.tokens.pad
        parameters = dict(self._model.named_parameters())
        split = (target.tensors(flat) for flat in (target.gradient, target.known))
        seen = dict(zip(parameters, zip(*split, strict=True), strict=True))
        words = next(
            (
                f"{name}.weight"
                for name, module in self._model.named_modules()
                if isinstance(module, nn.Embedding) and module.num_embeddings == target.tokens.vocab
            ),
            None,
        )
        if words is None:
            raise NoText(f"the model has no embeddings of {target.tokens.vocab} words")
        self.embeddings = parameters[words].detach()
        """float32, shape (vocabulary, width)."""
        anatomy = dissect(target)
        self._generator, among = generator, words_of(anatomy, generator) if narrowed else None
        self.narrowed = among is not None
        """Whether it is known which tokens there are."""
        self.readable = torch.arange(len(self.embeddings), device=target.device) if among is None else among
        """Tokens that can be read, int64."""
        used = longest(anatomy)
        if not used:
            raise NoText("the gradient of the position embeddings does not say how long the sentences are")
        # Nothing depends on a causal model's last token but as a label.
        length = used + 1 if target.loss is LOSSES["causal_lm"] else used
        most = max(float(rms(gradient)) for gradient, _ in seen.values())
        matched = [name for name, (gradient, _) in seen.items() if name != words and rms(gradient) > ROUNDING * most]
        self._matched = [parameters[name] for name in matched]
        self.observed, self._known = ([seen[name][part].float() for name in matched] for part in (0, 1))
        """float32: the gradients to match, 0 where unknown."""
        self._labels = dummy_labels(target, length)
        self.shape = torch.Size((target.batch_size, length, self.embeddings.shape[1]))
        """(batch, length, width)."""
        self._scale = self.embeddings.square().mean().sqrt()

    def start(self) -> Tensor:
        """A random z: normal, or, where it is known which tokens there are, any of these in every place."""
        shapes = self.shape.numel(), self._labels.shape.numel()
        words, logits = (torch.randn(size, generator=self._generator).to(self._scale.device) for size in shapes)
        if self.narrowed:
            drawn = torch.randint(len(self.readable), self.shape[:2], generator=self._generator)
            words = self.embeddings[self.readable[drawn.to(words.device)]].flatten() / self._scale
        return torch.cat([words, logits])

    def reordered(self, z: Tensor, sentence: int, order: Tensor) -> Tensor:
        """z, with the embeddings of a sentence in another order, int64, shape (length,)."""
        moved = z.clone()
        words = moved[: self.shape.numel()].view(self.shape)
        words[sentence] = words[sentence, order]
        return moved

    def variants(self, z: Tensor, sentence: int, place: int) -> list[Tensor]:
        """z, with the embedding of each token that can be read in one place."""
        changed = z.repeat(len(self.readable), 1)
        words = changed[:, : self.shape.numel()].view(-1, *self.shape)
        words[:, sentence, place] = self.embeddings[self.readable] / self._scale
        return list(changed)

    def snapped(self, z: Tensor) -> Tensor:
        """z, with the embeddings of the tokens that are read."""
        words = self.embeddings[self._nearest(z)].flatten() / self._scale
        return torch.cat([words, z[self.shape.numel() :]])

    def words(self, z: Tensor) -> Tensor:
        """Embeddings, shape (batch, length, width): z, in units of the root mean square of the vocabulary's."""
        return z[: self.shape.numel()].view(self.shape) * self._scale

    def gradients(self, z: Tensor, *, differentiable: bool = True) -> list[Tensor]:
        """Those to lay beside `observed`."""
        tokens = torch.full(self.shape[:2], (self._pad + 1) % len(self.embeddings), device=z.device)
        loss = self._labels.loss(self._model(tokens, self.words(z)), self._logits(z))
        gradients = torch.autograd.grad(loss, self._matched, create_graph=differentiable)
        return [gradient * known for gradient, known in zip(gradients, self._known, strict=True)]

    def read(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, int64, shape (batch, length), each the nearest by its angle; and the likeliest labels."""
        return self._labels.read(self._logits(z), self._nearest(z))

    def _nearest(self, z: Tensor) -> Tensor:
        known = functional.normalize(self.embeddings[self.readable], dim=1)
        return self.readable[(functional.normalize(self.words(z), dim=2) @ known.T).argmax(2)]

    def _logits(self, z: Tensor) -> Tensor:
        return z[self.shape.numel() :].view(self._labels.shape)
