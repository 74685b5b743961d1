r"""A radial kernel k(r) says how strongly a target at distance r attracts or repels; its width is the temperature.

Each kernel gives functions of the distance r and the temperature tau, all in the same unit of length: `value` k, `derivative` dk/dr and
`sharp` k#(r) = int_r^inf s k(s) ds, for which grad_x k#(|x-y|) = k (y - x) (arXiv 2604.06333); and the logarithms of k, of k# and of the pull
-k'(r)/r, for which grad_x k(|x-y|) = pull (y - x).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .shapes import Float

LEAST_DISTANCE = 1e-4
"""What coinciding points are apart: at 0 the square root has no finite gradient. The release's value."""

CHUNK = 2**18
"""Entries of [problems, queries, targets] at a time on a CPU: a megabyte in float32, of which three or four fit into a share of the last cache."""


def pairwise_distance(x: Float[Tensor, "*b n d"], y: Float[Tensor, "*b m d"]) -> Float[Tensor, "*b n m"]:
    """Euclidean distance of every x to every y, never below `LEAST_DISTANCE`.

    The squares are expanded so that the work is one matrix product. In float32 that loses digits when the points lie far from the origin
    compared with their spread, so centre them first: distances do not change.
    """
    products = (x @ y.mT).mul_(-2)  # in place from here on: one matrix in memory, however large
    squares = products.add_(x.square().sum(-1)[..., :, None]).add_(y.square().sum(-1)[..., None, :])
    return squares.clamp_(min=LEAST_DISTANCE**2).sqrt_()


def fill_distances(
    out: Float[Tensor, "b n m"],
    x: Float[Tensor, "b n d"],
    y: Float[Tensor, "b m d"],
    x_squares: Float[Tensor, "b n"],
    y_squares: Float[Tensor, "b m"],
) -> Float[Tensor, "b n m"]:
    """`pairwise_distance` without a graph, into memory that is there, from squares that are known."""
    torch.add(x_squares[:, :, None], y_squares[:, None, :], out=out)
    return out.baddbmm_(x, y.mT, alpha=-2).clamp_(min=LEAST_DISTANCE**2).sqrt_()


