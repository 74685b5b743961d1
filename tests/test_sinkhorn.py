"""The laws of entropic transport and of the field made of it, in float64; numbers as in the table of the method's properties."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from drifting_diffusers import transport
from drifting_diffusers.couplings import row_softmax
from drifting_diffusers.fields import MeanShiftField, Situation, frame, read_field, situated, spell
from drifting_diffusers.fields.drifting import algorithm_2
from drifting_diffusers.fields.sinkhorn import SinkhornField, w_flow
from drifting_diffusers.kernels import Gaussian, Laplace, pairwise_distance
from drifting_diffusers.losses import drift_loss
from drifting_diffusers.schedules import exponential
from drifting_diffusers.transport import sinkhorn

F64 = torch.float64
COST = pytest.mark.parametrize("cost", ["quadratic", "linear"])
OWN_TERM = pytest.mark.parametrize("own_term", ["independent", "masked", "same"])


def plain(epsilon: float, iterations: float = 10, **more) -> SinkhornField:
    """In the coordinates of x, the force as it is."""
    return SinkhornField((epsilon,), iterations=iterations, normalise_distance=False, normalise_force=False, **more)


def clouds(seed: int, d: int = 3, sizes=(16, 20, 24), b: int = 2) -> list[Tensor]:
    """Queries, positives shifted by 1, negatives."""
    generator = torch.Generator().manual_seed(seed)
    x, positives, negatives = (torch.randn(b, n, d, generator=generator, dtype=F64) for n in sizes)
    return [x, positives + 1, negatives]


def masses(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def velocity(field, x: Tensor, positives: Tensor, negatives: Tensor, **more) -> Tensor:
    return field(x, positives=positives, negatives=negatives, **more).velocity


def half_squares(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() / 2


def assert_close_in_norm(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert (actual - expected).norm() <= bound * expected.norm().clamp(min=1e-300)


# --- the algorithm -----------------------------------------------------------------------------------------------------------------------


def witness(cost: Tensor, epsilon: float, a: Tensor, b: Tensor, iterations: float) -> Tensor:
    """Sinkhorn's algorithm as it is first written: the kernel, scaled from both sides."""
    found = []
    for c, mass, other in zip(cost.numpy(), a.numpy(), b.numpy(), strict=True):
        k, mass, other = np.exp(-c / epsilon), mass / mass.sum(), other / other.sum()
        u, v = mass.copy(), other.copy()
        for half in range(int(2 * iterations)):
            if half % 2:
                v = other / np.where(k.T @ u > 0, k.T @ u, np.inf)
            else:
                u = mass / np.where(k @ v > 0, k @ v, np.inf)
        found.append(u[:, None] * k * v)
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize("iterations", [0, 0.5, 1, 1.5, 7])
@pytest.mark.parametrize("block", [2**24, 50])
def test_plans_agree_with_scaling_the_kernel_itself(iterations, block, monkeypatch):
    """With masses, some of them 0, and absent pairs; the blocks of rows change nothing."""
    monkeypatch.setattr(transport, "BLOCK", block)
    x, y, _ = clouds(0)
    a, b = masses(1, 2, 16), masses(2, 2, 20)
    a[:, 3], b[:, 5:8] = 0, 0
    cost = half_squares(x, y)
    cost.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    plan = sinkhorn(cost, 0.7, row_weights=a, column_weights=b, iterations=iterations)
    expected = witness(cost, 0.7, a, b, iterations)
    assert_close(plan.log_plan().exp(), expected, rtol=1e-11, atol=1e-18)
    off = (expected.sum(2) - a / a.sum(1, keepdim=True)).abs().sum(1) + (expected.sum(1) - b / b.sum(1, keepdim=True)).abs().sum(1)
    assert_close(plan.residual(), off, rtol=1e-9, atol=1e-14)
    mass = expected.sum(2, keepdim=True)
    present = mass[..., 0] > 0
    assert not present[:, 3].any()
    assert_close(plan.displacement(x, y)[present], (expected @ y / mass - x)[present], rtol=1e-9, atol=1e-12)
    raw = torch.from_numpy(np.exp(plan.columns.numpy()[:, None] - cost.numpy() / 0.7))
    assert_close(plan.displacement(x, y, divide=False), raw @ y - raw.sum(2, keepdim=True) * x, rtol=1e-9, atol=1e-12)


