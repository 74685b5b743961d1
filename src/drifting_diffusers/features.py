"""What samples are compared in: a feature map turns images into named sets of vectors, one per location."""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from .shapes import Float


@runtime_checkable
class FeatureMap(Protocol):
    """Images [n, c, h, w] in [-1, 1] to `{name: [n, l, d]}`: l locations of d channels. Differentiable in the images; nothing in it is trained here."""

    def __call__(self, images: Tensor) -> dict[str, Tensor]: ...


class Pixels(nn.Module):
    """The image itself as one vector: the "vanilla" term of arXiv 2602.04770, A.5."""

    def forward(self, images: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n 1 d"]]:
        return {"pixels": images.flatten(1)[:, None]}


class MultiScaleStatistics(nn.Module):
    """placeholder"""
