"""Fields made of fields: looking ahead (T19), friction (T20), sums. In float64, each test named after its law."""

import math
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from drifting_diffusers.couplings import row_softmax
from drifting_diffusers.fields import (
    Drift,
    DriftingField,
    Field,
    FramedField,
    FrechetField,
    MeanShiftField,
    NystromField,
    Problems,
    Situation,
    Symmetrised,
    VelocityGuidance,
    batch_mean,
    memories,
    names,
    read_field,
    situated,
    spell,
)
from drifting_diffusers.fields.combined import Combined, temperature_set
from drifting_diffusers.fields.friction import Friction, inertial_step
from drifting_diffusers.fields.lookahead import Lookahead
from drifting_diffusers.kernels import Laplace
from drifting_diffusers.losses import drift_loss
from drifting_diffusers.schedules import Schedule, exponential, linear

F64 = torch.float64
PLAIN = MeanShiftField((0.5,), normalise_force=False)
FRAMED = [PLAIN, MeanShiftField((0.2, 0.5)), DriftingField(), DriftingField((0.2,), grouping="problem")]
WRAPPED = [
    lambda field: Lookahead(field),
    lambda field: Lookahead(field, terms=2, step=0.3),
    lambda field: Friction(field, 0.3),
    lambda field: Combined((field, PLAIN), weights=(0.5, 2.0)),
    lambda field: Lookahead(Friction(Combined((field, Lookahead(PLAIN))), 0.5)),
]
NAMED = ["lookahead", "lookahead, two terms", "friction", "combined", "all of them"]


@pytest.fixture(scope="module", autouse=True)
def rows():
    """Their names, and one thread: these sums are too small to share out."""
    for name, known in (("lookahead", Lookahead), ("friction", Friction), ("combined", Combined)):
        names.FIELDS.setdefault(name, known)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Centres:
    """A transport in short, V = mean of the positives - mean of the others among the own negatives: needs to know which are its own."""

    def __call__(self, x, *, positives, negatives, positive_weights=None, negative_weights=None, own=None, mean=batch_mean) -> Drift:
        assert own is not None
        others = (negatives[..., :own, :].sum(-2, keepdim=True) - x) / (own - 1)
        one = torch.ones((), dtype=x.dtype)
        return Drift(positives.mean(-2, keepdim=True) - others, one, one, one[None])


def clouds(seed: int, d: int = 3, sizes=(16, 20, 24), b: int = 2) -> list[Tensor]:
    """Queries, positives shifted by 1, negatives."""
    generator = torch.Generator().manual_seed(seed)
    x, positives, negatives = (torch.randn(b, n, d, generator=generator, dtype=F64) for n in sizes)
    return [x, positives + 1, negatives]


def velocity(field: Field, x: Tensor, positives: Tensor, negatives: Tensor, **more) -> Tensor:
    return field(x, positives=positives, negatives=negatives, **more).velocity


