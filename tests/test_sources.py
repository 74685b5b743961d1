"""Where real samples come from: tickets, banks that are filled again from them, rows of a dataset, and what is made ahead in a thread."""

import threading

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import AutoencoderKL
from PIL import Image as PILImage
from torch.testing import assert_close

from drifting_diffusers import DriftingConfig, cache_latents
from drifting_diffusers.data import LabelledImages
from drifting_diffusers.draws import RealDraws, as_samples
from drifting_diffusers.sources import Ahead, BankFeed, DatasetFeed, Drawable, Feed, RowSource, TicketReader, Tickets

COUNTS = (9, 4, 1)  # images of each class


@pytest.fixture(scope="module")
def images():
    """8 x 8 noise, no two alike."""
    rng = torch.Generator().manual_seed(0)
    labels = [label for label, count in enumerate(COUNTS) for _ in range(count)]
    pictures = [PILImage.fromarray((torch.rand(8, 8, generator=rng) * 255).byte().numpy()) for _ in labels]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    data = Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    return LabelledImages(data, size=(8, 8), channels=1, num_classes=3, image_column="image", label_column="label")


@pytest.fixture(scope="module")
def latents(images, tmp_path_factory):
    """Moments of the same as a VAE of random weights tells them, with mirror images."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(4, 4), norm_num_groups=2, **blocks)
    return cache_latents(images, vae, tmp_path_factory.mktemp("latents"), dtype=torch.float32)


# Tickets


def test_starters_come_first_and_every_pass_is_a_permutation():
    tickets = Tickets([7, 3, 3], 5, seed=1)
    rows = tickets.rows(range(3 + 5 * 4))
    assert rows[:3] == [7, 3, 3]
    passes = [rows[3 + 5 * k : 8 + 5 * k] for k in range(4)]
    assert all(sorted(rows) == list(range(5)) for rows in passes)
    assert len({*map(tuple, passes)}) > 1


def test_tickets_are_functions_of_the_seed_in_any_order():
    ours, theirs, other = (Tickets([0], 50, seed=seed) for seed in (1, 1, 2))
    wanted = [120, 3, 77, 0, 3, 51]
    assert ours.rows(wanted) == [theirs.rows([ticket])[0] for ticket in wanted]
    assert ours.rows(range(51)) != other.rows(range(51))
    assert ours.seeds([4, 9]) == [(1, 4), (1, 9)]


def test_steps_take_tickets_one_after_the_other():
    tickets = Tickets([0, 0], 5, seed=0)
    assert [tickets.of_step(step, 3) for step in range(3)] == [[2, 3, 4], [5, 6, 7], [8, 9, 10]]


def test_a_ticket_reads_the_same_sample_whoever_reads_it(images):
    reader = TicketReader(images, Tickets([], len(images), seed=3), flip=True)
    samples, labels, numbers = reader.__getitems__([20, 4, 11])
    for i, ticket in enumerate([20, 4, 11]):
        alone, label, _ = reader[ticket]
        assert_close(alone[0], samples[i], rtol=0, atol=0)
        assert label == labels[i]
    assert numbers.tolist() == [20, 4, 11]
    every = reader.__getitems__(list(range(len(images))))[0]
    plain = TicketReader(images, Tickets([], len(images), seed=3), flip=False).__getitems__(list(range(len(images))))[0]
    same = [torch.equal(*pair) for pair in zip(every, plain, strict=True)]
    mirrored = [torch.equal(ours, theirs.flip(2)) for ours, theirs in zip(every, plain, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 0 < sum(mirrored) < len(images)


def test_reading_leaves_the_global_random_numbers_alone(images):
    """It happens in a thread, at a moment that nobody knows."""
    reader = TicketReader(images, Tickets([], len(images), seed=3), flip=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(reader.batches([[0, 1]], 0))
    assert torch.equal(torch.get_rng_state(), before)


# Banks


def bank_feed(data, **changes):
    common = {"pack": lambda samples: samples, "num_classes": 3, "capacity": 3, "unconditional_capacity": 7, "push_per_step": 5}
    return BankFeed(data, **common | {"seed": 4, "flip": True, "progress": False} | changes)


def held(feed):
    return [bank.state_dict() for bank in (feed.positives, feed.negatives) if bank is not None]


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": torch.uint8}, {"dtype": torch.float16, "workers": 2}, {"unconditional_capacity": 0}, {"push_per_step": 40}],
    ids=lambda changes: " ".join(map(str, changes)) or "plain",
)
def test_a_bank_restored_from_its_tickets_is_the_one_that_went_on(changes, images):
    feed = bank_feed(images, **changes)
    feed.fill()
    for step in range(6):
        feed.advance(step)
    state = {name: {key: value.clone() for key, value in ring.items()} for name, ring in feed.state_dict().items()}
    assert set(state) == {"positives", "negatives"} - ({"negatives"} if feed.negatives is None else set())
    assert all(ring["samples"].dtype == torch.long for ring in state.values())  # one integer per sample

    again = bank_feed(images, **changes)
    again.load_state_dict(state)
    assert_close(held(again), held(feed), rtol=0, atol=0)
    for each in (feed, again):
        each.advance(6)
        each.close()
    assert_close(held(again), held(feed), rtol=0, atol=0)


def test_so_is_one_of_latents_whose_noise_is_new_at_every_draw(latents):
    feed, again = bank_feed(latents), bank_feed(latents)
    feed.fill()
    for step in range(9):
        feed.advance(step)
    again.load_state_dict(feed.state_dict())
    assert_close(held(again), held(feed), rtol=0, atol=0)
    assert len(feed.positives.samples[2].unique(dim=0)) == 3  # of one image


def test_a_bank_starts_with_every_class(images):
    feed = bank_feed(images, capacity=4, flip=False)
    feed.fill()
    assert feed.positives.count.tolist() == [min(4, count) for count in COUNTS]
    assert feed.negatives.count.tolist() == [7]
    first = images.per_class(9)[0][-1]
    assert_close(feed.positives.samples[2, 0], first)


def test_workers_change_nothing_and_are_gone_when_a_feed_is_closed(images):
    here, there = bank_feed(images), bank_feed(images, workers=1)
    for feed in (here, there):
        feed.fill()
        for step in range(2):
            feed.advance(step)
    processes = there._stream._workers
    assert all(worker.is_alive() for worker in processes)
    there.close()
    assert not any(worker.is_alive() for worker in processes)
    for feed in (here, there):
        feed.advance(2)
        feed.close()
    assert_close(held(there), held(here), rtol=0, atol=0)


# Rows


def whose(images, samples):
    """Which row each of these samples is."""
    every = images.gather(range(len(images)))[0]
    return [[next(i for i, image in enumerate(every) if torch.equal(image, sample)) for sample in group] for group in samples]


def test_rows_are_of_their_class_and_distinct_while_there_are_enough(images, rng):
    source = RowSource(images, images.labels, flip=False)
    drawn = whose(images, source.draw(torch.tensor([0, 1, 2, 0]), 4, generator=rng))
    for label, rows in zip((0, 1, 0), (drawn[0], drawn[1], drawn[3]), strict=True):
        assert len({*rows}) == 4
        assert {*images.labels[rows].tolist()} == {label}
    assert len({*drawn[2]}) == 1  # of one image, with repeats
    assert drawn[0] != drawn[3]


def test_every_row_of_a_class_is_drawn_as_often(images):
    source, rng = RowSource(images, images.labels, flip=False), torch.Generator().manual_seed(0)
    times = np.bincount(np.concatenate([source._rows(source.rows[0], 1, rng) for _ in range(900)]), minlength=9)
    assert times.sum() == 900
    assert times.min() > 60
    assert times.max() < 140


def test_draws_are_functions_of_the_generator_and_mirror_half(images):
    source = RowSource(images, images.labels, flip=True)
    draw = lambda seed: source.draw(torch.tensor([0, 1]), 3, generator=torch.Generator().manual_seed(seed))
    assert_close(draw(5), draw(5), rtol=0, atol=0)
    assert not torch.equal(draw(5), draw(6))
    views = source.draw(torch.tensor([2]), 20, generator=torch.Generator().manual_seed(0))[0]
    assert len(views.unique(dim=0)) == 2


def test_a_class_without_a_row_is_named_with_a_way_out(images, rng):
    with pytest.raises(LookupError, match=r"classes \[3, 5\] have no row in the dataset: add samples of them, or leave these labels out"):
        RowSource(images, images.labels, flip=False).draw(torch.tensor([5, 0, 3]), 1, generator=rng)


def test_a_million_rows_are_not_permuted_for_a_few(images, monkeypatch):
    source, rng = RowSource(images, np.zeros(len(images), dtype=np.int64), flip=False), torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: pytest.fail("a permutation"))
    rows = source._rows(np.arange(1_000_000), 1000, rng)
    assert len({*rows.tolist()}) == 1000
    assert 450_000 < rows.mean() < 550_000


# A dataset as a feed


def test_a_dataset_feed_has_no_state_and_tells_the_labels_of_its_order(images, rng):
    feed = DatasetFeed(images, unconditional=True, push_per_step=7, seed=2, flip=False)
    feed.fill()
    labels = torch.cat([feed.advance(step) for step in range(4)])
    assert labels[:14].bincount().tolist() == labels[14:].bincount().tolist() == list(COUNTS)  # two passes
    assert feed.state_dict() == {}
    assert_close(feed.advance(1), labels[7:14])
    negatives = whose(images, feed.negatives.draw(torch.zeros(1, dtype=torch.long), 12, generator=rng))[0]
    assert len({*images.labels[negatives].tolist()}) > 1
    assert DatasetFeed(images, unconditional=False, push_per_step=7, seed=2, flip=False).negatives is None


def test_feeds_are_what_they_say(images):
    feeds = bank_feed(images), DatasetFeed(images, unconditional=True, push_per_step=1, seed=0, flip=False)
    assert all(isinstance(feed, Feed) for feed in feeds)
    assert all(isinstance(feed.positives, Drawable) for feed in feeds)


# Ahead


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("real-samples")}


def test_steps_are_made_in_order_once_each_and_none_beyond_the_last():
    made = []
    ahead = Ahead(lambda step: made.append(step) or step * 10, 4)
    assert [ahead(step) for step in range(4)] == [0, 10, 20, 30]
    assert ahead(4) == 40  # asked for, so made; but not ahead
    ahead.close()
    assert made == [0, 1, 2, 3, 4]


def test_one_step_is_made_while_another_runs():
    begun, gate, before = threading.Event(), threading.Event(), threads()
    ahead = Ahead(lambda step: (begun.set(), gate.wait()) if step == 1 else None, 2)
    ahead(0)
    begun.wait()
    assert len(threads() - before) == 1
    gate.set()
    ahead.close()
    assert threads() == before


def test_closing_waits_for_what_is_being_made_and_keeps_it():
    made, gate, begun = [], threading.Event(), threading.Event()

    def make(step):
        if step == 1:
            begun.set()
            gate.wait()
        made.append(step)
        return step

    ahead = Ahead(make, 9)
    ahead(0)
    begun.wait()
    closing = threading.Thread(target=ahead.close)
    closing.start()
    assert made == [0]
    gate.set()
    closing.join()
    assert made == [0, 1]
    assert [ahead(0), ahead(1)] == [0, 1]  # a step that was left in its middle, and the next
    ahead.close()
    assert made == [0, 1, 2]


def test_an_exception_reaches_the_caller_and_nothing_is_made_after_it():
    made = []

    def make(step):
        made.append(step)
        if step == 1:
            raise OSError("the disk is gone")
        return step

    ahead = Ahead(make, 9)
    assert ahead(0) == 0
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            ahead(1)
    ahead.close()
    assert made == [0, 1]


def test_steps_out_of_order_are_refused():
    ahead = Ahead(lambda step: step, 9)
    ahead(3)
    for step in (2, 6):
        with pytest.raises(RuntimeError, match=f"step 4 was made, and step {step} is asked for: close this one"):
            ahead(step)
    ahead.close()


# The samples of a step


def draws(feed, **changes):
    config = DriftingConfig(
        "nowhere",
        **{"labels_per_step": 4, "positives_per_label": 2, "unconditional_per_label": 2, "max_steps": 9, "warmup_steps": 1} | changes,
    )
    return RealDraws(feed, config, classes=3, slots=range(config.labels_per_step), device=torch.device("cpu"))


def copied(state):
    return {name: {key: value.clone() for key, value in ring.items()} for name, ring in state.items()}


def test_a_state_is_that_of_the_step_asked_for_though_the_next_is_drawn_already(images):
    ours = draws(bank_feed(images))
    ours.feed.fill()
    drawn, states = [], []
    for step in range(4):
        drawn.append(ours.of_step(step))
        ours.close()  # the next step is drawn by now
        states.append(copied(ours.state_dict()))
    assert (states[1]["positives"]["samples"] != states[2]["positives"]["samples"]).any()

    again = draws(bank_feed(images))
    again.load_state_dict(states[1])
    for step in (2, 3):
        found = again.of_step(step)
        assert_close((found.labels, found.positives, found.negatives), (drawn[step].labels, drawn[step].positives, drawn[step].negatives))
    again.close()


def test_a_step_that_is_asked_for_again_is_the_same(images):
    ours = draws(bank_feed(images))
    ours.feed.fill()
    first = ours.of_step(0)
    ours.close()
    assert ours.of_step(0) is first
    ours.close()


def test_labels_are_distinct_while_there_are_enough_or_those_of_the_fresh_samples(images):
    of_classes, of_data = (draws(bank_feed(images), labels_from=source) for source in ("classes", "data"))
    for step in range(8):
        labels = of_classes.labels_of(step, torch.tensor([0]))
        assert sorted(labels[:3].tolist()) == [0, 1, 2]
        fresh = of_data.labels_of(step, torch.tensor([2, 0, 0]))  # fewer than there are places
        assert sorted(fresh[:3].tolist()) == [0, 0, 2]
        assert len(fresh) == 4


# Samples that are read by row


def test_samples_that_do_not_fit_the_generator_are_refused(latents):
    config = DriftingConfig("nowhere")
    form = {"size": latents.size, "channels": latents.channels, "num_classes": 3}
    assert as_samples(latents, **form, config=config) is latents
    for change, message in (
        ({"num_classes": 2}, r"labels from 0 to 2, and the generator has num_classes=2: build it with num_classes=3"),
        ({"num_classes": 0}, r"the generator has num_classes=0: build it with num_classes=3"),
        ({"num_classes": 5}, r"classes \[3, 4\] have no sample; build the generator with the classes there are"),
        ({"size": (8, 8)}, r"makes samples of 4 x 8 x 8, and the dataset has 4 x 4 x 4: build it with that sample_size"),
    ):
        with pytest.raises(ValueError, match=message):
            as_samples(latents, **form | change, config=config)
