"""The drift loss: numbers recorded from the release, an independent witness, inputs that break fast paths, refusals, and foreign fields."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from drifting_diffusers.fields import Drift, DriftingField, Field, batch_mean
from drifting_diffusers.losses import drift_loss

F64 = torch.float64
RECORDED = Path(__file__).parent / "recorded" / "drift_small.npz"
SMALL = ("basic", "neg_weight_zero", "zero_gen_pos_weights", "hot_R", "tiny")
CASES = (
    *("basic", "no_neg", "empty_neg", "one_R", "weights_all", "neg_weight_zero", "train_like", "zero_gen_pos_weights", "one_gen_no_neg"),
    *("one_dim", "high_dim", "far_clusters", "wide_R", "huge", "tiny", "small", "dup_gen_pos", "gen_collapsed", "all_identical"),
    *("all_zero", "offset", "half_inputs", "hot_R"),
)
STRESS = (
    *("plain", "one generated sample beyond 100 mean distances", "mutually isolated pair", "isolated pair with a wide gap"),
    *("isolated pair in one big problem", "one wide problem among narrow ones, low dimension", "spreads 100 times apart"),
    "heavy-tailed samples",
)


# --- recorded numbers --------------------------------------------------------------------------------------------------------------------


def replay(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our numbers for a recorded case, under the names of the recording."""
    x = case["gen"].clone().requires_grad_()
    masses = {name: case.get(f"weight_{short}") for name, short in (("generated", "gen"), ("positive", "pos"), ("negative", "neg"))}
    field = DriftingField(tuple(case["R"].tolist()))
    loss, drift = drift_loss(x, case["pos"], case.get("neg"), field=field, **{f"{name}_weights": w for name, w in masses.items()})
    loss.mean().backward()
    assert x.grad.dtype == case["grad_gen"].dtype
    return {"loss": loss.detach(), "grad_gen": x.grad, "info_scale": drift.distance, "info_loss_R": drift.strength}


def assert_recorded(ours: dict[str, Tensor], recorded: dict[str, Tensor], bounds: dict[str, float]) -> None:
    for name, value in ours.items():
        stored = recorded[name].double()
        assert (value.double() - stored).abs().max() <= bounds[name] * stored.abs().max(), name


@pytest.mark.parametrize("name", SMALL)
def test_recorded_cases_that_travel_with_the_tests(name):
    case = {k.removeprefix(f"{name}/"): torch.from_numpy(v) for k, v in np.load(RECORDED).items() if k.startswith(f"{name}/")}
    assert_recorded(replay(case), case, {k.removeprefix("tol_"): float(v) for k, v in case.items() if k.startswith("tol_")})


@pytest.mark.parametrize("name", CASES)
def test_recorded_cases(shared, name):
    folder = shared / "fixtures"
    case = {k: torch.from_numpy(v) for k, v in np.load(folder / "drift" / f"{name}.npz").items()}
    ours = replay(case)
    if name == "all_identical":  # the true force is 0, what is computed is rounding noise
        assert all(torch.isfinite(value).all() for value in ours.values())
        assert 0 <= ours["loss"].mean() <= len(case["R"]) ** 2
        return
    tolerances = json.loads((folder / "tolerances.json").read_text())[f"drift/{name}"]
    assert_recorded(ours, case, {k: v["tol"] for k, v in tolerances.items()})


def test_every_recorded_case_is_tested(shared):
    index = json.loads((shared / "fixtures/drift/index.json").read_text())
    assert {case["name"] for case in index} == set(CASES)


# --- a witness ---------------------------------------------------------------------------------------------------------------------------


def witness(x, positives, negatives, negative_weights, temperatures=(0.02, 0.05, 0.2)) -> tuple[Tensor, Tensor]:
    """Loss and gradient straight from the formulas: nothing centred, distances pair by pair, every coefficient and the terms in x written out."""
    n, dimensions = x.shape[1:]
    y = torch.cat([x, negatives, positives], dim=1)
    w = torch.cat([torch.ones_like(x[..., 0]), negative_weights, torch.ones_like(positives[..., 0])], dim=1)[:, None, :]
    repelling = torch.arange(y.shape[1]) < y.shape[1] - positives.shape[1]
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=1e-4)
    scale = (distance * w).mean() / w.expand_as(distance).mean()
    unit = (scale / dimensions**0.5).clamp(min=1e-3)
    k = distance / scale.clamp(min=1e-3)
    k[:, torch.arange(n), torch.arange(n)] += 100
    total = torch.zeros_like(x)
    for temperature in temperatures:
        logits = -k / temperature
        a = (torch.log_softmax(logits, 2) + torch.log_softmax(logits, 1)).exp().clamp(min=1e-6).sqrt() * w
        minus, plus = (a * repelling).sum(2, keepdim=True), (a * ~repelling).sum(2, keepdim=True)
        c = torch.where(repelling, -a * plus, a * minus)
        force = (c @ y - c.sum(2, keepdim=True) * x) / unit
        total = total + force / force.square().mean().clamp(min=1e-8).sqrt()
    return total.square().mean(dim=(1, 2)), -2 * total / (unit * x.numel())


