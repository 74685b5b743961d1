"""Couplings: their normalisations, the floor, targets without mass, and logits that a kernel space cannot hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from drifting_diffusers.couplings import COUPLINGS, Coupling, row_softmax, two_sided_softmax, unnormalised

ALL = pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS.keys())


def draw(seed: int, n: int, m: int, spread: float = 3.0) -> torch.Tensor:
    return -spread * torch.rand(2, n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 6), m=st.integers(1, 7), spread=st.floats(0.0, 50.0))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_what_each_coupling_normalises(seed, n, m, spread):
    logits = draw(seed, n, m, spread)
    kernel = logits.exp()
    assert_close(unnormalised(logits), kernel)
    assert_close(row_softmax(logits).sum(-1), torch.ones(2, n, dtype=torch.float64))
    expected = kernel / (kernel.sum(-1, keepdim=True) * kernel.sum(-2, keepdim=True)).sqrt()
    assert_close(two_sided_softmax(logits), expected, rtol=1e-10, atol=1e-300)


@given(seed=st.integers(0, 2**31), shift=st.floats(-500, 500))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_softmaxes_do_not_see_a_shift_of_all_logits(seed, shift):
    logits = draw(seed, 4, 5)
    for coupling in (row_softmax, two_sided_softmax):
        assert_close(coupling(logits + shift), coupling(logits), rtol=1e-9, atol=0)


@ALL
def test_couplings_do_not_see_the_order_of_queries_and_targets(coupling):
    logits, weights = draw(0, 5, 6), 0.5 + torch.rand(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, columns = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([5, 2, 0, 1, 4, 3])
    assert_close(coupling(logits[:, rows][:, :, columns], weights[:, columns]), coupling(logits, weights)[:, rows][:, :, columns])


@ALL
def test_mass_is_multiplicity(coupling):
    """A target of mass 2 listens like two targets of mass 1 together, in the normaliser over targets too."""
    logits = draw(0, 4, 3)
    doubled = coupling(torch.cat([logits, logits[..., :1]], dim=-1))
    merged = coupling(logits, torch.tensor([[2.0, 1, 1]], dtype=torch.float64).expand(2, -1))
    if coupling is two_sided_softmax:  # under the root a mass w is sqrt(w); the field multiplies no further
        merged = merged.clone()
        merged[..., 0] *= 2**0.5
    assert_close(merged[..., 0], doubled[..., 0] + doubled[..., 3])
    assert_close(merged[..., 1:], doubled[..., 1:3])


@ALL
@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_a_target_of_mass_zero_is_absent_even_from_the_floor(coupling, floor):
    logits, weights = draw(0, 4, 6), torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64).expand(2, -1)
    there = weights[0] > 0
    affinity = coupling(logits, weights, floor=floor)
    assert_close(affinity[..., ~there], torch.zeros(2, 4, 2, dtype=torch.float64), rtol=0, atol=0)
    assert_close(affinity[..., there], coupling(logits[..., there], floor=floor))


@ALL
def test_a_problem_without_any_mass_has_no_affinity_and_no_nan(coupling):
    assert_close(coupling(draw(0, 4, 6), torch.zeros(2, 6, dtype=torch.float64), floor=1e-3), torch.zeros(2, 4, 6, dtype=torch.float64))


@ALL
def test_floor_is_the_least_affinity_and_changes_nothing_above_it(coupling):
    logits = draw(0, 20, 30, spread=30.0)
    free, floored = coupling(logits), coupling(logits, floor=1e-3)
    assert floored.min() == 1e-3
    assert_close(floored[free > 1e-3], free[free > 1e-3], rtol=0, atol=0)


def test_two_sided_softmax_survives_where_the_product_of_two_softmaxes_underflows():
    """Two queries far from one target: its row softmax e^-120 is 0 in float32, the root of the product e^-60 / sqrt(2) is not."""
    logits = torch.tensor([[0.0, -120.0], [0.0, -120.0]])
    naive = (logits.softmax(-1) * logits.softmax(-2)).sqrt()
    assert naive[0, 1] == 0
    assert_close(two_sided_softmax(logits)[0, 1], torch.tensor(-60.0).exp() / 2**0.5, rtol=1e-5, atol=0)


@ALL
def test_couplings_are_protocol_members_and_found_by_name(coupling):
    assert isinstance(coupling, Coupling)
    assert COUPLINGS[coupling.__name__] is coupling