def test_t15_both_marginals_are_met_as_the_iterations_go_on():
    x, y, _ = clouds(0, d=2, sizes=(100, 100, 0))
    left = [float(sinkhorn(half_squares(x, y), 0.1, iterations=i).residual().max()) for i in (1, 3, 10, 30, 100, 300)]
    assert left == sorted(left, reverse=True)
    assert left[0] > 0.1
    assert left[-1] < 1e-5
    plan = sinkhorn(half_squares(x, y), 0.1, iterations=5)
    assert_close(plan.log_plan().exp().sum(1), torch.full((2, 100), 0.01, dtype=F64))  # the columns, last set, are exact


def test_absent_rows_and_columns_are_as_if_they_were_not_given():
    x, y, _ = clouds(0)
    a, b = masses(1, 2, 16), masses(2, 2, 20)
    a[:, 10:], b[:, 15:] = 0, 0
    full = sinkhorn(half_squares(x, y), 0.3, row_weights=a, column_weights=b)
    less = sinkhorn(half_squares(x, y)[:, :10, :15], 0.3, row_weights=a[:, :10], column_weights=b[:, :15])
    assert_close(full.displacement(x, y)[:, :10], less.displacement(x[:, :10], y[:, :15]), rtol=1e-12, atol=1e-12)
    assert torch.isfinite(full.displacement(x, y)).all()  # of the absent rows too: they follow the map, they do not make it


def test_where_nothing_is_there_nothing_moves():
    x, y, _ = clouds(0)
    for more in ({"column_weights": torch.zeros(2, 20, dtype=F64)}, {"row_weights": torch.zeros(2, 16, dtype=F64)}):
        plan = sinkhorn(half_squares(x, y), 0.3, **more)
        assert_close(plan.displacement(x, y), torch.zeros_like(x), rtol=0, atol=0)
        assert torch.isfinite(plan.residual()).all()
    absent = sinkhorn(torch.full((2, 16, 20), torch.inf, dtype=F64), 0.3)
    assert_close(absent.displacement(x, y), torch.zeros_like(x), rtol=0, atol=0)


@pytest.mark.parametrize("iterations", [-1, 0.3, "10", True])
def test_iterations_are_halves(iterations, as_users_see_it):
    with pytest.raises(ValueError, match="iterations must be a multiple of 1/2"):
        sinkhorn(torch.zeros(1, 2, 2), 0.1, iterations=iterations)
    with pytest.raises(ValueError, match="iterations must be a multiple of 1/2"):
        SinkhornField(iterations=iterations)
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        sinkhorn(torch.zeros(1, 2, 2), 0.0)


# --- symmetries --------------------------------------------------------------------------------------------------------------------------


@COST
@pytest.mark.parametrize("iterations", [0, 0.5, 1, 10])
def test_t1_antisymmetry_for_given_negatives(cost, iterations):
    x, p, q = clouds(0)
    w, v = masses(1, 2, 20), masses(2, 2, 24)
    for field in (plain(0.3, iterations, cost=cost), SinkhornField(iterations=iterations, cost=cost)):
        there = velocity(field, x, p, q, positive_weights=w, negative_weights=v)
        assert_close_in_norm(there, -velocity(field, x, q, p, positive_weights=v, negative_weights=w), 1e-12)


