"""The laws of the drifting field, in float64: each test carries the number of its law in the table of the method's properties.

`ALGORITHM_2` is the paper's field without the normalisations of its appendix A.6. Particles stand for a generator wherever no network is needed.
"""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from drifting_diffusers.couplings import COUPLINGS, row_softmax, two_sided_softmax
from drifting_diffusers.fields import DriftingField, Field, batch_mean
from drifting_diffusers.kernels import Gaussian, Laplace, pairwise_distance
from drifting_diffusers.losses import drift_loss

F64 = torch.float64
COUPLING = pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS.keys())
SEEDS = given(seed=st.integers(0, 2**31), d=st.integers(1, 9), temperature=st.floats(0.1, 3.0))
QUICK = settings(deadline=None, derandomize=True, max_examples=15)


def algorithm_2(temperature: float, **changes) -> DriftingField:
    plain = {"affinity_floor": 0.0, "self_mask": 1e6, "normalise_distance": False, "normalise_force": False}
    return DriftingField((temperature,), **(plain | changes))


def clouds(seed: int, d: int, sizes=(16, 20, 24), b: int = 2) -> list[Tensor]:
    """Queries, positives shifted by 1, negatives."""
    generator = torch.Generator().manual_seed(seed)
    x, positives, negatives = (torch.randn(b, n, d, generator=generator, dtype=F64) for n in sizes)
    return [x, positives + 1, negatives]


def velocity(field: Field, x: Tensor, positives: Tensor, negatives: Tensor, **more) -> Tensor:
    return field(x, positives=positives, negatives=negatives, **more).velocity


def assert_close_in_norm(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert (actual - expected).norm() <= bound * expected.norm().clamp(min=1e-300)


# --- symmetries --------------------------------------------------------------------------------------------------------------------------


@COUPLING
@SEEDS
@QUICK
def test_t1_antisymmetry(coupling, seed, d, temperature):
    """V(x; p, q) = -V(x; q, p), for every normalisation."""
    x, p, q = clouds(seed, d)
    for field in (algorithm_2(temperature, coupling=coupling), DriftingField((0.05, temperature), coupling=coupling)):
        assert_close_in_norm(velocity(field, x, p, q), -velocity(field, x, q, p), 1e-12)


@COUPLING
@pytest.mark.parametrize("place", ["before", "after"])
def test_t1_antisymmetry_holds_with_masses(coupling, place):
    x, p, q = clouds(0, 3)
    w, v = torch.rand(2, 20, generator=torch.Generator().manual_seed(1), dtype=F64), torch.full((2, 24), 2.0, dtype=F64)
    field = DriftingField(coupling=coupling, weights=place)
    there = velocity(field, x, p, q, positive_weights=w, negative_weights=v)
    assert_close_in_norm(there, -velocity(field, x, q, p, positive_weights=v, negative_weights=w), 1e-12)


@COUPLING
def test_t2_equilibrium(coupling):
    """Positives and negatives the same array, nothing masked: nothing but the rounding of two matrix products is left."""
    x, p, _ = clouds(0, 3)
    assert_close(velocity(algorithm_2(0.5, coupling=coupling), x, p, p.clone()), torch.zeros_like(x), rtol=0, atol=1e-14)
    drift = DriftingField(coupling=coupling)(x, positives=p, negatives=p.clone())
    assert_close(drift.velocity, torch.zeros_like(x), rtol=0, atol=1e-10)  # rounding, divided by the least rms of 1e-4
    assert (drift.strength < 1e-28).all()


@pytest.mark.parametrize(("n", "rms"), [(16, 0.13), (64, 0.067), (256, 0.035)])
def test_t3_finite_batches_leave_a_noise_of_order_one_over_root_n(n, rms):
    """P = q in law, own batch masked, temperature 0.5, two dimensions: mean of the rms over 30 draws; shifted by 3 it is 0.32 for every n."""
    generator = torch.Generator().manual_seed(0)
    x, p = (torch.randn(30, n, 2, generator=generator, dtype=F64) for _ in range(2))
    strength = lambda positives: float(velocity(algorithm_2(0.5), x, positives, x).square().mean(dim=(1, 2)).sqrt().mean())
    assert abs(strength(p) / rms - 1) < 0.07
    assert abs(strength(p + 3) / 0.32 - 1) < 0.07


@COUPLING
@SEEDS
@QUICK
def test_t4_rotations_and_translations_carry_over(coupling, seed, d, temperature):
    x, p, q = clouds(seed, d)
    generator = torch.Generator().manual_seed(seed)
    turn, shift = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=F64))[0], torch.randn(d, generator=generator, dtype=F64)
    move = lambda t: t @ turn + shift
    for field in (algorithm_2(temperature, coupling=coupling), DriftingField((0.05, temperature), coupling=coupling)):
        assert_close_in_norm(velocity(field, move(x), move(p), move(q)), velocity(field, x, p, q) @ turn, 1e-10)


