"""The Frechet distance as a drift, against finite differences of it with SciPy's matrix root, and what it remembers."""

import dataclasses
import io
import threading

import numpy as np
import pytest
import scipy.linalg
import torch
from test_field_laws import AllReduce
from torch import Tensor
from torch.testing import assert_close

from drifting_diffusers.fields import Situation, batch_mean, memories, read_field, situated, spell
from drifting_diffusers.fields.frechet import FrechetField, affine_map
from drifting_diffusers.fields.moments import BLOCKS, Moments, gaussian_of, sums_of
from drifting_diffusers.losses import NonFinite, drift_loss

F64 = torch.float64


def clouds(seed: int = 0, d: int = 3, sizes=(40, 60, 24), b: int = 2) -> list[Tensor]:
    """Queries, positives of another shape and place, negatives."""
    generator = torch.Generator().manual_seed(seed)
    x, p, q = (torch.randn(b, n, d, generator=generator, dtype=F64) for n in sizes)
    return [x, p * torch.linspace(0.5, 2.0, d, dtype=F64) + 1, q - 1]


def velocity(field, x: Tensor, positives: Tensor, negatives: Tensor, **more) -> Tensor:
    return field(x, positives=positives, negatives=negatives, **more).velocity


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """With SciPy's Schur method, of covariances divided by n."""
    a, b = np.atleast_2d(np.cov(x.T, bias=True)), np.atleast_2d(np.cov(y.T, bias=True))
    root = np.real(scipy.linalg.sqrtm(a @ b))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root))


def assert_close_in_norm(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert (actual - expected).norm() <= bound * expected.norm().clamp(min=1e-300)


# --- the affine map ----------------------------------------------------------------------------------------------------------------------


def test_t22_the_drift_is_the_gradient_of_the_frechet_distance():
    """The derivative of FD by x_i is (2 / N) (x_i - T(x_i)), by central differences."""
    x, p, _ = (t[0] for t in clouds())
    found = velocity(FrechetField(ridge=1e-12), x, p, x)
    slopes, step = np.zeros((5, 3)), 1e-5
    for i in range(5):
        for j in range(3):
            moved = np.zeros(x.shape)
            moved[i, j] = step
            slopes[i, j] = (frechet_distance(x.numpy() + moved, p.numpy()) - frechet_distance(x.numpy() - moved, p.numpy())) / (2 * step)
    assert_close_in_norm(-2 / len(x) * found[:5], torch.from_numpy(slopes), 1e-6)


def test_t22_the_map_carries_one_gaussian_onto_the_other():
    """Moments of T(x) are those of the positives, A is symmetric and positive: the optimal transport."""
    x, p, _ = (t[0] for t in clouds())
    moved = x + velocity(FrechetField(ridge=1e-12), x, p, x)
    assert_close(moved.mean(0), p.mean(0))
    assert_close(moved.T.cov(correction=0), p.T.cov(correction=0), rtol=1e-6, atol=1e-8)
    assert frechet_distance(moved.numpy(), p.numpy()) < 1e-9
    matrix = affine_map(x.T.cov(correction=0), p.T.cov(correction=0), 1e-12)
    assert_close(matrix, matrix.T)
    assert (torch.linalg.eigvalsh(matrix) > 0).all()


def test_the_strength_is_the_frechet_distance():
    """In units: strength u^2 d = FD, and s^2 = tr S_r + tr S_g + |mu_r - mu_g|^2 is the mean square of all pairs."""
    x, p, _ = (t[:1] for t in clouds())
    drift = FrechetField(ridge=1e-12)(x, positives=p, negatives=x)
    assert_close(float(drift.strength[0] * drift.unit**2 * 3), frechet_distance(x[0].numpy(), p[0].numpy()), rtol=1e-6, atol=0)
    assert_close(drift.distance, torch.cdist(x, p).square().mean().sqrt())
    assert_close(drift.unit, drift.distance / 3**0.5)
    loss, _ = drift_loss(x, p, field=FrechetField())
    nearer, _ = drift_loss(x + 0.9 * drift.velocity, p, field=FrechetField())
    assert nearer < 0.05 * loss  # unlike that of kernel fields it falls
    assert_close(drift_loss(x, p, field=FrechetField(normalise_force=True))[0].mean(), torch.tensor(1.0, dtype=F64))


def test_t2_equal_moments_are_at_rest():
    """The same set, and any other set of the same mean and covariance: two moments are all that is seen."""
    x, p, _ = clouds()
    assert velocity(FrechetField(), x, p, p.clone()).abs().max() < 1e-12
    mirrored = 2 * p.mean(dim=(0, 1)) - p
    assert velocity(FrechetField(), x, p, mirrored).abs().max() < 1e-9
    assert velocity(FrechetField(), x, p, x).abs().max() > 0.1


def test_t1_it_is_not_antisymmetric():
    x, p, q = clouds()
    there, back = velocity(FrechetField(), x, p, q), velocity(FrechetField(), x, q, p)
    assert (there + back).norm() > 0.1 * there.norm()


@pytest.mark.parametrize("grouping", ["batch", "problem"])
def test_t4_rotations_translations_and_units_carry_over(grouping):
    x, p, q = clouds()
    generator = torch.Generator().manual_seed(2)
    turn, shift = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=F64))[0], torch.randn(3, generator=generator, dtype=F64)
    move = lambda t: 100 * (t @ turn + shift)
    field = FrechetField(grouping=grouping)
    assert_close_in_norm(velocity(field, move(x), move(p), move(q)), 100 * velocity(field, x, p, q) @ turn, 1e-10)


