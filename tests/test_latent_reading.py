"""Reading latents fast changes no bit of them, and a resumed run reads what its step needs and nothing of what came before."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_latents import N, write
from torch.testing import assert_close

from drifting_diffusers import DriftingConfig
from drifting_diffusers.data import RealSamples
from drifting_diffusers.draws import RealDraws
from drifting_diffusers.latents import LatentCache
from drifting_diffusers.sources import BankFeed, DatasetFeed

LATE = 10**6
ROWS = [10, 3, 3, 0, 7, 5, 8, 1, 10, 4, 6, 2, 9] * 5  # more than one chunk, across all shards


@pytest.fixture(scope="module", params=["moments float16", "moments bfloat16", "moments float32", "sample float16", "sample bfloat16"])
def cache(request, tmp_path_factory):
    stored, dtype = request.param.split()
    folder = tmp_path_factory.mktemp("latents") / request.param.replace(" ", "_")
    return write(folder, moments=stored == "moments", dtype=getattr(torch, dtype))


def plainly(cache, rows, chance, mirrored):
    """One row after the other, one generator each."""
    shards = [load_file(file) for file in sorted(cache.folder.glob("*.safetensors"))]
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    found = []
    for row, rng, flip in zip(rows, chance, mirrored, strict=True):
        if "latents" in whole:
            found.append(whole["latents"][row, int(flip)].float())
            continue
        eps = torch.from_numpy(rng.standard_normal((4, 16, 16), dtype=np.float32))
        found.append((eps * whole["std"][row, int(flip)].float() + whole["mean"][row, int(flip)].float() - 0.0) * 0.18215)
    return torch.stack(found)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("large", [0, 2**40])
def test_draws_are_bit_for_bit_those_of_a_generator_per_row(cache, flip, large):
    seeds = [(7, large + i, row) for i, row in enumerate(ROWS)]
    chance = [np.random.default_rng((1, *seed)) for seed in seeds]
    mirrored = [rng.random() < 0.5 for rng in chance]
    assert 10 < sum(mirrored) < len(ROWS) - 10
    wanted = plainly(cache, ROWS, chance, [flip and heads for heads in mirrored])
    assert_close(cache.varied(ROWS, seeds, flip=flip), wanted, rtol=0, atol=0)


def test_so_are_rows_that_are_the_same_at_every_look(cache):
    chance = [np.random.default_rng((0, row, 0)) for row in ROWS]
    assert_close(cache.gather(ROWS)[0], plainly(cache, ROWS, chance, [False] * len(ROWS)), rtol=0, atol=0)


def test_seeds_of_different_lengths_are_seeds(cache):
    seeds = [(i,) * (1 + i % 3) for i in range(N)]
    whole = cache.varied(range(N), seeds, flip=True)
    alone = torch.cat([cache.varied([row], [seed], flip=True) for row, seed in enumerate(seeds)])
    assert_close(whole, alone, rtol=0, atol=0)


def test_rows_and_seeds_must_be_as_many(cache):
    with pytest.raises(ValueError, match="every row needs a seed, got 2 rows and 3 seeds"):
        cache.varied([0, 1], [[0], [1], [2]], flip=True)


# -- resuming


class Watched(RealSamples):
    """Samples that remember which were read: 4,000 numbers in ten classes."""

    def __init__(self, n=4000):
        self.labels, self.size, self.channels, self.names = np.arange(n) % 10, (1, 1), 1, None
        self.read: list[int] = []

    def gather(self, rows):
        return torch.tensor(list(rows), dtype=torch.float32)[:, None, None, None], torch.from_numpy(self.labels[list(rows)])

    def varied(self, rows, seeds, *, flip):
        self.read += rows
        return self.gather(rows)[0]


CONFIG = {"labels_per_step": 4, "positives_per_label": 6, "unconditional_per_label": 3, "push_per_step": 16, "max_steps": 2 * LATE}


def bank_of(data):
    return BankFeed(data, pack=lambda x: x, num_classes=10, capacity=8, unconditional_capacity=20, push_per_step=16, seed=3, flip=True)


@pytest.fixture
def orders(monkeypatch):
    """How many orders of all rows were made."""
    made, original = [], np.random.Generator.permutation

    class Counting(np.random.Generator):
        def permutation(self, *args, **kwargs):
            made.append(args)
            return original(self, *args, **kwargs)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Counting(np.random.PCG64(seed)))
    return made


@pytest.mark.parametrize("step", [1, LATE])
def test_a_bank_goes_on_with_what_it_held_and_the_samples_of_its_step(step, orders):
    went_on = bank_of(Watched())
    went_on.fill()
    went_on.advance(step - 1)
    state = went_on.state_dict()
    held = sorted({int(ticket) for ring in state.values() for ticket in ring["samples"].flatten()})
    again = Watched()
    resumed = bank_of(again)
    orders.clear()
    resumed.load_state_dict(state)
    assert_close(resumed.positives.samples, went_on.positives.samples, rtol=0, atol=0)
    assert sorted(set(again.read)) == sorted(set(resumed.tickets.rows(held)))
    assert len(again.read) == 80 + 20
    again.read.clear()
    labels = resumed.advance(step)
    assert again.read == resumed.tickets.rows(resumed.tickets.of_step(step, 16))
    assert_close(labels, went_on.advance(step), rtol=0, atol=0)
    assert len(orders) <= 4  # of the pass it is in, perhaps of the one before, for two banks: not of all the passes before


def draws_of(data, tmp_path):
    config = DriftingConfig(str(tmp_path), positives_from="dataset", **CONFIG)
    feed = DatasetFeed(data, unconditional=True, push_per_step=16, seed=3, flip=True)
    return RealDraws(feed, config, classes=10, slots=range(4), device=torch.device("cpu"))


@pytest.mark.parametrize("step", [1, LATE])
def test_a_dataset_is_read_for_the_step_alone(step, orders, tmp_path):
    data = Watched()
    draws = draws_of(data, tmp_path)
    orders.clear()
    drawn = draws._draw(step)
    assert len(data.read) == 4 * 6 + 4 * 3
    assert len(orders) == 1
    assert drawn.positives.shape == (4, 6, 1, 1, 1)


def test_a_step_is_the_same_whether_those_before_it_were_run(tmp_path):
    went_on, resumed = draws_of(Watched(), tmp_path), draws_of(Watched(), tmp_path)
    for step in range(4):
        last = went_on.of_step(step)
    resumed.load_state_dict(went_on.state_dict())
    first = resumed.of_step(3)
    for ours, theirs in zip((first.labels, first.positives, first.negatives), (last.labels, last.positives, last.negatives), strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)
    went_on.close()
    resumed.close()


def test_nothing_of_a_cache_is_loaded_by_opening_it(tmp_path):
    """The labels are; the latents are mapped, so that what stands in the file afterwards is what is read."""
    cache = write(tmp_path / "cache", moments=False, dtype=torch.float32)
    file = cache.folder / cache.description["shards"][0]["file"]
    opened, content = LatentCache(cache.folder), bytearray(file.read_bytes())
    last = content[-4:]
    assert np.frombuffer(last, np.float32)[0] != 5
    with file.open("r+b") as written:
        written.seek(-4, 2)
        written.write(np.float32(5).tobytes())
    assert any(bool((opened.varied([row] * 9, [(i,) for i in range(9)], flip=True) == 5).any()) for row in range(4))
