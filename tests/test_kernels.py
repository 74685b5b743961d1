"""Kernels: what their four functions have to do with each other, checked by finite differences, and distances near and far from 0."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from drifting_diffusers.kernels import LEAST_DISTANCE, Gaussian, Kernel, Laplace, in_float, pairwise_distance

KERNELS = pytest.mark.parametrize("kernel", [Laplace(), Gaussian()], ids=["laplace", "gaussian"])
DISTANCE = torch.linspace(0.05, 4, 60, dtype=torch.float64)
STEP = 1e-6


def slope(function, at: torch.Tensor, temperature: float) -> torch.Tensor:
    return (function(at + STEP, temperature) - function(at - STEP, temperature)) / (2 * STEP)


@KERNELS
@pytest.mark.parametrize("temperature", [0.3, 0.8, 2.0])
def test_derivative_is_the_slope_of_the_value(kernel, temperature):
    assert_close(slope(kernel.value, DISTANCE, temperature), kernel.derivative(DISTANCE, temperature), rtol=1e-6, atol=1e-8)


@KERNELS
@pytest.mark.parametrize("temperature", [0.3, 0.8, 2.0])
def test_t9_sharp_kernel_falls_at_r_times_the_kernel(kernel, temperature):
    """dk#/dr = -r k, by finite differences: that makes grad_x k#(|x - y|) = k (y - x)."""
    assert_close(slope(kernel.sharp, DISTANCE, temperature), -DISTANCE * kernel.value(DISTANCE, temperature), rtol=1e-6, atol=1e-8)


@KERNELS
def test_t9_sharp_kernel_is_the_tail_integral(kernel):
    """k#(r) = int_r^inf s k(s) ds: beside its slope, its constant."""
    s = torch.linspace(0.7, 40, 400_001, dtype=torch.float64)
    assert_close(torch.trapezoid(s * kernel.value(s, 0.8), s), kernel.sharp(s[0], 0.8), rtol=1e-8, atol=0)


@KERNELS
def test_t9_gradient_of_the_sharp_kernel_is_the_mean_shift_numerator(kernel, rng):
    x = torch.randn(5, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    y = torch.randn(7, 3, generator=rng, dtype=torch.float64)
    distance = pairwise_distance(x, y)
    (gradient,) = torch.autograd.grad(kernel.sharp(distance, 0.8).sum(), x)
    k = kernel.value(distance, 0.8).detach()
    assert_close(gradient, k @ y - k.sum(1, keepdim=True) * x.detach(), rtol=1e-9, atol=1e-12)


def test_t7_gaussian_mean_shift_is_the_difference_of_scores(rng):
    """The Gaussian mean shift is sigma^2 grad log KDE, here against finite differences; so its field is a difference of scores."""
    x, positives, negatives = (torch.randn(n, 3, generator=rng, dtype=torch.float64) for n in (16, 20, 24))
    positives, sigma, kernel = positives + 1, 0.7, Gaussian()

    def log_ratio(z):
        p, q = (kernel.value(pairwise_distance(z, y), sigma).mean(1).log() for y in (positives, negatives))
        return p - q

    def mean_shift(y):
        k = kernel.value(pairwise_distance(x, y), sigma)
        return k @ y / k.sum(1, keepdim=True) - x

    h = 1e-5 * torch.eye(3, dtype=torch.float64)
    score = torch.stack([(log_ratio(x + e) - log_ratio(x - e)) / 2e-5 for e in h], dim=1)
    velocity = mean_shift(positives) - mean_shift(negatives)
    assert (sigma**2 * score - velocity).abs().max() <= 1e-8 * velocity.abs().max()


def test_gaussian_is_its_own_sharp_kernel_and_laplace_is_not():
    for kernel, constant in ((Gaussian(), True), (Laplace(), False)):
        ratio = kernel.sharp(DISTANCE, 0.8) / kernel.value(DISTANCE, 0.8)
        assert (float((ratio - ratio[0]).abs().max()) < 1e-12) is constant


@KERNELS
def test_value_is_the_exponential_of_log_value_which_survives_where_the_value_underflows(kernel):
    assert_close(kernel.log_value(DISTANCE, 0.5).exp(), kernel.value(DISTANCE, 0.5))
    far = torch.tensor([20.0])
    assert kernel.value(far, 0.02) == 0
    assert torch.isfinite(kernel.log_value(far, 0.02)).all()
    assert isinstance(kernel, Kernel)


@given(seed=st.integers(0, 2**31), d=st.integers(1, 8), scale=st.floats(1e-2, 1e2))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_distance_is_a_metric_on_apart_points(seed, d, scale):
    generator = torch.Generator().manual_seed(seed)
    x, y, z = (scale * torch.randn(4, d, generator=generator, dtype=torch.float64) for _ in range(3))
    xy = pairwise_distance(x, y)
    assert_close(xy, pairwise_distance(y, x).mT)
    assert_close(xy, (x[:, None] - y[None]).norm(dim=-1).clamp(min=LEAST_DISTANCE), rtol=1e-6, atol=1e-9)
    through_z = pairwise_distance(x, z)[:, :, None] + pairwise_distance(z, y)[None]
    assert (xy <= through_z.min(dim=1).values * (1 + 1e-9) + 3 * LEAST_DISTANCE).all()


def test_coinciding_points_have_the_least_distance_and_a_finite_gradient():
    x = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    distance = pairwise_distance(x, x.detach())
    assert_close(distance, torch.full_like(distance, LEAST_DISTANCE))
    distance.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_distances_take_any_leading_axes(rng):
    x, y = torch.randn(2, 3, 5, 4, generator=rng), torch.randn(2, 3, 6, 4, generator=rng)
    assert_close(pairwise_distance(x, y)[1, 2], pairwise_distance(x[1, 2], y[1, 2]))


@pytest.mark.parametrize(
    ("given", "computed"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)]
)
def test_half_precision_is_computed_in_float32(given, computed):
    assert in_float(torch.zeros(2, dtype=given)).dtype == computed
