"""A model's name -> a freshly built module. Weights are drawn from torch's global generator: seed it before."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from torch import nn

from harness.models.bert import Bert
from harness.models.convnet import ConvNet
from harness.models.gpt2 import GPT2
from harness.models.hugging_face import load_folder
from harness.models.lenet import LeNet
from harness.models.mlp import MLP
from harness.models.resnet import ResNet
from harness.models.spec import choose

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "mlp": MLP,
    "convnet": ConvNet,
    "resnet": ResNet,
    "bert": Bert,
    "gpt2": GPT2,
}
HUGGING_FACE = "hf:"
"""Before the path of a folder."""


class ModelError(ValueError):
    """A model that cannot be built from its name; one line that says why."""


def load_model(spec: str) -> nn.Module:
    """Builds the model that `spec` names.

    Running a user's factory runs the user's code: it is named on the command line, never read from a wire or a file.

    Raises: ModelError, naming the specification and what was wrong with it.
    """
    path, colon, factory = spec.rpartition(":")
    try:
        if spec.startswith(HUGGING_FACE):
            model = load_folder(spec.removeprefix(HUGGING_FACE))
        elif colon and "=" not in factory:
            model = getattr(_import(path), factory)()
        else:
            build, options = choose("model", spec, MODELS)
            model = build(**options)
    except Exception as error:  # whatever a user's file raises belongs into one line that names the file
        raise ModelError(f"model {spec!r}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {spec!r}: the factory returned {type(model).__name__}, wanted torch.nn.Module")
    return model


def _import(path: str) -> ModuleType:
    if not path.endswith(".py"):
        return importlib.import_module(path)
    file = Path(path).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses and pickling in the user's file look their module up here
    spec.loader.exec_module(module)
    return module