@COUPLING
@SEEDS
@QUICK
def test_t4_the_order_of_targets_and_problems_does_not_matter(coupling, seed, d, temperature):
    x, p, q = clouds(seed, d)
    generator = torch.Generator().manual_seed(seed)
    shuffle = lambda t, dim: t.index_select(dim, torch.randperm(t.shape[dim], generator=generator))
    field = DriftingField((0.05, temperature), coupling=coupling)
    expected = velocity(field, x, p, q)
    assert_close_in_norm(velocity(field, x, shuffle(p, 1), shuffle(q, 1)), expected, 1e-12)
    assert_close_in_norm(velocity(field, x.flip(0), p.flip(0), q.flip(0)).flip(0), expected, 1e-12)
    assert_close_in_norm(velocity(field, x.flip(1), p, q).flip(1), expected, 1e-12)


@given(seed=st.integers(0, 2**31), d=st.integers(3, 9), temperature=st.floats(0.1, 3.0))
@QUICK
def test_t4_a_change_of_units_changes_only_the_unit(seed, d, temperature):
    """Where no pair is closer than `LEAST_DISTANCE`, which has a unit."""
    x, p, q = clouds(seed, d)
    field = DriftingField((0.05, temperature))
    small = field(x, positives=p, negatives=q)
    large = field(1000 * x, positives=1000 * p, negatives=1000 * q)
    assert_close_in_norm(large.velocity / large.unit, small.velocity / small.unit, 1e-12)
    assert_close(large.unit, 1000 * small.unit, rtol=1e-12, atol=0)
    assert_close(large.strength, small.strength, rtol=1e-12, atol=0)


# --- closed forms ------------------------------------------------------------------------------------------------------------------------


def mean_shift(x: Tensor, y: Tensor, k: Tensor) -> Tensor:
    return k @ y / k.sum(-1, keepdim=True) - x


@SEEDS
@QUICK
def test_t5_row_softmax_is_the_difference_of_mean_shifts_times_a_scalar(seed, d, temperature):
    """V = a (1 - a) (V+ - V-) with a = Z+ / (Z+ + Z-): Algorithm 2 carries a factor of at most 1/4 that its equation (11) has not."""
    x, p, q = clouds(seed, d)
    kp, kq = (Laplace().value(pairwise_distance(x, y), temperature) for y in (p, q))
    a = kp.sum(-1, keepdim=True) / (kp.sum(-1, keepdim=True) + kq.sum(-1, keepdim=True))
    expected = a * (1 - a) * (mean_shift(x, p, kp) - mean_shift(x, q, kq))
    assert_close_in_norm(velocity(algorithm_2(temperature, coupling=row_softmax), x, p, q), expected, 1e-10)


@SEEDS
@QUICK
def test_t5_two_sided_softmax_is_a_mean_shift_with_a_reweighted_kernel(seed, d, temperature):
    """The kernel becomes k / sqrt(g), g the column sums over the queries; the scalar Z+ Z- / r, r the row sums of k."""
    x, p, q = clouds(seed, d)
    kp, kq = (Laplace().value(pairwise_distance(x, y), temperature) for y in (p, q))
    r = kp.sum(-1, keepdim=True) + kq.sum(-1, keepdim=True)
    kp, kq = (k / k.sum(-2, keepdim=True).sqrt() for k in (kp, kq))
    expected = kp.sum(-1, keepdim=True) * kq.sum(-1, keepdim=True) / r * (mean_shift(x, p, kp) - mean_shift(x, q, kq))
    assert_close_in_norm(velocity(algorithm_2(temperature, coupling=two_sided_softmax), x, p, q), expected, 1e-10)


