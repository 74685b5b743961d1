"""The laws of the fields that are two pulls through a kernel: mean shift, score, sharp, kernel gradient, divergence. In float64, each named after its law.

`plain` fields have one temperature in the coordinates of x and no normalisation: they are then the published formulas.
"""

import dataclasses

import numpy as np
import pytest
import torch
from kernel_field_cases import (
    ANTISYMMETRIC,
    EVERY_FIELD,
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

from drifting_diffusers.fields import MeanShiftField, algorithm_2, frame
from drifting_diffusers.fields.divergence import WEIGHTINGS, DivergenceField
from drifting_diffusers.fields.frame import FramedField
from drifting_diffusers.fields.kernel_gradient import KernelGradientField
from drifting_diffusers.fields.score import ScoreField
from drifting_diffusers.fields.sharp import SharpField
from drifting_diffusers.kernels import Gaussian, Laplace, pairwise_distance

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
