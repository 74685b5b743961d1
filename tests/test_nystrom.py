"""The field that sees the data through landmarks, against sums written out in NumPy, and its memory of a whole dataset."""

import io

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from drifting_diffusers.fields import MeanShiftField, Observer, Situation, memories, read_field, situated, spell
from drifting_diffusers.fields.frame import Problems
from drifting_diffusers.fields.landmarks import AttractionSums, Projection, _Class, inverse
from drifting_diffusers.fields.nystrom import NystromField
from drifting_diffusers.kernels import Gaussian, Laplace
from drifting_diffusers.losses import NonFinite, drift_loss
from drifting_diffusers.schedules import exponential

F64 = torch.float64
PLAIN = {"normalise_distance": False, "normalise_force": False}


def clouds(seed: int = 0, d: int = 3, sizes=(16, 40, 24), b: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, positives, negatives = (torch.randn(b, n, d, generator=generator, dtype=F64) for n in sizes)
    return [x, positives + 1, negatives]


def velocity(field, x: Tensor, positives: Tensor, negatives: Tensor, **more) -> Tensor:
    return field(x, positives=positives, negatives=negatives, **more).velocity


def attraction(field, x: Tensor, positives: Tensor, **more) -> Tensor:
    """Without repulsion: the one negative has no mass."""
    return velocity(field, x, positives, x[:, :1].clone(), negative_weights=x.new_zeros(len(x), 1), **more)


def assert_close_in_norm(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert (actual - expected).norm() <= bound * expected.norm().clamp(min=1e-300)


def mean_shift(x: Tensor, y: Tensor, tau: float) -> Tensor:
    k = (-torch.cdist(x, y) / tau).exp()
    return k @ y / k.sum(-1, keepdim=True) - x


# --- the projection ----------------------------------------------------------------------------------------------------------------------


def test_t17_the_attraction_is_psi_b_over_psi_s():
    """With psi = k(., U) A written out."""
    x, p, _ = clouds()
    w = torch.rand(2, 40, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = attraction(NystromField((0.7,), landmarks=9, **PLAIN), x, p, positive_weights=w)
    for b in range(2):
        xs, y, u, mass = x[b].numpy(), p[b].numpy(), p[b, :9].numpy(), w[b].numpy()
        k = lambda a, c: np.exp(-np.linalg.norm(a[:, None] - c[None], axis=-1) / 0.7)
        values, vectors = np.linalg.eigh(k(u, u) + 1e-4 * np.eye(9))
        a = vectors @ np.diag(values**-0.5) @ vectors.T
        psi_x, psi_y = k(xs, u) @ a, k(y, u) @ a
        expected = psi_x @ (psi_y.T @ (mass[:, None] * y)) / (psi_x @ (psi_y.T @ mass))[:, None] - xs
        assert_close_in_norm(found[b], torch.from_numpy(expected), 1e-6)


def test_t17_the_error_falls_with_the_number_of_landmarks():
    """About 4e-1, 1.6e-1, 4e-2 and 2e-6 for 20, 80, 320 and all of 2000 samples in the plane at width 0.5; they differ by the draw."""
    generator = torch.Generator().manual_seed(0)
    p, x = torch.randn(1, 2000, 2, generator=generator, dtype=F64), torch.randn(1, 200, 2, generator=generator, dtype=F64)

    def error(m: int, y: Tensor) -> float:
        exact = mean_shift(x, y, 0.5)
        return float((attraction(NystromField((0.5,), landmarks=m, **PLAIN), x, y) - exact).norm() / exact.norm())

    for m, expected in ((20, 4e-1), (80, 1.6e-1), (320, 4e-2)):
        assert expected / 2.5 < error(m, p) < 2.5 * expected
    assert error(1000, p[:, :1000]) <= 1e-5  # with 2000 it is the same and takes seconds


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_t17_with_every_positive_a_landmark_it_is_the_difference_of_mean_shifts(dtype):
    x, p, q = (t.to(dtype) for t in clouds())
    joined, w = torch.cat([x, q], dim=1), torch.rand(2, 40, generator=torch.Generator().manual_seed(1), dtype=dtype)
    more = {"own": 16, "positive_weights": w}
    exact = MeanShiftField((0.2, 0.5))(x, positives=p, negatives=joined, **more)
    found = NystromField((0.2, 0.5), landmarks=40)(x, positives=p, negatives=joined, **more)
    assert_close_in_norm(found.velocity, exact.velocity, 1e-4)
    assert_close(found.strength, exact.strength, rtol=1e-3, atol=0)
    assert_close(found.distance, exact.distance)
    few = NystromField((0.2, 0.5), landmarks=4)(x, positives=p, negatives=joined, **more)
    assert (few.velocity - exact.velocity).norm() > 0.05 * exact.velocity.norm()


def test_the_repulsion_is_psi_b_over_psi_s_without_psi_psi():
    """Of own negatives with masses, written out."""
    x, p, q = clouds()
    joined, w = torch.cat([x, q], dim=1), torch.rand(2, 40, generator=torch.Generator().manual_seed(1), dtype=F64)
    options = {"landmarks": 9, "repulsion": "nystrom", "least_mass": 0.0, **PLAIN}
    found = velocity(NystromField((2.0,), **options), x, p, joined, own=16, negative_weights=w)
    attracted = velocity(NystromField((2.0,), **options), x, p, joined, own=16, negative_weights=0 * w)
    for b in range(2):
        u, y, mass = p[b, :9].numpy(), joined[b].numpy(), w[b].numpy()
        k = lambda a, c: np.exp(-np.linalg.norm(a[:, None] - c[None], axis=-1) / 2.0)
        shares = k(y[:16], u) @ np.linalg.inv(k(u, u) + 1e-4 * np.eye(9)) @ k(u, y) * mass
        np.fill_diagonal(shares, 0)
        expected = shares @ y / shares.sum(1, keepdims=True) - y[:16]
        assert (shares.sum(1) > 0).all()
        assert_close_in_norm((attracted - found)[b], torch.from_numpy(expected), 1e-6)


def test_the_negatives_through_the_same_landmarks_without_the_query_itself():
    """Where the landmarks are the negatives the projection is exact, so it is the masked mean shift."""
    x = clouds()[0]
    for masses in (None, torch.rand(2, 16, generator=torch.Generator().manual_seed(1), dtype=F64) + 0.1):
        field = NystromField((0.5,), landmarks=16, ridge=1e-9, repulsion="nystrom", **PLAIN)
        found = velocity(field, x, x.clone(), x, own=16, negative_weights=masses)
        expected = velocity(MeanShiftField((0.5,), **PLAIN), x, x.clone(), x, own=16, negative_weights=masses)
        assert_close_in_norm(found, expected, 1e-3)  # a query counts itself as 1e-4 away where it is attracted
        unmasked = velocity(field, x, x.clone(), x.clone(), own=0, negative_weights=masses)
        assert (unmasked - expected).norm() > 0.1 * expected.norm()
    assert field.report.clamped == 0


def test_t2_equal_sides_through_the_same_landmarks_are_at_rest():
    """And with exact repulsion they are not, unless every sample is a landmark."""
    x, p, _ = clouds()
    rest = lambda **more: velocity(NystromField((0.5,), **more, **PLAIN), x, p, p.clone(), own=0).norm()
    assert rest(landmarks=10, repulsion="nystrom") < 1e-10
    assert rest(landmarks=10) > 0.1
    assert rest(landmarks=40, ridge=1e-9) < 1e-5


def test_t1_it_is_antisymmetric_only_where_landmarks_do_not_matter():
    x, p, q = clouds()
    sides = lambda m: [velocity(NystromField((0.5,), landmarks=m, ridge=1e-9, **PLAIN), x, *pair) for pair in ((p, q), (q, p))]
    there, back = sides(40)
    assert_close_in_norm(there, -back, 1e-5)
    there, back = sides(5)
    assert (there + back).norm() > 0.05 * there.norm()


@pytest.mark.parametrize("repulsion", ["exact", "nystrom"])
def test_t4_rotations_and_translations_carry_over(repulsion):
    x, p, q = clouds()
    generator = torch.Generator().manual_seed(2)
    turn, shift = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=F64))[0], torch.randn(3, generator=generator, dtype=F64)
    move = lambda t: t @ turn + shift
    field = NystromField((0.3, 0.7), landmarks=10, repulsion=repulsion)
    there = field(move(x), positives=move(p), negatives=move(q))
    assert_close_in_norm(there.velocity, velocity(field, x, p, q) @ turn, 1e-9)
    large = field(1000 * x, positives=1000 * p, negatives=1000 * q)
    assert_close_in_norm(large.velocity / large.unit, velocity(field, x, p, q) / there.unit, 1e-9)


@pytest.mark.parametrize("repulsion", ["exact", "nystrom"])
def test_a_mass_of_0_is_absence(repulsion):
    """Also where a landmark would have been; and nobody left is no NaN."""
    x, p, q = clouds()
    p, w = torch.cat([p[:, 3:6] + 0.1, p], dim=1), torch.cat([torch.zeros(2, 3, dtype=F64), torch.ones(2, 40, dtype=F64)], dim=1)
    joined, v = torch.cat([x, q], dim=1), torch.cat([torch.ones(2, 16, dtype=F64), torch.zeros(2, 24, dtype=F64)], dim=1)
    field = NystromField((0.5,), landmarks=10, repulsion=repulsion, **PLAIN)
    found = velocity(field, x, p, joined, positive_weights=w, negative_weights=v, own=16)
    assert_close(found, velocity(field, x, p[:, 3:], x), rtol=1e-9, atol=1e-12)
    few = velocity(field, x, p[:, :5], x, positive_weights=w[:, :5])  # 2 landmarks, though 10 are allowed
    assert_close(few, velocity(field, x, p[:, 3:5], x), rtol=1e-9, atol=1e-12)
    nobody = velocity(field, x, p, x, positive_weights=0 * w, negative_weights=torch.zeros(2, 16, dtype=F64))
    assert_close(nobody, torch.zeros_like(x))


def test_no_gradient_and_blocks_change_nothing(monkeypatch):
    x, p, q = (t.requires_grad_() for t in clouds(b=5))
    for repulsion in ("exact", "nystrom"):
        field = NystromField((0.3, 0.7), landmarks=10, repulsion=repulsion)
        whole = field(x, positives=p, negatives=torch.cat([x, q], dim=1), own=16)
        assert not whole.velocity.requires_grad
        for name in ("frame", "nystrom", "landmarks"):
            monkeypatch.setattr(f"drifting_diffusers.fields.{name}.BLOCK", 300)
        pieces = field(x, positives=p, negatives=torch.cat([x, q], dim=1), own=16)
        monkeypatch.undo()
        assert_close(pieces.velocity, whole.velocity, rtol=1e-9, atol=1e-12)


# --- what landmarks cannot say -----------------------------------------------------------------------------------------------------------


def test_a_query_without_mass_is_counted_and_pulled_by_the_landmarks():
    """Data right of two landmarks are an extrapolation of a smooth kernel, with a negative part at the left one: left of it there is less than no mass."""
    points = torch.tensor([[0.0], [0.5]] + [[1.5]] * 20, dtype=F64)[None]
    x = torch.tensor([[-4.0], [1.0]], dtype=F64)[None]
    field = NystromField((1.0,), kernel=Gaussian(), landmarks=2, **PLAIN)
    found = attraction(field, x, points)
    assert (field.report.clamped, field.report.queries, field.report.share) == (1, 2, 0.5)
    k = (-0.5 * torch.tensor([4.0, 4.5], dtype=F64).square()).exp()
    assert_close(found[0, 0, 0], (k * torch.tensor([0.0, 0.5], dtype=F64)).sum() / k.sum() + 4)
    attraction(NystromField((1.0,), kernel=Gaussian(), landmarks=2, report=field.report, **PLAIN), x, points)
    assert field.report.clamped == 2
    field.report.reset()
    assert (field.report.clamped, field.report.queries) == (0, 0)
    attraction(NystromField((1.0,), kernel=Gaussian(), landmarks=22, report=field.report, **PLAIN), x, points)
    assert (field.report.clamped, field.report.queries) == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_far_queries_hear_the_nearest_landmarks(dtype):
    """At 10^5 widths from the data the kernel itself is 0 in either precision."""
    x, p, _ = (t.to(dtype) for t in clouds(sizes=(16, 40, 1)))
    x = x + 5000
    field = NystromField((0.05,), landmarks=40, **PLAIN)
    pull = attraction(field, x, p)
    assert (torch.cosine_similarity(pull, p.mean(1, keepdim=True) - x, dim=-1) > 0.99).all()
    assert_close(pull.norm(dim=-1), (p.mean(1, keepdim=True) - x).norm(dim=-1), rtol=0.01, atol=0)
    assert field.report.clamped == 0


# --- the memory of a dataset -------------------------------------------------------------------------------------------------------------


def dataset(per_class=(40, 40, 5), locations: int = 2, d: int = 3) -> tuple[Tensor, Tensor]:
    """Classes 0, 1, 2 at different places, shuffled; the last has few samples."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(per_class)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    values = torch.randn(len(labels), locations, d, generator=generator, dtype=F64)
    return values + labels[:, None, None] + 10, labels


def filled(field: NystromField, values: Tensor, labels: Tensor | None, size: int = 1000) -> NystromField:
    parts = [None] * len(values) if labels is None else labels.split(size)
    for some, which in zip(values.split(size), parts, strict=False):
        field.memory.observe("map", some, which)
    return field


def test_a_field_of_the_dataset_has_a_memory_and_one_of_the_step_has_none():
    field = NystromField(sums="dataset")
    assert list(memories(field)) == [field.memory]
    assert isinstance(field.memory, Observer)
    assert not list(memories(NystromField()))
    x, p, q = clouds()
    assert situated(field, Situation(feature="map")).place is None
    assert_close(velocity(situated(field, Situation()), x, p, q), velocity(NystromField(), x, p, q), rtol=0, atol=0)


@pytest.mark.parametrize("repulsion", ["exact", "nystrom"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_t17_the_sums_of_the_dataset_are_those_of_a_step_that_has_it_all(repulsion, size):
    """In plain distances. Problems are (label, location), labels first and repeated at will."""
    values, labels = dataset()
    options = {"landmarks": 10, "repulsion": repulsion, **PLAIN}
    field = filled(NystromField((0.5, 1.0), sums="dataset", **options), values, labels, size)
    wanted = torch.tensor([2, 0, 2])
    x = torch.randn(3 * 2, 8, 3, generator=torch.Generator().manual_seed(4), dtype=F64) + 11
    here = situated(field, Situation(feature="map", labels=wanted))
    found = here(x, positives=torch.full_like(x, 1e3), negatives=x)  # the step's positives are not looked at
    for i in range(6):
        positives = values[labels == wanted[i // 2], i % 2][None]
        alone = NystromField((0.5, 1.0), **options)(x[i : i + 1], positives=positives, negatives=x[i : i + 1].clone(), own=8)
        assert_close_in_norm(found.velocity[i], alone.velocity[0], 1e-6)
    assert field.report.queries == here.report.queries > 0


def test_t17_widths_are_mean_distances_of_two_landmarks_of_the_class():
    values, labels = dataset()
    field = filled(NystromField((0.5,), sums="dataset", landmarks=10, normalise_force=False), values, labels)
    x = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(4), dtype=F64) + 11
    found = situated(field, Situation(feature="map", labels=torch.arange(3)))(x, positives=x, negatives=x)
    for label in range(3):
        chosen = values[labels == label][:10]
        pairs = [torch.pdist(chosen[:, location]) for location in range(2)]
        length = torch.cat(pairs).mean()
        assert_close(found.distance[2 * label : 2 * label + 2], length.expand(2))
        assert_close(found.unit[2 * label], length / 3**0.5)
        one = slice(2 * label, 2 * label + 1)
        plain = NystromField((float(0.5 * length),), landmarks=10, **PLAIN)
        expected = velocity(plain, x[one], values[labels == label, 0][None], x[one].clone(), own=8)
        assert_close_in_norm(found.velocity[one], expected, 1e-6)


def test_t4_the_dataset_moves_with_the_samples():
    values, labels = dataset()
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(4), dtype=F64) + 11

    def drift(move) -> Tensor:
        field = filled(NystromField((0.5,), sums="dataset", landmarks=10), move(values), labels)
        return situated(field, Situation(feature="map", labels=torch.tensor([1])))(
            move(x), positives=move(x), negatives=move(x), own=8
        ).velocity

    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=F64))[0]
    assert_close_in_norm(drift(lambda t: t @ turn + 7), drift(lambda t: t) @ turn, 1e-8)


def test_t17_shards_add_up():
    """Of samples through the same landmarks, and of classes."""
    values, labels = dataset(per_class=(40, 40, 15))
    make = lambda: NystromField((0.5,), sums="dataset", landmarks=10)
    whole = filled(make(), values, labels)
    first = filled(make(), values[:70], labels[:70]).memory
    second = first.shard()
    second.observe("map", values[70:], labels[70:])
    by_class = [filled(make(), values[labels == c], labels[labels == c]).memory for c in range(3)]
    x = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(4), dtype=F64) + 11
    situation = Situation(feature="map", labels=torch.arange(3))
    expected = situated(whole, situation)(x, positives=x, negatives=x).velocity
    for memory in (first.merged(second), second + first, by_class[2] + by_class[0] + by_class[1]):
        found = situated(NystromField((0.5,), sums="dataset", landmarks=10, memory=memory), situation)(x, positives=x, negatives=x)
        assert_close_in_norm(found.velocity, expected, 1e-9)
    part = situated(NystromField((0.5,), sums="dataset", landmarks=10, memory=first), situation)(x, positives=x, negatives=x)
    assert (part.velocity - expected).norm() > 1e-3 * expected.norm()
    with pytest.raises(ValueError, match=r"class 0 of feature 'map' has other landmarks in the other shard; make shards with `shard\(\)`"):
        first.merged(filled(make(), values.flip(0), labels.flip(0)).memory)
    with pytest.raises(ValueError, match=r"these sums were made with \{'ridge': 0.1\}, and \{'ridge': 0.0001\} is asked for"):
        first.merged(AttractionSums(10, (0.5,), Laplace(), 0.1))


@pytest.mark.parametrize("when", ["waiting", "chosen", "used"])
def test_a_memory_comes_back_exactly_and_goes_on(when):
    values, labels = dataset()
    split = {"waiting": 12, "chosen": 70, "used": len(values)}[when]
    make = lambda: NystromField((0.5,), sums="dataset", landmarks=10)
    situation = Situation(feature="map", labels=torch.arange(3))
    x = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(4), dtype=F64) + 11
    drift = lambda field: situated(field, situation)(x, positives=x, negatives=x).velocity
    field, again = filled(make(), values[:split], labels[:split]), make()
    if when == "used":
        drift(field)
    file = io.BytesIO()
    torch.save(field.memory.state_dict(), file)
    file.seek(0)
    again.memory.load_state_dict(torch.load(file, weights_only=True))
    for one in (field, again):
        filled(one, values[split:], labels[split:])
    assert_close(drift(again), drift(field), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"these sums were made with \{'landmarks': 10\}, and \{'landmarks': 11\} is asked for"):
        NystromField((0.5,), sums="dataset", landmarks=11).memory.load_state_dict(field.memory.state_dict())


def test_without_classes_there_is_one():
    values, _ = dataset()
    field = filled(NystromField((0.5,), sums="dataset", landmarks=10, **PLAIN), values, None)
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(4), dtype=F64) + 11
    found = velocity(situated(field, Situation(feature="map")), x, x, x)
    expected = velocity(NystromField((0.5,), landmarks=10, **PLAIN), x, values.transpose(0, 1), x)
    assert_close_in_norm(found, expected, 1e-6)


def test_what_a_memory_cannot_answer_is_said():
    values, labels = dataset()
    field = filled(NystromField((0.5,), sums="dataset", landmarks=10), values, labels)
    with pytest.raises(ValueError, match=r"no real sample of classes \[7\] was observed for feature 'map'; there are \[0, 1, 2\]"):
        situated(field, Situation(feature="map", labels=torch.tensor([0, 7])))
    x = torch.zeros(5, 4, 3, dtype=F64)
    with pytest.raises(ValueError, match="5 problems cannot be 1 labels at the 2 locations that were observed"):
        situated(field, Situation(feature="map", labels=torch.tensor([0])))(x, positives=x, negatives=x)
    with pytest.raises(ValueError, match=r"feature 'map' of the real samples holds NaN or infinite values"):
        field.memory.observe("map", values * torch.inf, labels)
    lonely = filled(NystromField((0.5,), sums="dataset"), values[:1], labels[:1])
    with pytest.raises(ValueError, match=r"class \d of feature 'map' has 1 landmarks that do not differ"):
        situated(lonely, Situation(feature="map", labels=labels[:1]))


def test_what_is_not_finite_is_noticed_though_the_length_is_known():
    values, labels = dataset()
    field = situated(
        filled(NystromField((0.5,), sums="dataset", landmarks=10), values, labels), Situation(feature="map", labels=torch.tensor([0]))
    )
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(4), dtype=F64) + 11
    loss, _ = drift_loss(x, x, field=field)
    assert torch.isfinite(loss).all()
    x[1, 2, 0] = torch.nan
    with pytest.raises(NonFinite, match="generated holds 1 NaN"):
        drift_loss(x, torch.zeros_like(x), field=field)


def poisoned(values: Tensor, bad: float) -> Tensor:
    """The last of the entries of the first problem."""
    values = values.clone()
    values[0].view(-1)[-1] = bad
    return values


NAMES = ("generated", "positives", "negatives", "generated_weights", "positive_weights", "negative_weights")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"repulsion": "nystrom"}, {"grouping": "problem"}, {"landmarks": 3}], ids=str)
def test_what_is_not_finite_is_said_and_stops_no_factorisation(options, name, bad):
    """Whether a landmark is bad or another sample."""
    x, p, q = clouds(sizes=(6, 8, 5))
    given = dict(zip(NAMES, (x, p, q, *(torch.ones(t.shape[:2], dtype=F64) for t in (x, p, q))), strict=True))
    drift_loss(**given, field=NystromField(**options))
    for flip in (False, True):
        one = poisoned(given[name], bad)
        with pytest.raises(NonFinite, match=f"{name} holds 1 NaN or infinite values"):
            drift_loss(**(given | {name: one.flip(1) if flip else one}), field=NystromField(**options))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("repulsion", ["exact", "nystrom"])
def test_what_is_not_finite_is_said_by_a_field_of_the_dataset_too(repulsion, bad):
    """All but positives, which it does not look at."""
    values, labels = dataset()
    field = filled(NystromField((0.5,), sums="dataset", landmarks=10, repulsion=repulsion), values, labels)
    field = situated(field, Situation(feature="map", labels=torch.tensor([0])))
    x, p, q = clouds(sizes=(6, 8, 5))
    given = dict(zip(NAMES, (x, p, q, *(torch.ones(t.shape[:2], dtype=F64) for t in (x, p, q))), strict=True))
    for name in ("generated", "negatives", "generated_weights", "negative_weights"):
        with pytest.raises(NonFinite, match=f"{name} holds 1 NaN or infinite values"):
            drift_loss(**(given | {name: poisoned(given[name], bad)}), field=field)
    expected = drift_loss(**given, field=field)[0]
    assert_close(drift_loss(**(given | {"positives": poisoned(p, bad)}), field=field)[0], expected, rtol=0, atol=0)


def test_a_problem_without_mass_is_not_a_number_and_the_other_is_as_it_was():
    x, p, q = clouds()
    field, w = NystromField((0.5,), landmarks=10, grouping="problem"), torch.ones(2, 40, dtype=F64)
    v = torch.ones(2, 24, dtype=F64)
    expected = field(x, positives=p, negatives=q, positive_weights=w, negative_weights=v)
    w[0], v[0] = 0, 0
    found = field(x, positives=p, negatives=q, positive_weights=w, negative_weights=v)
    assert found.distance.isnan().tolist() == [True, False]
    assert_close(found.velocity[1], expected.velocity[1])


def test_the_inverse_of_what_is_not_finite_is_nan():
    w = torch.eye(3, dtype=F64).repeat(3, 1, 1)
    w[0, 1, 2], w[2, 0, 0] = torch.nan, torch.inf
    found = inverse(w, 1e-4)
    assert found.isnan().flatten(1).all(1).tolist() == [True, False, True]
    assert_close(found[1], torch.eye(3, dtype=F64) / (1 + 1e-4))


class Copies(TorchDispatchMode):
    """Counts the tensors that go from the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = [value for value in args if isinstance(value, Tensor)]
        away = isinstance(found, Tensor) and found.device.type != "cpu"
        self.count += away and any(value.device.type == "cpu" for value in given)
        return found


def resumed(repulsion: str) -> NystromField:
    """The sums of two classes at two locations, all of them on the CPU as after a resume."""
    values, labels = dataset(per_class=(20, 20))
    field, again = (NystromField((0.5, 1.0), sums="dataset", landmarks=10, repulsion=repulsion) for _ in range(2))
    again.memory.load_state_dict(filled(field, values, labels).memory.state_dict())
    return again


@pytest.mark.parametrize("repulsion", ["exact", "nystrom"])
def test_sums_move_to_the_device_of_the_first_query_once(repulsion):
    """After that two of everything a step: nothing but the indices of the classes goes there, however many temperatures and blocks."""
    field, x = resumed(repulsion), torch.empty(4, 6, 3, device="meta")
    situation, copies = Situation(feature="map", labels=torch.arange(2)), []
    for _ in range(3):
        place = situated(field, situation).place
        with Copies() as seen:
            assert {place.centre(x).device.type, place.length(x).device.type} == {"meta"}
            for t in (0, 1):
                for part in (slice(0, 2), slice(2, 4)):
                    assert {values.device.type for values in place.projection(t, x, part)} == {"meta"}
        copies.append(seen.count)
    assert copies == [2 * len(Projection._fields) + 3, 1, 1]


def test_a_field_of_the_dataset_runs_where_the_queries_are():
    """With no tensor of another device, be it the first that looks or not."""
    x, on_cpu = torch.empty(4, 6, 3, device="meta"), torch.zeros(4, 6, 3)
    for first in (x, on_cpu):
        place = situated(resumed("nystrom"), Situation(feature="map", labels=torch.arange(2))).place
        place.projection(0, first, slice(0, 4))
        assert {values.device.type for values in place.projection(1, x, slice(0, 4))} == {"meta"}
        assert place.centre(x).device.type == place.length(x).device.type == "meta"
    field = situated(resumed("nystrom"), Situation(feature="map", labels=torch.arange(2)))
    assert field.force(Problems(x, x, x, None, None, 6), 1.0).device.type == "meta"


def test_what_a_checkpoint_brought_back_meets_what_is_observed_elsewhere(monkeypatch):
    """It is on the CPU, be it samples that wait or sums of classes of which nothing more came."""
    some = torch.zeros(3, 2, 3, dtype=F64)
    one = _Class()
    one.pending = [some, some.to("meta")]
    assert (one.waiting.device.type, one.waiting.shape) == ("meta", (6, 2, 3))
    memory = resumed("nystrom").memory
    memory._classes["map"][0].to(torch.device("meta"))
    monkeypatch.setattr(_Class, "to", lambda self, device: None)  # nothing comes back from there
    ready = memory._finish("map")
    assert {values.device.type for projection in ready.projections for values in projection} == {"meta"}
    assert ready.centre.device.type == ready.length.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t25_the_dataset_in_float32_far_from_the_origin(dtype):
    """Samples about 100, spread 1: problems are centred about the landmarks."""
    values, labels = dataset(locations=1)
    values = (values + 90).to(dtype)
    x = (torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(4)) + 101).to(dtype)
    drifts = []
    for kind in (dtype, F64):
        field = filled(NystromField((0.5,), sums="dataset", landmarks=10), values.to(kind), labels)
        here = situated(field, Situation(feature="map", labels=torch.tensor([1])))
        drifts.append(here(x.to(kind), positives=x.to(kind), negatives=x.to(kind), own=8).velocity.double())
    assert_close_in_norm(drifts[0], drifts[1], 1e-4)