def assert_close_in_norm(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert (actual - expected).norm() <= bound * expected.norm().clamp(min=1e-300)


# --- looking ahead -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [*FRAMED, Centres()], ids=lambda field: type(field).__name__)
@pytest.mark.parametrize("terms", [1, 3])
def test_t19_unit_weights_without_rescaling_are_euler_steps(field, terms):
    """Where K + 1 particle steps on the same positives end, x + V is; the other negatives stay where they are."""
    x, p, q = clouds(0)
    ahead = Lookahead(field, terms, weights=(1.0,) * (terms + 1), rescale=False, step=1.0)
    here = x
    for _ in range(terms + 1):
        here = here + velocity(field, here, p, torch.cat([here, q], dim=1), own=16)
    assert_close_in_norm(x + velocity(ahead, x, p, torch.cat([x, q], dim=1), own=16), here, 1e-13)
    assert_close_in_norm(
        x + velocity(Lookahead(field, terms, rescale=False, step=1.0), x, p, torch.cat([x, q], dim=1), own=16), here, 1e-13
    )


@pytest.mark.parametrize("own", [0, 5, 16])
def test_t19_only_the_own_negatives_move(own):
    x, p, q = clouds(0)
    joined = torch.cat([x[:, :own], q], dim=1)
    first = velocity(PLAIN, x, p, joined, own=own)
    second = velocity(PLAIN, x + first, p, torch.cat([(x + first)[:, :own], q], dim=1), own=own)
    found = velocity(Lookahead(PLAIN, rescale=False), x, p, joined, own=own)
    assert_close(found, first + second, rtol=0, atol=1e-14)
    if own:
        assert (found - first - velocity(PLAIN, x + first, p, joined, own=own)).norm() > 1e-3 * found.norm()


@pytest.mark.parametrize("field", FRAMED)
def test_t19_no_terms_are_the_plain_field(field):
    x, p, _ = clouds(0)
    plain, ahead = field(x, positives=p, negatives=x), Lookahead(field, terms=0)(x, positives=p, negatives=x)
    for name in ("velocity", "unit", "distance", "strength"):
        assert_close(getattr(ahead, name), getattr(plain, name), rtol=0, atol=0)


def test_rescaled_terms_are_as_long_as_the_first():
    x, p, _ = clouds(0)
    rms = lambda v: v.square().mean().sqrt()
    for field in (PLAIN, MeanShiftField((0.2, 0.5), normalise_force=False)):
        first = velocity(field, x, p, x)
        second = velocity(field, x + first, p, x + first, own=16)
        assert abs(rms(second) / rms(first) - 1) > 0.1  # there is something to do
        expected = (first + second * rms(first) / rms(second)) / 2
        assert_close(velocity(Lookahead(field), x, p, x), expected, rtol=1e-12, atol=1e-14)
        weighted = velocity(Lookahead(field, weights=(0.2, 3.0)), x, p, x)
        assert_close(weighted, 0.2 * first + 3 * second * rms(first) / rms(second), rtol=1e-12, atol=1e-14)


def test_a_step_is_never_longer_than_its_force():
    """Of one temperature, normalised or not, that is the same way; a number is taken at its word."""
    x, p, _ = clouds(0)
    p = p - 0.7  # near, so that the force is shorter than its normalisation makes it
    normalised, plain = MeanShiftField((0.5,)), PLAIN
    there = velocity(plain, x, p, x)
    expected = (velocity(normalised, x, p, x) + velocity(normalised, x + there, p, x + there, own=16)) / 2
    halves = {"weights": (0.5, 0.5), "rescale": False}
    assert_close(velocity(Lookahead(normalised, **halves), x, p, x), expected, rtol=1e-10, atol=1e-12)
    assert_close(velocity(Lookahead(plain), x, p, x), velocity(Lookahead(plain, step=1.0), x, p, x), rtol=1e-12, atol=1e-14)
    literal = x + velocity(normalised, x, p, x)
    expected = (literal - x + velocity(normalised, literal, p, literal, own=16)) / 2
    assert_close(velocity(Lookahead(normalised, step=1.0, **halves), x, p, x), expected, rtol=1e-10, atol=1e-12)


def test_a_step_of_a_field_that_groups_by_problem_has_a_length_in_each():
    x, p, _ = clouds(0)
    x, p = torch.stack([x[0], 7 * x[1]]), torch.stack([p[0], 7 * p[1]])
    field = Lookahead(MeanShiftField((0.5,), grouping="problem"), rescale=False)
    together = velocity(field, x, p, x)
    for i in range(2):
        assert_close(velocity(field, x[i], p[i], x[i], own=16), together[i], rtol=1e-10, atol=1e-12)


def test_fresh_positives_are_parts_without_overlap_and_masses_go_with_them():
    x, p, _ = clouds(0)
    w = torch.rand(2, 20, generator=torch.Generator().manual_seed(1), dtype=F64)
    field = Lookahead(PLAIN, terms=2, rescale=False, fresh_positives=True)
    here, total = x, 0
    for part, masses in zip(p.tensor_split(3, dim=1), w.tensor_split(3, dim=1), strict=True):
        v = velocity(PLAIN, here, part, here, own=16, positive_weights=masses)
        here, total = here + v, total + v
    found = velocity(field, x, p, x, positive_weights=w)
    assert_close(found, total, rtol=1e-12, atol=1e-14)
    assert (found - velocity(Lookahead(PLAIN, terms=2, rescale=False), x, p, x, positive_weights=w)).norm() > 0.01 * found.norm()
    assert torch.isfinite(velocity(field, x, p[:, :3], x)).all()
    with pytest.raises(ValueError, match="3 terms with fresh positives need at least 3 positives, got 2; take more"):
        velocity(field, x, p[:, :2], x)


def test_t1_every_term_is_antisymmetric_where_it_stands_and_the_sum_is_not():
    x, p, q = clouds(0)
    ahead = lambda terms: Lookahead(PLAIN, terms, rescale=False)
    assert_close(velocity(ahead(0), x, p, q), -velocity(ahead(0), x, q, p), rtol=1e-12, atol=1e-14)
    there = x + velocity(PLAIN, x, p, q)
    term = velocity(ahead(1), x, p, q) - velocity(PLAIN, x, p, q)
    assert_close(term, -velocity(PLAIN, there, q, p), rtol=1e-12, atol=1e-14)
    found = velocity(ahead(1), x, p, q)
    assert (found + velocity(ahead(1), x, q, p)).norm() > 0.01 * found.norm()


@pytest.mark.parametrize("field", FRAMED)
@pytest.mark.parametrize("wrap", WRAPPED, ids=NAMED)
def test_t2_equilibrium(wrap, field):
    x, p, _ = clouds(0)
    assert_close(velocity(wrap(field), x, p, p.clone()), torch.zeros_like(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("field", FRAMED)
@pytest.mark.parametrize("wrap", WRAPPED, ids=NAMED)
def test_t4_equivariance(wrap, field):
    """Rotations and translations carry over, the order of samples does not matter, and a change of units changes the unit alone."""
    x, p, q = clouds(0)
    generator = torch.Generator().manual_seed(2)
    turn, shift = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=F64))[0], torch.randn(3, generator=generator, dtype=F64)
    field, expected = wrap(field), velocity(wrap(field), x, p, torch.cat([x, q], dim=1), own=16)
    there = velocity(field, x @ turn + shift, p @ turn + shift, torch.cat([x, q], dim=1) @ turn + shift, own=16)
    assert_close_in_norm(there, expected @ turn, 1e-9)
    scaled = velocity(field, 100 * x, 100 * p, 100 * torch.cat([x, q], dim=1), own=16)
    assert_close_in_norm(scaled, 100 * expected, 1e-3)  # the distance of a sample to itself, 1e-4, has a unit
    order = torch.randperm(16, generator=generator)
    shuffled = velocity(field, x[:, order], p.flip(1), torch.cat([x[:, order], q.flip(1)], dim=1), own=16)
    assert_close_in_norm(shuffled, expected[:, order], 1e-9)


@pytest.mark.parametrize("field", FRAMED)
@pytest.mark.parametrize("wrap", WRAPPED, ids=NAMED)
def test_wrappers_keep_to_the_protocol(wrap, field):
    """`negatives is x`, problems without an axis, masses of 0, 16 bits, no gradient."""
    x, p, q = clouds(0)
    field = wrap(field)
    assert isinstance(field, Field)
    expected = velocity(field, x, p, x)
    assert_close(velocity(field, x, p, x.clone(), own=16), expected, rtol=0, atol=0)
    assert (velocity(field, x, p, x.clone()) - expected).norm() > 1e-3 * expected.norm()  # nothing is own unless it is said to be
    one = x[0]
    alone = velocity(field, one, p[0], one)
    assert_close(alone, velocity(field, x[:1], p[:1], x[:1], own=16)[0], rtol=1e-12, atol=1e-13)
    masses = {"negative_weights": torch.cat([torch.ones(2, 16, dtype=F64), torch.zeros(2, 24, dtype=F64)], dim=1)}
    assert torch.isfinite(velocity(field, x, p, torch.cat([x, q], dim=1), own=16, **masses)).all()
    short = x.bfloat16().requires_grad_()
    drift = field(short, positives=p.bfloat16(), negatives=short)
    assert drift.velocity.dtype == torch.float32
    assert not drift.velocity.requires_grad
    exact = velocity(field, short.detach().double(), p.bfloat16().double(), short.detach().double(), own=16)
    assert_close_in_norm(drift.velocity.double(), exact, 1e-3)


def test_masses_of_zero_are_absent_for_wrappers_where_they_are_for_the_field():
    x, p, q = clouds(0)
    masses = torch.cat([torch.ones(2, 16, dtype=F64), torch.zeros(2, 24, dtype=F64)], dim=1)
    for wrap in WRAPPED:
        found = velocity(wrap(PLAIN), x, p, torch.cat([x, q], dim=1), own=16, negative_weights=masses)
        assert_close(found, velocity(wrap(PLAIN), x, p, x), rtol=1e-10, atol=1e-12)


class AllReduce:
    """`torch.distributed.all_reduce` between threads: every rank gets the mean over the problems of all."""

    def __init__(self, ranks: int):
        self.totals, self.weights, self.barrier = [torch.zeros(())] * ranks, [torch.zeros(())] * ranks, threading.Barrier(ranks, timeout=60)

    def mean(self, rank: int):
        def reduce(totals: Tensor, weights: Tensor) -> Tensor:
            self.totals[rank], self.weights[rank] = totals.sum(-1), weights.sum()
            self.barrier.wait()
            value = torch.stack(self.totals).sum(0) / torch.stack(self.weights).sum()
            self.barrier.wait()
            return value

        return reduce


def sharded(field: Field, x: Tensor, p: Tensor, ranks: int, all_reduce: bool) -> Tensor:
    group, found = AllReduce(ranks), [torch.zeros(())] * ranks

    def work(rank: int) -> None:
        mine = x.tensor_split(ranks)[rank]
        found[rank] = velocity(field, mine, p.tensor_split(ranks)[rank], mine, mean=group.mean(rank) if all_reduce else batch_mean)

    threads = [threading.Thread(target=work, args=(r,)) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(found)


@pytest.mark.parametrize("field", [Lookahead(PLAIN, terms=2), *[wrap(DriftingField((0.2, 0.5))) for wrap in WRAPPED]])
def test_t25_shards_with_a_mean_over_all_ranks_move_as_the_whole(field):
    x, p, _ = clouds(0, b=5)
    spread = torch.logspace(-0.5, 0.5, 5, dtype=F64)[:, None, None]
    whole = velocity(field, x * spread, p * spread, x * spread, own=16)
    assert_close_in_norm(sharded(field, x * spread, p * spread, 2, all_reduce=True), whole, 1e-12)
    assert (sharded(field, x * spread, p * spread, 2, all_reduce=False) - whole).norm() > 1e-2 * whole.norm()


def test_means_are_few_messages():
    x, p, _ = clouds(0)
    asked = []

    def counting(totals: Tensor, weights: Tensor) -> Tensor:
        asked.append(totals.shape)
        return batch_mean(totals, weights)

    def count(field: Field) -> int:
        asked.clear()
        velocity(field, x, p, x, mean=counting)
        return len(asked)

    assert count(PLAIN) == 2
    assert count(Lookahead(PLAIN, terms=3, step=1.0)) == 4 * 2 + 1  # rescaling asks for all terms together
    assert count(Lookahead(PLAIN, terms=3, step=1.0, rescale=False)) == 4 * 2
    assert count(Lookahead(PLAIN, terms=3)) == 4 * 2 + 3 + 1  # and every step for its length
    assert count(Combined((PLAIN, PLAIN))) == 4
    assert count(Friction(PLAIN, 0.1)) == 2


# --- a generator that looks ahead --------------------------------------------------------------------------------------------------------


def energy_distance(x: Tensor, y: Tensor) -> float:
    within = lambda z: torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))
    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))