def test_problems_are_pooled_or_apart():
    x, p, q = clouds()
    one = lambda t: t.flatten(0, 1)
    together = velocity(FrechetField(), x, p, q)
    assert_close(together.flatten(0, 1), velocity(FrechetField(), one(x), one(p), one(q)))
    apart = FrechetField(grouping="problem")(x, positives=p, negatives=q)
    assert (apart.unit.shape, apart.strength.shape) == ((2,), (1, 2))
    for b in range(2):
        assert_close(apart.velocity[b], velocity(FrechetField(), x[b], p[b], q[b]))
    assert (together - apart.velocity).norm() > 0.1


@pytest.mark.parametrize("grouping", ["batch", "problem"])
def test_masses_count_and_a_mass_of_0_is_absence(grouping):
    """An integer mass is so many samples; guidance dilutes the generated samples with unconditional ones."""
    x, p, q = clouds()
    field = FrechetField(grouping=grouping)
    joined = torch.cat([x, q], dim=1)
    ones = lambda t: torch.ones(t.shape[:2], dtype=F64)
    double = velocity(field, x, p, joined, own=40, negative_weights=torch.cat([ones(x), 2 * ones(q)], dim=1))
    assert_close(double, velocity(field, x, p, torch.cat([joined, q], dim=1), own=40))
    absent = velocity(field, x, p, joined, own=40, negative_weights=torch.cat([ones(x), 0 * ones(q)], dim=1))
    assert_close(absent, velocity(field, x, p, x))
    assert (double - absent).norm() > 0.1
    half = torch.cat([ones(p), 0 * ones(p)], dim=1)
    assert_close(velocity(field, x, torch.cat([p, p + 9], dim=1), x, positive_weights=half), velocity(field, x, p, x))


def test_t21_guidance_moves_the_mean_to_alpha_times_one_less_alpha_minus_1_times_the_other():
    """Particles come to rest where the mixture (1 - gamma) q + gamma p(.|0) has the moments of the positives, if any q does that."""
    generator = torch.Generator().manual_seed(0)
    x, p, unconditional = (torch.randn(1, n, 2, generator=generator, dtype=F64) for n in (500, 500, 500))
    p, alpha = p + 0.25, 2.0
    masses = torch.cat([torch.ones(1, 500, dtype=F64), torch.full((1, 500), alpha - 1, dtype=F64)], dim=1)
    for _ in range(200):
        x = x + 0.2 * velocity(FrechetField(), x, p, torch.cat([x, unconditional], dim=1), own=500, negative_weights=masses)
    expected = alpha * p.mean(1) - (alpha - 1) * unconditional.mean(1)
    assert_close(x.mean(1), expected, rtol=0, atol=1e-3)


