"""Names of a text model's parts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attack.engine.labels import NoLabel
from attack.engine.layout import Layout, ending
from attack.engine.token_labels import solve_labels
from tests.attack.engine.test_rivals import coarsely


def test_the_last_of_the_names_that_end_so_is_meant() -> None:
    names = ["lm.h.0.mlp", "lm.h.11.mlp", "lm.oh.12.mlp", "lm.h.13.mlp.act"]
    assert ending(names, r"h\.\d+\.mlp", "layers") == "lm.h.11.mlp"


def test_what_a_model_lacks_is_said_in_words() -> None:
    target, batch = coarsely([9])
    other = dataclasses.replace(target, model=torch.nn.Linear(2, 2))
    with pytest.raises(NoLabel, match="has no word embeddings by the name"):
        Layout.of(other)
    with pytest.raises(NoLabel, match="has no layer norm before the last layer by the name"):
        solve_labels(other, [batch.inputs[0]], torch.Generator())