def ring(n: int, generator: torch.Generator) -> Tensor:
    """Eight Gaussians on a circle."""
    angle = torch.randint(8, (n,), generator=generator) * math.pi / 4
    return 2 * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.15 * torch.randn(n, 2, generator=generator)


def trained(field: Field, seed: int, steps: int = 60) -> list[float]:
    """Energy distances of a small one-step generator to its data, every second step of its training."""
    torch.manual_seed(seed)  # the initial weights
    first = nn.Linear(2, 64)
    model = nn.Sequential(first, nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    with torch.no_grad():
        first.weight.mul_(4)
    fixed, generator = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    real, noise = ring(500, fixed), torch.randn(500, 2, generator=fixed)
    optimiser, found = torch.optim.Adam(model.parameters(), lr=5e-3), []
    for step in range(steps):
        if step % 2 == 0:
            with torch.no_grad():
                found.append(energy_distance(model(noise), real))
        x = model(torch.randn(128, 2, generator=generator))
        loss, _ = drift_loss(x[None], ring(256, generator)[None], field=field)
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
    return found


def test_t19_the_further_ahead_the_fewer_steps_of_the_optimiser():
    """To a fixed energy distance, mean of three seeds, at the same learning rate and length of the velocities: over 0, 1 and 3 terms."""
    steps = []
    for terms in (0, 1, 3):
        distance = torch.tensor([trained(Lookahead(PLAIN, terms), seed, steps=56) for seed in range(3)]).mean(dim=0)
        steps.append(2 * int((distance < 0.03).nonzero()[0]))
    assert steps[0] > steps[1] > steps[2]


def test_looking_ahead_helps_a_field_of_normalised_forces_too():
    """Of one temperature, with the step that is not given: nearer to the data in the mean over the run, for every seed."""
    field = DriftingField((0.5,), affinity_floor=0.0)
    for seed in range(3):
        assert sum(trained(Lookahead(field, 3), seed, steps=30)) < sum(trained(field, seed, steps=30))


def test_whole_steps_of_normalised_forces_jump_over_the_data():
    """And so do steps of a normalised sum of temperatures; looking ahead with each by itself does not."""
    base, temperatures = DriftingField((0.05, 0.2, 1.0), affinity_floor=0.0), (0.05, 0.2, 1.0)
    end = lambda field: sum(trained(field, seed=0, steps=40)[-5:]) / 5
    plain = end(base)
    assert end(Lookahead(base, step=1.0)) > 4 * plain
    assert end(Lookahead(base)) > 1.5 * plain
    assert end(temperature_set(Lookahead(base), temperatures)) < 1.2 * plain


# --- friction ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FRAMED)
def test_t20_friction_is_a_share_of_the_velocity(field):
    x, p, _ = clouds(0)
    drift = field(x, positives=p, negatives=x)
    for gamma in (0.0, 0.25, 1.0):  # the plain field, less of it, a standstill
        damped = Friction(field, gamma)(x, positives=p, negatives=x)
        assert_close(damped.velocity, (1 - gamma) * drift.velocity, rtol=0, atol=0)
        assert_close(damped.strength, drift.strength, rtol=0, atol=0)
        assert_close(damped.unit, drift.unit, rtol=0, atol=0)


@pytest.mark.parametrize("damp", [lambda field: Friction(field, 0.5), lambda field: Combined((field,), weights=(0.5,))])
def test_t20_of_normalised_forces_friction_is_a_factor_of_lookahead_too(damp):
    """A step that is not given is as long as the force, which friction leaves alone; a step that is given, or a force as it is, gets shorter."""
    x, p, _ = clouds(0)
    gap = lambda field, **more: (
        (velocity(Lookahead(damp(field), **more), x, p, x) - 0.5 * velocity(Lookahead(field, **more), x, p, x)).norm()
        / velocity(Lookahead(field, **more), x, p, x).norm()
    )
    normalised = DriftingField((0.2,), affinity_floor=0.0)
    assert gap(normalised) < 1e-13
    assert gap(normalised, step=1.0) > 0.05
    assert gap(DriftingField((0.2,), affinity_floor=0.0, normalise_force=False)) > 1e-4


def test_t20_a_step_with_a_memory():
    u, v = clouds(0, sizes=(4, 4, 4))[:2]
    assert_close(inertial_step(u, v, 1.0, 0.1), 0.1 * v, rtol=0, atol=0)
    assert_close(inertial_step(u, v, 0.0, 0.1), u + 0.1 * v, rtol=0, atol=0)
    held = torch.zeros_like(v)
    for _ in range(400):
        held = inertial_step(held, v, 0.2, 0.1)
    assert_close(held, 0.1 / 0.2 * v)  # a constant force: terminal velocity step V / gamma


@dataclass(frozen=True)
class Unnormalised(FramedField):
    """V = sum_p k (y - x) - sum_q k (y - x), no denominators, no own pair."""

    def force(self, problems: Problems, temperature: float) -> Tensor:
        k_p, k_q = (Laplace().value(r, temperature) for r in (problems.to_positives, problems.to_negatives))
        k_q = problems.set_own(k_q.clone(), 0.0)
        pull = lambda k, y: k @ y - k.sum(-1, keepdim=True) * problems.x
        return pull(k_p, problems.positives) - pull(k_q, problems.negatives)


SURROGATE = Unnormalised((0.7,), normalise_distance=False, normalise_force=False)


def pair(a: float) -> tuple[Tensor, Tensor]:
    """Two samples at +-a around a target."""
    return torch.tensor([[a], [-a]], dtype=F64), torch.zeros(1, 1, dtype=F64)


def test_t20_the_surrogate_rests_at_tau_log_2():
    """Its force is -a e^(-a/tau) (1 - 2 e^(-a/tau)): outwards within tau log 2, inwards beyond, and friction does not move that place."""
    root = 0.7 * math.log(2)
    for a in (0.1, 0.4, root, 1.0, 3.0):
        x, target = pair(a)
        expected = -a * math.exp(-a / 0.7) * (1 - 2 * math.exp(-a / 0.7))
        assert_close(velocity(SURROGATE, x, target, x)[0, 0], torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-12)
    for gamma in (0.0, 0.5):
        x, target = pair(1.5)
        for _ in range(90):
            x = x + 2 * velocity(Friction(SURROGATE, gamma), x, target, x)
        assert_close(x[:, 0], torch.tensor([root, -root], dtype=F64), rtol=0, atol=1e-12)
    x, target = pair(1.5)
    assert not velocity(Friction(SURROGATE, 1.0), x, target, x).any()


def test_friction_is_a_factor_of_the_gradient_that_adam_divides_out():
    x, p, _ = clouds(0, b=1)
    ends = {}
    for gamma in (0.0, 0.5):
        for kind in (torch.optim.SGD, torch.optim.Adam):
            particles = x.clone().requires_grad_()
            optimiser = kind([particles], lr=0.01)
            for _ in range(3):
                optimiser.zero_grad()
                drift_loss(particles, p, field=Friction(DriftingField(), gamma))[0].sum().backward()
                optimiser.step()
            ends[kind, gamma] = particles.detach() - x
    assert_close_in_norm(ends[torch.optim.Adam, 0.5], ends[torch.optim.Adam, 0.0], 1e-5)
    assert ends[torch.optim.SGD, 0.5].norm() < 0.6 * ends[torch.optim.SGD, 0.0].norm()


# --- sums --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [DriftingField(), MeanShiftField(), DriftingField(grouping="problem", normalise_distance=False)])
def test_a_temperature_set_is_a_sum_of_fields(base):
    x, p, q = clouds(0)
    joined, w = torch.cat([x, q], dim=1), torch.rand(2, 40, generator=torch.Generator().manual_seed(1), dtype=F64)
    given = {"positives": p, "negatives": joined, "own": 16, "negative_weights": w}
    whole, parts = base(x, **given), temperature_set(base, base.temperatures)(x, **given)
    for name in ("velocity", "unit", "distance", "strength"):
        assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-13)
    assert temperature_set(base, (0.1, 0.3)).fields[1].grouping == base.grouping