def stress(name: str) -> list[Tensor]:
    from field_stress import cases  # beside the recordings; the fixture `shared` puts it on the path

    return next(inputs for found, *inputs in cases() if found == name)


def loss_and_gradient(x: Tensor, positives: Tensor, negatives: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    loss, _ = drift_loss(x, positives, negatives, negative_weights=w)
    loss.mean().backward()
    return loss.detach(), x.grad


def assert_same(ours: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], bound: float) -> None:
    for a, b in zip(ours, exact, strict=True):
        assert torch.isfinite(a).all()
        assert (a.double() - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("name", STRESS)
def test_inputs_that_break_fast_paths(shared, name):
    """Against the witness in float64, and float32 against float64."""
    inputs = stress(name)
    exact = loss_and_gradient(*inputs)
    assert_same(exact, witness(*inputs), 1e-11)
    assert_same(loss_and_gradient(*(t.float() for t in inputs)), exact, 1e-5)


def test_every_stress_case_is_tested(shared):
    from field_stress import cases

    assert tuple(name for name, *_ in cases()) == STRESS


def cloud(seed: int = 0, b: int = 4, sizes=(8, 10, 6), d: int = 5) -> list[Tensor]:
    """Generated, positives, negatives, and masses of the negatives."""
    generator = torch.Generator().manual_seed(seed)
    x, p, q = (torch.randn(b, n, d, generator=generator, dtype=F64) for n in sizes)
    return [x + 0.3, 1.2 * p, q - 0.2, 2 * torch.rand(b, sizes[2], generator=generator, dtype=F64)]


def test_the_witness_agrees_without_recordings():
    assert_same(loss_and_gradient(*cloud()), witness(*cloud()), 1e-12)


def test_an_offset_costs_float32_no_digits():
    """Samples 1000 spreads from the origin: the field centres them before it expands squares; the release loses digits here."""
    x, p, q, w = cloud()
    near, away = (loss_and_gradient(*(t.float() for t in (x + s, p + s, q + s, w))) for s in (0.0, 1000.0))
    assert_same(away, tuple(t.double() for t in near), 2e-3)  # the inputs themselves have lost four digits


# --- invariances -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["problems", "generated", "positives", "negatives", "dimensions"])
def test_no_order_matters(which):
    x, p, q, w = cloud()
    flip = lambda t, dim: t if t is None else t.flip(dim)
    back = lambda t: t
    if which == "problems":
        x, p, q, w = (flip(t, 0) for t in (x, p, q, w))
        back = lambda t: flip(t, 0)
    elif which == "generated":
        x, back = flip(x, 1), lambda t: flip(t, 1) if t.ndim == 3 else t
    elif which == "positives":
        p = flip(p, 1)
    elif which == "negatives":
        q, w = flip(q, 1), flip(w, 1)
    else:
        x, p, q = (flip(t, 2) for t in (x, p, q))
        back = lambda t: flip(t, 2) if t.ndim == 3 else t
    assert_same(tuple(back(t) for t in loss_and_gradient(x, p, q, w)), loss_and_gradient(*cloud()), 1e-12)


def test_problems_meet_only_in_the_means():
    """Given the same means, a problem's loss and gradient do not depend on the problems beside it."""
    x, p, q, w = cloud()
    means: list[Tensor] = []
    record = lambda totals, weights: means.append(batch_mean(totals, weights)) or means[-1]
    whole, _ = drift_loss(x, p, q, negative_weights=w, mean=record)
    for b in range(4):
        play = iter(means)
        one = slice(b, b + 1)
        loss, _ = drift_loss(x[one], p[one], q[one], negative_weights=w[one], mean=lambda totals, weights, play=play: next(play))
        assert_close(loss, whole[one], rtol=1e-12, atol=0)
    assert not torch.allclose(drift_loss(x[:1], p[:1], q[:1], negative_weights=w[:1])[0], whole[:1], rtol=1e-3)


def test_no_negatives_and_an_empty_set_of_them_are_the_same():
    x, p, *_ = cloud()
    expected, _ = drift_loss(x, p)
    for more in ({}, {"negative_weights": x.new_zeros(4, 0)}):
        assert_close(drift_loss(x, p, x.new_zeros(4, 0, 5), **more)[0], expected, rtol=1e-13, atol=0)


def test_masses_of_one_are_no_masses():
    x, p, q, _ = cloud()
    ones = {f"{side}_weights": torch.ones(4, n, dtype=F64) for side, n in (("generated", 8), ("positive", 10), ("negative", 6))}
    assert_close(drift_loss(x, p, q, **ones)[0], drift_loss(x, p, q)[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gets_the_loss_of_its_rounded_inputs_in_float32(dtype):
    x, p, q, w = (t.to(dtype) for t in cloud())
    half, exact = loss_and_gradient(x, p, q, w), loss_and_gradient(*(t.float() for t in (x, p, q, w)))
    assert half[0].dtype == torch.float32
    assert_close(half[0], exact[0], rtol=1e-6, atol=0)
    assert_close(half[1], exact[1].to(dtype))


def test_dtypes_may_differ_between_generated_and_real():
    x, p, q, w = cloud()
    loss, drift = drift_loss(x.bfloat16().requires_grad_(), p.float(), q.float(), negative_weights=w.float())
    expected, _ = drift_loss(x.bfloat16().float(), p.float(), q.float(), negative_weights=w.float())
    assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    assert drift.velocity.dtype == torch.float32


# --- refusals ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked():
    """Shapes unchecked, as users run it: then our own errors must speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def put(t: Tensor, value: float) -> Tensor:
    t = t.clone()
    t.view(-1)[1] = value
    return t


REFUSED = {
    "generated without problems": (lambda a: a | {"generated": a["generated"][0]}, r"generated must be .*\[problems, samples, dimensions\], got torch.float64 \(8, 5\)"),
    "integers": (lambda a: a | {"positives": a["positives"].long()}, r"positives must be floating-point samples .*, got torch.int64 \(4, 10, 5\)"),
    "other dimensions": (lambda a: a | {"positives": a["positives"][..., :3]}, r"positives must have .* generated \(4, 8, 5\), got \(4, 10, 3\)"),
    "other problems": (lambda a: a | {"negatives": a["negatives"][:2]}, r"negatives must have .* generated \(4, 8, 5\), got \(2, 6, 5\)"),
    "an empty class": (lambda a: a | {"positives": a["positives"][:, :0]}, r"at least one generated and one positive .* positives \(4, 0, 5\); leave an empty class out"),
    "nothing generated": (lambda a: a | {"generated": a["generated"][:, :0]}, r"at least one generated .* got generated \(4, 0, 5\)"),
    "too few masses": (lambda a: a | {"positive_weights": torch.ones(4, 9)}, r"positive_weights must be one mass per sample, \(4, 10\), got \(4, 9\)"),
    "masses of a problem": (lambda a: a | {"generated_weights": torch.ones(4)}, r"generated_weights must be one mass per sample, \(4, 8\), got \(4,\)"),
    "masses of nothing": (lambda a: a | {"negatives": None}, r"negative_weights were given without negatives"),
    "a negative mass": (lambda a: a | {"negative_weights": put(a["negative_weights"], -0.5)}, r"negative_weights must be at least 0, got -0.5; to push .* make it a negative"),
    "NaN samples": (lambda a: a | {"generated": put(a["generated"], torch.nan)}, r"generated holds 1 NaN or infinite values of 160;"),
    "infinite positives": (lambda a: a | {"positives": put(a["positives"], torch.inf)}, r"positives holds 1 NaN or infinite values of 200;"),
    "infinite negatives": (lambda a: a | {"negatives": put(a["negatives"], -torch.inf)}, r"negatives holds 1 NaN or infinite values of 120;"),
    "NaN masses": (lambda a: a | {"negative_weights": put(a["negative_weights"], torch.nan)}, r"negative_weights holds 1 NaN or infinite values of 24;"),
    "infinite masses": (lambda a: a | {"negative_weights": put(a["negative_weights"], torch.inf)}, r"negative_weights holds 1 NaN or infinite values of 24;"),
    "no mass at all": (
        lambda a: {k: a[k] for k in ("generated", "positives")} | {"generated_weights": torch.zeros(4, 8), "positive_weights": torch.zeros(4, 10)},
        r"all masses are 0 in problems \[0, 1, 2, 3\], so there is no mean distance",
    ),
    "no mass in one problem of its own": (
        lambda a: {k: a[k] for k in ("generated", "positives")}
        | {"generated_weights": (torch.arange(4) != 2)[:, None].expand(4, 8).float(), "positive_weights": (torch.arange(4) != 2)[:, None].expand(4, 10).float()}
        | {"field": DriftingField(grouping="problem")},
        r"all masses are 0 in problems \[2\], so there is no mean distance",
    ),
    "large samples": (lambda a: {k: put(v.float(), 3e25) if k == "generated" else v.float() for k, v in a.items()}, r"overflow float32: the largest value is 3e\+25"),
    "large negatives": (lambda a: {k: put(v.float(), -4e30) if k == "negatives" else v.float() for k, v in a.items()}, r"overflow float32: the largest value is 4e\+30, .*; scale the features down"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_with_the_value_got(unchecked, what):
    change, message = REFUSED[what]
    arguments = change(dict(zip(("generated", "positives", "negatives", "negative_weights"), cloud(), strict=True)))
    with pytest.raises(ValueError, match=message):
        drift_loss(arguments.pop("generated"), arguments.pop("positives"), arguments.pop("negatives", None), **arguments)


@pytest.mark.usefixtures("as_users_see_it")
def test_the_blame_reads_samples_that_need_a_gradient():
    """As in training. Warnings are errors here, and reading the value of a tensor that needs a gradient warns."""
    x, p, *_ = cloud()
    with pytest.raises(ValueError, match=r"overflow float32: the largest value is 3e\+25"):
        drift_loss(put(x.float(), 3e25).requires_grad_(), p.float())


def test_shapes_are_types():
    x, p, *_ = cloud()
    with pytest.raises(jaxtyping.TypeCheckError):
        drift_loss(x, p[..., :3])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperatures": ()}, r"temperatures must be .* above 0, got \(\)"),
        ({"temperatures": (0.2, -0.05)}, r"temperatures must be .* above 0, got \(0.2, -0.05\)"),
        ({"temperatures": (0.0,)}, r"temperatures .* got \(0.0,\); the paper's are \(0.02, 0.05, 0.2\)"),
        ({"temperatures": (float("nan"),)}, r"temperatures must be .* got \(nan,\)"),
        ({"temperatures": (float("inf"),)}, r"temperatures must be .* got \(inf,\)"),
        ({"temperatures": ("0.2",)}, r"temperatures must be .* got \('0.2',\)"),
        ({"temperatures": (0.2, 1e-39)}, r"temperatures must be above 2.96\d*e-37, got \(0.2, 1e-39\): .* overflows float32"),
        ({"distance_floor": 0.0}, r"distance_floor must be finite and above 0, got 0.0: .* the release has 0.001"),
        ({"strength_floor": float("nan")}, r"strength_floor must be finite and above 0, got nan: .* the release has 1e-08"),
        ({"strength_floor": -1.0}, r"strength_floor must be .* got -1.0"),
        ({"affinity_floor": -1e-3}, r"affinity_floor must lie in \[0, 1\), got -0.001; the release has 1e-3"),
        ({"affinity_floor": 1.0}, r"affinity_floor must lie in \[0, 1\), got 1.0"),
        ({"self_mask": -1.0}, r"self_mask must be finite and at least 0, got -1.0"),
        ({"self_mask": float("inf")}, r"self_mask must be finite .* got inf; use a large number such as 1e6"),
        ({"weights": "between"}, r"weights must be one of \('after', 'before'\), got 'between'"),
        ({"grouping": "row"}, r"grouping must be one of \('batch', 'problem'\), got 'row'"),
    ],
)
def test_impossible_fields_are_refused(unchecked, parameters, message):
    with pytest.raises(ValueError, match=message):
        DriftingField(**parameters)


@pytest.mark.usefixtures("as_users_see_it")
def test_one_temperature_is_a_tuple_too():
    with pytest.raises(TypeError, match=r"temperatures must be a tuple of numbers, got 0.2; write \(0.2,\) for a single one"):
        DriftingField(0.2)


def test_the_least_temperature_still_gives_finite_velocities():
    """One sample alone: its only negative is itself, masked, so its whole column is one masked logit."""
    x = torch.zeros(1, 1, 2)
    drift = DriftingField((3e-37,))(x, positives=x + 1, negatives=x)
    assert torch.isfinite(drift.velocity).all()


# --- foreign fields ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Twice:
    """A field that holds a field and looks ahead: the drift of x, plus the drift of where that leads, own negatives moved along."""

    field: Field
    steps: int = 2

    def __call__(self, x, *, positives, negatives, positive_weights=None, negative_weights=None, own=None, mean=batch_mean) -> Drift:
        own = (x.shape[-2] if negatives is x else 0) if own is None else own
        here, drifts = x, []
        for _ in range(self.steps):
            moved = torch.cat([here[:, :own], negatives[:, own:]], dim=1)
            masses = {"positive_weights": positive_weights, "negative_weights": negative_weights}
            drifts.append(self.field(here, positives=positives, negatives=moved, own=own, mean=mean, **masses))
            here = here + drifts[-1].velocity
        return replace(drifts[0], velocity=here - x)


@dataclass(frozen=True)
class Sinkhorn:
    """The difference of two entropic transport maps, of squared distances: a field without temperatures, masks or rms."""

    epsilon: float = 0.5
    iterations: int = 50

    def __call__(self, x, *, positives, negatives, positive_weights=None, negative_weights=None, own=None, mean=batch_mean) -> Drift:
        with torch.no_grad():
            velocity = self.transported(x, positives, positive_weights) - self.transported(x, negatives, negative_weights)
            ones = velocity.new_ones(len(x))
            unit = mean(torch.cdist(x, positives).mean(dim=(1, 2)), ones)
            strength = mean(velocity.square().mean(dim=(1, 2)), ones)
        return Drift(velocity, unit, unit * x.shape[-1] ** 0.5, strength[None])

    def transported(self, x: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
        w = torch.ones_like(y[..., 0]) if w is None else w
        log_target = (w / w.sum(-1, keepdim=True)).log()[:, None, :]
        logits = -torch.cdist(x, y).square() / (2 * self.epsilon)
        for _ in range(self.iterations):
            logits = logits - logits.logsumexp(1, keepdim=True) + log_target
            logits = logits - logits.logsumexp(2, keepdim=True)
        return logits.exp() @ y


FOREIGN = pytest.mark.parametrize(
    "field", [Twice(DriftingField()), Twice(Twice(DriftingField())), Sinkhorn()], ids=["twice", "nested", "sinkhorn"]
)


@FOREIGN
def test_any_field_goes_through_the_loss(field):
    x, p, q, w = cloud()
    x.requires_grad_()
    loss, drift = drift_loss(x, p, q, negative_weights=w, field=field)
    loss.mean().backward()
    assert isinstance(field, Field)
    assert_close(x.grad, -2 * drift.velocity / (drift.unit**2 * x.numel()), rtol=1e-10, atol=0)


def test_looking_ahead_is_a_second_step_with_the_own_samples_moved():
    x, p, q, _ = cloud()
    first = drift_loss(x, p, q)[1].velocity
    second = drift_loss(x + first, p, q)[1].velocity
    assert_close(drift_loss(x, p, q, field=Twice(DriftingField()))[1].velocity, first + second, rtol=1e-10, atol=1e-12)
    assert_close(drift_loss(x, p, q, field=Twice(DriftingField(), steps=1))[1].velocity, first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "field",
    [Twice(DriftingField((0.05, 0.2, 1.0), affinity_floor=0.0, normalise_force=False)), Sinkhorn()],
    ids=["twice", "sinkhorn"],
)
def test_a_foreign_field_trains(field):
    """Free samples descend the loss from the origin to a Gaussian at (3, 3) with standard deviation 0.5."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 2, generator=generator, requires_grad=True)
    optimiser = torch.optim.Adam([x], 0.05)
    for _ in range(150):
        data = torch.randn(1, 64, 2, generator=generator) * 0.5 + 3
        loss, _ = drift_loss(x, data, field=field)
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
    assert_close(x.detach().mean(dim=(0, 1)), torch.tensor([3.0, 3.0]), rtol=0, atol=0.3)
    assert 0.2 < x.detach().std(dim=1).mean() < 0.9


def test_autocast_does_not_reach_the_field():
    """A training loop under bfloat16 autocast gets the float32 loss and gradient, not products of 8 digits."""
    draw = lambda n, seed: torch.randn(2, n, 32, generator=torch.Generator().manual_seed(seed))
    results = []
    for enabled in (False, True):
        x = draw(8, 0).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, drift = drift_loss(x, draw(9, 1), draw(4, 2), negative_weights=torch.full((2, 4), 0.5))
        loss.mean().backward()
        results.append((loss.detach(), x.grad, drift.strength))
    assert_close(results[0], results[1], rtol=0, atol=0)
