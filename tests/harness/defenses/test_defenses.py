"""Defenses, by what must hold whatever the gradient is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.defenses import Chain, Moment, State, load_defense
from harness.defenses.blocks import BLOCK
from harness.defenses.largest import Numbers, largest, sample
from harness.errors import ConfigError, DefenseError
from harness.exchange.base import as_tensor
from harness.seeding import Draws
from harness.wire.codec import decode

SIZES = (0, 1, 600, 7, 2400)
ELEMENTS = sum(SIZES)
SPECS = (
    "",
    "clip:1.0",
    "noise-gaussian:1e-2",
    "noise-laplace:1e-2",
    "prune:0.5",
    "topk:0.9",
    "topk-dgc:0.9",
    "topk-dgc:0.99,momentum=0.5,clip=2.0,warmup=3",
    "fp16",
    "bf16",
    "int8",
    "int8:rounding=stochastic",
    "qsgd:7",
    "qsgd:1,bucket=100",
    "qsgd:127",
    "ternary",
    "ternary:clip=2.5",
    "sign",
    "clip:1.0+noise-gaussian:1e-3+int8",
)
LOSES = ("sign", "topk:0.9", "topk-dgc:0.9,momentum=0")


def gradient(step: int = 0) -> Tensor:
    """Of very different sizes in different tensors, as gradients are."""
    drawn = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(step))
    return torch.cat([part * 10.0**-at for at, part in enumerate(drawn.split(SIZES))])


def apply(chain: Chain, flat: Tensor, state: State, *, rank: int = 0, step: int = 0, seed: int = 0):
    return chain(flat, SIZES, state, seed=seed, rank=rank, step=step)


def sent_by(spec: str, flat: Tensor, **moment: int) -> Tensor:
    chain = load_defense(spec)
    return as_tensor(apply(chain, flat, chain.begin(SIZES), **moment)[0])


@pytest.mark.parametrize("spec", SPECS)
def test_a_step_is_pure_and_its_draws_belong_to_a_moment(spec):
    chain, flat = load_defense(spec), gradient()
    before = chain.begin(SIZES)
    state = {name: tensor + 0.01 for name, tensor in before.items()}
    kept = flat.clone()

    def sent(**moment: int) -> tuple[Tensor, State]:  # a state is handed over
        coded, after = apply(chain, flat, {name: tensor.clone() for name, tensor in state.items()}, **moment)
        return as_tensor(coded), after

    first, after = sent(rank=1, step=2)
    again, same = sent(rank=1, step=2)
    assert torch.equal(first, again) and all(torch.equal(after[name], same[name]) for name in state)
    assert torch.equal(flat, kept)
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    drawn = any(name in spec for name in ("noise", "stochastic", "qsgd", "ternary"))
    for other in ({"rank": 0, "step": 2}, {"rank": 1, "step": 3}, {"rank": 1, "step": 2, "seed": 1}):
        assert torch.equal(sent(**other)[0], first) != drawn or "warmup" in spec


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("sizes", [(1,), (0,), (3, 0, 5)])
def test_small_and_zero_gradients_are_sent(spec, sizes):
    chain = load_defense(spec)
    sent, _ = chain(torch.zeros(sum(sizes)), sizes, chain.begin(sizes), seed=0, rank=0, step=0)
    assert as_tensor(sent).shape == (sum(sizes),)
    if "noise" not in spec:
        assert not as_tensor(sent).any()


def test_nothing_at_all_and_a_huge_clip_are_the_gradient_to_the_bit():
    flat = gradient()
    for spec in ("", "clip:1e9", "noise-gaussian:0", "noise-laplace:0", "prune:0", "topk:0", "clip:1e9+prune:0.0"):
        assert torch.equal(sent_by(spec, flat), flat), spec


def test_a_clipped_gradient_has_the_norm_and_the_direction():
    flat = gradient()
    clipped = sent_by("clip:0.05", flat)
    assert torch.linalg.vector_norm(clipped).item() == pytest.approx(0.05)
    assert torch.allclose(clipped / 0.05, flat / torch.linalg.vector_norm(flat), rtol=1e-5)


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_noise_has_its_law_and_differs_from_rank_to_rank(law):
    size = 100_000
    chain = load_defense(f"noise-{law}:0.01")
    draws = [chain(torch.zeros(size), (size,), {}, seed=0, rank=rank, step=0)[0] for rank in (0, 1)]
    for noise in draws:
        # Standard errors: of the mean 0.01 / sqrt(1e5) = 3e-5; of the deviation, for Laplace, 1.1 / sqrt(1e5) of it.
        assert abs(noise.mean().item()) < 2e-4 and noise.std().item() == pytest.approx(0.01, rel=0.02)
        beyond = (noise.abs() > 0.03).float().mean().item()
        assert beyond == pytest.approx({"gaussian": 0.0027, "laplace": np.exp(-3 * np.sqrt(2))}[law], rel=0.25)
    assert abs(torch.corrcoef(torch.stack(draws))[0, 1].item()) < 0.02


def test_more_than_32_bits_of_a_seed_count():
    # torch's own manual_seed takes the lowest 32: two seeds that differ above them would draw the same noise.
    seeds = [5, 5 + (1 << 40), 5 + (1 << 100)]
    draws = [sent_by("noise-gaussian:1", torch.zeros(ELEMENTS), seed=seed) for seed in seeds]
    assert not any(torch.equal(draws[a], draws[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    drawn = Draws(3, "test")
    bytes_ = np.concatenate([drawn.words(np.uint8, 1000), drawn.words(np.uint32, 50_000).view(np.uint8)])
    counts = np.bincount(bytes_, minlength=256)
    # Chi-squared with 255 degrees of freedom: its deviation is 22.6.
    assert abs(((counts - counts.mean()) ** 2 / counts.mean()).sum() - 255) < 5 * 22.6


@pytest.mark.parametrize("spec", LOSES)
def test_sent_and_kept_make_up_the_sum_of_the_gradients(spec):
    chain = load_defense(spec)
    state, sent, total = chain.begin(SIZES), torch.zeros(ELEMENTS), torch.zeros(ELEMENTS)
    for step in range(20):
        coded, state = apply(chain, gradient(step), state, step=step)
        sent, total = sent + as_tensor(coded), total + gradient(step)
        # Each step rounds a few times, at the size of what is kept or sent.
        scale = 20 * torch.cat(
            [part.abs().max().expand(len(part)) if len(part) else part for part in total.split(SIZES)]
        )
        assert ((sent + state["0.residual"] - total).abs() <= 20 * torch.finfo(torch.float32).eps * scale).all()


@pytest.mark.parametrize("spec", ["int8:rounding=stochastic", "qsgd:7", "qsgd:1", "qsgd:127", "ternary"])
def test_rounding_by_chance_is_unbiased(spec):
    flat, draws = gradient(), 400
    sent = torch.stack([sent_by(spec, flat, step=step) for step in range(draws)])
    unit = torch.from_numpy(decode(*_whole(apply(load_defense(spec), flat, {})[0])).error)
    error = (sent.mean(0) - flat) / unit
    # Six standard errors: a draw between two levels deviates by half a unit at most.
    assert (error.abs() <= 6 * 0.5 / draws**0.5).all()
    assert abs(error.mean().item()) <= 6 * 0.5 / (draws * ELEMENTS) ** 0.5


def test_pruning_sends_the_largest_of_each_tensor_exactly():
    flat = gradient()
    chain = load_defense("prune:0.75")
    coded, _ = apply(chain, flat, {})
    said = decode(*_whole(coded))
    assert torch.equal(as_tensor(coded)[torch.from_numpy(said.sent)], flat[torch.from_numpy(said.sent)])
    for part, sent in zip(flat.split(SIZES), torch.from_numpy(said.sent).split(SIZES), strict=True):
        assert int(sent.sum()) == len(part) - round(0.75 * len(part))
        if sent.any() and not sent.all():
            assert part[sent].abs().min() >= part[~sent].abs().max()


@pytest.mark.parametrize("spec", ["int8", "int8:rounding=stochastic", "qsgd:7", "qsgd:127", "ternary", "fp16", "bf16"])
def test_the_gradient_lies_in_the_cell_that_the_wire_shows(spec):
    flat = gradient()
    coded, _ = apply(load_defense(spec), flat, {})
    said = decode(*_whole(coded))
    assert (np.abs(said.values.astype(np.float64) - flat.numpy()) <= said.error).all()


def test_momentum_and_clipping_are_those_of_the_paper():
    """Against the recurrence of Lin et al. 2018, algorithm 1, written out for two elements of which one is sent."""
    chain = load_defense("topk-dgc:0.5,momentum=0.5,clip=5.0")
    state = chain.begin((2,))
    sent = []
    for step, g in enumerate(([3.0, 4.0], [6.0, 8.0], [0.0, 1.0])):
        coded, state = chain(torch.tensor(g), (2,), state, seed=0, rank=0, step=step)
        sent.append(as_tensor(coded).tolist())
    # g = (3, 4): u = v = g; 4 is sent.     g = (6, 8) clipped to (3, 4): u = (4.5, 4), v = (7.5, 4); 7.5 is sent.
    # g = (0, 1): u = (0, 3), v = (0, 7); 7 is sent.
    assert sent == [[0.0, 4.0], [7.5, 0.0], [0.0, 7.0]]


def test_a_warm_up_sends_less_from_step_to_step():
    chain = load_defense("topk-dgc:0.99,warmup=4")
    state, shares = chain.begin((10_000,)), []
    for step in range(6):
        coded, state = chain(gradient(step).repeat(4)[:10_000], (10_000,), state, seed=0, rank=0, step=step)
        shares.append(decode(*_whole(coded)).sent.mean())
    assert shares == pytest.approx([0.25, 0.1119, 0.05, 0.0224, 0.01, 0.01], abs=1e-3)


def test_clipping_examples_is_the_mean_of_clipped_gradients():
    step = load_defense("clip-examples:1.0+noise-gaussian:0").of_examples
    assert step is not None
    examples = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    # The first has norm 5, the second 0.5.
    clipped = step(examples, Moment(seed=0, rank=0, step=0))
    assert torch.allclose(clipped, torch.tensor([0.6 + 0.3, 0.8 + 0.4]) / 3)


@pytest.mark.parametrize("spec", ["int8", "qsgd:7", "ternary", "sign"])
def test_what_is_not_a_number_has_no_level(spec):
    flat = gradient()
    flat[5] = float("nan")
    with pytest.raises(DefenseError, match="not finite"):
        sent_by(spec, flat)


@pytest.mark.parametrize(
    "spec, text",
    [
        ("gauss:1", "'gauss' is not known; there are: clip-examples, dp-sgd, clip, noise-gaussian"),
        ("clip", "clip needs its norm; wanted clip:NORM"),
        ("clip:0", "wanted a norm of more than 0"),
        ("clip:much", "holds a text where clip takes a number; wanted clip:NORM"),
        ("prune:1", "wanted a share of 0 or more and below 1, e.g. 0.9, got 1"),
        ("noise-gaussian:-1", "wanted a standard deviation of 0 or more"),
        ("int8:8", "'8' is not an option of int8; wanted int8:rounding=nearest"),
        ("fp16:1", "'1' is not an option of fp16; wanted fp16"),
        ("int8:rounding=up", "rounding: wanted nearest or stochastic, got up"),
        ("topk-dgc:0.99,speed=3", "'speed=3' is not an option of topk-dgc; wanted topk-dgc:SHARE,momentum=0.9"),
        ("qsgd:5", "wanted 1, 7, 127 levels, what 2, 4 and 8 bits hold, got 5"),
        ("prune:0.9+clip:1.0", "prune:0.9 codes what is sent, so it comes last"),
        ("int8+fp16", "int8 codes what is sent, so it comes last"),
        ("clip:1.0+clip-examples:1.0", "clip-examples:1.0 takes each example's gradient: put it first"),
        ("clip:1.0+soteria:0.5", "soteria:0.5 takes the batch itself: put it first"),
        ("clip:1.0+", "'' is not known"),
        ("dp-sgd:noise=1.0", "dp-sgd needs its clip; wanted dp-sgd:NOISE,CLIP,delta=1e-05"),
        ("dp-sgd:1.0,noise=2.0,clip=1", "'noise=2.0' is not an option of dp-sgd"),
        ("dp-sgd:noise=1,clip=1,delta=2", "delta: wanted more than 0 and below 1"),
    ],
)
def test_a_chain_that_cannot_be_is_one_line(spec, text):
    with pytest.raises(ConfigError) as caught:
        load_defense(spec)
    assert text in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).startswith("defense ")


def _whole(coded):
    codec, params, payload = coded.part(0, coded.size)
    return codec, coded.size, params, payload


def written_out(values: np.ndarray, sizes: tuple[int, ...], counts: list[int]) -> np.ndarray:
    """By sorting each tensor."""
    places, at = [np.empty(0, np.int64)], 0
    for size, count in zip(sizes, counts, strict=True):
        places.append(at + np.sort(np.argsort(-np.abs(values[at : at + size]), stable=True)[:count]))
        at += size
    return np.concatenate(places)


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["random", "the sample misses", "the sample misleads", "not a number"])
def test_the_largest_of_long_tensors_are_found_whatever_the_sample_says(share, kind):
    sizes = (5 * BLOCK + 17, 5, 3 * BLOCK + 1)
    values = np.random.default_rng(3).permutation(sum(sizes)).astype(np.float32) - np.float32(sum(sizes) / 3)
    looked_at = sample(np.arange(sizes[0]))
    assert 1000 < looked_at.size < sizes[0] / 50
    if kind == "the sample misses":
        values[looked_at] = 0
    elif kind == "the sample misleads":
        values[looked_at] *= 1e6
    counts = [round(size * share) for size in sizes]
    expected = written_out(values, sizes, counts)
    if kind == "not a number":
        values[7] = np.nan
        counts = [max(1, count) for count in counts]
        expected = written_out(np.where(np.isnan(values), np.float32(np.inf), values), sizes, counts)
    places, numbers = (np.concatenate(found) for found in zip(*largest(Numbers(values), sizes, counts), strict=True))
    assert np.array_equal(places, expected)
    assert np.array_equal(numbers, values[expected], equal_nan=True)


@pytest.mark.parametrize("spec", ["sign", "topk:0.999", "topk-dgc:0.99", "qsgd:7", "int8", "ternary:clip=2.0"])
def test_long_vectors_are_coded_as_written_out(spec):
    """In blocks as at once; segments that are cut, short ones together, and ones that fill a block."""
    sizes = (BLOCK + 3, 2, 1, 600, BLOCK, 0, 2 * BLOCK + 1)
    flat = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1))
    chain = load_defense(spec)
    state = {name: torch.randn(sum(sizes)) for name in chain.begin(sizes)}
    before = {name.partition(".")[2]: tensor.clone() for name, tensor in state.items()}
    coded, after = chain(flat, sizes, state, seed=0, rank=0, step=0)
    sent, total = as_tensor(coded), flat.clone()
    if before:
        total = before["residual"] + (flat + np.float32(0.9) * before["velocity"] if "velocity" in before else flat)
        left = torch.where(sent != 0, 0.0, total) if "top" in spec else total - sent
        assert torch.allclose(after["0.residual"], left, rtol=1e-6, atol=1e-6)
    for part, said in zip(total.split(sizes), sent.split(sizes), strict=True):
        if spec == "sign":
            assert torch.allclose(said, part.abs().mean() * part.sign(), rtol=1e-5)
        elif "top" in spec:
            assert int((said != 0).sum()) == np.ceil(len(part) * (0.001 if spec == "topk:0.999" else 0.01) - 1e-9)
            assert torch.equal(said[said != 0], part[said != 0])
        elif len(part):
            unit = {"q": part.norm() / 7, "i": part.abs().max() / 127, "t": part.abs().max()}[spec[0]]
            reach = unit / 2 if spec == "int8" else unit
            assert ((said - part).abs() <= reach * (1 + 1e-5)).all()


class Net(torch.nn.Module):
    """A convolution, a vector, a matrix and one that is too small to be worth two factors."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((12, 3, 5, 5), (12,), (30, 40), (2, 3), ())
        self.parts = torch.nn.ParameterList([torch.zeros(shape) for shape in shapes])


