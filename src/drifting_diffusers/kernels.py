r"""A radial kernel k(r) says how strongly a target at distance r attracts or repels; its width is the temperature.

Each kernel gives functions of the distance r and the temperature tau, all in the same unit of length: `value` k, `derivative` dk/dr and
`sharp` k#(r) = int_r^inf s k(s) ds, for which grad_x k#(|x-y|) = k (y - x) (arXiv 2604.06333); and the logarithms of k, of k# and of the pull
-k'(r)/r, for which grad_x k(|x-y|) = pull (y - x).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .shapes import Float

LEAST_DISTANCE = 1e-4
"""What coinciding points are apart: at 0 the square root has no finite gradient. The release's value."""


def pairwise_distance(x: Float[Tensor, "*b n d"], y: Float[Tensor, "*b m d"]) -> Float[Tensor, "*b n m"]:
    """Euclidean distance of every x to every y, never below `LEAST_DISTANCE`.

    The squares are expanded so that the work is one matrix product. In float32 that loses digits when the points lie far from the origin
    compared with their spread, so centre them first: distances do not change.
    """
    products = (x @ y.mT).mul_(-2)  # in place from here on: one matrix in memory, however large
    squares = products.add_(x.square().sum(-1)[..., :, None]).add_(y.square().sum(-1)[..., None, :])
    return squares.clamp_(min=LEAST_DISTANCE**2).sqrt_()


@runtime_checkable
class Kernel(Protocol):
    """What a field needs of a kernel. The logarithms are what fields use: they neither underflow far away nor saturate at r = 0."""

    def log_value(self, distance: Tensor, temperature: float) -> Tensor: ...
    def log_pull(self, distance: Tensor, temperature: float) -> Tensor: ...
    def log_sharp(self, distance: Tensor, temperature: float) -> Tensor: ...
    def value(self, distance: Tensor, temperature: float) -> Tensor: ...
    def derivative(self, distance: Tensor, temperature: float) -> Tensor: ...
    def sharp(self, distance: Tensor, temperature: float) -> Tensor: ...


class Radial:
    """A kernel by the logarithms of k, of its pull -k'(r)/r, and of k#."""

    def value(self, distance: Tensor, temperature: float) -> Tensor:
        return self.log_value(distance, temperature).exp()

    def derivative(self, distance: Tensor, temperature: float) -> Tensor:
        return -distance * self.log_pull(distance, temperature).exp()

    def sharp(self, distance: Tensor, temperature: float) -> Tensor:
        return self.log_sharp(distance, temperature).exp()


@dataclass(frozen=True)
class Laplace(Radial):
    """k = exp(-r / tau), the kernel of arXiv 2602.04770, section 3.3: the distance is not squared. k# = tau (r + tau) k."""

    def log_value(self, distance: Tensor, temperature: float) -> Tensor:
        return distance * (-1 / temperature)

    def log_pull(self, distance: Tensor, temperature: float) -> Tensor:
        return self.log_value(distance, temperature) - (distance * temperature).log()

    def log_sharp(self, distance: Tensor, temperature: float) -> Tensor:
        return self.log_value(distance, temperature) + (distance + temperature).log() + math.log(temperature)


@dataclass(frozen=True)
class Gaussian(Radial):
    """k = exp(-r^2 / 2 tau^2). The one kernel whose mean shift is a score: k# = tau^2 k (arXiv 2603.09936)."""

    def log_value(self, distance: Tensor, temperature: float) -> Tensor:
        return distance.square() * (-0.5 / temperature**2)

    def log_pull(self, distance: Tensor, temperature: float) -> Tensor:
        return self.log_value(distance, temperature) - 2 * math.log(temperature)

    def log_sharp(self, distance: Tensor, temperature: float) -> Tensor:
        return self.log_value(distance, temperature) + 2 * math.log(temperature)


KERNELS: dict[str, type] = {"laplace": Laplace, "gaussian": Gaussian}


def in_float(x: Tensor) -> Tensor:
    """X in float32, or in float64 if it is that already: in 16 bits distances underflow at temperature 0.02."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products of float32 in float32, whatever is allowed elsewhere: TF32 has 10 bits, and distances are differences of large numbers."""
    allowed = torch.get_float32_matmul_precision()
    if allowed == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
