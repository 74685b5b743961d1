"""Kernels: what their functions have to do with each other, checked by finite differences, and distances near and far from 0."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch.testing import assert_close

from drifting_diffusers import kernels
from drifting_diffusers.kernels import (
    LEAST_DISTANCE,
    Gaussian,
    Kernel,
    Laplace,
    Matern,
    RationalQuadratic,
    in_float,
    log_power_bessel,
    pairwise_distance,
)

EVERY = [Laplace(), Gaussian(), RationalQuadratic(), RationalQuadratic(1.2), *map(Matern, (0.3, 0.5, 1.0, 1.5, 2.2, 2.5, 7.5))]
KERNELS = pytest.mark.parametrize("kernel", EVERY, ids=str)
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
    s = torch.linspace(0.7, 40, 40_001, dtype=torch.float64)
    assert_close(torch.trapezoid(s * kernel.value(s, 0.8), s), kernel.sharp(s[0], 0.8) - kernel.sharp(s[-1], 0.8), rtol=1e-6, atol=0)
    assert kernel.sharp(1e8 * s[-1], 0.8) < 0.02 * kernel.sharp(s[0], 0.8)  # and nothing at infinity


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


def test_the_gaussian_alone_is_its_own_sharp_kernel():
    for kernel, constant in ((Gaussian(), True), *((other, False) for other in EVERY if other != Gaussian())):
        ratio = kernel.sharp(DISTANCE, 0.8) / kernel.value(DISTANCE, 0.8)
        assert (float((ratio - ratio[0]).abs().max()) < 1e-12) is constant


@KERNELS
def test_value_is_the_exponential_of_log_value_which_survives_where_the_value_underflows(kernel):
    assert_close(kernel.log_value(DISTANCE, 0.5).exp(), kernel.value(DISTANCE, 0.5))
    assert isinstance(kernel, Kernel)
    far = torch.tensor([20.0])
    assert torch.isfinite(kernel.log_value(far, 0.02)).all()
    assert (kernel.value(far, 0.02) == 0) is not isinstance(kernel, RationalQuadratic)  # its tail is heard


@KERNELS
@pytest.mark.parametrize("temperature", [0.02, 0.3, 5.0])
def test_the_three_logarithms_are_those_of_the_three_functions(kernel, temperature):
    r = DISTANCE * min(temperature, 1.0)
    assert_close(kernel.log_value(r, temperature), kernel.value(r, temperature).log(), rtol=1e-10, atol=1e-12)
    assert_close(kernel.log_sharp(r, temperature), kernel.sharp(r, temperature).log(), rtol=1e-10, atol=1e-12)
    assert_close(kernel.log_pull(r, temperature), (-kernel.derivative(r, temperature) / r).log(), rtol=1e-10, atol=1e-12)


@KERNELS
def test_kernels_start_at_1_and_fall(kernel):
    """k(0) = 1: at the least distance a kernel with a kink has fallen by the distance, and a rougher one by more."""
    r = torch.logspace(-12, 1, 200, dtype=torch.float64)
    value, sharp = kernel.value(r, 0.8), kernel.sharp(r, 0.8)
    assert_close(value[0], torch.ones_like(value[0]), rtol=0, atol=1e-6)
    assert (value.diff() <= 1e-13).all()
    assert (sharp.diff() <= 1e-13).all()


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logarithms_and_their_slopes_are_finite_at_every_distance(kernel, dtype):
    """From the least distance, and from 0 itself for k and k#, to 50 000 widths; and float32 agrees with float64."""
    far = torch.cat([torch.logspace(-4, 3, 300, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]).to(dtype)
    for temperature in (0.02, 1.0):
        for name in ("log_value", "log_sharp", "log_pull"):
            r = (far[:-1] if name == "log_pull" else far).clone().requires_grad_()
            found = getattr(kernel, name)(r, temperature)
            found.sum().backward()
            assert found.dtype == dtype
            assert torch.isfinite(found).all()
            assert torch.isfinite(r.grad).all()
            assert_close(found.double(), getattr(kernel, name)(r.detach().double(), temperature), rtol=2e-6, atol=1e-4)


@KERNELS
def test_gradients_of_logarithms_are_exact_to_second_order(kernel):
    """The potential of the sharp field differentiates log k#; general orders have a backward of their own."""
    r = torch.tensor([1e-3, 0.1, 0.7, 3.0, 9.0], dtype=torch.float64, requires_grad=True)
    for function in (kernel.log_value, kernel.log_sharp, kernel.log_pull):
        scaled = lambda s, function=function: function(s.exp(), 0.8)
        assert torch.autograd.gradcheck(scaled, r.detach().log().requires_grad_(), atol=1e-6)
        assert torch.autograd.gradgradcheck(scaled, r.detach().log().requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("nu", [0.05, 0.3, 0.5, 1.0, 1.5, 2.2, 4.5, 10.1, 20.5])
def test_matern_is_the_bessel_formula(nu):
    """Against scipy from r = 1e-4 to tails where K_nu itself underflows: e^z K_nu(z), its logarithm and z."""
    r, tau = torch.logspace(-4, 3, 200, dtype=torch.float64), 0.1
    z = math.sqrt(2 * nu) * r.numpy() / tau
    log_k = lambda order: np.log(special.kve(order, z)) - z
    constant = (1 - nu) * math.log(2) - special.gammaln(nu)
    kernel = Matern(nu)
    assert (special.kv(nu, z) == 0).any()
    for name, expected in (
        ("log_value", constant + nu * np.log(z) + log_k(nu)),
        ("log_pull", constant + math.log(2 * nu / tau**2) + (nu - 1) * np.log(z) + log_k(nu - 1)),
        ("log_sharp", constant + math.log(tau**2 / (2 * nu)) + (nu + 1) * np.log(z) + log_k(nu + 1)),
    ):
        found = getattr(kernel, name)(r, tau).numpy()
        assert np.isfinite(expected).all()
        assert np.abs(found - expected).max() <= 1e-9  # relative, of the kernel
        assert np.abs(found - expected)[z < 1].max() <= 1e-11


def test_half_integers_by_their_closed_form_are_the_integral():
    z = torch.logspace(-6, 5, 100, dtype=torch.float64)
    for p in (0, 1, 2, 9):
        integral = kernels._LogPowerBessel.apply(z, p + 0.5)
        assert_close(log_power_bessel(z, p + 0.5), integral, rtol=1e-12, atol=1e-11)
    assert_close(Matern(1.5).value(DISTANCE, 0.8), (1 + 3**0.5 * DISTANCE / 0.8) * (-(3**0.5) * DISTANCE / 0.8).exp())
    z = 5**0.5 * DISTANCE / 0.8
    assert_close(Matern(2.5).value(DISTANCE, 0.8), (1 + z + z**2 / 3) * (-z).exp())


def test_matern_is_laplace_at_one_half_and_tends_to_the_gaussian_as_rational_quadratics_do():
    for name in ("value", "derivative", "sharp"):
        of = lambda kernel, name=name: getattr(kernel, name)(DISTANCE, 0.8)
        assert_close(of(Matern(0.5)), of(Laplace()), rtol=1e-12, atol=1e-13)
        distances = {k: float((of(k) - of(Gaussian())).abs().max()) for k in (Matern(2.5), Matern(20.3), Matern(99.5))}
        assert 0.02 > distances[Matern(99.5)] < distances[Matern(20.3)] / 3 < distances[Matern(2.5)] / 9
        assert_close(of(RationalQuadratic(1e7)), of(Gaussian()), rtol=1e-5, atol=1e-9)


def test_the_sharp_matern_kernel_is_the_next_matern_kernel():
    """k# = tau^2 M_(nu+1) of the same z, so that k#(0) = tau^2 whatever nu; and Laplace's is tau (r + tau) k."""
    for nu in (0.3, 0.5, 1.0, 2.5):
        same_z = 0.8 * math.sqrt((nu + 1) / nu)
        assert_close(Matern(nu).sharp(DISTANCE, 0.8), 0.8**2 * Matern(nu + 1).value(DISTANCE, same_z), rtol=1e-11, atol=0)
        assert_close(Matern(nu).sharp(torch.zeros(1, dtype=torch.float64), 0.8), torch.full((1,), 0.64, dtype=torch.float64))


@pytest.mark.usefixtures("as_users_see_it")
def test_parameters_that_make_no_kernel_are_refused():
    for value in (0, -1.0, math.inf, math.nan, "1", True):
        with pytest.raises(ValueError, match=r"alpha must be a finite number above 0, got .*; take rational_quadratic\(2.0\)"):
            RationalQuadratic(value)
    for value in (0, 101.0, math.nan):
        with pytest.raises(
            ValueError, match=r"nu must be a finite number above 0 and at most 100, got .*; take matern\(1.5\), or gaussian"
        ):
            Matern(value)
    for alpha in (0.5, 1.0):
        heavy = RationalQuadratic(alpha)
        assert torch.isfinite(heavy.log_value(DISTANCE, 0.8) + heavy.log_pull(DISTANCE, 0.8)).all()
        with pytest.raises(
            ValueError, match=f"k# of the rational quadratic kernel is infinite for alpha <= 1, got {alpha}; take alpha > 1"
        ):
            heavy.log_sharp(DISTANCE, 0.8)


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