NET_SIZES = (900, 12, 1200, 6, 1)


def test_low_rank_and_residual_make_up_the_sum_of_the_gradients():
    chain = load_defense("powersgd:2").fit(Net())
    state, sent, total = chain.begin(NET_SIZES), torch.zeros(2119), torch.zeros(2119)
    for step in range(10):
        gradient = torch.randn(2119, generator=torch.Generator().manual_seed(step))
        coded, state = chain(gradient, NET_SIZES, state, seed=0, rank=0, step=step)
        product, sent, total = as_tensor(coded), sent + as_tensor(coded), total + gradient
        assert torch.linalg.matrix_rank(product[:900].view(12, 75)) == 2
        assert torch.linalg.matrix_rank(product[912:2112].view(30, 40)) == 2
        for plain in (slice(900, 912), slice(2112, 2119)):
            assert torch.equal(product[plain], gradient[plain])
        assert torch.allclose(sent + state["0.residual"], total, atol=1e-4)


def test_a_warm_start_comes_to_the_best_low_rank_and_a_low_rank_gradient_is_sent_whole():
    drawn = torch.Generator().manual_seed(0)
    low = torch.randn(30, 2, generator=drawn) @ torch.randn(2, 40, generator=drawn)
    chain = load_defense("powersgd:2").fit(Net())

    def errors(matrix: Tensor, steps: int) -> list[float]:
        """Of the same gradient again and again, with nothing left from the step before but the start."""
        state, found = chain.begin(NET_SIZES), []
        for step in range(steps):
            flat = torch.cat([torch.zeros(912), matrix.reshape(-1), torch.zeros(7)])
            coded, state = chain(flat, NET_SIZES, state, seed=0, rank=0, step=step)
            state["0.residual"].zero_()
            found.append(float((as_tensor(coded) - flat).norm()))
        return found

    assert errors(low, 1)[0] < 1e-4
    noisy = low + 0.1 * torch.randn(30, 40, generator=drawn)
    u, s, v = torch.linalg.svd(noisy)
    best = float((u[:, :2] * s[:2] @ v[:2] - noisy).norm())
    first, *_, last = errors(noisy, 20)
    assert first > last and last == pytest.approx(best, rel=1e-4)


def test_low_rank_of_nothing_and_of_what_is_not_a_number():
    chain = load_defense("powersgd:2").fit(Net())
    state = chain.begin(NET_SIZES)
    for _ in range(2):  # a start that has become zero is no end
        coded, state = chain(torch.zeros(2119), NET_SIZES, state, seed=0, rank=0, step=0)
        assert not as_tensor(coded).any()
    coded, state = chain(torch.ones(2119), NET_SIZES, state, seed=0, rank=0, step=0)
    assert torch.allclose(as_tensor(coded), torch.ones(2119), atol=1e-4)
    with pytest.raises(DefenseError, match="not finite"):
        chain(torch.full((2119,), torch.nan), NET_SIZES, state, seed=0, rank=0, step=0)
    with pytest.raises(ConfigError, match="wanted a rank of 1 or more"):
        load_defense("powersgd:0")
    with pytest.raises(ConfigError, match="powersgd: a factor of 3000000 x 2 numbers"):
        load_defense("powersgd:2").fit(torch.nn.Linear(3_000_000, 10, device="meta"))
