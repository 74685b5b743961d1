"""The meters that look at single neighbours, against plain loops over pairs, closed forms and hand-made cases."""

import math

import pytest
import torch
from torch.testing import assert_close

from drifting_diffusers import neighbours
from drifting_diffusers.neighbours import density_coverage, memorisation, nearest, precision_recall


def normal(n, d=3, seed=0, mean=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


# -- a second implementation: Python floats, one pair at a time


def radii_by_loops(points, k):
    return [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]


def figures_by_loops(generated, real, k):
    g, r = generated.tolist(), real.tolist()
    of_real, of_generated = radii_by_loops(r, k), radii_by_loops(g, k)
    balls = [[math.dist(p, q) <= radius for q, radius in zip(r, of_real, strict=True)] for p in g]
    precision = sum(any(row) for row in balls) / len(g)
    recall = sum(any(math.dist(q, p) <= radius for p, radius in zip(g, of_generated, strict=True)) for q in r) / len(r)
    density = sum(sum(row) for row in balls) / (k * len(g))
    coverage = sum(any(row[j] for row in balls) for j in range(len(r))) / len(r)
    return precision, recall, density, coverage


@pytest.mark.parametrize(("n", "m", "d", "k", "shift"), [(30, 40, 2, 3, 0.5), (25, 20, 5, 1, 0.0), (40, 30, 3, 5, 1.5)])
def test_precision_recall_density_and_coverage_are_those_of_plain_loops(n, m, d, k, shift):
    generated, real = normal(n, d, mean=shift), normal(m, d, seed=1)
    precision, recall, density, coverage = figures_by_loops(generated, real, k)
    assert precision_recall(generated, real, k=k) == pytest.approx((precision, recall), abs=1e-12)
    assert density_coverage(generated, real, k=k) == pytest.approx((density, coverage), abs=1e-12)
    assert 0 < precision < 1  # or the case would show nothing
    assert 0 < recall < 1


def test_nearest_is_that_of_plain_loops_far_from_the_origin_and_in_float32():
    queries, keys = normal(20, 4, mean=300.0).float(), normal(30, 4, seed=1, mean=300.0).float()
    distances, indices = nearest(queries, keys)
    for q, distance, index in zip(queries.tolist(), distances.tolist(), indices.tolist(), strict=True):
        by_loops = [math.dist(q, p) for p in keys.tolist()]
        assert index == by_loops.index(min(by_loops))
        assert distance == pytest.approx(min(by_loops), rel=1e-9)


# -- invariances


def test_swapping_the_sets_swaps_precision_and_recall():
    a, b = normal(60, mean=0.7), normal(50, seed=1)
    assert precision_recall(a, b) == precision_recall(b, a)[::-1]


def test_neither_order_nor_place_nor_unit_nor_block_matters(monkeypatch):
    generated, real = normal(60, mean=0.5), normal(50, seed=1)
    shuffled = generated[torch.randperm(60, generator=torch.Generator().manual_seed(2))], real.flip(0)
    rotation = torch.linalg.qr(normal(3, seed=3)).Q
    for meter in (precision_recall, density_coverage):
        found = meter(generated, real)
        assert meter(*shuffled) == pytest.approx(found, abs=1e-12)
        assert meter(7 * generated @ rotation + 40, 7 * real @ rotation + 40) == pytest.approx(found, abs=1e-12)
    whole = nearest(generated, real)
    assert_close(nearest(generated, real, chunk=7), whole)
    found = precision_recall(generated, real), density_coverage(generated, real)
    monkeypatch.setattr(neighbours.blocks, "__kwdefaults__", {"rows": 7, "columns": 11})
    assert (precision_recall(generated, real), density_coverage(generated, real)) == found
    assert_close(nearest(generated, real), whole)


# -- known cases


def test_copies_have_every_ball_to_themselves():
    """Each copy lies in its original's ball and, ties included, in the balls whose radius it defines: density (k + 1) / k in the mean."""
    real = normal(80).float()
    assert precision_recall(real, real) == (1.0, 1.0)
    density, coverage = density_coverage(real, real, k=5)
    assert density == pytest.approx(6 / 5)
    assert coverage == 1.0


def test_a_missing_class_lowers_recall_and_coverage_alone():
    real = torch.cat((normal(200), normal(200, seed=1, mean=50.0)))
    precision, recall = precision_recall(normal(200, seed=2), real)
    density, coverage = density_coverage(normal(200, seed=2), real)
    assert precision > 0.8
    assert recall < 0.5
    assert density == pytest.approx(1, abs=0.25)
    assert coverage == pytest.approx(0.485, abs=0.02)


def test_duplicated_images_cover_nothing_but_themselves():
    """Five copies of each leave balls of radius 0 at k = 3: rounding must not make a neighbour of them."""
    few = normal(40, seed=2, mean=30.0).float().repeat_interleave(5, 0)
    precision, recall = precision_recall(few, normal(200, seed=1, mean=30.0).float())
    assert precision > 0.8
    assert recall == 0
    assert precision_recall(few, few.flip(0)) == (1.0, 1.0)


@pytest.mark.parametrize(("n", "m", "k"), [(60, 60, 5), (40, 80, 3)])
def test_density_and_coverage_of_one_law_are_what_their_docstring_says(n, m, k):
    expected = 1 - math.prod((m - i) / (n + m - i) for i in range(1, k + 1))
    found = torch.tensor([density_coverage(normal(n, seed=2 * i), normal(m, seed=2 * i + 1), k=k) for i in range(100)]).mean(0)
    assert found[0].item() == pytest.approx(1, abs=0.03)
    assert found[1].item() == pytest.approx(expected, abs=0.01)


def test_precision_of_one_law_is_not_1():
    for d in (2, 16):
        precision, recall = precision_recall(normal(300, d), normal(300, d, seed=1))
        assert precision < 0.99
        assert recall < 0.99


# -- memories


def test_samples_as_new_as_held_out_ones_are_no_memories():
    found = memorisation(normal(1000, 4), normal(500, 4, seed=1), normal(1000, 4, seed=2))
    assert found["ratio"] == pytest.approx(1, abs=0.1)
    assert found["share_closer"] == pytest.approx(0.05, abs=0.03)


def test_copies_are_memories():
    training, held_out = normal(100, 4).float() + 30, normal(60, 4, seed=1).float() + 30
    copied = memorisation(training[:50], training, held_out)
    assert (copied["generated_distance"], copied["ratio"], copied["share_closer"]) == (0.0, 0.0, 1.0)
    a_few = memorisation(torch.cat((normal(80, 4, seed=2).float() + 30, training[:20])), training, held_out)
    assert a_few["ratio"] > 0.6
    assert a_few["share_closer"] > 0.2


def test_memorisation_by_hand():
    """On a line: training at 0 and 10; held out 1, 2, 3, 4 away; generated 0, 1, 3 and 30 away. The nearest half of the held-out ends at 2.5."""
    line = lambda *places: torch.tensor(places, dtype=torch.float64)[:, None]
    found = memorisation(line(0, 11, 13, 40), line(0, 10), line(1, 2, 13, -4), quantile=0.5)
    assert found == {"generated_distance": 2.0, "held_out_distance": 2.5, "ratio": 0.8, "share_closer": 0.5}


def test_copies_count_where_some_held_out_samples_are_copies_too():
    line = lambda *places: torch.tensor(places, dtype=torch.float64)[:, None]
    assert memorisation(line(0, 0, 5, 6), line(0, 10), line(0, 1, 2, 3))["share_closer"] == 0.5 > 0.05  # the nearest 5 % end at 0.15
    assert memorisation(line(0, 0, 5, 6), line(0, 10), line(0, 0, 2, 3, 4))["share_closer"] == 0.5  # they end at 0


def test_of_equally_near_keys_the_first_is_found_in_any_block(monkeypatch):
    monkeypatch.setattr(neighbours.blocks, "__kwdefaults__", {"rows": 2, "columns": 3})
    keys = normal(4).repeat(5, 1)
    assert_close(nearest(keys[:4], keys), (torch.zeros(4, dtype=torch.float64), torch.arange(4)))


# -- what is refused


@pytest.mark.usefixtures("as_users_see_it")
def test_what_cannot_be_compared_is_refused():
    x = normal(10)
    bad = x.clone()
    bad[4, 1] = torch.nan
    for meter in (nearest, precision_recall, density_coverage):
        with pytest.raises(ValueError, match=r"1 of 10 samples of .* the first is sample 4"):
            meter(bad, x)
        with pytest.raises(ValueError, match=r"different widths.*\[10, 3\].*\[10, 2\]"):
            meter(x, x[:, :2])
        with pytest.raises(ValueError, match="hold no sample"):
            meter(x[:0], x)
    with pytest.raises(ValueError, match="choose k from 1 to 9"):
        precision_recall(x, x, k=10)
    with pytest.raises(ValueError, match="are in the training set"):
        memorisation(normal(5, seed=1), x, x)
    with pytest.raises(ValueError, match="quantile 5"):
        memorisation(normal(5, seed=1), x, x, quantile=5)
