"""The laws of two wrappers, guidance of velocities and symmetrisation over a group, in float64; toys stand for generators."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from drifting_diffusers.fields import (
    Combined,
    DriftingField,
    FrechetField,
    Friction,
    MeanShiftField,
    NystromField,
    frame,
    read_field,
    spell,
    symmetrised,
)
from drifting_diffusers.fields.frame import Problems
from drifting_diffusers.fields.sinkhorn import SinkhornField
from drifting_diffusers.fields.symmetrised import Symmetrised
from drifting_diffusers.fields.velocity_guidance import VelocityGuidance, guidance_strength
from drifting_diffusers.guidance import unconditional_weight
from drifting_diffusers.kernels import Gaussian

F64 = torch.float64
PLAIN = {"normalise_distance": False, "normalise_force": False}
INNER = {
    "sinkhorn": SinkhornField((0.05, 0.3)),
    "masked": SinkhornField((0.05, 0.3), own_term="masked"),
    "mean_shift": MeanShiftField((0.2, 0.5)),
    "drifting": DriftingField((0.05, 0.3)),
    "before": DriftingField((0.05, 0.3), weights="before", affinity_floor=0.0),
}
FIELD = pytest.mark.parametrize("field", INNER.values(), ids=INNER.keys())


def clouds(seed: int, d: int = 3, sizes=(16, 20, 24), b: int = 2) -> list[Tensor]:
    """Queries, positives shifted by 1, unconditional negatives shifted by -1."""
    generator = torch.Generator().manual_seed(seed)
    x, positives, negatives = (torch.randn(b, n, d, generator=generator, dtype=F64) for n in sizes)
    return [x, positives + 1, negatives - 1]


def guided(field, x: Tensor, p: Tensor, q: Tensor, alpha: Tensor):
    """The drift at guidance scales alpha [b], with the masses that a trainer gives."""
    weight = unconditional_weight(alpha, x.shape[1], q.shape[1])
    weights = torch.cat([torch.ones_like(x[..., 0]), weight[:, None].expand(-1, q.shape[1])], dim=1)
    return field(x, positives=p, negatives=torch.cat([x, q], dim=1), negative_weights=weights, own=x.shape[1])


def velocity(field, x: Tensor, positives: Tensor, negatives: Tensor, **more) -> Tensor:
    return field(x, positives=positives, negatives=negatives, **more).velocity


def assert_close_in_norm(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert (actual - expected).norm() <= bound * expected.norm().clamp(min=1e-300)


# --- guidance of velocities --------------------------------------------------------------------------------------------------------------


@FIELD
def test_t21_at_scale_1_it_is_the_field_without_unconditional_negatives(field):
    x, p, q = clouds(0)
    at_one = guided(VelocityGuidance(field), x, p, q, torch.ones(2, dtype=F64))
    absent = field(x, positives=p, negatives=x)
    assert_close(at_one.velocity, absent.velocity, rtol=1e-9, atol=1e-11)
    assert_close(at_one.strength, absent.strength, rtol=1e-9, atol=0)
    mixed = guided(VelocityGuidance(field), x, p, q, torch.tensor([1.0, 2.5], dtype=F64)).velocity
    assert torch.isfinite(mixed).all()


@pytest.mark.parametrize("grouping", ["batch", "problem"])
def test_t21_at_scale_1_moments_of_no_mass_do_not_count(grouping):
    """The Frechet field among negatives of mass 0 is no number; the second term is none at all."""
    x, p, q = clouds(0)
    field = FrechetField(grouping=grouping)
    at_one = guided(VelocityGuidance(field), x, p, q, torch.ones(2, dtype=F64))
    assert_close(at_one.velocity, velocity(field, x, p, x), rtol=1e-9, atol=1e-11)
    mixed = guided(VelocityGuidance(field), x, p, q, torch.tensor([1.0, 2.5], dtype=F64)).velocity
    assert torch.isfinite(mixed).all()
    if grouping == "problem":
        assert_close(mixed[0], velocity(field, x, p, x)[0], rtol=1e-9, atol=1e-11)
    spoiled = torch.ones(2, 40, dtype=F64).index_fill(1, torch.tensor([30]), torch.nan)
    given = VelocityGuidance(field)(x, positives=p, negatives=torch.cat([x, q], dim=1), negative_weights=spoiled, own=16)
    assert not torch.isfinite(given.velocity).any()  # what is no number is not taken for 0


@FIELD
def test_without_own_or_further_negatives_it_is_the_field_inside(field):
    x, p, q = clouds(0)
    for negatives, own in ((x, 16), (q, 0)):
        assert_close(
            velocity(VelocityGuidance(field), x, p, negatives, own=own), velocity(field, x, p, negatives, own=own), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    "inner", [SinkhornField((0.3,), own_term="masked", **PLAIN), MeanShiftField((0.5,), **PLAIN), DriftingField((0.5,), **PLAIN)]
)
def test_the_guided_velocity_is_a_sum_of_two_fields(inner):
    """V = F(x; p_c, q) + (alpha - 1) F(x; p_c, p_0), for a scale of every problem; the masses say the scale alone."""
    x, p, q = clouds(0)
    alpha = torch.tensor([1.5, 3.0], dtype=F64)
    expected = velocity(inner, x, p, x) + (alpha - 1)[:, None, None] * velocity(inner, x, p, q)
    assert_close_in_norm(guided(VelocityGuidance(inner), x, p, q, alpha).velocity, expected, 1e-12)


def test_relative_masses_of_unconditional_negatives_are_kept():
    x, p, q = clouds(0)
    inner = MeanShiftField((0.5,), **PLAIN)
    relative = torch.rand(2, 24, generator=torch.Generator().manual_seed(1), dtype=F64)
    weights = torch.cat([torch.ones(2, 16, dtype=F64), relative * (1.5 * 15) / relative.sum(1, keepdim=True)], dim=1)
    expected = velocity(inner, x, p, x) + 1.5 * velocity(inner, x, p, q, negative_weights=relative)
    given = velocity(VelocityGuidance(inner), x, p, torch.cat([x, q], dim=1), negative_weights=weights, own=16)
    assert_close_in_norm(given, expected, 1e-12)


def test_the_strength_of_guidance_is_alpha_less_1():
    x, p, q = clouds(0)
    alpha = torch.tensor([1.0, 2.5], dtype=F64)
    weights = torch.cat([torch.ones(2, 16, dtype=F64), unconditional_weight(alpha, 16, 24)[:, None].expand(-1, 24)], dim=1)
    whole = Problems(x, p, torch.cat([x, q], dim=1), None, weights, own=16)
    assert_close(guidance_strength(whole), alpha - 1)
    weights = torch.cat([torch.zeros(2, 16, dtype=F64), torch.ones(2, 24, dtype=F64)], dim=1)
    nobody = Problems(x, p, torch.cat([x, q], dim=1), None, weights, own=16)
    assert_close(guidance_strength(nobody), torch.zeros(2, dtype=F64))


@FIELD
def test_blocks_of_rows_change_nothing(field, monkeypatch):
    x, p, q = clouds(0)
    alpha = torch.tensor([1.5, 3.0], dtype=F64)
    for wrapped in (VelocityGuidance(field), Symmetrised(VelocityGuidance(field))):
        monkeypatch.setattr(frame, "BLOCK", 2**24)
        whole = guided(wrapped, x, p, q, alpha).velocity
        monkeypatch.setattr(frame, "BLOCK", 100)
        assert_close_in_norm(guided(wrapped, x, p, q, alpha).velocity, whole, 1e-12)
    assert VelocityGuidance(field).by_rows == field.by_rows


def test_the_sum_is_normalised_not_its_terms():
    x, p, q = clouds(0)
    for field in INNER.values():
        drift = guided(VelocityGuidance(field), x, p, q, torch.tensor([4.0, 4.0], dtype=F64))
        assert len(drift.strength) == 2
    one = guided(VelocityGuidance(SinkhornField()), x, p, q, torch.tensor([4.0, 4.0], dtype=F64))
    assert_close((one.velocity / one.unit).square().mean(), torch.tensor(1.0, dtype=F64))


@pytest.mark.parametrize("own_term", ["independent", "masked"])
def test_t21_a_toy_of_two_gaussians_rests_at_the_guided_mean(own_term):
    """A generator m + s z regressed onto x + V: m goes to alpha m_c - (alpha - 1) m_0, s to the spread of the data. Problems have alpha 1 and 2."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(2, 64, 2, generator=generator, dtype=F64)
    conditional, unconditional, alpha = torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 2.0]], dtype=F64)
    field = VelocityGuidance(SinkhornField((0.1,), own_term=own_term, iterations=4, **PLAIN))
    m, s, means, spreads = torch.full((2, 1, 2), -1.0, dtype=F64), torch.ones(2, 1, 1, dtype=F64), [], []
    for i in range(100):
        z = noise()
        v = guided(field, m + s * z, conditional + 0.5 * noise(), unconditional + 0.5 * noise(), alpha).velocity
        m, s = m + 0.15 * v.mean(1, keepdim=True), s + 0.15 * (v * z).mean((1, 2), keepdim=True)
        if i >= 40:
            means.append(m[:, 0])
            spreads.append(s[:, 0, 0])
    expected = torch.stack([conditional, 2 * conditional - unconditional])
    assert_close(torch.stack(means).mean(0), expected, rtol=0, atol=0.06)
    assert (torch.stack(spreads).mean(0) / 0.5 - 1).abs().max() < 0.12


