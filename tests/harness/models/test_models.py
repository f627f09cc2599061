"""Models by name: the built-in ones, the user's own, and what is said of a wrong name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from harness.models import MODELS, ModelError, load_model, load_optimizer
from harness.models.spec import parse_spec


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("bert", "gpt2")])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
def test_built_in_models_take_the_pictures_that_they_are_built_for(name: str, shape: tuple[int, ...]) -> None:
    model = load_model(f"{name}:input={'x'.join(map(str, shape))},classes=7")
    assert model(torch.rand(2, *shape)).shape == (2, 7)
    assert (model.input_shape, model.num_classes) == (shape, 7)


def test_lenet_is_that_of_the_released_code() -> None:
    model = load_model("lenet")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding) for c in convolutions] == [
        (3, 12, (5, 5), (2, 2), (2, 2)),
        (12, 12, (5, 5), (2, 2), (2, 2)),
        (12, 12, (5, 5), (1, 1), (2, 2)),
    ]
    assert sum(isinstance(module, nn.Sigmoid) for module in model.modules()) == 3
    assert (model.head.in_features, model.head.out_features) == (768, 100)
    values = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    assert values.abs().max() <= 0.5 and abs(values.std().item() - 1 / 12**0.5) < 0.003


def test_the_seed_fixes_the_weights() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([parameter.reshape(-1) for parameter in load_model("convnet").parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "own_model.py"
    file.write_text("from torch import nn\ndef build():\n    return nn.Linear(3, 2)\ndef wrong():\n    return 5\n")
    assert isinstance(load_model(f"{file}:build"), nn.Linear)
    assert isinstance(load_model("harness.models.lenet:LeNet"), nn.Module)
    with pytest.raises(ModelError, match=r"returned int, wanted torch\.nn\.Module"):
        load_model(f"{file}:wrong")
    with pytest.raises(ModelError, match="no such file"):
        load_model(f"{tmp_path}/none.py:build")
    with pytest.raises(ModelError, match="has no attribute"):
        load_model(f"{file}:none")


def test_wrong_names_say_what_there_is() -> None:
    with pytest.raises(ModelError, match="lenet, mlp, convnet, resnet"):
        load_model("alexnet")
    with pytest.raises(ModelError, match="key=value"):
        load_model("lenet:classes=10,12")
    with pytest.raises(ModelError, match="unexpected keyword"):
        load_model("lenet:clases=10")
    with pytest.raises(ValueError, match="sgd, adam, adamw"):
        load_optimizer("lion:lr=1", [])
    with pytest.raises(ValueError, match="learning rate is missing"):
        load_optimizer("sgd", [nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="momentun"):
        load_optimizer("sgd:lr=0.1,momentun=0.9", [nn.Parameter(torch.zeros(1))])


def test_the_grammar_of_names() -> None:
    assert parse_spec("sgd:lr=0.1,momentum=1e-3,nesterov=true") == (
        "sgd",
        {"lr": 0.1, "momentum": 1e-3, "nesterov": True},
    )
    assert parse_spec("lenet:input=1x28x28,classes=10") == ("lenet", {"input": (1, 28, 28), "classes": 10})
    assert parse_spec("mnist:path=/a/b=c") == ("mnist", {"path": "/a/b=c"})
    assert parse_spec("lenet") == ("lenet", {})


def test_update_rules_are_chains() -> None:
    weight = nn.Parameter(torch.ones(1))
    rule = load_optimizer("clip:value=0.5+sgd:lr=1e+0+multistep:milestones=2,gamma=0.1,every=2", [weight])
    steps = []
    for _ in range(6):
        before = weight.detach().clone()
        weight.grad = torch.full((1,), 4.0)
        rule.step()
        steps.append(round(float(before - weight.detach()), 6))
    assert steps == [0.5, 0.5, 0.5, 0.5, 0.05, 0.05]


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        ("sgd:lr=1+adam:lr=1", "wanted one optimizer"),
        ("clip:norm=1", "wanted one optimizer"),
        ("clip:1+sgd:lr=1", "not key=value"),
        ("clip:nrom=1+sgd:lr=1", "wanted clip:norm=1 or clip:value=0.5"),
        ("sgd:lr=1+cosine", "T_max"),
        ("sgd:lr=1+linear:until=2", "all but the last need until"),
        ("sgd:lr=1+step:step_size=1,every=0", "every: wanted a number of steps, got 0"),
        ("sgd:lr=-1", "Invalid learning rate"),
        ("adamw:lr=1,decay=some", "decay: wanted all or matrices"),
    ],
)
def test_an_update_rule_that_cannot_be_is_one_line(rule: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong) as error:
        load_optimizer(rule, [nn.Parameter(torch.zeros(2, 2))])
    assert "\n" not in str(error.value)
