"""Training with a defense: resumed as uninterrupted, what is sealed is undefended, and degenerate settings are SGD."""

from __future__ import annotations

import dataclasses
import json
import threading
from math import exp
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.special import ndtr

from harness.config import TrainConfig
from harness.defenses import Moment, load_defense
from harness.defenses.base import ExampleStep
from harness.defenses.dp_sgd import DPSGD
from harness.errors import CheckpointError, ConfigError
from harness.exchange import LocalExchange
from harness.exchange.base import flat_state
from harness.gradients import example_gradients, mean_gradient
from harness.models import load_model
from harness.models.losses import LOSSES
from harness.privacy import Accountant, Spent, read_spent
from harness.training import Trainer
from harness.types import Batch

PLAIN = TrainConfig(model="mlp:hidden=20", batch_size=3, steps=6, tensorboard=False, truth=False)
DEFENSES = (
    "sign",
    "topk-dgc:0.9",
    "clip-examples:0.1+noise-gaussian:1e-3+int8:rounding=stochastic",
    "dp-sgd:noise=1,clip=0.1+topk:0.5",
    "powersgd:2",
    "powersgd-averaged:2",
)


def trained(config: TrainConfig, run: Path | None = None, *, world: int = 1, resume: bool = False) -> torch.Tensor:
    """Ranks as threads; the weights that all end with."""
    # One after the other: what draws the first weights is one generator for all threads.
    trainers = [Trainer(config, rank=rank, world_size=world) for rank in range(world)]
    states = {}

    def train(trainer: Trainer, end: LocalExchange) -> None:
        if resume:
            assert run is not None
            trainer.resume(run)
        trainer.train(end, run=run)
        states[trainer.rank] = flat_state(trainer.model)

    threads = [
        threading.Thread(target=train, args=pair) for pair in zip(trainers, LocalExchange.group(world), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(states[rank], states[0]) for rank in range(world))
    return states[0]


@pytest.mark.parametrize("defense", DEFENSES)
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path, defense: str) -> None:
    config = dataclasses.replace(PLAIN, defense=defense, exchange="allreduce")
    whole = trained(config, world=2)
    assert not torch.equal(whole, trained(PLAIN, world=2))
    trained(dataclasses.replace(config, steps=4, checkpoint_every=2), tmp_path, world=2)
    assert torch.equal(trained(config, tmp_path, world=2, resume=True), whole)


def test_a_checkpoint_that_lacks_a_rank_is_not_whole(tmp_path: Path) -> None:
    config = dataclasses.replace(PLAIN, defense="sign", steps=4, checkpoint_every=2)
    trained(config, tmp_path)
    files = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
    assert files == [f"step{step}{rank}.safetensors" for step in (2, 4) for rank in (".rank0", "")]
    (tmp_path / "checkpoints" / "step4.rank0.safetensors").unlink()
    trainer = Trainer(config, rank=0, world_size=1)
    trainer.resume(tmp_path)
    assert trainer.steps_done == 2
    (tmp_path / "checkpoints" / "step2.rank0.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"step2\.rank0\.safetensors: cannot be read"):
        trainer.resume(tmp_path)
    with pytest.raises(CheckpointError, match="was written with defense = 'sign', and this run has ''"):
        Trainer(PLAIN, rank=0, world_size=1).resume(tmp_path)


def test_no_noise_and_a_huge_clip_is_plain_training() -> None:
    whole = trained(PLAIN)
    assert torch.equal(trained(dataclasses.replace(PLAIN, defense="clip:1e9+noise-gaussian:0")), whole)
    examples = trained(dataclasses.replace(PLAIN, defense="clip-examples:1e9"))
    # The same sums in another order, over six steps at a rate of 0.1.
    assert torch.allclose(examples, whole, rtol=0, atol=1e-6)


def test_what_is_sealed_is_the_undefended_gradient(tmp_path: Path) -> None:
    config = dataclasses.replace(PLAIN, truth=True, steps=1)
    trained(config, tmp_path / "plain")
    trained(dataclasses.replace(config, defense="clip:1e-3+sign"), tmp_path / "defended")
    plain, defended = (
        load_file(tmp_path / name / "truth" / "step0.rank0.safetensors")["gradient"] for name in ("plain", "defended")
    )
    assert torch.equal(plain, defended) and plain.any()


@pytest.mark.parametrize("model", ["lenet:input=3x16x16,classes=10", "mlp:input=3x16x16,classes=10,hidden=20"])
def test_the_gradients_of_examples_are_those_of_batches_of_one(model: str) -> None:
    torch.manual_seed(0)
    net, loss = load_model(model), LOSSES["cross_entropy"]
    batch = Batch(inputs=torch.rand(4, 3, 16, 16), labels=torch.tensor([3, 1, 1, 7]))
    found = example_gradients(net, loss, batch)
    for at in range(4):
        alone = mean_gradient(net, loss, Batch(inputs=batch.inputs[at : at + 1], labels=batch.labels[at : at + 1]))
        assert torch.allclose(found.examples[at], alone.flat, rtol=1e-4, atol=1e-6)
    whole = mean_gradient(net, loss, batch)
    assert torch.allclose(found.mean().flat, whole.flat, rtol=1e-4, atol=1e-6)
    assert found.loss == pytest.approx(whole.loss, rel=1e-5) and found.correct == whole.correct


def test_soteria_prunes_what_tells_most_of_the_batch() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 9), torch.nn.Sigmoid(), torch.nn.Linear(9, 4))
    batch = Batch(inputs=torch.rand(3, 1, 3, 4), labels=torch.tensor([0, 3, 1]))
    whole = mean_gradient(net, LOSSES["cross_entropy"], batch).flat
    # Written out: one derivative of one feature of one example after the other.
    scores = torch.zeros(9)
    for example in batch.inputs:
        inputs = example[None].requires_grad_()
        features = net[:3](inputs)[0]
        for at in range(9):
            (slope,) = torch.autograd.grad(features[at], inputs, retain_graph=True)
            scores[at] += features[at].abs().item() / slope.norm()
    link = load_defense("soteria:0.4").fit(net).of_batch
    assert link is not None
    sent = link(whole, net, batch)
    begin = 12 * 9 + 9
    pruned = scores.topk(round(0.4 * 9)).indices
    expected = whole.clone()
    expected[begin : begin + 36].view(4, 9)[:, pruned] = 0
    assert torch.equal(sent, expected) and not torch.equal(sent, whole)
    assert torch.equal(load_defense("soteria:0").fit(net).of_batch(whole, net, batch), whole)
    other = load_defense("soteria:0.5,layer=1").fit(net).of_batch(whole, net, batch)
    assert torch.equal(other[108:], whole[108:]) and int((other[:108].view(9, 12) == 0).all(0).sum()) == 6


def test_soteria_looks_without_leaving_a_trace(tmp_path: Path) -> None:
    """A second pass neither moves batch norm nor draws other dropout: the model's own numbers are as without."""
    config = dataclasses.replace(PLAIN, model="resnet:depth=10,width=4", steps=2, truth=True)
    trained(dataclasses.replace(config, defense="soteria:0"), tmp_path / "looked")
    trained(config, tmp_path / "plain")
    for step in (0, 1):
        name = f"truth/step{step}.rank0.safetensors"
        looked, plain = (load_file(tmp_path / run / name) for run in ("looked", "plain"))
        assert all(torch.equal(looked[key], plain[key]) for key in plain)


def test_what_cannot_be_defended_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"layer .* normalizes by the batch"):
        trainer = Trainer(
            dataclasses.replace(PLAIN, model="resnet:depth=10,width=4", defense="clip-examples:1.0", steps=1),
            rank=0,
            world_size=1,
        )
        trainer.train(LocalExchange())
    with pytest.raises(ConfigError, match="has momentum in place of the optimizer's"):
        Trainer(
            dataclasses.replace(PLAIN, defense="topk-dgc:0.9", optimizer="sgd:lr=0.1,momentum=0.9"),
            rank=0,
            world_size=1,
        )
    with pytest.raises(ConfigError, match="wanted a linear layer fc9; the model has: "):
        Trainer(dataclasses.replace(PLAIN, defense="soteria:0.5,layer=fc9"), rank=0, world_size=1)
    with pytest.raises(ConfigError, match="sums factors, which zeromq does not: take --exchange allreduce or ddp"):
        Trainer(dataclasses.replace(PLAIN, defense="powersgd-averaged:2"), rank=0, world_size=1)
    with pytest.raises(ConfigError, match="'gauss' is not known"):
        Trainer(dataclasses.replace(PLAIN, defense="gauss"), rank=0, world_size=1)


