r"""Inception v3 as the Frechet Inception Distance means it: the network of TensorFlow's graph of 2015-12-05, resize included.

The layers are those of Szegedy et al., arXiv 1512.00567, without the auxiliary head. Five things differ from the networks that are trained under
the same name today, and each moves an FID: 1,008 outputs instead of 1,000; average pools of the mixed blocks that divide by the pixels they see,
not by the padded ones; a max pool in the last mixed block; images in (v - 128) / 128 for v in 0...255; and TensorFlow 1's bilinear resize to
299 x 299, in which pixel i of the output reads position i * (old side) / (new side), without the half pixel that others add and without antialiasing.

Parameters are named as in `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, which is a port of that graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .shapes import Float

SIDE = 299  # pixels that the network sees in both directions


class Convolution(nn.Module):
    """A convolution without bias, batch norm with TensorFlow's epsilon of 1e-3, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k _ _"]:
        return F.relu(self.bn(self.conv(x)))


class Step(NamedTuple):
    """One convolution of a branch: its name in the files, channels that leave it, kernel. `halves` is stride 2 without padding."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    halves: bool = False


Branch = tuple[Step | tuple[Step, ...], ...]  # one after the other; a tuple at the end is a fork, whose outputs stand side by side


class Mixed(nn.Module):
    """Branches side by side, the pooled one last.

    Args:
        in_channels: channels that enter every branch.
        branches: what they are made of.
        pool: "mean" or "max" of 3 x 3 pixels in front of the last branch, which is a 1 x 1 convolution; "halve" is a max pool of stride 2 alone.
        pool_channels: channels that leave that last branch; with "halve" they are `in_channels`.
    """

    def __init__(self, in_channels: int, branches: tuple[Branch, ...], pool: str, pool_channels: int = 0):
        super().__init__()
        self.pool, self.out_channels = pool, 0
        pooled = () if pool == "halve" else ((Step("branch_pool", pool_channels),),)
        self.plan = (*branches, *pooled)
        for branch in self.plan:
            channels = in_channels
            for stage in branch:
                fork = (stage,) if isinstance(stage, Step) else stage
                for step in fork:
                    stride, padded = (2, False) if step.halves else (1, True)
                    setattr(self, step.name, Convolution(channels, step.channels, step.kernel, stride, padded))
                channels = sum(step.channels for step in fork)
            self.out_channels += channels
        self.out_channels += in_channels if pool == "halve" else 0

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k _ _"]:
        if self.pool == "halve":
            return torch.cat([*(self.along(branch, x) for branch in self.plan), F.max_pool2d(x, 3, stride=2)], dim=1)
        pooled = (
            F.max_pool2d(x, 3, stride=1, padding=1)
            if self.pool == "max"
            else F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        )
        return torch.cat([*(self.along(branch, x) for branch in self.plan[:-1]), self.along(self.plan[-1], pooled)], dim=1)

    def along(self, branch: Branch, x: Tensor) -> Tensor:
        for stage in branch:
            fork = (stage,) if isinstance(stage, Step) else stage
            parts = [self.get_submodule(step.name)(x) for step in fork]
            x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return x


def tall_and_wide(stem: str, channels: tuple[int, ...], first: tuple[int, int]) -> Branch:
    """A 1 x 1 convolution, then 1 x 7 and 7 x 1 in turn, starting with `first`: a 7 x 7 kernel in factors."""
    turned = (first[1], first[0])
    kernels = ((1, 1), *(first if k % 2 == 0 else turned for k in range(len(channels) - 1)))
    return tuple(Step(f"{stem}_{k}", width, kernel) for k, (width, kernel) in enumerate(zip(channels, kernels, strict=True), start=1))


def mixed_35(in_channels: int, pool_channels: int) -> Mixed:
    """Blocks of the 35 x 35 grid (figure 5 of the paper, with a 5 x 5 kernel left whole)."""
    fives = (Step("branch5x5_1", 48), Step("branch5x5_2", 64, (5, 5)))
    threes = (Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, (3, 3)), Step("branch3x3dbl_3", 96, (3, 3)))
    return Mixed(in_channels, ((Step("branch1x1", 64),), fives, threes), "mean", pool_channels)


def mixed_35_to_17(in_channels: int) -> Mixed:
    threes = (Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, (3, 3)), Step("branch3x3dbl_3", 96, (3, 3), halves=True))
    return Mixed(in_channels, ((Step("branch3x3", 384, (3, 3), halves=True),), threes), "halve")


def mixed_17(width: int) -> Mixed:
    """Blocks of the 17 x 17 grid (figure 6), `width` channels within."""
    once = tall_and_wide("branch7x7", (width, width, 192), (1, 7))
    twice = tall_and_wide("branch7x7dbl", (width, width, width, width, 192), (7, 1))
    return Mixed(768, ((Step("branch1x1", 192),), once, twice), "mean", 192)


def mixed_17_to_8() -> Mixed:
    threes = (Step("branch3x3_1", 192), Step("branch3x3_2", 320, (3, 3), halves=True))
    sevens = (*tall_and_wide("branch7x7x3", (192, 192, 192), (1, 7)), Step("branch7x7x3_4", 192, (3, 3), halves=True))
    return Mixed(768, (threes, sevens), "halve")


def mixed_8(in_channels: int, pool: str) -> Mixed:
    """Blocks of the 8 x 8 grid (figure 7), which fork at the end."""
    threes = (Step("branch3x3_1", 384), (Step("branch3x3_2a", 384, (1, 3)), Step("branch3x3_2b", 384, (3, 1))))
    fork = (Step("branch3x3dbl_3a", 384, (1, 3)), Step("branch3x3dbl_3b", 384, (3, 1)))
    twice = (Step("branch3x3dbl_1", 448), Step("branch3x3dbl_2", 384, (3, 3)), fork)
    return Mixed(in_channels, ((Step("branch1x1", 320),), threes, twice), pool, 192)


class InceptionV3(nn.Module):
    """The FID network with random weights: levels [n, 3, h, w] in 0...255 to 2,048 features and 1,008 logits. See the module."""

    num_features = 2048

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), stride=2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), padded=False)
        self.Mixed_5b = mixed_35(192, 32)
        self.Mixed_5c = mixed_35(256, 64)
        self.Mixed_5d = mixed_35(288, 64)
        self.Mixed_6a = mixed_35_to_17(288)
        self.Mixed_6b = mixed_17(128)
        self.Mixed_6c = mixed_17(160)
        self.Mixed_6d = mixed_17(160)
        self.Mixed_6e = mixed_17(192)
        self.Mixed_7a = mixed_17_to_8()
        self.Mixed_7b = mixed_8(1280, "mean")
        self.Mixed_7c = mixed_8(2048, "max")
        self.fc = nn.Linear(self.num_features, 1008)
        self.eval().requires_grad_(False)

    def forward(self, levels: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n _"]]:
        """Features and logits of images in levels 0...255 (float32 or float64), of any size.

        "features" are the means of the last map over its places, "logits" the outputs of the last layer without its bias: the Inception Score is
        defined on those.
        """
        dtype = self.fc.weight.dtype
        x = tensorflow_resize(levels.to(torch.promote_types(levels.dtype, dtype)), SIDE)  # never in 16 bits: those do not hold 255 levels
        x = ((x - 128) / 128).to(dtype)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)  # 73 x 73
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)  # 35 x 35
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        features = x.mean((2, 3))
        return {"features": features, "logits": F.linear(features, self.fc.weight)}


def tensorflow_resize(x: Float[Tensor, "n c h w"], side: int) -> Float[Tensor, "n c side side"]:
    """Bilinear as TensorFlow 1 does it with `align_corners=False`: see the module. Columns first, then rows, as there."""
    for dim in (3, 2):
        length = x.shape[dim]
        position = torch.arange(side, device=x.device, dtype=x.dtype) * (length / side)
        before = position.floor().clamp(max=length - 1)
        low = before.long()
        high = (low + 1).clamp(max=length - 1)
        weight = (position - before).reshape((-1, 1) if dim == 2 else (-1,))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x