# --- choices -----------------------------------------------------------------------------------------------------------------------------


def test_the_text_form_has_the_choices_and_not_the_memory():
    field = NystromField(landmarks=150, kernel=Gaussian(), repulsion="nystrom", sums="dataset")
    assert spell(field) == "nystrom(landmarks=150, kernel=gaussian, repulsion='nystrom', sums='dataset')"
    assert read_field(spell(field)) == field
    assert read_field(spell(field)).memory is not field.memory
    assert spell(NystromField()) == "nystrom"


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"landmarks": 0}, "landmarks must be a whole number of at least 1, got 0"),
        ({"landmarks": 2.5}, "landmarks must be a whole number of at least 1, got 2.5"),
        ({"ridge": 0.0}, "ridge must be finite and above 0, got 0.0"),
        ({"least_mass": 1.0}, r"least_mass must lie in \[0, 1\), got 1.0"),
        ({"repulsion": "none"}, "repulsion must be one of"),
        ({"sums": "class"}, "sums must be one of"),
        ({"memory": AttractionSums(500, (0.05,), Laplace(), 1e-4)}, "sums='step' and a memory"),
        ({"memory": AttractionSums(500, (0.2,), Laplace(), 1e-4), "sums": "dataset"}, "the memory was made for"),
        ({"temperatures": (exponential(1.0, 0.1),), "sums": "dataset"}, "sums over a dataset are made for fixed temperatures"),
    ],
)
def test_choices_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        NystromField(**changes)