def test_t1_with_own_negatives_only_the_same_batch_rests_on_itself():
    """Positives that are the generated samples: T_{q,q} - T_{q,q} = 0, while a masked or halved batch is not at rest among itself."""
    x, _, _ = clouds(0)
    moved = {term: float(velocity(plain(0.3, own_term=term), x, x.clone(), x, own=16).norm()) for term in ("same", "masked", "independent")}
    assert moved["same"] < 1e-12
    assert min(moved["masked"], moved["independent"]) > 0.1


def test_t1_halves_exchanged_for_positives_change_the_sign():
    """What makes `independent` without bias at p = q: with as many positives as a half, p and q' may change places."""
    x, p, _ = clouds(0, sizes=(16, 8, 0))
    field = plain(0.3)
    first, second = x[:, :8], x[:, 8:]
    there = velocity(field, x, p, x)[:, :8]
    back = velocity(field, torch.cat([first, p], dim=1), second, torch.cat([first, p], dim=1), own=16)[:, :8]
    assert_close_in_norm(there, -back, 1e-12)


@COST
def test_t2_t15_equilibrium_on_identical_supports(cost):
    x, p, _ = clouds(0)
    for iterations in (0, 0.5, 1, 10):
        assert_close(velocity(plain(0.1, iterations, cost=cost), x, p, p.clone()), torch.zeros_like(x), rtol=0, atol=1e-13)
    moved = torch.cat([p[:, 1:], p[:, :1]], dim=1)  # in another order
    assert_close(velocity(plain(0.1, cost=cost), x, p, moved), torch.zeros_like(x), rtol=0, atol=1e-12)


@OWN_TERM
@COST
def test_t4_rotations_translations_and_units_carry_over(own_term, cost):
    x, p, q = clouds(0)
    generator = torch.Generator().manual_seed(5)
    turn, shift = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=F64))[0], torch.randn(3, generator=generator, dtype=F64)
    move = lambda t: t @ turn + shift
    field = SinkhornField((0.05, 0.3), cost=cost, own_term=own_term)
    joined = torch.cat([x, q], dim=1)
    expected = field(x, positives=p, negatives=joined, own=16)
    assert_close_in_norm(velocity(field, move(x), move(p), move(joined), own=16), expected.velocity @ turn, 1e-10)
    bound = 1e-9 if cost == "quadratic" else 1e-4  # own pairs are `LEAST_DISTANCE` apart, which has a unit
    large = field(1000 * x, positives=1000 * p, negatives=1000 * joined, own=16)
    assert_close_in_norm(large.velocity / large.unit, expected.velocity / expected.unit, bound)
    assert_close(large.strength, expected.strength, rtol=bound, atol=0)


@OWN_TERM
def test_t4_the_order_of_samples(own_term):
    """Targets in any order; queries with their own negatives too, but with halves only within each half."""
    x, p, q = clouds(0)
    field, w = plain(0.3, own_term=own_term), masses(1, 2, 40)
    ask = lambda x, p, q, w: velocity(field, x, p, torch.cat([x, q], dim=1), negative_weights=w, own=16)
    expected = ask(x, p, q, w)
    generator = torch.Generator().manual_seed(2)
    one, two = torch.randperm(20, generator=generator), torch.randperm(24, generator=generator)
    assert_close_in_norm(ask(x, p[:, one], q[:, two], torch.cat([w[:, :16], w[:, 16:][:, two]], dim=1)), expected, 1e-12)
    inside = torch.cat([torch.randperm(8, generator=generator), 8 + torch.randperm(8, generator=generator)])
    across = torch.arange(16).reshape(8, 2).T.flatten()
    shuffled = lambda order: ask(x[:, order], p, q, torch.cat([w[:, order], w[:, 16:]], dim=1))
    assert_close_in_norm(shuffled(inside), expected[:, inside], 1e-12)
    difference = (shuffled(across) - expected[:, across]).norm() / expected.norm()
    assert difference > 0.05 if own_term == "independent" else difference < 1e-12


