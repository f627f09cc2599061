"""Labels of sentences that are known: classes, the tokens behind masks, and the last token of each, which a causal
model only sees as a label.

With the tokens known, so are the inputs a_n of every layer, and a layer's gradient sum_n d_n a_n^T gives each d_n by
least squares: what the loss says of that layer's output. Next to the last layer, that names the label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from attack.engine.labels import NoLabel
from attack.engine.layout import ending
from attack.engine.target import Target
from harness.models import IGNORED, LOSSES

FAINT = 1e-3
"""Share of the largest d_n below which a token has no label: those of others are errors of rounding, at 1e-6 or so."""
SKETCH = 32
"""Random directions in which tokens are compared as labels."""


def solve_labels(target: Target, sentences: list[Tensor], generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """The sentences, with what only a label says of them, and the labels as the loss takes them.

    Args:
        sentences: tokens of each, int64, shape (length,), all of the batch.

    Raises: NoLabel.
    """
    with torch.enable_grad():
        if target.loss is LOSSES["cross_entropy"]:
            return sentences, target.labels if target.labels is not None else _classes(target, sentences)
        if target.loss is LOSSES["masked_lm"]:
            return sentences, _masked(target, sentences)
        if target.loss is LOSSES["causal_lm"]:
            whole = _ended(target, sentences, generator)
            return whole, padded(whole, IGNORED)
    raise NoLabel("the loss is none whose labels are known to be read")


def padded(rows: list[Tensor], value: int) -> Tensor:
    """int64, shape (batch, longest)."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """What went through a layer."""

    inputs: Tensor
    outputs: Tensor
    """The rest of the model depends on these."""
    logits: Tensor


def _classes(target: Target, sentences: list[Tensor]) -> Tensor:
    """int64, shape (batch,)."""
    name, layer = next(
        (
            (name, module)
            for name, module in reversed(list(target.model.named_modules()))
            if isinstance(module, nn.Linear) and module.out_features == target.classes
        ),
        ("", None),
    )
    if layer is None:
        raise NoLabel("the model does not end in a linear layer with an output a class")
    seen = _run(target, sentences, name)
    given = seen.inputs.flatten(0, -2)
    if len(given) != len(sentences):
        # A classifier of every token, of which one counts.
        raise NoLabel("the last layer sees more than one state of a sentence")
    slopes = _solved(target, name, given)
    return (len(sentences) * slopes - seen.logits.detach().softmax(1)).argmin(1)


def _masked(target: Target, sentences: list[Tensor]) -> Tensor:
    """int64, shape (batch, longest), `IGNORED` where nothing was asked for."""
    name = _layer(target, r"predictions\.transform\.dense", "layer before the last")
    seen = _run(target, sentences, name)
    real = padded([torch.ones_like(row) for row in sentences], 0).bool()
    slopes = _solved(target, name, seen.inputs[real])
    sizes = torch.linalg.vector_norm(slopes, dim=1)
    asked = sizes > FAINT * sizes.max()
    count = int(asked.sum())
    logits = seen.logits[real][asked]
    bias = _gradient(target, _parameter(target, r"predictions\.(decoder\.)?bias", "bias of the last layer"))
    counts = (logits.detach().softmax(1).sum(0) - count * bias).round().long().clamp(min=0)
    tokens = torch.arange(len(bias), device=bias.device).repeat_interleave(counts)
    if len(tokens) != count:
        raise NoLabel(f"{count} tokens were asked for, the last bias speaks of {len(tokens)}")
    costs = []
    for token in tokens.tolist():
        loss = -logits.log_softmax(1)[:, token].sum()
        (slope,) = torch.autograd.grad(loss, seen.outputs, retain_graph=True)
        costs.append((slope[real][asked] - count * slopes[asked]).square().sum(1))
    order = linear_sum_assignment(torch.stack(costs, 1).detach().cpu().numpy())[1]
    labels = torch.full(real.shape, IGNORED, device=real.device)
    places = torch.zeros_like(real)
    places[real] = asked
    labels[places] = tokens[torch.as_tensor(order, device=tokens.device)]
    return labels


def _ended(target: Target, sentences: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Each with its last token: nothing depends on that as an input.

    Of the last layer's gradient, sum_n (p_n - label_n) h_n^T / all, only the last labels are unknown: what the others
    leave is -h_n / all in the row of each. Where that layer is the word embeddings as well, the rows of words that
    occur hold more than that; for these, the layer before the last norm decides.
    """
    behind = _run(target, sentences, _last_norm(target))
    real = padded([torch.ones_like(row) for row in sentences], 0).bool()
    last = torch.tensor([len(row) for row in sentences]).cumsum(0) - 1
    weight, tied = _last_weight(target)
    states, chances = behind.outputs[real].detach(), behind.logits[real].detach().softmax(1)
    left = len(states) * _gradient(target, weight) - chances.T @ states
    known = torch.ones(len(states), dtype=torch.bool).index_fill(0, last, False)
    left.index_add_(0, torch.cat([row[1:] for row in sentences]), states[known])
    pulls = torch.linalg.lstsq(states[last].T, left.T).solution
    words = torch.cat(sentences).unique()
    if tied:
        pulls[:, words] = torch.inf
    tokens, unseen = pulls.argmin(1), pulls.amin(1) > -0.5
    if unseen.any():
        among = _last_block(target, sentences, behind, words, last, generator)
        tokens = torch.where(unseen, among, tokens)
    return [torch.cat([row, token[None]]) for row, token in zip(sentences, tokens, strict=True)]