def test_temperatures_add_up():
    x, p, q = clouds(0, 3)
    separate = [DriftingField((t,))(x, positives=p, negatives=q) for t in (0.02, 0.05, 0.2)]
    together = DriftingField((0.02, 0.05, 0.2))(x, positives=p, negatives=q)
    assert_close(together.velocity, sum(d.velocity for d in separate))
    assert_close(together.strength, torch.cat([d.strength for d in separate]))
    for drift in separate:  # each has unit rms, in units
        assert_close((drift.velocity / drift.unit).square().mean(), torch.tensor(1.0, dtype=F64))


def test_the_gaussian_kernel_and_a_grouping_by_problem_keep_problems_apart():
    x, p, q = clouds(0, 3)
    field = DriftingField((0.2, 0.5), kernel=Gaussian(), grouping="problem")
    together = field(x, positives=p, negatives=q)
    assert together.unit.shape == (2,)
    assert together.strength.shape == (2, 2)
    for b in range(2):
        alone = field(x[b : b + 1], positives=p[b : b + 1], negatives=q[b : b + 1])
        assert_close(alone.velocity[0], together.velocity[b])
        assert_close(alone.strength[:, 0], together.strength[:, b])


# --- the masked own batch ----------------------------------------------------------------------------------------------------------------


def test_own_samples_are_masked_when_the_negatives_are_the_queries():
    x, p, _ = clouds(0, 3)
    field = algorithm_2(0.5)
    masked = velocity(field, x, p, x)
    assert_close(velocity(field, x, p, x.clone(), own=16), masked, rtol=0, atol=0)
    assert (velocity(field, x, p, x, own=0) - masked).norm() > 0.1 * masked.norm()
    one = velocity(field, x[:1, :1], p[:1], torch.cat([x, x[:1] + 0.3], dim=0)[[0]][:, 1:])
    without = velocity(field, x[:1, :1], p[:1], x[:1], own=1)
    assert_close(one, without)  # masked with 1e6 is as good as not there


def test_negatives_beyond_the_own_ones_are_not_masked():
    x, p, q = clouds(0, 3)
    joined = torch.cat([x, q], dim=1)
    assert (velocity(algorithm_2(0.5), x, p, joined, own=16) - velocity(algorithm_2(0.5), x, p, joined, own=0)).norm() > 0.1


def test_unbatched_calls_are_problems_of_one():
    x, p, q = (t[0] for t in clouds(0, 3))
    w = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=F64)
    for more in ({}, {"positive_weights": w}, {"own": 8}):
        plain = DriftingField()(x, positives=p, negatives=q, **more)
        more = {k: v[None] if isinstance(v, Tensor) else v for k, v in more.items()}
        batched = DriftingField()(x[None], positives=p[None], negatives=q[None], **more)
        assert_close(plain.velocity, batched.velocity[0], rtol=0, atol=0)
    particles = DriftingField()(x, positives=p, negatives=x)
    assert_close(particles.velocity, DriftingField()(x[None], positives=p[None], negatives=x[None], own=16).velocity[0], rtol=0, atol=0)


# --- recorded numbers --------------------------------------------------------------------------------------------------------------------


