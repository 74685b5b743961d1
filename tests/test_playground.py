"""The plane: targets stay in their square, drawings are densities, both sides of a play arrive, and a seed is a play."""

import math

import pytest
import torch
from torch.testing import assert_close

from drifting_diffusers.fields import FIELDS, Situation, situated
from drifting_diffusers.playground import (
    CHOICES,
    LEFT_OUT,
    STARTS,
    TARGETS,
    Learner,
    Particles,
    PlaneGenerator,
    energy_distance,
    find_field,
    play,
    points_from_drawing,
)


@pytest.mark.parametrize("name", TARGETS)
def test_targets_lie_in_the_unit_square_and_fill_it(name, rng):
    points = TARGETS[name](20_000, rng)
    assert points.shape == (20_000, 2)
    assert points.min() >= 0
    assert points.max() <= 1
    assert ((points.amax(0) - points.amin(0)) > 0.4).all()


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_a_function_of_its_generator(name):
    one, same, other = (TARGETS[name](50, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one, other)


def test_a_drawing_is_a_density(rng):
    ink = torch.zeros(40, 80)
    ink[:10, :20] = 1.0  # the upper left corner
    ink[30:, 60:] = 3.0  # three times as much in the lower right
    points = points_from_drawing(ink, 40_000, rng)
    left = points[:, 0] < 0.5
    assert_close(left.float().mean(), torch.tensor(0.25), atol=0.01, rtol=0)
    assert_close(points[left].amin(0), torch.tensor([0.0, 0.625]), atol=1e-3, rtol=0)  # twice as wide as high: it lies in the middle
    assert_close(points[left].amax(0), torch.tensor([0.25, 0.75]), atol=1e-3, rtol=0)
    assert_close(points[~left].mean(0), torch.tensor([0.875, 0.3125]), atol=5e-3, rtol=0)


def test_what_is_no_drawing_is_refused(rng):
    with pytest.raises(ValueError, match="the drawing is empty: draw a line"):
        points_from_drawing(torch.zeros(5, 5), 3, rng)
    with pytest.raises(ValueError, match="the drawing is empty"):
        points_from_drawing(torch.zeros(0, 5), 3, rng)
    with pytest.raises(ValueError, match=r"at least 0, got values from -1"):
        points_from_drawing(torch.tensor([[1.0, -1.0]]), 3, rng)
    with pytest.raises(ValueError, match="finite"):
        points_from_drawing(torch.tensor([[1.0, math.inf]]), 3, rng)
    with pytest.raises(ValueError, match="at most 4,194,304 pixels"):
        points_from_drawing(torch.ones(1, 1).expand(3000, 3000), 3, rng)


def test_every_field_is_a_choice_or_says_why_not():
    assert CHOICES.keys() | LEFT_OUT.keys() == FIELDS.keys()
    assert not CHOICES.keys() & LEFT_OUT.keys()


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_the_field_of_its_name(name):
    field = find_field(name)
    assert type(field) is FIELDS[name]
    if CHOICES[name].temperature is not None:
        inner = getattr(find_field(name, 0.37, moving=True), "field", find_field(name, 0.37, moving=True))
        assert inner.temperatures == (0.37,)


@pytest.mark.parametrize("name", CHOICES)
def test_every_field_brings_particles_nearer(name, rng):
    data = TARGETS["two moons"](200, rng)
    cloud = Particles(STARTS["middle"](torch.randn(100, 2, generator=rng)), data, find_field(name, moving=True))
    before = energy_distance(cloud.x, data)
    for step in range(40):
        cloud.step(step, 40)
    assert energy_distance(cloud.x, data) < 0.5 * before


@pytest.mark.parametrize("name", TARGETS)
def test_particles_and_generator_arrive(name):
    first, *_, last = play(TARGETS[name], steps=80, particles=128)
    assert last.particle_energy < 0.08 * first.particle_energy  # 0.01 is what 128 points of the target itself may have by chance
    assert last.generator_energy < 0.25 * first.generator_energy


def test_both_sides_start_from_the_same_points():
    for start in STARTS:
        first = next(play(TARGETS["heart"], start=start, particles=64))
        assert_close(first.particles, first.generated)
        assert first.step == 0
        assert first.particle_energy == first.generator_energy


def test_a_seed_is_a_play():
    plays = [list(play(TARGETS["spiral"], steps=4, particles=32, seed=seed)) for seed in (3, 3, 4)]
    for one, same in zip(plays[0], plays[1], strict=True):
        assert_close(one.particles, same.particles, rtol=0, atol=0)
        assert_close(one.generated, same.generated, rtol=0, atol=0)
        assert (one.particle_energy, one.generator_energy) == (same.particle_energy, same.generator_energy)
    assert not torch.equal(plays[0][-1].generated, plays[2][-1].generated)


def test_a_play_draws_nothing_of_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(play(TARGETS["spiral"], steps=2, particles=8))
    assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


def test_frames_are_counted_and_kept():
    frames = list(play(TARGETS["two rings"], steps=5, particles=16))
    assert [frame.step for frame in frames] == [0, 1, 2, 3, 4, 5]
    assert not torch.equal(frames[0].particles, frames[-1].particles)  # a frame is not written to by the next
    assert not any(frame.particles.requires_grad or frame.generated.requires_grad for frame in frames)


def test_a_generator_learns_the_velocity_of_its_own_samples(rng):
    """One step goes along the field: the samples of the step are nearer to where the field carried them."""
    model = PlaneGenerator(STARTS["corner"], rng)
    learner = Learner(model, TARGETS["heart"], find_field("drifting"), samples=64)
    noise = torch.randn(256, 2, generator=rng)
    with torch.no_grad():
        before, data = model(noise), TARGETS["heart"](512, rng)
        velocity = find_field("drifting")(before, positives=data, negatives=before).velocity
        learner_moves = lambda: (model(noise) - before).flatten()
    learner.step(0, 10, rng)
    assert torch.dot(learner_moves(), velocity.flatten()) > 0


def test_friction_stands_still_at_the_end(rng):
    data = TARGETS["heart"](50, rng)
    x = torch.randn(20, 2, generator=rng)
    speed = lambda step: situated(find_field("friction"), Situation(step, 10))(x, positives=data, negatives=x).velocity.norm()
    assert_close(speed(10) / speed(0), torch.tensor(0.1), rtol=1e-4, atol=0)


def test_energy_distance_is_that_of_its_formula(rng):
    x, y = torch.randn(5, 2, generator=rng), torch.randn(7, 2, generator=rng)
    apart = lambda a, b: [math.dist(p, q) for p in a.tolist() for q in b.tolist()]
    expected = 2 * sum(apart(x, y)) / 35 - sum(apart(x, x)) / 20 - sum(apart(y, y)) / 42
    assert_close(energy_distance(x, y), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"field": "gravity"}, "no field 'gravity': take one of drifting"),
        ({"field": "symmetrised"}, "needs a group"),
        ({"temperature": 0.001}, r"from 0\.02 to 5\.0 mean distances, got 0\.001"),
        ({"temperature": math.nan}, "temperature must lie"),
        ({"start": "above"}, "start must be one of middle, corner, everywhere, got 'above'"),
        ({"steps": 0}, "steps must be from 1 to 2000, got 0"),
        ({"particles": 100_000}, "particles must be from 2 to 2000, got 100000"),
    ],
    ids=str,
)
def test_what_there_is_not_is_refused_at_once(wrong, message):
    with pytest.raises(ValueError, match=message):
        play(TARGETS["spiral"], **wrong)
