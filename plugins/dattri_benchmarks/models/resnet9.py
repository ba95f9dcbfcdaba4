"""ResNet-9: a stem and three residual blocks, for images of 32 x 32 pixels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """Return a group norm of 8 channels a group: what an example gives depends on it alone.

    Source: Wu and He 2018, arXiv 1803.08494.
    """
    return nn.GroupNorm(max(1, channels // 8), channels)


class Residual(nn.Module):
    """y = relu(body(x) + shortcut(x)), each a stack of convolutions and norms."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            norm(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            norm(outputs),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs)
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, outputs, H / stride, W / stride]`` of ``x [B, inputs, H, W]``."""
        y: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return y


def resnet9(classes: int = 10, width: int = 64, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    """Return a residual network on ``[B, 3, H, W]``, 4,825,154 parameters with 2 classes.

    A 3 x 3 stem of ``width`` channels, three blocks of two 3 x 3 convolutions (2, 4 and 8 times the
    width, strides 1, 2, 2) with a 1 x 1 shortcut, the mean over positions, a linear layer. A norm
    after every convolution; no dropout.

    Source: He et al. 2016, arXiv 1512.03385, section 4.2 (the plan for CIFAR-10), made shallow and
    wide.

    Args:
        classes: Outputs.
        width: Channels of the stem.
        norm: Of a number of channels.
    """
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        norm(width),
        nn.ReLU(),
        Residual(width, 2 * width, 1, norm),
        Residual(2 * width, 4 * width, 2, norm),
        Residual(4 * width, 8 * width, 2, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )
