"""The laws of the fields that are two pulls through a kernel: mean shift, score, sharp, kernel gradient, divergence. In float64, each named after its law.

`plain` fields have one temperature in the coordinates of x and no normalisation: they are then the published formulas.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from drifting_diffusers.fields import MeanShiftField, Situation, algorithm_2, frame, names, read_field, situated, spell
from drifting_diffusers.fields.divergence import WEIGHTINGS, DivergenceField
from drifting_diffusers.fields.frame import FramedField
from drifting_diffusers.fields.kernel_gradient import KernelGradientField
from drifting_diffusers.fields.score import ScoreField
from drifting_diffusers.fields.sharp import SharpField, sharp_potential
from drifting_diffusers.kernels import Gaussian, Laplace, Matern, RationalQuadratic, pairwise_distance
from drifting_diffusers.schedules import exponential

F64 = torch.float64
KERNELS = {
    "laplace": Laplace(),
    "gaussian": Gaussian(),
    "rational_quadratic": RationalQuadratic(2.0),
    "matern_half_integer": Matern(1.5),
    "matern": Matern(0.8),
}
EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
ANTISYMMETRIC = {
    "mean_shift": MeanShiftField(),
    "mean_shift_bias_corrected": MeanShiftField(bias_corrected=True),
    "score": ScoreField(),
    "score_form": ScoreField((0.2, 0.5), form="score"),
    "sharp": SharpField(),
    "sharp_matern": SharpField((0.3,), kernel=Matern(0.8)),
    "kernel_gradient": KernelGradientField(),
    "kernel_gradient_rational_quadratic": KernelGradientField((0.3,), kernel=RationalQuadratic(0.7)),
    "divergence_kl": DivergenceField(),
    "divergence_mmd": DivergenceField(weighting="mmd"),
}
FIELDS = ANTISYMMETRIC | {
    "divergence_p/q": DivergenceField(weighting="p/q"),
    "divergence_q/p": DivergenceField(weighting="q/p"),
    "divergence_mixed": DivergenceField(weighting=("kl", "q/p"), mixture=(0.5, 2.0)),
}
EVERY_FIELD = pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS.keys())
for name, cls in (("score", ScoreField), ("sharp", SharpField), ("kernel_gradient", KernelGradientField), ("divergence", DivergenceField)):
    names.FIELDS.setdefault(name, cls)


def plain(cls: type, temperature: float = 0.8, **more) -> FramedField:
    """The published formula: plain lengths, nothing normalised."""
    return cls((temperature,), normalise_distance=False, normalise_force=False, **more)


def clouds(seed: int = 0, d: int = 3, sizes=(16, 20, 24), b: int = 2) -> list[Tensor]:
    """Queries, positives shifted by 1, negatives."""
    generator = torch.Generator().manual_seed(seed)
    x, positives, negatives = (torch.randn(b, n, d, generator=generator, dtype=F64) for n in sizes)
    return [x, positives + 1, negatives]


def masses(seed: int = 1, b: int = 2, p: int = 20, q: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(b, p, generator=generator, dtype=F64) + 0.1, 2 * torch.rand(b, q, generator=generator, dtype=F64) + 0.1


def velocity(field, x: Tensor, positives: Tensor, negatives: Tensor, **more) -> Tensor:
    return field(x, positives=positives, negatives=negatives, **more).velocity


def gap(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def slopes(function, x: Tensor, step: float = 1e-5) -> Tensor:
    """D function / dx by central differences, the new axis last: every query of a function of queries one by one."""
    moves = step * torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.stack([(function(x + e) - function(x - e)) / (2 * step) for e in moves], dim=-1)


def mean_of(k, x: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
    """The w-weighted mean over y of a function of the distance, with distances taken pair by pair."""
    values = k((x[..., :, None, :] - y[..., None, :, :]).norm(dim=-1))
    w = torch.ones_like(y[..., 0]) if w is None else w
    return (values * w[..., None, :]).sum(-1) / w.sum(-1)[..., None]


# --- symmetries --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ANTISYMMETRIC.values(), ids=ANTISYMMETRIC.keys())
def test_t1_antisymmetry_with_and_without_masses(field):
    x, p, q = clouds()
    w, v = masses()
    assert gap(velocity(field, x, p, q), -velocity(field, x, q, p)) <= 1e-12
    there = velocity(field, x, p, q, positive_weights=w, negative_weights=v)
    assert gap(there, -velocity(field, x, q, p, positive_weights=v, negative_weights=w)) <= 1e-12
    assert gap(there, velocity(field, x, p, q)) > 0.01


def test_t1_ratio_weightings_are_exchanged_with_the_sides_and_not_antisymmetric():
    x, p, q = clouds()
    one, other = (plain(DivergenceField, weighting=w) for w in ("p/q", "q/p"))
    assert gap(velocity(one, x, p, q), -velocity(other, x, q, p)) <= 1e-12
    assert gap(velocity(one, x, p, q), -velocity(one, x, q, p)) > 0.5


@EVERY_FIELD
def test_t2_equilibrium(field):
    """Positives and negatives the same array, with the same masses, nothing masked: what is left is the rounding of two matrix products."""
    x, p, _ = clouds()
    w, _ = masses()
    for given in ({}, {"positive_weights": w, "negative_weights": w}):
        as_it_is = dataclasses.replace(field, temperatures=(0.8,), normalise_distance=False, normalise_force=False)
        assert_close(velocity(as_it_is, x, p, p.clone(), **given), torch.zeros_like(x), rtol=0, atol=1e-13)
        drift = field(x, positives=p, negatives=p.clone(), **given)
        assert_close(drift.velocity, torch.zeros_like(x), rtol=0, atol=1e-8)  # rounding, divided by the least rms of 1e-4
        assert (drift.strength < 1e-24).all()


@EVERY_FIELD
def test_t4_rotations_translations_orders_and_units_carry_over(field):
    x, p, q = clouds()
    w, v = masses()
    generator = torch.Generator().manual_seed(0)
    turn, shift = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=F64))[0], torch.randn(3, generator=generator, dtype=F64)
    expected = velocity(field, x, p, q, positive_weights=w, negative_weights=v)
    move = lambda t: t @ turn + shift
    assert gap(velocity(field, move(x), move(p), move(q), positive_weights=w, negative_weights=v), expected @ turn) <= 1e-10
    i, j = torch.randperm(20, generator=generator), torch.randperm(24, generator=generator)
    shuffled = velocity(field, x.flip(1), p[:, i], q[:, j], positive_weights=w[:, i], negative_weights=v[:, j])
    assert gap(shuffled.flip(1), expected) <= 1e-12
    large = field(1000 * x, positives=1000 * p, negatives=1000 * q, positive_weights=w, negative_weights=v)
    assert gap(large.velocity, 1000 * expected) <= 1e-10


# --- what each field is ------------------------------------------------------------------------------------------------------------------


@EVERY_KERNEL
def test_mean_shift_is_equation_10_and_11(kernel):
    """V = E[k(x, y+) k(x, y-) (y+ - y-)] / (Z_p Z_q): one sum over pairs of targets, masses in both means."""
    x, p, q = clouds(b=1)
    (w,), (v,) = masses(b=1)
    kp, kq = (kernel.value(pairwise_distance(x[0], y[0]), 0.8) * m for y, m in ((p, w), (q, v)))
    pairs = torch.einsum("np,nm,pmd->nd", kp, kq, p[0][:, None] - q[0][None])
    found = velocity(plain(MeanShiftField, kernel=kernel), x, p, q, positive_weights=w[None], negative_weights=v[None])
    assert gap(found[0], pairs / (kp.sum(1) * kq.sum(1))[:, None]) <= 1e-12


def test_t7_score_field_is_sigma_squared_times_the_score_difference():
    """Against finite differences of the log-ratio of two kernel density estimates, written in numpy."""
    x, p, q = (t[0] for t in clouds(d=2))
    sigma, h = 0.7, 1e-5
    kde = lambda z, y: np.log(np.exp(-((z[:, None] - y[None]) ** 2).sum(-1) / (2 * sigma**2)).mean(1))
    ratio = lambda z: kde(z, p.numpy()) - kde(z, q.numpy())
    score = torch.from_numpy(np.stack([(ratio(x.numpy() + h * e) - ratio(x.numpy() - h * e)) / (2 * h) for e in np.eye(2)], axis=1))
    for form, factor in (("mean_shift", sigma**2), ("score", 1.0)):
        found = velocity(plain(ScoreField, sigma, form=form), x, p, q)
        assert (found - factor * score).abs().max() <= 1e-8 * factor * score.abs().max()
    assert gap(velocity(plain(MeanShiftField, sigma, kernel=Laplace()), x, p, q), sigma**2 * score) > 0.1


@EVERY_KERNEL
def test_for_the_gaussian_alone_mean_shift_kernel_gradient_and_sharp_field_are_one(kernel):
    x, p, q = clouds()
    w, v = masses()
    given = {"positive_weights": w, "negative_weights": v}
    shift, gradient, sharp = (
        velocity(plain(cls, 0.7, kernel=kernel), x, p, q, **given) for cls in (MeanShiftField, KernelGradientField, SharpField)
    )
    if kernel == Gaussian():
        assert gap(shift, 0.7**2 * gradient) <= 1e-12
        assert gap(shift, 0.7**2 * sharp) <= 1e-12
        assert gap(shift, velocity(plain(ScoreField, 0.7), x, p, q, **given)) == 0
    else:
        assert min(gap(shift, 0.7**2 * gradient), gap(shift, 0.7**2 * sharp), gap(gradient, sharp)) > 0.05


def test_normalised_forces_have_no_form():
    """Each temperature is divided by its own rms: sigma^2 drops out."""
    x, p, q = clouds()
    shift, score = (velocity(ScoreField((0.2, 1.0), form=form), x, p, q) for form in ("mean_shift", "score"))
    assert gap(shift, score) <= 1e-12
    shift, score = (velocity(ScoreField((0.2, 1.0), form=form, normalise_force=False), x, p, q) for form in ("mean_shift", "score"))
    assert gap(shift, score) > 0.5


@EVERY_KERNEL
@pytest.mark.parametrize(("cls", "of"), [(KernelGradientField, "value"), (SharpField, "sharp")])
def test_kernel_gradient_and_sharp_field_are_gradients_of_log_densities(kernel, cls, of):
    """V = grad log(k * p) - grad log(k * q), with k# for k in the sharp field, by finite differences and with masses."""
    x, p, q = clouds()
    w, v = masses()
    k = lambda r: getattr(kernel, of)(r, 0.8)
    expected = slopes(lambda z: mean_of(k, z, p, w).log() - mean_of(k, z, q, v).log(), x)
    found = velocity(plain(cls, kernel=kernel), x, p, q, positive_weights=w, negative_weights=v)
    assert gap(found, expected) <= 1e-8


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_divergences_are_gradients_of_functions_of_the_density_ratio(weighting):
    """Of log(p / q), p / q, -q / p and p - q, by finite differences."""
    x, p, q = clouds()
    w, v = masses()
    scalar = {"kl": lambda a, b: (a / b).log(), "p/q": lambda a, b: a / b, "q/p": lambda a, b: -b / a, "mmd": lambda a, b: a - b}
    k = lambda r: (-(r**2) / (2 * 0.8**2)).exp()
    expected = slopes(lambda z: scalar[weighting](mean_of(k, z, p, w), mean_of(k, z, q, v)), x)
    found = velocity(plain(DivergenceField, weighting=weighting, ratio_bound=1e12), x, p, q, positive_weights=w, negative_weights=v)
    assert gap(found, expected) <= 1e-7
    if weighting != "kl":
        assert gap(velocity(plain(KernelGradientField, kernel=Gaussian()), x, p, q), expected) > 0.3


def asymmetry(field: FramedField, d: int = 3) -> float:
    """Max |J - J^T| / max |J| at 30 points."""
    _, p, q = clouds(1, d, b=1)
    points = torch.randn(1, 30, d, generator=torch.Generator().manual_seed(2), dtype=F64)
    jacobian = slopes(lambda z: velocity(field, z, p, q), points)
    return float((jacobian - jacobian.mT).abs().max() / jacobian.abs().max())


@EVERY_KERNEL
def test_t8_which_fields_are_gradients(kernel):
    """Sharp, kernel-gradient and divergence fields for every kernel; the mean shift for the Gaussian alone."""
    for cls in (SharpField, KernelGradientField):
        assert asymmetry(plain(cls, kernel=kernel)) <= 1e-8
    for weighting in (*WEIGHTINGS, ("kl", "q/p")):
        assert asymmetry(plain(DivergenceField, kernel=kernel, weighting=weighting, ratio_bound=1e12)) <= 1e-8
    assert asymmetry(plain(DivergenceField, kernel=kernel, weighting="q/p", ratio_bound=1.5)) <= 1e-5  # a cut has a kink
    if kernel == Gaussian():
        assert asymmetry(plain(MeanShiftField, kernel=kernel)) <= 1e-8
    else:
        assert asymmetry(plain(MeanShiftField, kernel=kernel)) >= 0.1


def test_t8_algorithm_2_is_no_gradient():
    assert asymmetry(algorithm_2(0.8)) > 0.5


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
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        sharp_potential(x, p, x, temperature=0.0)
    with pytest.raises(ValueError, match=r"own must lie in \[0, 1\], got 2"):
        sharp_potential(x, p, x, temperature=1.0, own=2)


# --- presence and absence ----------------------------------------------------------------------------------------------------------------


@EVERY_FIELD
def test_own_queries_are_absent_and_further_negatives_are_not(field):
    """Each query among the others without itself and the further negatives, one by one."""
    field = dataclasses.replace(field, temperatures=(0.8,), normalise_distance=False, normalise_force=False)
    x, p, q = (t[0] for t in clouds(sizes=(6, 9, 5)))
    found = velocity(field, x, p, torch.cat([x, q]), own=6)
    for i in range(6):
        alone = velocity(field, x[i : i + 1], p, torch.cat([x[:i], x[i + 1 :], q]))
        assert gap(found[i], alone[0]) <= 1e-11
    assert gap(velocity(field, x, p, x), velocity(field, x, p, x.clone(), own=6)) == 0


@EVERY_FIELD
def test_mass_0_is_absence_and_mass_2_is_two(field):
    x, p, q = clouds()
    w, v = torch.ones(2, 20, dtype=F64), torch.ones(2, 24, dtype=F64)
    w[:, :5], v[:, 20:] = 0, 0
    w[:, 5] = 2
    found = velocity(field, x, p, q, positive_weights=w, negative_weights=v)
    twice = velocity(field, x, torch.cat([p[:, 5:], p[:, 5:6]], dim=1), q[:, :20])
    assert (gap(found, twice) <= 1e-11) is not getattr(field, "bias_corrected", False)  # whose weights are not linear in masses
    assert gap(found, velocity(field, x, p[:, 5:], q[:, :20], positive_weights=w[:, 5:], negative_weights=v[:, :20])) <= 1e-11


@EVERY_FIELD
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_nobody_on_a_side_is_no_nan(field, dtype):
    """One query whose only negative is itself; a side of masses 0; both."""
    x, p, q = (t.to(dtype) for t in clouds(sizes=(1, 4, 3)))
    nothing = lambda t: torch.zeros(t.shape[:2], dtype=dtype)
    for negatives, given in (
        (x, {"own": 1}),
        (q, {"negative_weights": nothing(q)}),
        (q, {"positive_weights": nothing(p)}),
        (x, {"own": 1, "positive_weights": nothing(p)}),
    ):
        found = velocity(field, x, p, negatives, **given)
        assert torch.isfinite(found).all()
        assert found.abs().sum() > 0 or "own" in given


@EVERY_FIELD
def test_blocks_of_rows_are_the_whole(field, monkeypatch):
    x, p, q = clouds()
    w, v = masses(q=16 + 24)
    given = {"positive_weights": w, "negative_weights": v, "own": 16}
    whole = field(x, positives=p, negatives=torch.cat([x, q], dim=1), **given)
    monkeypatch.setattr(frame, "BLOCK", 150)
    cut = field(x, positives=p, negatives=torch.cat([x, q], dim=1), **given)
    assert gap(cut.velocity, whole.velocity) <= 1e-12
    assert_close(cut.strength, whole.strength, rtol=1e-12, atol=0)


@EVERY_FIELD
def test_no_graph_and_the_dtype_of_the_input(field):
    x, p, q = clouds()
    drift = field(x.requires_grad_(), positives=p.requires_grad_(), negatives=q)
    assert not any(t.requires_grad for t in (drift.velocity, drift.unit, drift.strength))
    half = field(x.bfloat16(), positives=p.bfloat16(), negatives=q.bfloat16()).velocity
    assert (drift.velocity.dtype, half.dtype) == (F64, torch.float32)


@EVERY_FIELD
@pytest.mark.parametrize("start", ["collapsed", "on the data", "far"])
def test_t25_degenerate_batches_are_finite_at_the_smallest_temperature(field, start):
    p = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    x = {"collapsed": torch.zeros(2, 8, 3), "on the data": p.clone(), "far": p + 1e4}[start]
    smallest = dataclasses.replace(field, temperatures=(0.02,))
    for dtype in (torch.float32, torch.bfloat16, F64):
        assert torch.isfinite(velocity(smallest, x.to(dtype), p.to(dtype), x.to(dtype), own=8)).all()


# --- limits ------------------------------------------------------------------------------------------------------------------------------


def test_coinciding_points_do_not_pull_by_the_kernel_gradient_but_count_in_the_density():
    x, p, q = (t[0] for t in clouds(sizes=(4, 6, 5)))
    p = torch.cat([p, x[:1]])
    kernel, r = Laplace(), pairwise_distance(x, p)
    numerator = (kernel.log_pull(r, 0.8).exp()[0, :6, None] * (p[:6] - x[0])).sum(0)
    expected = numerator / kernel.value(r, 0.8)[0].sum()
    away = velocity(plain(KernelGradientField), x, p, q) + slopes(lambda z: mean_of(lambda r: (-r / 0.8).exp(), z, q).log(), x)
    assert gap(away[0], expected) <= 1e-8
    large = velocity(KernelGradientField((0.02,)), *(1e4 * t.float() for t in (x, p, q)))  # 1 / r is 1e8 there
    assert gap(large.double(), 1e4 * velocity(KernelGradientField((0.02,)), x, p, q)) < 1e-3


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