def test_t1_sums_of_antisymmetric_fields_are_antisymmetric():
    x, p, q = clouds(0)
    field = Combined((DriftingField(), PLAIN), weights=(0.3, 2.0))
    there, back = velocity(field, x, p, q), velocity(field, x, q, p)
    assert_close_in_norm(there, -back, 1e-12)
    assert_close(there, 0.3 * velocity(DriftingField(), x, p, q) + 2 * velocity(PLAIN, x, p, q), rtol=1e-12, atol=1e-14)


def test_strengths_of_a_step_and_of_problems_stand_in_one_table():
    x, p, _ = clouds(0)
    a, b = DriftingField((0.1, 0.2)), DriftingField((0.3,), grouping="problem")
    strength = Combined((a, b))(x, positives=p, negatives=x).strength
    assert strength.shape == (3, 2)
    assert_close(strength[:2, 0], a(x, positives=p, negatives=x).strength)
    assert_close(strength[2], b(x, positives=p, negatives=x).strength[0])


def test_temperatures_reach_the_field_within_a_wrapper():
    field = temperature_set(Lookahead(Friction(PLAIN, 0.1)), (0.1, 0.3))
    assert [one.field.field.temperatures for one in field.fields] == [(0.1,), (0.3,)]
    with pytest.raises(TypeError, match="Centres has no temperatures to choose; give a field with that attribute"):
        temperature_set(Centres(), (0.1,))
    with pytest.raises(TypeError, match="FrechetField has no temperatures to choose"):  # it has one force, without a width
        temperature_set(FrechetField(), (0.1,))