def waves(b: int, n: int, s: int, a: float, c: float, dtype=torch.float32) -> Tensor:
    i, j, k = torch.meshgrid(torch.arange(b), torch.arange(n), torch.arange(s), indexing="ij")
    return ((a + 0.7 * i + 1.3 * j + 0.31 * k + 0.05 * j * k).double().sin() + c).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_t6_golden_values_of_the_release(dtype):
    gen, pos, neg = waves(2, 4, 6, 1, 0, dtype), waves(2, 5, 6, 2, 0.5, dtype), waves(2, 3, 6, 3, -0.3, dtype)
    expect = lambda *numbers: torch.tensor(numbers, dtype=dtype)
    loss, drift = drift_loss(gen, pos)
    assert_close(loss, expect(5.43920, 8.40112), rtol=1e-5, atol=0)
    assert_close(drift.distance, expect(2.317923)[0], rtol=1e-5, atol=0)
    assert_close(drift.strength, expect(1.03286e-5, 5.30332e-5, 1.585728e-2), rtol=1e-5, atol=0)
    gen.requires_grad_()
    masses = torch.tensor([[0.5] * 3, [2.0] * 3], dtype=dtype)
    loss, drift = drift_loss(gen, pos, neg, negative_weights=masses)
    loss.mean().backward()
    assert_close(loss, expect(0.398598, 14.88131), rtol=1e-5, atol=0)
    assert_close(drift.distance, expect(2.329882)[0], rtol=1e-5, atol=0)
    assert_close(drift.strength, expect(3.926833e-3, 1.808975e-2, 8.083494e-2), rtol=1e-5, atol=0)
    assert_close(gen.grad[0, 0], expect(-0.0334190, -0.0402731, -0.0423533, -0.0393940, -0.0322666, -0.0227292), rtol=1e-5, atol=0)


# --- the loss and its gradient -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", ["batch", "problem"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_t13_the_gradient_is_the_velocity_and_reaches_the_samples_alone(grouping, place):
    """The derivative of loss.mean() by x is -2 V / (u^2 B N D); loss.mean() is the mean square of V / u."""
    x, p, q = (t.requires_grad_() for t in clouds(0, 5))
    masses = {
        f"{side}_weights": torch.rand(2, n, dtype=F64).requires_grad_()
        for side, n in (("generated", 16), ("positive", 20), ("negative", 24))
    }
    loss, drift = drift_loss(x, p, q, field=DriftingField(grouping=grouping, weights=place), **masses)
    loss.mean().backward()
    unit = drift.unit if drift.unit.ndim == 0 else drift.unit[:, None, None]
    assert_close(x.grad, -2 * drift.velocity / (unit**2 * x.numel()), rtol=1e-12, atol=0)
    assert_close(loss, (drift.velocity / unit).square().mean(dim=(1, 2)), rtol=1e-12, atol=0)
    assert all(t.grad is None for t in (p, q, *masses.values()))
    assert not any(t.requires_grad for t in (drift.velocity, drift.unit, drift.distance, drift.strength))


def test_t13_the_gradient_passes_through_what_made_the_samples():
    x, p, _ = clouds(0, 5)
    scale = torch.tensor(2.0, dtype=F64, requires_grad=True)
    loss, drift = drift_loss(scale * x, p)
    loss.mean().backward()
    assert_close(scale.grad, (-2 * drift.velocity * x).sum() / (drift.unit**2 * x.numel()))


def test_the_loss_is_no_thermometer():
    """One temperature's loss is 1 and three temperatures' between 0 and 9 whatever the distributions; the strength falls when they agree."""
    x, p, _ = clouds(0, 3, sizes=(64, 64, 0))
    same = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(3), dtype=F64)
    far, near = drift_loss(x, p + 2), drift_loss(x, same)
    for loss, _ in (far, near):
        assert 0.5 < loss.mean() <= 9
    assert near[1].strength[-1] * 5 < far[1].strength[-1]
    assert_close(drift_loss(x, p, field=DriftingField((0.2,)))[0].mean(), torch.tensor(1.0, dtype=F64))


# --- what the field does to particles ----------------------------------------------------------------------------------------------------

MODES = torch.tensor([[-2.5, 0.0], [2.5, 0.0]])
STARTS = {"between": (0.0, 0.0, 0.3), "far": (10.0, 10.0, 0.3), "collapsed": (2.5, 0.0, 1e-3)}  # mean and standard deviation


