"""Residual networks for small pictures (He et al. 2016, arXiv 1512.03385), in torchvision's parameter order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


NOISE = 16
"""Pictures of noise, each of 4 x 4 patches, whose statistics frozen norms begin with."""


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that stays in evaluation mode, as jobs keep it that fine-tune; its affine part is trained."""

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """As `torch.nn.Module.train`, but for this module itself."""
        super().train(False)
        return self


NORMS: dict[str, type[nn.BatchNorm2d]] = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut; the basic block of He et al., figure 5 left."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: type[nn.BatchNorm2d]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.bn2 = norm(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), norm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, outputs, height / stride, width / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """ResNet-10, 18 or 34 with a 3x3 stem and no pooling before the first block, as is usual at 32x32.

    Args:
        input: (channels, height, width) of one picture.
        classes: number of classes.
        depth: 10, 18 or 34.
        width: channels of the first stage; 64 in the paper.
        norm: `batch`, or `frozen`: the running statistics are used and stay as they are. A net that nobody trained has
            none worth the name, so these begin as those of pictures of noise.
    """

    def __init__(
        self,
        input: tuple[int, int, int] = (3, 32, 32),
        classes: int = 100,
        depth: int = 18,
        width: int = 64,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth {depth} is not known; there are: {', '.join(map(str, DEPTHS))}")
        if norm not in NORMS:
            raise ValueError(f"norm {norm!r} is not known; there are: {', '.join(NORMS)}")
        self.input_shape, self.num_classes = tuple(input), classes
        self.conv1 = nn.Conv2d(input[0], width, kernel_size=3, padding=1, bias=False)
        self.bn1 = NORMS[norm](width)
        stages: list[nn.Module] = []
        channels = width
        for stage, blocks in enumerate(DEPTHS[depth]):
            outputs = width << stage
            for block in range(blocks):
                stages.append(Block(channels, outputs, stride=2 if stage and not block else 1, norm=NORMS[norm]))
                channels = outputs
        self.body = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if norm == "frozen":
            self._take_statistics(functional.interpolate(torch.rand(NOISE, input[0], 4, 4), size=input[1:]))

    def _take_statistics(self, pictures: Tensor) -> None:
        """Sets the running statistics of frozen norms to those of pictures."""
        norms = [module for module in self.modules() if isinstance(module, FrozenBatchNorm2d)]
        for module in norms:
            nn.Module.train(module)
            module.momentum = None  # as they are
        with torch.no_grad():
            self(pictures)
        for module in norms:
            module.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, classes)."""
        y = self.body(functional.relu(self.bn1(self.conv1(x))))
        return self.head(functional.adaptive_avg_pool2d(y, 1).flatten(1))
