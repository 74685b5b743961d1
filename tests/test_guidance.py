"""Guidance: the power law of the scale, the mass of unconditional negatives, and what they do to the field (law T21)."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from drifting_diffusers.couplings import COUPLINGS
from drifting_diffusers.fields import DriftingField
from drifting_diffusers.guidance import draw_guidance, guidance_quantile, unconditional_weight
from drifting_diffusers.losses import drift_loss


def clouds(seed=0, n=12, p=10, m=6, d=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, k, d, generator=generator, dtype=torch.float64) for k in (n, p, m)]


@pytest.mark.parametrize(("power", "mean"), [(3.0, 1.60), (5.0, 1.318), (1.0, 3 / math.log(4)), (0.0, 2.5)])
def test_t21_mean_of_the_power_law(power, mean):
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert_close(guidance_quantile(u, power=power).mean(), torch.tensor(mean, dtype=torch.float64), rtol=0, atol=5e-4)
    drawn = draw_guidance(200_000, generator=torch.Generator().manual_seed(0), power=power)
    assert_close(drawn.mean().double(), torch.tensor(mean, dtype=torch.float64), rtol=0, atol=1e-2)
    assert drawn.min() >= 1
    assert drawn.max() <= 4


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, 3.0, 5.0])
def test_the_quantile_runs_from_low_to_high_and_inverts_the_distribution(power):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = guidance_quantile(u, low=1.2, high=2.5, power=power)
    assert_close(alpha[[0, -1]], torch.tensor([1.2, 2.5], dtype=torch.float64))
    grid = torch.linspace(1.2, 2.5, 200_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(grid**-power, grid)
    found = (mass / mass[-1])[((alpha[1:-1] - 1.2) / 1.3 * 200_000).round().long() - 1]
    assert_close(found, u[1:-1], rtol=0, atol=2e-5)


def test_a_share_of_the_scales_is_unguided():
    draw = lambda share: draw_guidance(10_000, generator=torch.Generator().manual_seed(0), unguided_share=share)
    assert (draw(1.0) == 1).all()
    assert not (draw(0.0) == 1).any()
    assert abs(float((draw(0.5) == 1).double().mean()) - 0.5) < 0.02
    assert_close(draw(0.5), draw(0.5), rtol=0, atol=0)


def test_recorded_power_law_and_masses(shared):
    recorded = {k: torch.from_numpy(v) for k, v in np.load(shared / "fixtures/misc/cfg_law.npz").items()}
    for j, (low, high, power) in enumerate(recorded["params"].tolist()):
        assert_close(
            guidance_quantile(recorded["frac"], low=low, high=high, power=power), recorded[f"cfg_{j}"], rtol=1e-5, atol=0, check_dtype=False
        )
    law = guidance_quantile(recorded["frac"], power=3.0)
    kept = torch.where(recorded["no_cfg_draw"] < float(recorded["no_cfg_frac"]), 1.0, law)
    assert_close(kept, recorded["cfg_with_no_cfg"], rtol=1e-5, atol=0, check_dtype=False)
    for i, (generated, unconditional) in enumerate(recorded["uncond_G_U"].tolist()):
        mass = unconditional_weight(recorded[f"uncond_cfg_{i}"], generated, unconditional)
        expected = mass.repeat_interleave(2)[:, None].expand(-1, unconditional)  # two locations of each label
        assert_close(expected, recorded[f"uncond_weight_neg_{i}"], rtol=1e-5, atol=1e-6, check_dtype=False)


def test_t21_mass_of_an_unconditional_negative():
    """The unconditional share of the repelling mass is gamma = 1 - 1 / alpha, the own sample left out."""
    alpha = torch.tensor([1.0, 1.5, 2.0, 4.0], dtype=torch.float64)
    mass = unconditional_weight(alpha, 64, 16)
    assert_close(mass, (alpha - 1) * 63 / 16)
    assert_close(16 * mass / (63 + 16 * mass), 1 - 1 / alpha)
    assert_close(unconditional_weight(alpha, 64, 0), (alpha - 1) * 63)  # no negative there to divide by


@pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS.keys())
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_t21_scale_one_is_never_nan(coupling, place, floor):
    x, positives, negatives = clouds()
    x.requires_grad_()
    zero = unconditional_weight(torch.ones(2, dtype=torch.float64), 12, 6)[:, None].expand(-1, 6)
    field = DriftingField(weights=place, coupling=coupling, affinity_floor=floor)
    loss, drift = drift_loss(x, positives, negatives, negative_weights=zero, field=field)
    loss.mean().backward()
    for value in (loss, x.grad, drift.velocity, drift.strength):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS.keys())
@pytest.mark.parametrize("choice", [{"weights": "before"}, {"weightless": "absent"}, {"weightless": "absent", "affinity_floor": 0.0}])
def test_t21_where_massless_targets_are_absent_scale_one_is_no_negatives(coupling, choice):
    x, positives, negatives = clouds()
    field = DriftingField(coupling=coupling, **choice)
    without, _ = drift_loss(x, positives, field=field)
    massless, drift = drift_loss(x, positives, negatives, negative_weights=torch.zeros(2, 6, dtype=torch.float64), field=field)
    assert_close(massless, without, rtol=1e-11, atol=0)
    assert torch.isfinite(drift.velocity).all()


def test_t21_absence_is_of_massless_targets_alone():
    """Among targets with mass, weights after the softmaxes mean the same as in the release."""
    x, positives, negatives = clouds()
    masses = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    look = lambda field: drift_loss(x, positives, negatives, negative_weights=masses, field=field)[1].velocity
    assert_close(look(DriftingField(weightless="absent")), look(DriftingField()), rtol=1e-12, atol=0)


def test_t21_weights_after_let_massless_negatives_into_the_softmaxes():
    """The released field at scale 1 is not the field without unconditional samples: they still take affinity away. Pinned."""
    x, positives, negatives = clouds()
    velocity = lambda *more, **masses: drift_loss(x, positives, *more, field=DriftingField(weights="after"), **masses)[1].velocity
    without, massless = velocity(), velocity(negatives, negative_weights=torch.zeros(2, 6, dtype=torch.float64))
    difference = (massless - without).norm() / without.norm()
    assert_close(difference, torch.tensor(0.2511027846957648, dtype=torch.float64), rtol=1e-6, atol=0)
    assert difference > 0.01


@pytest.mark.parametrize("place", ["before", "after"])
def test_t21_guidance_moves_the_rest_point_away_from_the_unconditional_mean(place):
    """Two Gaussians, conditional at +1 and unconditional around 0: at alpha = 2 the particles rest beyond +1, towards alpha m_c - (alpha - 1) m_0 = 2."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda n: torch.randn(1, n, 2, generator=generator, dtype=torch.float64)
    conditional = torch.tensor([1.0, 0.0], dtype=torch.float64)
    means = {}
    for alpha in (1.0, 2.0):
        x = 0.5 * normal(64)
        mass = unconditional_weight(torch.tensor([alpha], dtype=torch.float64), 64, 64)[:, None].expand(-1, 64)
        field = DriftingField((0.2, 0.5), affinity_floor=0.0, weights=place)
        for _ in range(150):
            positives, unconditional = conditional + 0.5 * normal(64), 0.8 * normal(64)
            masses = torch.cat([torch.ones(1, 64, dtype=torch.float64), mass], dim=1)
            repelling = torch.cat([x, unconditional], dim=1)
            x = x + 0.05 * field(x, positives=positives, negatives=repelling, negative_weights=masses, own=64).velocity
        means[alpha] = x.mean(dim=(0, 1))
    assert_close(means[1.0], conditional, rtol=0, atol=0.15)
    assert means[2.0][0] > means[1.0][0] + 0.3
    assert abs(float(means[2.0][1])) < 0.15


@pytest.mark.parametrize(("low", "high"), [(0.0, 4.0), (4.0, 1.0), (-1.0, 2.0), (1.0, math.inf), (math.nan, 2.0)])
def test_impossible_ranges_are_refused(low, high):
    with pytest.raises(ValueError, match=f"0 < low <= high, got low={low}, high={high}"):
        guidance_quantile(torch.rand(3), low=low, high=high)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match=rf"unguided_share must lie in \[0, 1\], got {share}"):
        draw_guidance(3, generator=torch.Generator(), unguided_share=share)