# --- too few samples, precision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("start", ["collapsed", "on the data", "far", "one sample"])
@pytest.mark.parametrize("d", [1, 3, 64])
def test_t25_degenerate_batches_are_finite(dtype, start, d):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, 8, d, generator=generator)
    x = {"collapsed": torch.zeros(2, 8, d), "on the data": p.clone(), "far": p + 1e4, "one sample": p[:, :1] + 1}[start].to(dtype)
    for grouping in ("batch", "problem"):
        loss, drift = drift_loss(x.requires_grad_(), p.to(dtype), field=FrechetField(grouping=grouping))
        loss.mean().backward()
        assert drift.velocity.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.isfinite(drift.velocity).all()
        assert torch.isfinite(x.grad).all()
        assert 0 <= loss.mean() <= 1.1 * d  # |V| <= s
        still = drift_loss(p.to(dtype), p.to(dtype), field=FrechetField(grouping=grouping))[1]
        assert still.strength.max() < 1e-12
    nothing = drift_loss(torch.zeros(1, 4, d), torch.zeros(1, 4, d), field=FrechetField())[1]
    assert torch.equal(nothing.velocity, torch.zeros(1, 4, d))


def test_with_fewer_samples_than_dimensions_the_samples_still_reach_the_mean_and_no_more_than_the_spread():
    generator = torch.Generator().manual_seed(0)
    x, p = (torch.randn(1, 20, 50, generator=generator, dtype=F64) for _ in range(2))
    moved = x + velocity(FrechetField(), x, p + 3, x)
    assert_close(moved.mean(1), p.mean(1) + 3)
    spread = lambda t: float((t - t.mean(1, keepdim=True)).square().sum())
    assert 0 < spread(moved) <= 1.001 * spread(p)


def test_float32_far_from_the_origin():
    x, p, q = (t.float() + 300 for t in clouds())
    assert_close_in_norm(velocity(FrechetField(), x, p, q).double(), velocity(FrechetField(), x.double(), p.double(), q.double()), 1e-4)


def test_no_gradient_and_blocks_change_nothing(monkeypatch):
    x, p, q = (t.requires_grad_() for t in clouds())
    whole = velocity(FrechetField(), x, p, q)
    assert not whole.requires_grad
    monkeypatch.setattr("drifting_diffusers.fields.moments.BLOCK", 30)
    assert_close(velocity(FrechetField(), x, p, q), whole)


def test_what_is_not_finite_is_noticed_and_not_remembered():
    x, p, _ = clouds()
    field = situated(FrechetField(moments="average"), Situation(feature="map"))
    drift_loss(x, p, field=field)
    before = field.memory.recall("map").clone()
    with pytest.raises(NonFinite, match="generated holds 1 NaN"):
        drift_loss(poisoned(x), p, field=field)
    assert torch.equal(field.memory.recall("map"), before)
    with pytest.raises(NonFinite, match="positives holds 1 NaN"):
        drift_loss(x, poisoned(p), field=field)
    assert torch.equal(field.memory.recall("map"), before)
    assert torch.isfinite(drift_loss(x, p, field=field)[0]).all()


def poisoned(p: Tensor) -> Tensor:
    p = p.clone()
    p[0, 0, 0] = torch.nan
    return p


# --- several processes -------------------------------------------------------------------------------------------------------------------