def flow(step, start: str, steps: int = 300, eta: float = 0.1, n: int = 128) -> Tensor:
    """N particles, in float32, under a decreasing step among ever new data of two Gaussians with standard deviation 0.35."""
    generator = torch.Generator().manual_seed(0)
    *mean, deviation = STARTS[start]
    x = torch.tensor(mean) + deviation * torch.randn(n, 2, generator=generator)
    for i in range(steps):
        data = MODES[torch.randint(0, 2, (n,), generator=generator)] + 0.35 * torch.randn(n, 2, generator=generator)
        x = x + eta * (1 - i / steps) * step(x, data)
    return x


def library(field: DriftingField):
    return lambda x, data: velocity(field, x, data, x)


def kernel_space(temperature: float):
    """Algorithm 2 as it is often written: the kernel itself, divided by its sums, which are kept from 0."""

    def step(x: Tensor, data: Tensor) -> Tensor:
        distance = torch.cat([torch.cdist(x, x) + 1e6 * torch.eye(len(x)), torch.cdist(x, data)], dim=1)
        k = (-distance / temperature).exp()
        a = k / (k.sum(1, keepdim=True) * k.sum(0, keepdim=True)).clamp(min=1e-12).sqrt()
        negative, positive = a[:, : len(x)], a[:, len(x) :]
        return positive * negative.sum(1, keepdim=True) @ data - negative * positive.sum(1, keepdim=True) @ x

    return step


@pytest.mark.parametrize("start", STARTS)
def test_t23_three_temperatures_without_floor_recover_both_modes_from_every_start(start):
    """Mass moves between modes by a temperature of the order of their distance, here 1 mean distance; the small ones shape each mode."""
    x = flow(library(DriftingField((0.05, 0.2, 1.0), affinity_floor=0.0)), start)
    distance, mode = torch.cdist(x, MODES).min(dim=1)
    assert abs(float((mode == 0).float().mean()) - 0.5) <= 0.05  # within 10 % of its mass of 1/2
    assert_close(distance.median(), torch.tensor(0.35 * 1.1774), rtol=0.15, atol=0)  # median of a Rayleigh law


def test_t23_small_temperature_in_kernel_space_never_hears_of_far_data():
    far = flow(kernel_space(0.1), "far", steps=100, eta=1.0)
    assert (torch.cdist(far, MODES).min(dim=1).values > 10).all()
    collapsed = flow(kernel_space(0.1), "collapsed", steps=100, eta=1.0)
    assert (torch.cdist(collapsed, MODES).argmin(dim=1) == 1).all()


def test_t23_log_space_keeps_the_direction_that_kernel_space_loses():
    """Half the exponent of the kernel survives under the root: at a distance of 14 and temperature 0.1 that is e^-70 against e^-140 = 0."""
    generator = torch.Generator().manual_seed(0)
    x, data = 0.3 * torch.randn(64, 2, generator=generator) + 10, 0.3 * torch.randn(64, 2, generator=generator)
    assert not kernel_space(0.1)(x, data).any()
    pull = velocity(algorithm_2(0.1), x, data, x)
    assert (torch.cosine_similarity(1e30 * pull, -x) > 0.9).float().mean() > 0.9


def test_t23_the_floor_pulls_from_afar_where_one_small_temperature_does_not():
    """... to the mean of the data, and no further: without larger temperatures particles then freeze between the modes."""
    reached = {floor: flow(library(DriftingField((0.05,), affinity_floor=floor)), "far", n=64) for floor in (0.0, 1e-3)}
    assert reached[0.0].mean(dim=0).norm() > 13.5
    assert reached[1e-3].mean(dim=0).norm() < 3
    assert torch.cdist(reached[1e-3], MODES).min(dim=1).values.median() > 1.5