def distances(x: Float[Tensor, "b n d"], y: Float[Tensor, "b m d"]) -> Float[Tensor, "b n m"]:
    """`pairwise_distance` without a graph, of some problems at a time: every pass finds in the cache what the one before left there."""
    out = x.new_empty(len(x), x.shape[1], y.shape[1])
    at_once = max(1, CHUNK // max(1, out[:1].numel())) if x.device.type == "cpu" else max(1, len(x))
    square = lambda points: torch.linalg.vector_norm(points, dim=-1).square_()
    for part in (slice(i, i + at_once) for i in range(0, len(x), at_once)):
        fill_distances(out[part], x[part], y[part], square(x[part]), square(y[part]))
    return out


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


@dataclass(frozen=True)
class RationalQuadratic(Radial):
    """k = (1 + u)^-alpha, u = r^2 / (2 alpha tau^2): Gaussians of many widths mixed, with a tail r^(-2 alpha) that is heard from far away.

    k# = tau^2 alpha / (alpha - 1) (1 + u)^(1 - alpha), for alpha > 1: below, r k has no integral (arXiv 2604.06333). The Gaussian is its limit.

    Attributes:
        alpha: how fast the tail falls, above 0.
    """

    alpha: float = 2.0

    def __post_init__(self):
        _check_above_0("alpha", self.alpha, math.inf, "rational_quadratic(2.0)")

    def log_value(self, distance: Tensor, temperature: float) -> Tensor:
        return self._log_base(distance, temperature) * -self.alpha

    def log_pull(self, distance: Tensor, temperature: float) -> Tensor:
        return self._log_base(distance, temperature) * -(self.alpha + 1) - 2 * math.log(temperature)

    def log_sharp(self, distance: Tensor, temperature: float) -> Tensor:
        if self.alpha <= 1:
            raise ValueError(
                f"k# of the rational quadratic kernel is infinite for alpha <= 1, got {self.alpha}; take alpha > 1, or a field that asks for k alone"
            )
        constant = 2 * math.log(temperature) + math.log(self.alpha / (self.alpha - 1))
        return self._log_base(distance, temperature) * (1 - self.alpha) + constant

    def _log_base(self, distance: Tensor, temperature: float) -> Tensor:
        return (distance.square() / (2 * self.alpha * temperature**2)).log1p()


@dataclass(frozen=True)
class Matern(Radial):
    r"""k = M_nu(z) with z = sqrt(2 nu) r / tau and M_nu(z) = 2^(1 - nu) / Gamma(nu) z^nu K_nu(z), so that k(0) = 1: smoother the larger nu is.

    nu = 1/2 is the Laplace kernel, nu to infinity the Gaussian, both of the same tau. From (z^nu K_nu)' = -z^nu K_(nu-1) follow

        -k'(r) / r = (2 nu / tau^2) 2^(1 - nu) / Gamma(nu) z^(nu - 1) K_(nu-1)(z),    for nu > 1 that is nu / ((nu - 1) tau^2) M_(nu-1)(z)
        k#(r)      = tau^2 M_(nu+1)(z),    the same z: k#(0) = tau^2 for every nu

    (arXiv 2604.06333 up to these constants.) Half-integers nu have a closed form. Any other nu costs an integral at each distance, a hundred
    times the work or so.

    Attributes:
        nu: smoothness, in (0, 100]: k has derivatives up to the order below 2 nu at r = 0.
    """

    nu: float = 1.5

    def __post_init__(self):
        _check_above_0("nu", self.nu, 100, "matern(1.5), or gaussian, its limit")

    def log_value(self, distance: Tensor, temperature: float) -> Tensor:
        return log_power_bessel(self._z(distance, temperature), self.nu) + self._log_constant

    def log_pull(self, distance: Tensor, temperature: float) -> Tensor:
        z, order = self._z(distance, temperature), abs(self.nu - 1)  # K_-a = K_a
        found = log_power_bessel(z, order) + (self._log_constant + math.log(2 * self.nu) - 2 * math.log(temperature))
        return found if self.nu >= 1 else found + 2 * (self.nu - 1) * z.log()

    def log_sharp(self, distance: Tensor, temperature: float) -> Tensor:
        constant = self._log_constant - math.log(2 * self.nu) + 2 * math.log(temperature)
        return log_power_bessel(self._z(distance, temperature), self.nu + 1) + constant

    @property
    def _log_constant(self) -> float:
        return (1 - self.nu) * math.log(2) - math.lgamma(self.nu)

    def _z(self, distance: Tensor, temperature: float) -> Tensor:
        return (distance * (math.sqrt(2 * self.nu) / temperature)).clamp(min=1e-12)  # at 0 logarithms have no gradient


KERNELS: dict[str, type] = {"laplace": Laplace, "gaussian": Gaussian, "matern": Matern, "rational_quadratic": RationalQuadratic}


def log_power_bessel(z: Tensor, order: float) -> Tensor:
    """log(z^a K_a(z)), K_a the modified Bessel function of the second kind, for z > 0 and a >= 0; differentiable in z as often as you like."""
    if (order - 0.5).is_integer():
        return _log_power_bessel_half(z, int(order - 0.5))
    return _LogPowerBessel.apply(z, order)  # pyright: ignore[reportReturnType]


def _log_power_bessel_half(z: Tensor, p: int) -> Tensor:
    """For a = p + 1/2: z^a K_a = sqrt(pi / 2) e^-z sum_j c_j z^j with c_j = 2^(j - p) (2p - j)! / (j! (p - j)!), all positive."""
    log_z, total = z.log(), torch.zeros_like(z)
    log_c = [(j - p) * math.log(2) + math.lgamma(2 * p - j + 1) - math.lgamma(j + 1) - math.lgamma(p - j + 1) for j in range(p + 1)]
    for j in range(1, p + 1):
        total = torch.logaddexp(total, j * log_z + (log_c[j] - log_c[0]))
    return total - z + (log_c[0] + 0.5 * math.log(math.pi / 2))


class _LogPowerBessel(torch.autograd.Function):
    """Any order: the integral forwards, the recurrence (z^a K_a)' = -z^a K_(a-1) backwards, so that no node of the integral is remembered."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, order: float) -> Tensor:
        found = _log_scaled_bessel(z, order) - z + order * z.log()
        ctx.order = order
        ctx.save_for_backward(z, found)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        z, found = ctx.saved_tensors
        less = abs(ctx.order - 1)
        ratio = (log_power_bessel(z, less) - found + (ctx.order - less) * z.log()).exp()  # K_(a-1) / K_a
        return -gradients[0] * ratio, None


def _log_scaled_bessel(z: Tensor, order: float) -> Tensor:
    """log(e^z K_a(z)) by the trapezoidal rule of int_0^inf exp(-z (cosh t - 1)) cosh(a t) dt, which converges exponentially.

    One node at a time, each relative to the peak at sinh t = a / z: no axis of nodes, no overflow, no underflow. The range ends where the
    integrand is e^-depth of what it is at 0. Nodes: the step must be small against 1 and against the width a^-1/2 of the peak.
    """
    exact = z.dtype == torch.float64
    depth, nodes = (40, 80 + 40 * math.ceil(math.sqrt(order))) if exact else (20, 40 + 20 * math.ceil(math.sqrt(order)))
    end = 2 * (depth / 2 / z).sqrt().asinh()
    for _ in range(3):  # z (cosh t - 1) = depth + a t
        end = 2 * ((depth / 2 + order / 2 * end) / z).sqrt().asinh()
    step, top = end / nodes, (order / z).asinh()
    peak = -2 * z * (top / 2).sinh().square() + order * top
    growth, decay = step.expm1(), (-2 * order * step).exp()
    total, beyond, faded = (-peak).exp(), torch.zeros_like(z), torch.ones_like(z)  # beyond = e^t - 1, faded = e^(-2 a t)
    for i in range(1, nodes + 1):
        beyond.addcmul_(beyond, growth).add_(growth)
        faded.mul_(decay)
        exponent = (beyond.square() / (beyond + 1)).mul_(-z / 2)  # -z (cosh t - 1)
        total.addcmul_(exponent.add_(step, alpha=i * order).sub_(peak).exp_(), faded + 1)
    return (total * step / 2).log() + peak


def _check_above_0(name: str, value: Any, most: float, instead: str) -> None:
    if isinstance(value, bool) or not (isinstance(value, Real) and math.isfinite(value) and 0 < float(value) <= most):
        raise ValueError(
            f"{name} must be a finite number above 0{f' and at most {most:g}' if most < math.inf else ''}, got {value!r}; take {instead}"
        )


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


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """What stands in float32 is computed in float32, whatever surrounds it: in 16 bits distances underflow at temperature 0.02."""
    with torch.autocast(device.type, enabled=False), exact_products():
        yield
