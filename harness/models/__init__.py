"""Public architectures, losses and update rules: what both the ranks and the eavesdropper know.

A model is named by a built-in name with options (`lenet:input=1x28x28,classes=10`), by `package.module:factory`, by
`path/file.py:factory`, or by `hf:PATH`, a folder that Hugging Face's transformers saved. A factory takes no argument
and returns an `nn.Module`; built-in models carry `input_shape` and, where they take tokens, `tokens`, and a module of
the user's own may carry them too.
"""

from harness.models.loading import MODELS, ModelError, load_model
from harness.models.losses import IGNORED, LOSSES, Loss
from harness.models.optimizers import OPTIMIZERS, UpdateRule, load_optimizer
from harness.models.preprocessing import Normalize, load_normalize
from harness.models.tokens import Tokenizer, Tokens, load_tokenizer

__all__ = [
    "IGNORED",
    "LOSSES",
    "MODELS",
    "OPTIMIZERS",
    "Loss",
    "ModelError",
    "Normalize",
    "Tokenizer",
    "Tokens",
    "UpdateRule",
    "load_model",
    "load_normalize",
    "load_optimizer",
    "load_tokenizer",
]
