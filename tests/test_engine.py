"""The fast engine of the released force is the plain path, whatever it saves on the way; features of a step that share calls and messages are as each alone."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from drifting_diffusers import DriftingField, DriftingObjective, drift_loss
from drifting_diffusers.couplings import row_softmax
from drifting_diffusers.fields import batch_mean, read_field, spell
from drifting_diffusers.fields.engine import Sides, TorchEngine
from drifting_diffusers.kernels import Gaussian
from drifting_diffusers.losses import NonFinite

F64 = torch.float64


def clouds(b=3, n=12, p=10, m=4, d=6, dtype=F64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    normal = lambda k: torch.randn(b, k, d, generator=rng, dtype=F64)
    masses = torch.rand(b, m, generator=rng, dtype=F64)
    return *(t.to(dtype) for t in (normal(n) + 0.3, 1.1 * normal(p), normal(m) - 0.2)), masses.to(dtype)


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def both(**choices):
    return DriftingField(backend="torch", **choices), DriftingField(backend="plain", **choices)


CHOICES = {
    "released": {},
    "one temperature": {"temperatures": (0.3,)},
    "no powers of each other": {"temperatures": (0.07, 0.11, 0.3)},
    "far apart": {"temperatures": (1e-4, 0.05, 5.0)},
    "the same twice": {"temperatures": (0.1, 0.2, 0.1)},
    "no floor": {"affinity_floor": 0.0},
    "hot, so that the mask shows": {"temperatures": (20.0, 50.0)},
    "plain distances and forces": {"normalise_distance": False, "normalise_force": False, "temperatures": (1.0, 0.5)},
    "every problem by itself": {"grouping": "problem"},
    "a mask of 1": {"self_mask": 1.0},
}


@pytest.mark.parametrize("own", [None, 0, 5])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_every_choice_is_the_plain_path(choices, own):
    x, p, q, _ = clouds(m=14)
    rng = torch.Generator().manual_seed(1)
    more = {"positive_weights": torch.rand(3, 10, generator=rng, dtype=F64)} if own else {}
    fast, plain = (field(x, positives=p, negatives=x if own is None else q, own=own, **more) for field in both(**choices))
    for name in ("velocity", "unit", "distance", "strength"):
        assert getattr(fast, name).shape == getattr(plain, name).shape
        assert_close(getattr(fast, name), getattr(plain, name), rtol=1e-10, atol=1e-12)


SAVINGS = [
    {"one_exponential": one, "gram": gram, "chunk": chunk, "block": block}
    for one, gram, (chunk, block) in itertools.product((True, False), (True, False), ((10**6, 10**6), (500, 500), (100, 60)))
]


@pytest.mark.parametrize("savings", SAVINGS, ids=str)
@pytest.mark.parametrize("masses", [True, False])
def test_no_saving_changes_anything(savings, masses):
    x, p, q, w = clouds(b=5, d=40)
    expected = drift_loss(x, p, q, negative_weights=w if masses else None, field=DriftingField(backend="plain"))[1]
    sides = Sides(x, (x, q, p), 16, own=12).with_masses([None, w if masses else None, None])
    engine = TorchEngine(sides, (0.02, 0.05, 0.2), 1e-3, 100.0, **savings)
    distance = batch_mean(*engine.measure())
    unit = distance / x.shape[-1] ** 0.5
    strength = engine.forces(distance).sum(1) / unit**2 / x.numel()
    assert_close(distance, expected.distance, rtol=1e-12, atol=0)
    assert_close(strength, expected.strength, rtol=1e-10, atol=0)
    assert_close(engine.velocity(strength.rsqrt()), expected.velocity, rtol=1e-10, atol=1e-12)


def test_savings_are_what_these_shapes_would_take():
    x, p, _, _ = clouds(d=128)
    temperatures = (0.02, 0.05, 0.2)
    assert TorchEngine(Sides(x, (x, p), 12, own=12), temperatures, 0.0, 1.0).gram
    assert not TorchEngine(Sides(x[..., :8], (x[..., :8], p[..., :8]), 12, own=12), temperatures, 0.0, 1.0).gram
    assert not TorchEngine(Sides(x, (x, p), 12, own=12), (0.1,), 0.0, 1.0).gram  # one temperature: nothing to share the products of targets
    assert not TorchEngine(Sides(x, (x, p), 12, own=12), (0.1,), 0.0, 1.0, chunk=50, block=50).whole


@pytest.mark.parametrize("gram", [True, False])
def test_offsets_of_thirty_standard_deviations_cost_no_digits(gram):
    x, p, q, _ = clouds(b=4, n=32, p=32, d=48)
    sides = lambda dtype: Sides((x + 30).to(dtype), tuple((t + 30).to(dtype) for t in (x, q, p)), 36, own=32)

    def velocity(dtype):
        engine = TorchEngine(sides(dtype), (0.02, 0.05, 0.2), 1e-3, 100.0, gram=gram)
        distance = batch_mean(*engine.measure())
        return engine.velocity(engine.forces(distance).sum(1).rsqrt())

    rounded = sides(torch.float32).queries.double() - 30 - x  # what storing them in float32 moved them by is no error of the engine
    assert rounded.abs().max() < 4e-6
    assert error(velocity(torch.float32), velocity(F64)) < 2e-5
    x, p, q = (((t * 2**12).round() / 2**12) for t in (x, p, q))  # which float32 holds exactly, offset and all
    assert error(velocity(torch.float32), velocity(F64)) < 5e-6


def test_samples_in_16_bits_are_computed_in_32():
    x, p, q, w = clouds(dtype=torch.bfloat16)
    for field in both():
        samples = [t.clone().requires_grad_() for t in (x, x.float())]
        for sample in samples:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                drift_loss(sample, p, q, negative_weights=w, field=field)[0].sum().backward()
        assert samples[0].grad.dtype == torch.bfloat16
        assert_close(samples[0].grad, samples[1].grad.bfloat16(), rtol=0.01, atol=0)


@pytest.mark.parametrize("field", both(), ids=["torch", "plain"])
def test_the_gradient_is_that_of_the_regression_written_out(field):
    x, p, q, w = clouds()
    leaf, again, factors = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    loss, drift = drift_loss(leaf, p, q, negative_weights=w, field=field)
    written = ((again - (x + drift.velocity)) / drift.unit).square().mean((1, 2))
    (loss * factors).sum().backward()
    (written * factors).sum().backward()
    assert_close(loss, written.detach(), rtol=1e-12, atol=0)
    assert_close(leaf.grad, again.grad, rtol=1e-9, atol=1e-12)


def test_own_negatives_may_lie_elsewhere():
    x, p, _, _ = clouds()
    fast, plain = (field(x + 0.5, positives=p, negatives=x, own=12).velocity for field in both())
    assert_close(fast, plain, rtol=1e-10, atol=1e-12)


def test_a_backend_is_no_choice_of_a_run():
    assert DriftingField(backend="plain") == DriftingField()
    assert spell(DriftingField(backend="plain")) == "drifting"
    assert read_field("drifting(backend='plain')").backend == "plain"


@pytest.mark.parametrize("choices", [{"kernel": Gaussian()}, {"coupling": row_softmax}, {"weights": "before"}, {"weightless": "absent"}])
def test_a_backend_that_cannot_do_these_choices_is_refused(choices):
    assert not DriftingField(**choices).staged
    with pytest.raises(ValueError, match=r"backend='torch' computes the released force alone.*take backend='auto'"):
        DriftingField(backend="torch", **choices)


def test_an_unknown_backend_is_refused(as_users_see_it):
    with pytest.raises(ValueError, match="backend must be one of"):
        DriftingField(backend="cuda")


# --- features of a step --------------------------------------------------------------------------------------------------------------------


class Five:
    """Features: three of one shape, one of other numbers of problems, one of other dimensions."""

    def __call__(self, images):
        a, b, c = images[:, :1].flatten(2), images[:, 1:].flatten(2), images.flatten(2).mT
        return {"a": a, "b": 3 * b, "a again": a.square(), "both": torch.cat([a, b], dim=1), "places": c}


def step(field="drifting", dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    images = lambda n: torch.randn(3, n, 2, 4, 4, generator=rng, dtype=dtype)
    return DriftingObjective(Five(), field), images(6).requires_grad_(), images(5), images(4), torch.tensor([0.0, 0.5, 2.0])


def counting():
    messages = []

    def mean(totals, weights):
        messages.append(totals.shape)
        return batch_mean(totals, weights)

    return mean, messages


@pytest.mark.parametrize("field", ["drifting", "drifting(grouping='problem')", "drifting(normalise_force=False, temperatures=(0.2,))"])
def test_features_that_share_a_message_are_as_each_alone(field):
    objective, x, *real = step(field)
    mean, messages = counting()
    alone, seen = objective(x, *real)
    together, seen_together = objective(x, *real, mean=mean)
    assert len(messages) == (0 if "problem" in field else 2)
    assert_close(together, alone)
    assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (together, alone)), rtol=1e-4, atol=1e-6)
    assert list(seen) == list(seen_together)
    for name, measured in seen.items():
        assert_close(seen_together[name].distance, measured.distance)
        assert_close(seen_together[name].strength, measured.strength, rtol=1e-4, atol=1e-6)


def test_slopes_of_features_that_share_a_message_are_those_of_each_alone():
    objective, x, positives, negatives, weights = step()
    with torch.no_grad():
        features = [objective.problems(t) for t in (x, positives, negatives)]
    mean, messages = counting()
    found = [objective.slopes(*map(dict, features), weights, mean=how) for how in (batch_mean, mean)]
    assert len(messages) == 2
    assert_close(*(slopes for slopes, _, _ in found), rtol=1e-4, atol=1e-7)


def test_a_plain_field_asks_for_every_feature():
    objective, x, *real = step("drifting(backend='plain')")
    mean, messages = counting()
    objective(x, *real, mean=mean)
    assert len(messages) == 10


def test_the_feature_that_is_not_finite_is_named_among_those_of_its_call():
    class Broken(Five):
        def __call__(self, images):
            found = super().__call__(images)
            return found | {"a again": found["a again"] / 0}

    _, x, *real = step()
    mean, messages = counting()
    with pytest.raises(NonFinite, match="feature 'a again': generated holds"):
        DriftingObjective(Broken())(x, *real, mean=mean)
    assert len(messages) == 2


def test_what_does_not_fit_at_once_goes_in_waves(monkeypatch):
    from drifting_diffusers import comparison

    objective, x, *real = step()
    expected = objective(x, *real)[0]
    monkeypatch.setattr(comparison, "WAVE", 6 * 15 * 12)
    mean, messages = counting()
    assert_close(objective(x, *real, mean=mean)[0], expected)
    assert len(messages) > 2