def test_problems_are_apart():
    x, p, q = clouds(0)
    together = velocity(plain(0.2), x, p, q)
    for b in range(2):
        assert_close(velocity(plain(0.2), x[b], p[b], q[b]), together[b], rtol=1e-12, atol=1e-12)


# --- units -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2**24, 100])
def test_lengths_are_rms_distances_with_the_quadratic_cost(block, monkeypatch):
    """And mean distances with the linear one, weighted with the masses of the targets, own pairs counting as 0."""
    monkeypatch.setattr(frame, "BLOCK", block)
    x, p, q = clouds(0)
    w, v = masses(1, 2, 20), masses(2, 2, 40)
    targets, weights = torch.cat([x, q, p], dim=1), torch.cat([v, w], dim=1)
    distance = torch.cdist(x, targets, compute_mode="donot_use_mm_for_euclid_dist")
    mean = lambda t: (t * weights[:, None]).sum() / (16 * weights.sum())
    ask = lambda field: field(
        x, positives=p, negatives=torch.cat([x, q], dim=1), positive_weights=w, negative_weights=v, own=16
    )  # fmt: skip
    quadratic, linear = ask(SinkhornField()), ask(SinkhornField(cost="linear"))
    assert_close(quadratic.distance, mean(distance.square()).sqrt())
    assert_close(quadratic.unit, mean(distance.square()).sqrt() / 3**0.5)
    assert_close(linear.distance, mean(distance), rtol=1e-4, atol=0)  # own pairs count LEAST_DISTANCE
    scale = quadratic.distance
    in_units = ask(SinkhornField(normalise_force=False)).velocity
    assert_close(in_units, scale * velocity(plain(0.05), x / scale, p / scale, torch.cat([x, q], dim=1) / scale, positive_weights=w, negative_weights=v, own=16))  # fmt: skip


# --- what transport sees -----------------------------------------------------------------------------------------------------------------


