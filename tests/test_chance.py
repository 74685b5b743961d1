"""Generators that are made together are the ones that NumPy makes one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drifting_diffusers.chance import FEW, coins, generators

integers = st.one_of(st.integers(0, 3), st.integers(2**32 - 2, 2**32 + 1), st.integers(0, 2**64 - 1), st.just(2**64 - 1))


def states(rngs):
    return [rng.bit_generator.state for rng in rngs]


def one_by_one(seeds):
    return [np.random.default_rng(tuple(seed)) for seed in seeds]


@given(st.integers(1, 7).flatmap(lambda k: st.lists(st.lists(integers, min_size=k, max_size=k), min_size=FEW, max_size=20)))
@settings(deadline=None, max_examples=150)
def test_they_are_those_of_default_rng(seeds):
    assert states(generators(seeds)) == states(one_by_one(seeds))
    assert coins(seeds) == [rng.random() < 0.5 for rng in one_by_one(seeds)]


def test_coins_are_the_first_number_of_each():
    seeds = [(4, i) for i in range(5000)]
    assert coins(seeds) == [rng.random() < 0.5 for rng in one_by_one(seeds)]
    assert 2300 < sum(coins(seeds)) < 2700


@pytest.mark.parametrize(
    "seeds",
    [
        [],
        [(5, 6)] * (FEW - 1),  # too few to be hashed together
        [(5, 6, 7)[: 1 + i % 3] for i in range(20)],  # of different lengths
        [(1, 2**64 + i) for i in range(20)],
        [(0,)] * 20,
    ],
)
def test_whatever_the_form_of_the_seeds(seeds):
    assert states(generators(seeds)) == states(one_by_one(seeds))
    assert coins(seeds) == [rng.random() < 0.5 for rng in one_by_one(seeds)]


def test_each_has_a_stream_of_its_own():
    first, *others = generators([(3, 1)] * 20)
    numbers = first.standard_normal(100)
    assert all((other.standard_normal(100) == numbers).all() for other in others)


@pytest.mark.parametrize("bad", [-1, 0.5])
def test_what_is_no_seed_is_refused_as_numpy_does(bad, as_users_see_it):
    with pytest.raises((TypeError, ValueError)) as theirs:
        np.random.default_rng((1, bad))
    with pytest.raises(theirs.type, match=str(theirs.value)):
        generators([(1, bad)] * 20)