def test_the_floor_is_measured_against_the_mean_affinity():
    """It is at most 1 / sqrt(n m). Of 1000 targets most affinities lie under the floor, and its unnormalised pull throws particles out."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(1000, 2, generator=generator)
    start = torch.randn(128, 2, generator=generator)
    affinity = two_sided_softmax(Laplace().log_value(pairwise_distance(start, data) / 1.8, 0.2))
    assert affinity.mean() <= (128 * 1000) ** -0.5
    assert (affinity < 1e-3).float().mean() > 0.4
    far = {}
    for floor in (0.0, 1e-3):
        x = start
        for _ in range(20):
            x = x + velocity(DriftingField(affinity_floor=floor, normalise_force=False), x, data, x)
        far[floor] = float(x.abs().max())
    assert far[0.0] < 10
    assert far[1e-3] > 1000


def test_t24_only_the_antisymmetric_field_rests_at_the_data():
    """Fields a V+ - b V- of equation (11), composed from couplings: V+ alone collapses, 2 V+ - V- is too narrow, V+ - 2 V- too wide."""

    def mean_shifts(a: float, b: float):
        def step(x: Tensor, data: Tensor) -> Tensor:
            attraction = row_softmax(Laplace().log_value(pairwise_distance(x, data), 1.0)) @ data - x
            others = pairwise_distance(x, x) + 1e6 * torch.eye(len(x), dtype=x.dtype)
            return a * attraction - b * (row_softmax(Laplace().log_value(others, 1.0)) @ x - x)

        return step

    def spread(a: float, b: float) -> float:
        generator = torch.Generator().manual_seed(0)
        x, step = torch.randn(128, 2, generator=generator, dtype=F64), mean_shifts(a, b)
        for _ in range(60):
            x = x + 0.2 * step(x, torch.randn(128, 2, generator=generator, dtype=F64))
        return float(x.var(dim=0).mean())

    collapsed, narrow, right, wide = spread(1, 0), spread(2, 1), spread(1, 1), spread(1, 2)
    assert collapsed < 0.1
    assert collapsed < narrow < 0.8
    assert abs(right - 1) < 0.25
    assert wide > 2


# --- shapes ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positive_weights": torch.ones(1, 20)}, r"positive_weights must be one mass per sample, \[2, 20\], got \[1, 20\]; expand them"),
        ({"positive_weights": torch.ones(20)}, r"positive_weights must be .* got \[20\]"),
        ({"negative_weights": torch.ones(1, 24)}, r"negative_weights must be one mass per sample, \[2, 24\], got \[1, 24\]"),
        ({"negative_weights": torch.ones(2, 20)}, r"negative_weights must be .* got \[2, 20\]"),
        ({"own": -1}, r"own must lie in \[0, 16\], got -1"),
        ({"own": 17}, r"own must lie in \[0, 16\], got 17"),
        ({"own": 11, "negatives": torch.zeros(2, 10, 3)}, r"own must lie in \[0, 10\], got 11"),
        ({"positives": torch.zeros(1, 20, 3)}, r"positives must have the problems .* x \[2, 16, 3\], got \[1, 20, 3\]"),
        ({"negatives": torch.zeros(24, 3)}, r"negatives must have .* got \[24, 3\]"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(changes, message):
    x, p, q = clouds(0, 3)
    with pytest.raises(ValueError, match=message):
        DriftingField()(x, **({"positives": p, "negatives": q} | changes))
    with pytest.raises(ValueError, match=r"x must be \[problems, samples, dimensions\] or \[samples, dimensions\], got \[3\]"):
        DriftingField()(x[0, 0], positives=p, negatives=q)


# --- precision and the batch -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 64, 4096, 65536])
def test_t25_bfloat16_inputs_are_computed_in_float32(d):
    generator = torch.Generator().manual_seed(0)
    x, p, q = (torch.randn(2, n, d, generator=generator).bfloat16() for n in (8, 8, 4))
    masses = torch.full((2, 4), 0.5, dtype=torch.bfloat16)
    field = DriftingField((0.02,))
    loss, drift = drift_loss(x.requires_grad_(), p, q, negative_weights=masses, field=field)
    loss.mean().backward()
    exact, _ = drift_loss(x.detach().double(), p.double(), q.double(), negative_weights=masses.double(), field=field)
    assert (loss.dtype, drift.velocity.dtype, drift.strength.dtype) == (torch.float32,) * 3
    assert x.grad.dtype == torch.bfloat16
    assert torch.isfinite(drift.velocity).all()
    assert torch.isfinite(x.grad).all()
    assert_close(loss.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("start", ["collapsed", "on the data", "far"])
@pytest.mark.parametrize("d", [1, 3, 1024])
def test_t25_degenerate_batches_are_finite_at_the_smallest_temperature(start, d):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, 8, d, generator=generator)
    x = {"collapsed": torch.zeros(2, 8, d), "on the data": p.clone(), "far": p + 1e4}[start]
    for dtype in (torch.float32, torch.bfloat16):
        loss, drift = drift_loss(x.to(dtype).requires_grad_(), p.to(dtype), field=DriftingField((0.02,)))
        loss.mean().backward()
        assert torch.isfinite(drift.velocity).all()
        assert 0 <= loss.mean() <= 1 + 1e-5


class Tape:
    """A mean that remembers, then plays back: what a trainer needs to go through the problems of a step in pieces."""

    def __init__(self):
        self.values, self.playing = [], False

    def __call__(self, totals: Tensor, weights: Tensor) -> Tensor:
        if self.playing:
            return next(self.playback)
        self.values.append(batch_mean(totals, weights))
        return self.values[-1]

    def rewind(self) -> "Tape":
        self.playing, self.playback = True, iter(self.values)
        return self


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_t25_problems_in_pieces_with_the_same_means_are_problems_at_once(dtype):
    x, p, q = (t.to(dtype) for t in clouds(0, 6, b=5))
    tape = Tape()
    whole = DriftingField()(x, positives=p, negatives=q, mean=tape)
    assert len(tape.values) == 2  # the distance; the three strengths together: each is a message between processes
    for size in (1, 2, 3):
        pieces = [
            DriftingField()(a, positives=b, negatives=c, mean=tape.rewind()).velocity
            for a, b, c in zip(x.split(size), p.split(size), q.split(size), strict=True)
        ]
        assert_close_in_norm(torch.cat(pieces), whole.velocity, 1e-6 if dtype == torch.float32 else 1e-13)


class AllReduce:
    """`torch.distributed.all_reduce` between threads: every rank gets the mean over the problems of all."""

    def __init__(self, ranks: int):
        self.totals, self.weights, self.barrier = [torch.zeros(())] * ranks, [torch.zeros(())] * ranks, threading.Barrier(ranks, timeout=60)

    def mean(self, rank: int):
        def reduce(totals: Tensor, weights: Tensor) -> Tensor:
            self.totals[rank], self.weights[rank] = totals.sum(-1), weights.sum()
            self.barrier.wait()
            value = sum(self.totals) / sum(self.weights)
            self.barrier.wait()
            return value

        return reduce


def sharded_gradient(ranks: int, clouds_: list[Tensor], all_reduce: bool) -> Tensor:
    shards = [[t.tensor_split(ranks)[r] for t in clouds_] for r in range(ranks)]
    group, gradients = AllReduce(ranks), [torch.zeros(())] * ranks

    def work(rank: int) -> None:
        x, p, q = shards[rank]
        x = x.clone().requires_grad_()
        loss, _ = drift_loss(x, p, q, mean=group.mean(rank) if all_reduce else batch_mean)
        (loss.sum() / len(clouds_[0])).backward()
        gradients[rank] = x.grad

    threads = [threading.Thread(target=work, args=(r,)) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(gradients)


@pytest.mark.parametrize("ranks", [2, 3])
def test_t25_shards_with_a_mean_over_all_ranks_have_the_gradient_of_the_whole_batch(ranks):
    """And with their own means they have not: the loss couples all problems of a step."""
    x, p, q = clouds(0, 6, b=7)
    spread = torch.logspace(-0.5, 0.5, 7, dtype=F64)[:, None, None]
    x, p, q = x * spread, p * spread, q * spread
    whole = x.clone().requires_grad_()
    drift_loss(whole, p, q)[0].mean().backward()
    assert_close_in_norm(sharded_gradient(ranks, [x, p, q], all_reduce=True), whole.grad, 1e-12)
    apart = sharded_gradient(ranks, [x, p, q], all_reduce=False)
    assert torch.cosine_similarity(apart.flatten(), whole.grad.flatten(), dim=0) < 0.99