def test_t14_far_clusters_of_wrong_mass_move_by_transport_and_by_nothing_local():
    """Clusters of one shape 10 apart, masses .9 / .1 against .5 / .5: the mean drift of the right cluster, towards the left one."""
    base = 0.2 * torch.randn(10, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    far = base + torch.tensor([10.0, 0.0], dtype=F64)
    p, q = torch.cat([base] * 9 + [far]), torch.cat([base] * 5 + [far] * 5)
    local = {"normalise_distance": False, "normalise_force": False}
    right = lambda field: float(velocity(field, q, p, q.clone(), own=0)[50:, 0].mean())
    assert -1e-6 < right(MeanShiftField((0.5,), **local)) < -1e-7
    assert abs(right(MeanShiftField((0.5,), kernel=Gaussian(), **local))) < 1e-12
    assert -1e-7 < right(algorithm_2(0.5)) < -1e-8
    assert abs(right(plain(0.25, 300)) / -7.9 - 1) < 0.01


def test_t15_a_batch_is_carried_onto_itself_and_not_onto_another():
    """At epsilon .01 and after 300 iterations: rms of T(x) - x, .017 and .36."""
    x, _, y = clouds(0, d=2, sizes=(100, 0, 100))
    rms = lambda a, b: float(sinkhorn(half_squares(a, b), 0.01, iterations=300).displacement(a, b).square().mean().sqrt())
    assert abs(rms(x, x) / 0.017 - 1) < 0.15
    assert 0.2 < rms(x, y) < 0.5


def test_self_terms_at_p_equal_to_q_in_law():
    """The bias, per length of x: -.125 for the same batch, -.03 masked, none for independent halves; the noise has the opposite order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 32, 2, generator=generator, dtype=F64)
    bias, rms = {}, {}
    for term, positives in (("same", 32), ("masked", 32), ("independent", 16)):
        p = torch.randn(1000, positives, 2, generator=generator, dtype=F64)
        v = velocity(plain(0.05, own_term=term), x, p, x)
        bias[term], rms[term] = float((v * x).mean()), float(v.square().mean().sqrt())
    assert abs(bias["same"] / -0.125 - 1) < 0.1
    assert abs(bias["masked"] / -0.03 - 1) < 0.3
    assert abs(bias["independent"]) < 0.01
    assert rms["same"] < rms["masked"] < rms["independent"]


@pytest.mark.parametrize(("own_term", "rests"), [("same", True), ("masked", False), ("independent", False)])
def test_particles_that_stay_the_same_need_the_same_batch(own_term, rests):
    """Two halves that are no fresh samples push each other away, d(a - b)/dt = a - b; so do pairs of masked neighbours."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda: torch.randn(1, 64, 2, generator=generator, dtype=F64)
    x, data = normal() + 3, normal()
    for _ in range(60):
        x = x + 0.2 * velocity(plain(0.05, own_term=own_term), x, data, x)
    assert (float((x.std(1) - data.std(1)).abs().max()) < 0.15) == rests


# --- limits ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cost", "kernel", "width"), [("quadratic", Gaussian(), 0.3**0.5), ("linear", Laplace(), 0.3)])
def test_t16_half_an_iteration_is_the_mean_shift(cost, kernel, width):
    x, p, q = clouds(0)
    w, v = masses(1, 2, 20), masses(2, 2, 40)
    shift = MeanShiftField((width,), kernel=kernel, normalise_distance=False, normalise_force=False)
    more = {"positive_weights": w, "negative_weights": v, "own": 16}
    ours = velocity(plain(0.3, 0.5, cost=cost, own_term="masked"), x, p, torch.cat([x, q], dim=1), **more)
    assert_close(ours, velocity(shift, x, p, torch.cat([x, q], dim=1), **more), rtol=1e-6, atol=1e-9)
    k = lambda y, mass: row_softmax(kernel.log_value(pairwise_distance(x, y), width), mass) @ y
    assert_close(velocity(plain(0.3, 0.5, cost=cost), x, p, q, positive_weights=w), k(p, w) - k(q, None), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("cost", "kernel", "width"), [("quadratic", Gaussian(), 0.3**0.5), ("linear", Laplace(), 0.3)])
def test_t16_no_iteration_is_the_mmd_field(cost, kernel, width):
    x, p, q = clouds(0)
    w = masses(1, 2, 20)

    def pull(y, mass):
        k = kernel.value(pairwise_distance(x, y), width) * mass[:, None]
        return k @ y - k.sum(-1, keepdim=True) * x

    expected = pull(p, w / w.sum(1, keepdim=True)) - pull(q, torch.full((2, 24), 1 / 24, dtype=F64))
    assert_close(velocity(plain(0.3, 0, cost=cost), x, p, q, positive_weights=w), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("iterations", [0, 0.5, 10])
def test_t16_with_much_entropy_means_move_to_means(iterations):
    x, p, q = clouds(0)
    w = masses(1, 2, 20)
    expected = (p * w[..., None]).sum(1, keepdim=True) / w.sum(1)[:, None, None] - q.mean(1, keepdim=True)
    assert_close(velocity(plain(1e9, iterations), x, p, q, positive_weights=w), expected.expand_as(x), rtol=1e-6, atol=1e-6)


# --- masses and guidance -----------------------------------------------------------------------------------------------------------------


@OWN_TERM
def test_t21_unconditional_negatives_of_no_mass_are_not_there(own_term):
    x, p, q = clouds(0)
    more = torch.cat([torch.ones(2, 16, dtype=F64), torch.zeros(2, 24, dtype=F64)], dim=1)
    field = SinkhornField((0.05, 0.3), own_term=own_term)
    given = field(x, positives=p, negatives=torch.cat([x, q], dim=1), negative_weights=more, own=16)
    absent = field(x, positives=p, negatives=x)
    assert_close(given.velocity, absent.velocity, rtol=1e-9, atol=1e-11)
    assert_close(given.unit, absent.unit)


@OWN_TERM
def test_t21_a_mixture_of_negatives_rests_at_the_guided_mean(own_term):
    """With much entropy the mean of V is mean_c - (mean_q + (alpha - 1) mean_0) / alpha, whatever own samples it has."""
    x, p, q = clouds(0)
    weights = torch.cat([torch.ones(2, 16, dtype=F64), torch.full((2, 24), (2.5 - 1) * 15 / 24, dtype=F64)], dim=1)
    v = velocity(plain(1e9, own_term=own_term), x, p, torch.cat([x, q], dim=1), negative_weights=weights, own=16)
    expected = p.mean(1) - (x.mean(1) + 1.5 * q.mean(1)) / 2.5
    assert_close(v.mean(1), expected, rtol=1e-6, atol=1e-6)


@OWN_TERM
@pytest.mark.parametrize("iterations", [0, 0.5, 1, 10])
def test_masses_of_zero_and_tiny_epsilon_stay_finite(own_term, iterations):
    x, p, q = clouds(0)
    w, v = masses(1, 2, 20), masses(2, 2, 40)
    w[:, :19], v[0, :16], v[1, 3:] = 0, 0, 0
    for dtype in (torch.float32, F64):
        field = SinkhornField((1e-3, 0.05), iterations=iterations, own_term=own_term)
        args = [t.to(dtype) for t in (x, p, torch.cat([x, q], dim=1), w, v)]
        drift = field(args[0], positives=args[1], negatives=args[2], positive_weights=args[3], negative_weights=args[4], own=16)
        assert drift.velocity.dtype == dtype
        assert torch.isfinite(drift.velocity).all()


@OWN_TERM
def test_masses_of_own_samples_are_masses_of_queries(own_term):
    """Two samples in one place are one of twice the mass. (A masked sample sees its double: there it is not so.)"""
    x, p, _ = clouds(0)
    order = torch.tensor([0, 0, *range(1, 8), 8, 8, *range(9, 16)])
    weights = torch.ones(2, 16, dtype=F64)
    weights[:, 0] = weights[:, 8] = 2
    twice = velocity(plain(0.3, own_term=own_term), x[:, order], p, x[:, order], own=18)
    once = velocity(plain(0.3, own_term=own_term), x, p, x, negative_weights=weights, own=16)
    assert (float((twice - once[:, order]).norm() / twice.norm()) > 1e-3) == (own_term == "masked")


class Devices(TorchDispatchMode):
    """Where tensors are made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.seen |= {value.device.type for value in (found if isinstance(found, tuple | list) else [found]) if isinstance(value, Tensor)}
        return found


@pytest.mark.parametrize("weighted", [False, True])
def test_halves_need_nothing_from_another_device(weighted):
    """An index made on the CPU would be waited for, for every temperature and feature."""
    x, p, q = (t.to("meta") for t in clouds(0))
    w = torch.ones(2, 40, device="meta", dtype=F64) if weighted else None
    problems = frame.Problems(x, p, torch.cat([x, q], dim=1), None, w, 16)
    with Devices() as devices:
        batches = SinkhornField()._batches(problems)
    assert devices.seen == {"meta"}
    assert [batch.negatives.shape for batch in batches] == [(2, 8 + 24, 3)] * 2


def test_halves_are_one_half_and_the_negatives_of_the_other_and_what_is_not_own():
    x, p, q = clouds(0)
    w = masses(1, 2, 40)
    first, second = SinkhornField()._batches(frame.Problems(x, p, torch.cat([x, q], dim=1), None, w, 16))
    for batch, mine, other in ((first, slice(0, 8), slice(8, 16)), (second, slice(8, 16), slice(0, 8))):
        assert_close(batch.x, x[:, mine], rtol=0, atol=0)
        assert_close(batch.negatives, torch.cat([x[:, other], q], dim=1), rtol=0, atol=0)
        assert_close(batch.masses, w[:, mine], rtol=0, atol=0)
        assert_close(batch.negative_masses[:, :8], w[:, other], rtol=0, atol=0)
        assert_close(batch.negative_masses[:, 8:], w[:, 16:] * (w[:, other].sum(1) / (w[:, :16].sum(1) * 15 / 16))[:, None])


def test_two_generated_samples_see_each_other():
    """Masked, or as halves of one, the other is all there is: T(x_1) = x_2."""
    x, p, _ = clouds(0, sizes=(2, 2, 0))
    cross = sinkhorn(half_squares(x, p), 0.3).displacement(x, p)
    assert_close(velocity(plain(0.3, own_term="masked"), x, p, x), cross - (x.flip(1) - x))
    halves = velocity(plain(0.3), x, p, x)
    assert_close(halves, p.mean(1, keepdim=True) - x.flip(1))
    alone = velocity(plain(0.3, own_term="masked"), x[:, :1], p, x[:, :1], own=1)
    assert_close(alone, p.mean(1, keepdim=True) - x[:, :1])  # nobody repels it


@pytest.mark.parametrize(("n", "own"), [(15, 15), (16, 8)])
def test_halves_need_an_even_number_of_own_queries(n, own, as_users_see_it):
    x, p, _ = clouds(0)
    with pytest.raises(ValueError, match=r"even number, got .* take own_term='masked'"):
        SinkhornField()(x[:, :n], positives=p, negatives=x[:, :n], own=own)
    assert torch.isfinite(velocity(SinkhornField(own_term="masked"), x[:, :n], p, x[:, :n], own=own)).all()


# --- as part of the library --------------------------------------------------------------------------------------------------------------


@OWN_TERM
@COST
def test_float32_is_close_to_float64_and_blocks_change_nothing(own_term, cost, monkeypatch):
    x, p, q = clouds(0, d=16)
    field = SinkhornField((0.05, 0.3), own_term=own_term, cost=cost)
    joined = torch.cat([x, q], dim=1)
    exact = velocity(field, x, p, joined, own=16)
    assert_close_in_norm(velocity(field, x.float(), p.float(), joined.float(), own=16).double(), exact, 1e-4)
    monkeypatch.setattr(frame, "BLOCK", 100)
    monkeypatch.setattr(transport, "BLOCK", 100)
    assert_close_in_norm(velocity(field, x, p, joined, own=16), exact, 1e-12)


def test_the_loss_takes_it_and_nothing_needs_gradients():
    x, p, q = clouds(0)
    x.requires_grad_()
    loss, drift = drift_loss(x, p, q, field=w_flow())
    loss.mean().backward()
    assert_close(x.grad, -2 * drift.velocity / (drift.unit**2 * x.numel()), rtol=1e-12, atol=0)


def test_settings_and_text():
    expected = {"b": ((0.05,), 10), "l": ((0.05,), 1), "xl": ((0.01,), 1)}
    for size, (epsilon, iterations) in expected.items():
        field = w_flow(size)
        assert (field.field.temperatures, field.field.iterations, field.field.own_term) == (epsilon, iterations, "independent")
        assert read_field(spell(field)) == field == read_field(f"w_flow(size={size!r})")
    field = SinkhornField((exponential(1.0, 0.05),), cost="linear", own_term="masked", iterations=0.5)
    assert read_field(spell(field)) == field
    assert situated(field, Situation(step=10, steps=10)).temperatures == (0.05,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SinkhornField(cost="cubic"), "cost must be one of"),
        (lambda: SinkhornField(own_term="none"), "own_term must be one of"),
        (lambda: SinkhornField((0.0,)), "temperatures must be"),
        (lambda: w_flow("s"), "size must be one of"),
    ],
)
def test_what_is_no_choice(make, message, as_users_see_it):
    with pytest.raises(ValueError, match=message):
        make()