def sharded(ranks: int, steps: list[list[Tensor]], all_reduce: bool, **options) -> Tensor:
    """The velocities of the last step, every rank with problems and a memory of its own."""
    group, found = AllReduce(ranks), [torch.zeros(())] * ranks

    def work(rank: int) -> None:
        field = FrechetField(**options)
        for step in steps:
            x, p, q = (t.tensor_split(ranks)[rank] for t in step)
            found[rank] = velocity(field, x, p, q, mean=group.mean(rank) if all_reduce else batch_mean)

    threads = [threading.Thread(target=work, args=(r,)) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(found)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "options", [{"moments": "batch"}, {"moments": "queue", "window": 600}, {"moments": "average", "decay": 0.5}], ids=str
)
def test_t25_shards_with_a_mean_over_all_ranks_are_one(ranks, options, monkeypatch):
    """7 problems over 2 or 3 processes, three steps; the queue is as long, though no process sees all samples."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    shift = torch.linspace(-1, 1, 7, dtype=F64)[:, None, None]
    steps = [[t + shift + s for t in clouds(s, b=7)] for s in range(4)]
    field = FrechetField(**options)
    whole = [velocity(field, *step) for step in steps][-1]
    assert_close_in_norm(sharded(ranks, steps, all_reduce=True, **options), whole, 1e-10)
    assert (sharded(ranks, steps, all_reduce=False, **options) - whole).norm() > 0.01 * whole.norm()


def test_the_moments_of_a_step_are_one_message_and_have_no_pairs():
    x, p, q = clouds(d=5)
    shapes = []

    def mean(totals: Tensor, weights: Tensor) -> Tensor:
        shapes.append(tuple(totals.shape))
        return batch_mean(totals, weights)

    FrechetField()(x, positives=p, negatives=q, mean=mean)
    assert shapes == [(2 * (1 + 5 + 25) + 1, 1), (1, 2)]  # and the strength


# --- memories ----------------------------------------------------------------------------------------------------------------------------


def drawn(steps: int, n: int = 40, d: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Generated, real, and masses of the generated samples, of ever new distributions."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)
    return [(draw(2, n, d) * (1 + s) + s, draw(2, 60, d) - s, torch.rand(2, n, generator=generator, dtype=F64)) for s in range(steps)]


@pytest.mark.parametrize("window", [200, 240])
def test_a_queue_has_the_moments_of_the_last_samples(window):
    """80 generated samples a step, a window of 200 or 240: the last three steps; earlier ones are forgotten."""
    steps = drawn(6)
    field = situated(FrechetField(moments="queue", window=window), Situation(feature="map"))
    for i, (x, p, w) in enumerate(steps):
        found = velocity(field, x, p, x, negative_weights=w)
        xs, ps, ws = (torch.cat(parts, dim=1) for parts in zip(*steps[max(0, i - 2) : i + 1], strict=True))
        assert_close(found, velocity(FrechetField(), x, ps, xs, negative_weights=ws), rtol=1e-8, atol=1e-10)
    alone = velocity(FrechetField(), x, p, x, negative_weights=w)
    assert (found - alone).norm() > 0.1


def test_a_queue_of_small_steps_keeps_blocks_of_them():
    """Memory does not grow with the number of steps, and what it holds lies between the window and 2 / BLOCKS more."""
    memory, sums = Moments(), torch.ones(2, 13, dtype=F64)
    for step in range(500):
        total = memory.queued("map", sums, 1, 64)
        assert torch.equal(total, total[0, 0] * sums)
        assert min(step + 1, 64) <= total[0, 0] <= 64 * (1 + 2 / BLOCKS)
    assert len(memory.state_dict()["map"]["counts"]) <= BLOCKS + 2


def test_an_average_is_its_formula_from_the_first_step():
    """S_t = (1 - decay) sum_s decay^(t - s) S_s, in which masses are averaged as sums are: per generated sample, so that a large step counts as a small one."""
    steps, decay = drawn(5), 0.7
    steps[1:3] = [(x[:, :10], p[:, :15], w[:, :10]) for x, p, w in steps[1:3]]
    field = FrechetField(moments="average", decay=decay)
    for i, (x, p, w) in enumerate(steps):
        found = velocity(field, x, p, x, negative_weights=w)
        fade = [decay ** (i - s) / steps[s][0].shape[1] for s in range(i + 1)]
        xs, ps = (torch.cat([step[side] for step in steps[: i + 1]], dim=1) for side in (0, 1))
        ws = torch.cat([f * step[2] for f, step in zip(fade, steps, strict=False)], dim=1)
        vs = torch.cat([torch.full(step[1].shape[:2], f, dtype=F64) for f, step in zip(fade, steps, strict=False)], dim=1)
        assert_close(found, velocity(FrechetField(), x, ps, xs, negative_weights=ws, positive_weights=vs), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [{"moments": "queue", "window": 200}, {"moments": "average", "decay": 0.7}], ids=str)
def test_a_memory_comes_back_exactly(options):
    steps, (kept, fresh) = drawn(6), (FrechetField(**options), FrechetField(**options))
    for x, p, _ in steps[:4]:
        velocity(kept, x, p, x)
    assert list(memories(kept)) == [kept.memory]
    file = io.BytesIO()
    torch.save(kept.memory.state_dict(), file)
    file.seek(0)
    fresh.memory.load_state_dict(torch.load(file, weights_only=True))
    for x, p, _ in steps[4:]:
        assert_close(velocity(fresh, x, p, x), velocity(kept, x, p, x), rtol=0, atol=0)


def test_features_have_memories_of_their_own_and_a_field_of_the_step_has_none():
    (x, p, _), (other, real, _) = drawn(2)
    field = FrechetField(moments="average")
    first, second = (situated(field, Situation(feature=name)) for name in ("first", "second"))
    velocity(first, other, real, other)
    assert_close(velocity(second, x, p, x), velocity(FrechetField(), x, p, x))
    assert ("first" in field.memory, "third" in field.memory) == (True, False)
    with pytest.raises(ValueError, match=r"feature 'first' had 13 sums \(1 \+ d \+ d\^2\) and now has 7"):
        velocity(first, x[..., :2], p[..., :2], x[..., :2])
    plain = FrechetField()
    velocity(plain, x, p, x)
    assert not plain.memory.state_dict()


def test_a_field_made_by_replace_shares_the_memory():
    """So of a queue it would go on from other sums than those of an average; with a memory of its own it does not."""
    (x, p, _), (other, real, _) = drawn(2)
    queue = FrechetField(moments="queue")
    velocity(queue, other, real, other)
    shared = dataclasses.replace(queue, moments="average")
    apart = dataclasses.replace(queue, moments="average", memory=Moments())
    expected = velocity(FrechetField(moments="average"), x, p, x)
    assert shared.memory is queue.memory
    assert_close(velocity(apart, x, p, x), expected)
    assert (velocity(shared, x, p, x) - expected).norm() > 0.1 * expected.norm()


def test_moved_problems_have_their_own_moments():
    """What a wrapper of forces does: the first step carries the samples onto the data, so the second has nowhere to go."""
    x, p, _ = clouds()
    seen = []

    def twice(problems, temperature: float) -> Tensor:
        shift = field.force(problems, temperature)
        moved = dataclasses.replace(problems, x=problems.x + shift, negatives=problems.negatives + shift)
        seen.extend([shift, field.force(moved, temperature)])
        return shift

    field = FrechetField(ridge=1e-12)
    field.drift(twice, False, x, p, x, None, None, 40, batch_mean)
    assert seen[1].norm() < 1e-6 * seen[0].norm()
    field = FrechetField(moments="average")
    with pytest.raises(ValueError, match="moments='average' belong to the samples of a step, not to moved ones"):
        field.drift(twice, False, x, p, x, None, None, 40, batch_mean)


def test_sums_are_moments():
    _, p, _ = clouds()
    w = torch.rand(2, 60, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = gaussian_of(sums_of(p, w), 3)
    for b in range(2):
        assert_close(found.covariance[b].numpy(), np.cov(p[b].numpy().T, aweights=w[b].numpy(), bias=True))
        assert_close(found.mean[b, 0].numpy(), np.average(p[b].numpy(), axis=0, weights=w[b].numpy()))


# --- choices -----------------------------------------------------------------------------------------------------------------------------


def test_the_text_form_has_the_choices_and_not_the_memory():
    field = situated(FrechetField(moments="queue", window=10_000, normalise_force=True), Situation(feature="map"))
    assert spell(field) == "frechet(normalise_force=True, moments='queue', window=10000)"
    assert read_field(spell(field)) == field
    assert read_field("frechet").memory is not FrechetField().memory
    with pytest.raises(ValueError, match="frechet: got an unexpected keyword argument 'temperatures'"):
        read_field("frechet(temperatures=(0.2,))")


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moments": "bank"}, "moments must be one of"),
        ({"moments": "queue", "grouping": "problem"}, "moments='queue' are those of all problems together; take grouping='batch'"),
        ({"window": 0}, "window must be a whole number of samples, at least 1, got 0"),
        ({"window": 5e4}, "window must be a whole number of samples, at least 1, got 50000.0"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"ridge": 0.0}, "ridge must be finite and above 0, got 0.0"),
        ({"window": 7}, "window has no effect with moments='batch', got 7; take moments='queue', or leave window at 50000"),
        ({"window": 7, "moments": "average"}, "window has no effect with moments='average', got 7"),
        ({"decay": 0.1}, "decay has no effect with moments='batch', got 0.1; take moments='average', or leave decay at 0.999"),
        ({"decay": 0.1, "moments": "queue"}, "decay has no effect with moments='queue', got 0.1"),
    ],
)
def test_choices_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FrechetField(**changes)
