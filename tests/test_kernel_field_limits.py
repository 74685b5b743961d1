"""Kernel fields at their limits: the potential of the sharp field, far and coinciding points, cut ratios, units, bias, and choices that make no field."""

import math

import numpy as np
import pytest
import torch
from kernel_field_cases import (
    EVERY_KERNEL,
    F64,
    clouds,
    gap,
    masses,
    mean_of,
    plain,
    slopes,
    velocity,
)
from torch.testing import assert_close

from drifting_diffusers.fields import MeanShiftField, Situation, read_field, situated, spell
from drifting_diffusers.fields.divergence import WEIGHTINGS, DivergenceField
from drifting_diffusers.fields.kernel_gradient import KernelGradientField
from drifting_diffusers.fields.score import ScoreField
from drifting_diffusers.fields.sharp import SharpField, sharp_potential
from drifting_diffusers.kernels import Gaussian, Laplace, RationalQuadratic, pairwise_distance
from drifting_diffusers.schedules import exponential

# --- the potential -----------------------------------------------------------------------------------------------------------------------


@EVERY_KERNEL
@pytest.mark.parametrize("own", [0, 16])
def test_t9_the_sharp_field_is_minus_n_times_the_gradient_of_its_potential(kernel, own):
    x, p, q = clouds()
    w, v = masses(q=16 + 24)
    given = {"positive_weights": w, "negative_weights": v, "own": own}
    targets = torch.cat([x, q], dim=1)
    start = x.clone().requires_grad_()
    potential = sharp_potential(start, p, targets, temperature=0.8, kernel=kernel, **given)
    assert potential.shape == (2,)
    potential.sum().backward()
    assert gap(-16 * start.grad, velocity(plain(SharpField, kernel=kernel), x, p, targets, **given)) <= 1e-6


def test_t9_the_potential_is_the_log_ratio_of_densities_without_the_self_terms():
    x, p, _ = (t[0] for t in clouds())
    k = lambda r: 0.8 * (r + 0.8) * (-r / 0.8).exp()
    kept = lambda i: torch.cat([x[:i], x[i + 1 :]])
    expected = sum(mean_of(k, x[i : i + 1], kept(i)).log() - mean_of(k, x[i : i + 1], p).log() for i in range(16)) / 16
    assert_close(sharp_potential(x, p, x, temperature=0.8), expected[0])
    assert abs(float(sharp_potential(x, p, x, temperature=0.8, own=0) - expected[0])) > 0.1


def test_the_potential_is_differentiable_in_the_queries_alone():
    x, p, _ = clouds()
    p.requires_grad_()
    x.requires_grad_()
    sharp_potential(x, p, x, temperature=0.8).sum().backward()
    alone = x.detach().clone().requires_grad_()
    sharp_potential(alone, p.detach(), x.detach(), temperature=0.8, own=16).sum().backward()
    assert p.grad is None
    assert_close(x.grad, alone.grad, rtol=0, atol=0)  # nothing came through x as negatives


def test_descending_the_potential_brings_particles_to_the_data():
    generator = torch.Generator().manual_seed(0)
    data, x = torch.randn(256, 2, generator=generator) + 2, torch.randn(128, 2, generator=generator) * 0.3
    for _ in range(150):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(sharp_potential(x, data, x, temperature=1.0), x)
        x = x - 0.2 * len(x) * gradient
    assert (x.mean(0) - data.mean(0)).norm() < 0.2
    assert abs(float(x.detach().var(0).mean() / data.var(0).mean()) - 1) < 0.3


def test_a_potential_with_nobody_to_see_is_finite():
    x, p, _ = clouds(sizes=(1, 4, 1))
    for given, negatives in (({"own": 1}, x), ({"positive_weights": torch.zeros(2, 4, dtype=F64)}, x + 1)):
        start = x.clone().requires_grad_()
        potential = sharp_potential(start, p, negatives.clone(), temperature=0.8, **given)
        potential.sum().backward()
        assert torch.isfinite(potential).all()
        assert torch.isfinite(start.grad).all()
        assert start.grad.abs().min() > 0
        found = velocity(plain(SharpField), x, p, negatives, **given)
        assert gap(-start.grad, found) <= 1e-9  # the side that is there, and nothing of the other
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        sharp_potential(x, p, x, temperature=0.0)
    with pytest.raises(ValueError, match=r"own must lie in \[0, 1\], got 2"):
        sharp_potential(x, p, x, temperature=1.0, own=2)


# --- limits ------------------------------------------------------------------------------------------------------------------------------


def test_coinciding_points_do_not_pull_by_the_kernel_gradient_but_count_in_the_density():
    x, p, q = (t[0] for t in clouds(sizes=(4, 6, 5)))
    p = torch.cat([p, x[:1]])
    kernel, r = Laplace(), pairwise_distance(x, p)
    numerator = (kernel.log_pull(r, 0.8).exp()[0, :6, None] * (p[:6] - x[0])).sum(0)
    expected = numerator / kernel.value(r, 0.8)[0].sum()
    away = velocity(plain(KernelGradientField), x, p, q) + slopes(lambda z: mean_of(lambda r: (-r / 0.8).exp(), z, q).log(), x)
    assert gap(away[0], expected) <= 1e-8


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_coinciding_points_do_not_blow_rounding_errors_up_in_float32(scale):
    """In one dimension their distance is exactly the least one: 1 / (tau r) is up to 1e10 in mean distances, the displacement 0 but for rounding."""
    x = scale * torch.randn(1, 16, 1, generator=torch.Generator().manual_seed(0))
    p, q = torch.cat([x, x + 0.1 * scale], dim=1), x + 0.5 * scale
    field = KernelGradientField((0.2,), normalise_force=False)
    exact = velocity(field, x.double(), p.double(), q.double())
    assert gap(velocity(field, x, p, q).double(), exact) < 0.01  # the rest is the rounding of distances to near neighbours


def test_far_away_the_mmd_flow_has_no_force_and_the_kl_flow_its_whole():
    """The kernel underflows; its logarithm does not. The rms of nothing is nothing."""
    _, p, q = clouds()
    x = p + 60
    force = {w: velocity(plain(DivergenceField, 1.0, weighting=w), x, p, q) for w in WEIGHTINGS}
    assert force["mmd"].abs().max() == 0
    assert (force["kl"].norm(dim=-1) > 0.5).all()
    near = {w: velocity(plain(DivergenceField, 1.0, weighting=w), p, p, q) for w in WEIGHTINGS}
    assert (near["mmd"].norm(dim=-1) > 1e-3).any()


def test_the_density_ratio_is_cut_on_both_sides():
    _, p, q = clouds()
    q = q - 20
    for x, ratio in ((p, 100.0), (q, 0.01)):  # far from q it is e^hundreds, far from p its inverse
        score, over, under = (velocity(plain(DivergenceField, weighting=w), x, p, q) for w in ("kl", "p/q", "q/p"))
        assert gap(over, ratio * score) <= 1e-12
        assert gap(under, score / ratio) <= 1e-12
    wide = velocity(plain(DivergenceField, weighting="p/q", ratio_bound=1e12), p.float(), p.float(), q.float())
    assert torch.isfinite(wide).all()
    assert gap(velocity(plain(DivergenceField, weighting="p/q", ratio_bound=1.0), p, p, q), velocity(plain(DivergenceField), p, p, q)) == 0


def test_a_mixture_is_the_sum_of_its_parts():
    x, p, q = clouds()
    mixed = velocity(plain(DivergenceField, weighting=("kl", "p/q", "mmd"), mixture=(0.5, 2.0, 1.0)), x, p, q)
    kl, over, mmd = (velocity(plain(DivergenceField, weighting=w), x, p, q) for w in ("kl", "p/q", "mmd"))
    assert gap(mixed, 0.5 * kl + 2 * over + mmd) <= 1e-12
    assert gap(kl, velocity(plain(KernelGradientField, kernel=Gaussian()), x, p, q)) == 0


