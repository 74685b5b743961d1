"""The bank of real samples: the release's ring buffer, and what it refuses."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from drifting_diffusers import SampleBank


def filled(capacity=4, classes=3):
    bank = SampleBank(classes, capacity, (2,))
    bank.push(torch.arange(12.0).reshape(6, 2), torch.tensor([0, 0, 0, 1, 1, 2]))
    return bank


def test_recorded_bank(shared):
    """Contents, write positions and counts after every push of the release's own bank, and what its draws can return."""
    recorded = {name: torch.from_numpy(array) for name, array in np.load(shared / "fixtures/misc/memory_bank.npz").items()}
    bank = SampleBank(int(recorded["num_classes"]), int(recorded["max_size"]), (2, 2, 1))
    for t in range(int(recorded["n_adds"])):
        bank.push(recorded[f"add{t}_samples"], recorded[f"add{t}_labels"].long())
        assert_close(bank.samples, recorded[f"add{t}_bank"])
        assert_close(bank.next, recorded[f"add{t}_ptr"].long())
        assert_close(bank.count, recorded[f"add{t}_count"].long())
    for j in range(3):
        labels, n = recorded[f"sample{j}_labels"].long(), int(recorded[f"sample{j}_n"])
        seen = bank.count[labels] > 0  # for the others the release returns zeros, we refuse
        ours = bank.draw(labels[seen], n, generator=torch.Generator().manual_seed(j)).flatten(2)
        for label, drawn, theirs in zip(labels[seen].tolist(), ours, recorded[f"sample{j}_out"][seen].flatten(2), strict=True):
            held = {tuple(s) for s in bank.samples[label, : bank.count[label]].flatten(1).tolist()}
            for sample in (drawn, theirs):
                values = [tuple(s) for s in sample.tolist()]
                assert set(values) <= held
                assert len(set(values)) == min(n, len(held)) or n > bank.count[label]


def test_push_overwrites_the_oldest_and_a_push_beyond_the_ring_keeps_the_newest():
    bank = SampleBank(1, 3, (1,))
    bank.push(torch.arange(8.0)[:, None], torch.zeros(8, dtype=torch.long))
    assert sorted(bank.samples[0, :, 0].tolist()) == [5.0, 6.0, 7.0]
    bank.push(torch.tensor([[9.0]]), torch.tensor([0]))
    assert sorted(bank.samples[0, :, 0].tolist()) == [6.0, 7.0, 9.0]


def test_one_push_equals_many(rng):
    samples, labels = torch.randn(50, 2, generator=rng), torch.randint(3, (50,), generator=rng)
    one, many = SampleBank(3, 7, (2,)), SampleBank(3, 7, (2,))
    one.push(samples, labels)
    for i in range(50):
        many.push(samples[i : i + 1], labels[i : i + 1])
    assert_close(one.samples, many.samples)
    assert_close(one.next, many.next)
    assert_close(one.count, many.count)


def test_draws_are_distinct_while_there_are_enough(rng):
    drawn = filled().draw(torch.tensor([0, 1, 0]), 2, generator=rng)
    assert drawn.shape == (3, 2, 2)
    assert all(len(d.unique(dim=0)) == 2 for d in drawn)
    assert filled().draw(torch.tensor([2]), 5, generator=rng).shape == (1, 5, 2)  # one sample: repeated
    assert_close(filled().draw(torch.tensor([2]), 5, generator=rng)[0], torch.tensor([[10.0, 11.0]]).expand(5, 2))


def test_draw_is_a_function_of_the_generator():
    draw = lambda: filled().draw(torch.tensor([0, 1]), 2, generator=torch.Generator().manual_seed(3))
    assert_close(draw(), draw())


def test_unseen_class_is_refused(rng):
    bank = SampleBank(3, 4, (2,))
    bank.push(torch.ones(1, 2), torch.tensor([1]))
    with pytest.raises(LookupError, match=r"classes \[0, 2\].*push them"):
        bank.draw(torch.tensor([0, 1, 2]), 1, generator=rng)


@pytest.mark.parametrize("labels", [[3], [-1]])
def test_label_out_of_range_is_refused_and_nothing_is_stored(labels, rng):
    bank = filled()
    before = bank.samples.clone()
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        bank.push(torch.ones(1, 2), torch.tensor(labels))
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        bank.draw(torch.tensor(labels), 1, generator=rng)
    assert_close(bank.samples, before)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[n, 2\].*\[1, 3\]"):
        filled().push(torch.ones(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="capacity 0"):
        SampleBank(1, 0, (2,))


def test_state_round_trip(rng):
    bank, other = filled(), SampleBank(3, 4, (2,))
    other.load_state_dict(bank.state_dict())
    labels = torch.tensor([0, 1, 2])
    assert_close(
        bank.draw(labels, 2, generator=torch.Generator().manual_seed(1)), other.draw(labels, 2, generator=torch.Generator().manual_seed(1))
    )
    with pytest.raises(ValueError, match="saved bank"):
        SampleBank(3, 5, (2,)).load_state_dict(bank.state_dict())


def test_a_loaded_bank_goes_on_where_the_saved_one_stopped():
    bank, other = SampleBank(1, 3, (1,)), SampleBank(1, 3, (1,))
    bank.push(torch.arange(4.0)[:, None], torch.zeros(4, dtype=torch.long))  # 3, 1, 2: the next one goes to place 1
    other.load_state_dict(bank.state_dict())
    for each in (bank, other):
        each.push(torch.tensor([[9.0]]), torch.tensor([0]))
        assert each.samples[0, :, 0].tolist() == [3.0, 9.0, 2.0]


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("labels", "n", "message"),
    [([0], 0, "n must be at least 1, got 0"), ([0], -1, "n must be at least 1, got -1"), ([], 1, "labels are empty")],
)
def test_a_draw_of_nothing_is_refused(labels, n, message, rng):
    with pytest.raises(ValueError, match=message):
        filled().draw(torch.tensor(labels, dtype=torch.long), n, generator=rng)


def test_dtype_is_kept():
    bank = SampleBank(1, 2, (2,), dtype=torch.float16)
    bank.push(torch.ones(1, 2), torch.tensor([0]))
    assert bank.samples.dtype == torch.float16
