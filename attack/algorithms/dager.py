"""DAGER: sentences from the spans of a transformer's first gradients, exact, not searched by gradient matching.

First, which tokens can stand where: those whose input to the first attention is in the span of the gradient of query,
key and value. Then whole sentences, each proven by itself (`attack.engine.sentences`). Last the labels, by least
squares (`attack.engine.token_labels`). The rank of the second span is the number of tokens that are to be found.

The inputs of the first attention are sums of a word's and a position's embedding. As soon as sentences share words and
positions, more pairs are in the span than there are in the batch; the second check settles which.

Reference: Petrov, Dimitrov, Baader, Müller, Vechev 2024, NeurIPS, arXiv 2405.15586.
Differs from the paper: `attack.engine.span` and `attack.engine.sentences` say where; and where the embeddings are
trained, their gradient says first which tokens occur at all (`attack.engine.vocabulary`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attack.algorithms.base import Answer
from attack.engine.anatomy import Anatomy, NoTransformer, dissect
from attack.engine.context import Context
from attack.engine.labels import NoLabel
from attack.engine.sentences import Assembler, Candidates, Pairs
from attack.engine.span import Span
from attack.engine.standing import standing
from attack.engine.target import Target
from attack.engine.token_labels import padded, solve_labels
from attack.engine.vocabulary import linked, longest, words_of

MOST = 4000
"""Candidates, beyond which the first check has told too little: their scores would take gigabytes."""


def dager(target: Target, context: Context) -> Answer:
    """Sentences of the batch, in an order of its own."""
    assert target.tokens is not None
    try:
        anatomy = dissect(target)
    except NoTransformer as error:
        return _nothing(target, str(error))
    inputs, contexts = Span(anatomy.inputs), Span(anatomy.contexts)
    states = Span(anatomy.states)
    total = max(contexts.rank, states.rank)
    bound = f"{total} different tokens in their places are seen, {contexts.room - 1} could be told apart"
    if inputs.full or total >= contexts.room:
        return _nothing(target, f"the batch has {inputs.room} tokens or more, as many as the model is wide")

    def doubt(sentence: Tensor, made: Tensor) -> float:
        order = torch.arange(len(sentence), device=sentence.device)
        return states.doubt(anatomy.behind(made, sentence, order))

    assembler = Assembler(contexts, context, doubt)
    answer = _nothing(target, f"{bound}; no sentence was proven")
    for pairs in _pairs(target, anatomy, inputs, total, context):
        if not 0 < len(pairs.tokens) <= MOST:
            return _nothing(
                target, f"{bound}; {len(pairs.tokens)} tokens at positions are in the span of the first layer"
            )
        candidates = Candidates.of(anatomy, pairs)
        for found in [assembler.causal(candidates)] if anatomy.causal else assembler.encoded(candidates, total):
            seen = f"{bound}; {len(found)} sentences of {sum(map(len, found))} tokens were proven"
            answer = _nothing(target, seen)
            if not found or (not anatomy.causal and sum(map(len, found)) < total):
                continue
            sentences = [torch.tensor(sentence, device=target.device) for sentence in found]
            try:
                sentences, labels = solve_labels(target, sentences, context.generator)
            except NoLabel as error:
                answer = _nothing(target, f"{seen}, their labels not: {error}")
                continue
            rows = padded(sentences, target.tokens.pad)
            answer = Answer(inputs=rows, labels=labels, batch_size_read=True)
            if anatomy.causal or target.explained_by(rows, labels):
                return answer
    return answer


def _pairs(target: Target, anatomy: Anatomy, inputs: Span, total: int, context: Context) -> Iterator[Pairs]:
    """Those that are seen in the gradient of the embeddings, as far as that tells; then all that are in the span."""
    words = words_of(anatomy, context.generator)
    if words is None:
        assert target.tokens is not None
        words = torch.arange(target.tokens.vocab, device=target.device)
        fits, told = torch.ones(len(words), longest(anatomy), dtype=torch.bool, device=target.device), None
    else:
        fits = linked(anatomy, words, context.generator)
        told = standing(anatomy, words, total, context.generator)
    there = torch.stack(
        [
            inputs.has(anatomy.embed(words, torch.full_like(words, place))) & fits[:, place]
            for place in range(longest(anatomy))
        ],
        1,
    )
    if told is not None:
        # A word that is seen nowhere may stand anywhere.
        yield Pairs.of(words, there & (told | ~told.any(1, keepdim=True)), told)
    yield Pairs.of(words, there, there if told is None else told)


def _nothing(target: Target, reason: str) -> Answer:
    dropped = max((module.p for module in target.model.modules() if isinstance(module, nn.Dropout)), default=0.0)
    if dropped:
        reason += f"; the job drops {dropped:.0%} of the activations, and then inputs are not those of tokens"
    return Answer(inputs=None, labels=None, reason=reason)
