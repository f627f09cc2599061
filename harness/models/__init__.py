"""Public architectures, losses and update rules: what both the ranks and the eavesdropper know.

A model is named by a built-in name with options (`lenet:input=1x28x28,classes=10`), by `package.module:factory` or by
`path/file.py:factory`. A factory takes no argument and returns an `nn.Module`; built-in models carry `input_shape` and
`num_classes`, and a module of the user's own may carry them too.
"""

from harness.models.loading import MODELS, ModelError, load_model
from harness.models.losses import LOSSES
from harness.models.optimizers import OPTIMIZERS, UpdateRule, load_optimizer

__all__ = ["LOSSES", "MODELS", "OPTIMIZERS", "ModelError", "UpdateRule", "load_model", "load_optimizer"]