def test_guidance_in_words(as_users_see_it):
    for field in (VelocityGuidance(SinkhornField(own_term="masked")), Symmetrised(DriftingField(), "rotations-4")):
        assert read_field(spell(field)) == field
    with pytest.raises(TypeError, match="needs a field with a force"):
        VelocityGuidance(Symmetrised(DriftingField()))  # the other way round it is a field


# --- symmetrisation ----------------------------------------------------------------------------------------------------------------------

PERMUTATIONS = tuple(tuple(tuple(float(j == s) for j in range(3)) for s in order) for order in itertools.permutations(range(3)))
GROUPS = {"sign": "sign", "rotations": "rotations-3", "dihedral": "dihedral-4", "matrices": PERMUTATIONS}
GROUP = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())


def turned(g: Tensor, x: Tensor) -> Tensor:
    """G on consecutive coordinates of x [..., d]: as one block-diagonal matrix."""
    return x @ torch.block_diag(*[g] * (x.shape[-1] // len(g))).T


@FIELD
@GROUP
def test_the_result_is_equivariant_whatever_the_data_are(field, group):
    """V(h x; p, q) = h V(x; p, q), exactly; the field inside is not so."""
    x, p, q = clouds(0, d=6)
    whole = Symmetrised(field, group)
    expected, plain = velocity(whole, x, p, q), velocity(field, x, p, q)
    for h in whole.matrices():
        assert_close_in_norm(velocity(whole, turned(h, x), p, q), turned(h, expected), 1e-9)
    assert (velocity(field, turned(h, x), p, q) - turned(h, plain)).norm() > 0.1 * plain.norm()


@FIELD
@GROUP
def test_of_symmetric_data_it_is_the_field_itself(field, group):
    """All images of every sample on both sides: F(g x; p, q) = g F(x; p, q) already."""
    x, p, q = clouds(0, d=6, sizes=(16, 5, 4))
    whole = Symmetrised(field, group)
    orbit = lambda t: torch.cat([turned(g, t) for g in whole.matrices()], dim=1)
    assert_close_in_norm(velocity(whole, x, orbit(p), orbit(q)), velocity(field, x, orbit(p), orbit(q)), 1e-9)
    there = velocity(whole, x, p, q)
    assert (there - velocity(field, x, p, q)).norm() > 0.1 * there.norm()


@FIELD
def test_the_trivial_group_is_the_field_itself(field):
    x, p, q = clouds(0, d=6)
    for group in ("rotations-1", (((1.0,),),)):
        ours = Symmetrised(field, group)(x, positives=p, negatives=torch.cat([x, q], dim=1), own=16)
        plain = field(x, positives=p, negatives=torch.cat([x, q], dim=1), own=16)
        assert_close(ours.velocity, plain.velocity, rtol=1e-12, atol=1e-14)
        for one, other in ((ours.unit, plain.unit), (ours.distance, plain.distance), (ours.strength, plain.strength)):
            assert_close(one, other)


@FIELD
@GROUP
def test_t1_t2_antisymmetry_and_equilibrium_are_kept(field, group):
    x, p, q = clouds(0, d=6)
    whole = Symmetrised(field, group)
    assert_close_in_norm(velocity(whole, x, p, q), -velocity(whole, x, q, p), 1e-11)
    assert velocity(whole, x, p, p.clone()).abs().max() < 1e-9


def test_it_is_the_mean_over_the_group():
    x, p, q = clouds(0, d=2)
    inner = MeanShiftField((0.5,), kernel=Gaussian(), **PLAIN)
    whole = Symmetrised(inner, "rotations-4")
    expected = torch.stack([turned(g.T, velocity(inner, turned(g, x), p, q)) for g in whole.matrices()]).mean(0)
    assert_close(velocity(whole, x, p, q), expected)
    images = [velocity(inner, x, turned(g.T, p), turned(g.T, q)) for g in whole.matrices()]
    assert_close(velocity(whole, x, p, q), torch.stack(images).mean(0))  # the same as turning the data


def test_a_sample_is_no_negative_of_itself_in_any_image():
    """A single query, even on a mirror, feels its attraction alone; two feel each other's images, not their own."""
    x, p, _ = clouds(0, d=2, sizes=(2, 20, 0))
    x[:, 0, 1] = 0  # where the mirror of the dihedral group leaves it
    inner = MeanShiftField((0.5,), kernel=Gaussian(), **PLAIN)
    whole = Symmetrised(inner, "dihedral-1")
    alone, nobody = velocity(whole, x[:, :1], p, x[:, :1], own=1), velocity(whole, x[:, :1], p, x[:, :0])
    assert_close(alone, nobody, rtol=1e-12, atol=1e-12)
    images = torch.stack([turned(g, x[:, 1]) for g in whole.matrices()], dim=1)
    repelled = torch.stack([velocity(inner, x[:, :1], p, images[:, i : i + 1]) for i in range(2)]).mean(0)
    attracted = lambda y: velocity(inner, x[:, :1], turned(y, p), x[:, :0])
    away = torch.stack([attracted(g.T) for g in whole.matrices()]).mean(0)
    assert_close(velocity(whole, x, p, x)[:, :1], away + (repelled - attracted(torch.eye(2, dtype=F64))))


@GROUP
def test_own_negatives_move_with_their_queries(group):
    """V(h x; p, h x) = h V(x; p, x) for the sum of a part in p and a part in q; Algorithm 2 couples them, and for it this does not hold."""
    x, p, _ = clouds(0, d=6)
    moved = lambda whole, h: velocity(whole, turned(h, x), p, turned(h, x), own=16) - turned(h, velocity(whole, x, p, x))
    shift, coupled = Symmetrised(MeanShiftField((1.0,), **PLAIN), group), Symmetrised(DriftingField((1.0,), **PLAIN), group)
    assert max(float(moved(shift, h).abs().max()) for h in shift.matrices()) < 1e-12
    assert max(float(moved(coupled, h).norm()) for h in coupled.matrices()) > 1e-3 * velocity(coupled, x, p, x).norm()


def test_lopsided_data_pull_between_their_images():
    """Data around 2 and the group of signs: every image pulls alike, however far it is, so the mean shift leads to 0 and not to both sides."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda n: torch.randn(1, n, 2, generator=generator, dtype=F64)
    p, x = 0.3 * normal(100) + torch.tensor([2.0, 0.0], dtype=F64), normal(128)
    inner, ends = MeanShiftField((0.7,), kernel=Gaussian(), **PLAIN), {}
    mirrored = torch.cat([p, -p], dim=1)
    for name, field, data in (("inner", inner, p), ("images of the field", Symmetrised(inner), p), ("images of data", inner, mirrored)):
        y = x
        for _ in range(60):
            y = y + 0.3 * velocity(field, y, data, y)
        ends[name] = float((y[..., 0] > 0.8).double().mean()), float((y[..., 0] < -0.8).double().mean())
    assert ends["inner"][0] > 0.95
    assert max(ends["images of the field"]) < 0.1
    assert min(ends["images of data"]) > 0.3


def test_units_of_every_problem_and_unbatched_calls():
    x, p, q = clouds(0, d=2)
    field = Symmetrised(DriftingField((0.05, 0.3), grouping="problem"), "rotations-4")
    together = field(x, positives=p, negatives=q)
    assert (together.unit.shape, together.distance.shape, together.strength.shape) == ((2,), (2,), (2, 2))
    for b in range(2):
        alone = field(x[b], positives=p[b], negatives=q[b])
        assert_close(alone.velocity, together.velocity[b])
        assert_close(alone.strength[:, 0], together.strength[:, b])
    weights = torch.rand(2, 24, generator=torch.Generator().manual_seed(1), dtype=F64)
    of_none = velocity(field, x, p, torch.cat([q, q + 5], dim=1), negative_weights=torch.cat([weights, 0 * weights], dim=1))
    assert torch.isfinite(of_none).all()
    assert_close(velocity(field, x.float(), p.float(), q.float()).double(), together.velocity, rtol=1e-3, atol=1e-4)


def test_each_of_unit_distance_and_strength_is_a_mean_over_images_where_it_is_of_a_problem():
    """A sum of a field that groups by step and one that groups by problem: its unit is of the step and its strengths are of problems."""
    x, p, q = clouds(0, d=2)
    parts = MeanShiftField((0.2,)), MeanShiftField((0.3,), grouping="problem")
    for order in (parts, parts[::-1]):
        drift = Symmetrised(Combined(order), "rotations-4")(x, positives=p, negatives=q)
        alone = [Symmetrised(part, "rotations-4")(x, positives=p, negatives=q) for part in order]
        assert drift.strength.shape == (2, 2)
        assert (drift.unit.shape, drift.distance.shape) == (alone[0].unit.shape, alone[0].distance.shape)
        assert_close(drift.strength, torch.stack([one.strength[0].expand(2) for one in alone]))
        assert_close(drift.velocity, alone[0].velocity + alone[1].velocity)


def test_sums_over_a_dataset_are_of_samples_and_not_of_their_images(as_users_see_it):
    for inner in (NystromField(sums="dataset"), Combined((DriftingField(), Friction(NystromField(sums="dataset"), 0.1)))):
        with pytest.raises(ValueError, match=r"sums over a dataset are of the samples as they are, .* take sums='step' inside"):
            Symmetrised(inner)
    x, p, q = clouds(0)
    assert torch.isfinite(velocity(Symmetrised(NystromField((0.5,))), x, p, q)).all()
    Symmetrised(FrechetField(moments="average"))  # of what the field is called with


def test_16_bits_outside_do_not_reach_the_images():
    x, p, q = (t.float() for t in clouds(0, d=6))
    field = Symmetrised(DriftingField(), "rotations-3")
    expected = velocity(field, x, p, q)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(velocity(field, x, p, q), expected, rtol=0, atol=0)


def test_named_groups_are_what_they_say():
    matrices = lambda group: Symmetrised(DriftingField(), group).matrices()
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    assert_close(matrices("rotations-4"), torch.stack([torch.linalg.matrix_power(quarter, i) for i in range(4)]), rtol=0, atol=1e-15)
    assert_close(torch.linalg.det(matrices("dihedral-3")), torch.tensor([1.0, 1, 1, -1, -1, -1], dtype=F64))
    assert_close(matrices(PERMUTATIONS).sum(0), torch.full((3, 3), 2.0, dtype=F64))
    assert math.prod(matrices("sign").shape) == 2


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("spin", "group must be 'sign'"),
        ("rotations-0", "group must be 'sign'"),
        ("rotations", "group must be 'sign'"),
        ("rotations-1025", "k from 1 to 1024"),
        ("rotations-" + 50 * "9", "k from 1 to 1024"),
        ("rotations-\u0663", "group must be 'sign'"),  # a digit, of another script
        (3, "group must be the name of one or a tuple of square matrices, got 3"),
        ((((2.0,),),), "orthogonal"),
        ((((1.0,),), ((1.0,),)), "every matrix once"),
        ((((-1.0,),),), "are no group"),
        ((1.0, 2.0), "tuple of square matrices"),
        ((((1.0,),), ((1.0, 0.0), (0.0, 1.0))), "tuple of square matrices"),
    ],
)
def test_what_is_no_group(group, message, as_users_see_it):
    with pytest.raises(ValueError, match=message):
        Symmetrised(DriftingField(), group)


def test_large_groups_take_no_more_than_their_matrices(as_users_see_it):
    """A named group is one; of a given one every product is looked at, a row of them at a time."""
    assert len(Symmetrised(DriftingField(), "rotations-1000").matrices()) == 1000
    turns = Symmetrised(DriftingField(), "rotations-200").matrices()
    assert len(Symmetrised(DriftingField(), turns.tolist()).matrices()) == 200
    with pytest.raises(ValueError, match="199 matrices are no group"):
        Symmetrised(DriftingField(), turns[:-1].tolist())


def test_a_group_is_made_once_where_it_is_used():
    whole = Symmetrised(DriftingField(), "rotations-7")
    assert whole.matrices() is Symmetrised(MeanShiftField(), "rotations-7").matrices()
    there = symmetrised._on("rotations-7", torch.float32, torch.device("meta"))
    assert there is symmetrised._on("rotations-7", torch.float32, torch.device("meta"))
    assert (there.dtype, there.device.type, there.shape) == (torch.float32, "meta", (7, 2, 2))


def test_a_group_of_lists_or_arrays_is_that_of_tuples(as_users_see_it):
    signs = torch.tensor([[[1.0]], [[-1.0]]])
    expected = Symmetrised(DriftingField(), (((1.0,),), ((-1.0,),)))
    for given in (signs.tolist(), signs, signs.numpy(), tuple(signs.numpy())):
        assert Symmetrised(DriftingField(), given) == expected == read_field(spell(Symmetrised(DriftingField(), given)))


def test_planes_need_pairs_of_coordinates(as_users_see_it):
    x, p, q = clouds(0)
    with pytest.raises(ValueError, match="size divides 3"):
        velocity(Symmetrised(DriftingField(), "rotations-4"), x, p, q)