def test_dp_sgd_is_clipping_and_each_ranks_own_noise(tmp_path: Path) -> None:
    examples = torch.tensor([[3.0, 4.0], [0.3, 0.4]]).repeat(1, 20_000)
    norm = float(torch.linalg.vector_norm(examples[0]))
    (clip,) = load_defense(f"clip-examples:{norm}").links
    (private,) = load_defense(f"dp-sgd:noise=0.5,clip={norm}").links
    assert isinstance(clip, ExampleStep) and isinstance(private, ExampleStep)
    noise = [
        private(examples, Moment(seed=0, rank=rank, step=0)) - clip(examples, Moment(seed=0, rank=0, step=0))
        for rank in (0, 1)
    ]
    for each in noise:  # of the sum 0.5 C, of the mean of two examples half of that; its own deviation is 1 / sqrt(8e4)
        assert each.std().item() == pytest.approx(0.25 * norm, rel=0.02)
    assert abs(torch.corrcoef(torch.stack(noise))[0, 1].item()) < 0.02
    config = dataclasses.replace(PLAIN, steps=1, truth=False, defense="dp-sgd:noise=0,clip=1e9")
    plain = trained(dataclasses.replace(config, defense=""))
    assert torch.allclose(trained(config, tmp_path), plain, rtol=0, atol=1e-6)
    spent = read_spent(tmp_path)
    assert spent is not None and spent.epsilon_links is None and "no bound" in str(spent)


def test_what_is_spent_counts_an_examples_batches(tmp_path: Path) -> None:
    trained(dataclasses.replace(PLAIN, defense="dp-sgd:noise=2.0,clip=1.0,delta=1e-6"), tmp_path, world=2)
    spent = read_spent(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert spent is not None and all(line["epsilon_links"] > 0 for line in lines)
    assert spent.sampling_rate == 6 / spent.examples and spent.delta == 1e-6
    assert spent.epsilon_model < spent.epsilon_links == max(line["epsilon_links"] for line in lines)
    assert "epsilon" in str(spent)


def test_epsilon_is_that_of_the_literature() -> None:
    def spent(noise: float, steps: int, *, examples: int = 100, batch: int = 25, world: int = 1) -> Spent:
        defense = DPSGD(noise=noise, clip=1.0)
        return Accountant(defense=defense, examples=examples, batch_size=batch, world_size=world).spent(steps)

    # Balle and Wang 2018, arXiv 1805.06530, theorem 8: delta of a Gaussian mechanism.
    for noise, batches in ((1.0, 1), (3.0, 2), (0.7, 5)):
        once = spent(noise, 4 * batches)
        assert once.batches_of_an_example == batches
        mu, epsilon = batches**0.5 / noise, once.epsilon_links
        delta = ndtr(mu / 2 - epsilon / mu) - exp(epsilon) * ndtr(-mu / 2 - epsilon / mu)
        assert delta == pytest.approx(1e-5, rel=1e-3)
    # One batch more is spent when a new epoch begins, and four ranks' noise together is twice one's.
    assert spent(1.0, 4).epsilon_links < spent(1.0, 5).epsilon_links == spent(1.0, 8).epsilon_links
    assert spent(1.0, 3, batch=5, world=4).epsilon_model == pytest.approx(spent(2.0, 3, batch=20).epsilon_links)
    # Abadi et al. 2016, arXiv 1607.00133, figure 2: q = 0.01, sigma = 4, 100 epochs, delta 1e-5: epsilon 1.26, of which
    # a fifth was their conversion from moments; 0.942 is the limit of many steps (Dong et al. 2019, arXiv 1905.02383).
    assert 0.942 < spent(4.0, 10_000, examples=60_000, batch=600).epsilon_links_poisson < 1.26