def test_a_temperature_set_of_a_field_that_remembers_has_a_memory_each():
    field = temperature_set(Friction(NystromField((0.5,), sums="dataset", landmarks=7), 0.1), (0.1, 0.3))
    kept = list(memories(field))
    assert [one.field.temperatures for one in field.fields] == [(0.1,), (0.3,)]
    assert kept[0] is not kept[1]
    assert [one.field.landmarks for one in field.fields] == [7, 7]


# --- schedules, names, bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "now"),
    [
        (Friction(PLAIN), Friction(PLAIN, 0.25)),
        (Lookahead(PLAIN, step=linear(1.0, 0.2)), Lookahead(PLAIN, step=0.8)),
        (Lookahead(PLAIN, weights=(1.0, linear(0.0, 1.0))), Lookahead(PLAIN, weights=(1.0, 0.25))),
        (
            Combined((PLAIN, Friction(PLAIN)), weights=(1.0, linear(1.0, 0.0))),
            Combined((PLAIN, Friction(PLAIN, 0.25)), weights=(1.0, 0.75)),
        ),
        (Lookahead(MeanShiftField((exponential(1.0, 1 / 16),))), Lookahead(MeanShiftField((0.5,)))),
    ],
)
def test_schedules_are_refused_until_a_step_is_said(field, now):
    x, p, _ = clouds(0)
    with pytest.raises(ValueError, match=r"changes over a run, .* say the moment"):
        velocity(field, x, p, x)
    assert_close(velocity(situated(field, Situation(25, 100)), x, p, x), velocity(now, x, p, x), rtol=1e-12, atol=0)
    assert read_field(spell(field)) == field