def _last_block(
    target: Target, sentences: list[Tensor], behind: _Pass, words: Tensor, last: Tensor, generator: torch.Generator
) -> Tensor:
    """The label of each sentence's last state, among `words`, by the gradient of the last block's output, shape
    (batch,)."""
    name = _layer(target, r"h\.\d+\.mlp\.c_proj", "feed-forward layers")
    norm = target.model.get_submodule(_last_norm(target))
    real = padded([torch.ones_like(row) for row in sentences], 0).bool()
    inputs = _run(target, sentences, name).inputs[real]
    slopes = _solved(target, name, inputs, transposed=True)[last] * int(real.sum())
    weight = dict(target.model.named_parameters())[_last_weight(target)[0]].detach()
    sketch = torch.randn(weight.shape[1], SKETCH, generator=generator, dtype=torch.float64).to(weight.device)
    found = []
    for state, logits, slope in zip(behind.inputs[real][last], behind.logits[real].detach()[last], slopes, strict=True):
        # Slopes of the loss by the state, for each token as the label: J^T W^T (p - e_token).
        backwards = torch.func.jacrev(norm)(state) @ sketch
        wanted = weight.T @ logits.softmax(0) @ backwards - slope @ sketch
        found.append(words[(wanted - weight[words] @ backwards).square().sum(1).argmin()])
    return torch.stack(found)


def _run(target: Target, sentences: list[Tensor], name: str) -> _Pass:
    """The model on these sentences, cut at a layer."""
    assert target.tokens is not None
    kept: list[tuple[Tensor, Tensor]] = []

    def cut(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept.append((given[0].detach(), output.detach().requires_grad_()))
        return kept[-1][1]

    with _hooked(target.model.get_submodule(name), cut):
        logits = target.model(padded(sentences, target.tokens.pad))
    return _Pass(inputs=kept[0][0], outputs=kept[0][1], logits=logits)


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _solved(target: Target, name: str, inputs: Tensor, *, transposed: bool = False) -> Tensor:
    """d_n of a layer whose inputs are known, shape (n, width) -> (n, outputs)."""
    gradient = _gradient(target, f"{name}.weight")
    gradient = gradient if transposed else gradient.T
    if len(inputs) > inputs.shape[1]:
        raise NoLabel(f"{len(inputs)} tokens, and layer {name} tells {inputs.shape[1]} apart")
    return torch.linalg.lstsq(inputs.T, gradient).solution


def _gradient(target: Target, name: str) -> Tensor:
    names = [each for each, _ in target.model.named_parameters()]
    return target.tensors(target.gradient)[names.index(name)]


def _last_weight(target: Target) -> tuple[str, bool]:
    """The name of the language model's last weights, and whether they are the word embeddings."""
    own = next((name for name, _ in target.model.named_parameters() if name.endswith("lm_head.weight")), None)
    return own or _parameter(target, r"wte\.weight", "word embeddings"), own is None


def _last_norm(target: Target) -> str:
    return _layer(target, r"ln_f", "layer norm before the last layer")


def _layer(target: Target, pattern: str, what: str) -> str:
    return ending([name for name, _ in target.model.named_modules()], pattern, what)


def _parameter(target: Target, pattern: str, what: str) -> str:
    return ending([name for name, _ in target.model.named_parameters()], pattern, what)