def test_a_plain_step_of_a_field_in_one_over_length_is_s_squared_times_it():
    """Lengths are mean distances s, and the force is in 1 / s: see the units in the modules."""
    x, p, q = clouds(b=1)
    for cls in (SharpField, KernelGradientField, DivergenceField):
        drift = cls((0.3,), normalise_force=False)(x, positives=p, negatives=q)
        s = float(drift.distance)
        assert gap(drift.velocity, s**2 * velocity(plain(cls, 0.3 * s), x, p, q)) <= 1e-10
    drift = MeanShiftField((0.3,), normalise_force=False)(x, positives=p, negatives=q)
    assert gap(drift.velocity, velocity(plain(MeanShiftField, 0.3 * float(drift.distance)), x, p, q)) <= 1e-10


@pytest.mark.parametrize("n", [16, 32])
def test_t18_abc_takes_the_bias_of_order_one_over_n_away(n):
    """Centroid of N(0, 1) data seen from 1.2 through sigma = 0.5: exactly 0.96. One negative on the query repels nothing."""
    data = torch.randn(300_000, n, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = torch.full((len(data), 1, 1), 1.2, dtype=F64)
    bias = {}
    for corrected in (False, True):
        field = plain(MeanShiftField, 0.5, kernel=Gaussian(), bias_corrected=corrected)
        bias[corrected] = float((x + velocity(field, x, data, x.clone())).mean()) - 0.96
    assert -0.5 < n * bias[False] < -0.3
    assert abs(bias[True]) * 5 < abs(bias[False])


def test_abc_is_the_published_formula():
    """P (1 + p - sum p^2) in the place of p; the weights stay nonnegative and sum to 1."""
    x, y, q = (t[0].numpy() for t in clouds())
    shifts = []
    for targets in (y, q):
        p = np.exp(-np.linalg.norm(x[:, None] - targets[None], axis=-1) / 0.8)
        p /= p.sum(1, keepdims=True)
        p *= 1 + p - (p**2).sum(1, keepdims=True)
        np.testing.assert_allclose(p.sum(1), 1)
        shifts.append(p @ targets - x)
    found = velocity(plain(MeanShiftField, bias_corrected=True), *(torch.from_numpy(t) for t in (x, y, q)))
    assert gap(found, torch.from_numpy(shifts[0] - shifts[1])) <= 1e-12


# --- choices -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "score(temperatures=(exponential(1.0, 0.05),), form='score')",
        "sharp(temperatures=(0.2,), kernel=matern(nu=2.5))",
        "kernel_gradient(kernel=rational_quadratic(alpha=0.5))",
        "divergence(weighting=('kl', 'q/p'), mixture=(0.5, 2.0), ratio_bound=10.0)",
    ],
)
def test_fields_have_a_text_form(text):
    assert spell(read_field(text)) == text


def test_a_width_may_be_annealed():
    x, p, q = clouds()
    field = ScoreField((exponential(1.0, 0.05, 100),), normalise_force=False)
    with pytest.raises(ValueError, match="changes over a run"):
        velocity(field, x, p, q)
    for step, width in ((0, 1.0), (50, math.sqrt(0.05)), (1000, 0.05)):
        expected = velocity(ScoreField((width,), normalise_force=False), x, p, q)
        assert gap(velocity(situated(field, Situation(step=step)), x, p, q), expected) <= 1e-12


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreField(form="kde"), r"form must be one of \('mean_shift', 'score'\), got 'kde'"),
        (lambda: DivergenceField(weighting="chi2"), r"weighting must be one or several of kl, p/q, q/p, mmd, got 'chi2'"),
        (lambda: DivergenceField(weighting=()), r"weighting must be .* got \(\)"),
        (lambda: DivergenceField(mixture=(1.0, 2.0)), r"mixture must be one finite factor for each of \('kl',\), got \(1.0, 2.0\)"),
        (lambda: DivergenceField(ratio_bound=0.5), r"ratio_bound must lie in \[1, 1e12\], got 0.5"),
        (lambda: DivergenceField(ratio_bound=math.inf), r"ratio_bound must lie in \[1, 1e12\], got inf"),
        (lambda: SharpField(()), r"temperatures must be one or more finite numbers above 0"),
    ],
)
def test_choices_that_make_no_field_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    x, p, q = clouds()
    with pytest.raises(ValueError, match=r"k# of the rational quadratic kernel is infinite for alpha <= 1, got 1.0; take alpha > 1"):
        velocity(SharpField(kernel=RationalQuadratic(1.0)), x, p, q)