@pytest.mark.parametrize(
    "text",
    [
        "lookahead(drifting, terms=2, weights=(1, 0.5, 0.25), rescale=False, fresh_positives=True, step=0.5)",
        "lookahead(friction(mean_shift(temperatures=(0.2,)), friction=0.3))",
        "combined((drifting, mean_shift), weights=(0.5, 0.5))",
    ],
)
def test_wrappers_have_a_text_form(text):
    assert spell(read_field(text)) == text


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lookahead(PLAIN, terms=-1), "terms must be a whole number of at least 0, got -1; 0 is the plain field"),
        (
            lambda: Lookahead(PLAIN, terms=1.5),  # pyright: ignore[reportArgumentType]
            "terms must be a whole number",
        ),
        (lambda: Lookahead(PLAIN, weights=(1.0,)), r"1 terms and the velocity at x need 2 weights, got \(1.0,\)"),
        (lambda: Lookahead(PLAIN, weights=(1.0, -1.0)), "weights must be finite and at least 0"),
        (lambda: Lookahead(PLAIN, weights=(0.0, 0.0)), "one of them above 0"),
        (lambda: Lookahead(PLAIN, step=0.0), "step must be finite and above 0, got 0.0; None takes"),
        (lambda: Friction(PLAIN, 1.5), r"friction must lie in \[0, 1\], got 1.5; 0 is none"),
        (lambda: Friction(PLAIN, linear(0.0, 2.0)), "friction must lie in"),
        (lambda: inertial_step(torch.zeros(1, 1), torch.zeros(1, 1), -0.1, 1.0), "friction must lie in"),
        (lambda: Combined((PLAIN, PLAIN), weights=(1.0,)), "2 fields need as many weights"),
        (lambda: Combined((PLAIN,), weights=(math.nan,)), "weights must be finite"),
        (
            lambda: Combined((PLAIN,), weights=(linear(1.0, 0.0, steps=5),)),
            "above 0 at every step, .* a run that comes to a standstill has friction",
        ),
        (lambda: Combined((PLAIN, PLAIN), weights=(0, linear(0.0, 1.0))), "one of them above 0 at every step"),
        (lambda: Lookahead(PLAIN, weights=(linear(1.0, 0.0), linear(0.5, 0.0, steps=3))), "one of them above 0 at every step"),
    ],
)
def test_bad_choices_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_that_pass_the_checks_pass_them_at_every_step():
    for weights in ((linear(1.0, 0.0, 5), linear(0.0, 1.0)), (1.0, linear(1.0, 0.0, 5)), (Schedule(1.0, 0.0, shape="constant"), 0.0)):
        for step in (0, 1, 5, 10):
            assert situated(Combined((PLAIN, PLAIN), weights=weights), Situation(step, 10)).weights is not None


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("wrap", [Lookahead, Friction, Symmetrised, VelocityGuidance], ids=lambda wrap: wrap.__name__)
def test_what_is_no_field_is_not_wrapped(wrap):
    for given in ("drifting", 0.2, MeanShiftField, Laplace(), row_softmax):
        with pytest.raises(TypeError, match="field must be a field, such as DriftingField"):
            wrap(given)
    with pytest.raises(TypeError, match=r"without quotes, and in Python as read_field\('drifting'\)"):
        wrap("drifting")
    if wrap is not VelocityGuidance:
        wrap(lambda x, **given: PLAIN(x, **given))  # a function will do


@pytest.mark.usefixtures("as_users_see_it")
def test_a_sum_of_no_fields_is_refused():
    for given in ((), PLAIN, ("drifting",), (MeanShiftField,), (row_softmax,)):
        with pytest.raises(TypeError, match="Combined needs a tuple of one or more fields"):
            Combined(given)  # pyright: ignore[reportArgumentType]
    assert Combined([PLAIN]) == Combined((PLAIN,))  # pyright: ignore[reportArgumentType]
