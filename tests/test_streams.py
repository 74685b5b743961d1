"""Banks that a stream flows into: pass after pass, resumed at any position to the same bits, and what it says of streams that do not fit."""

import threading

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from PIL import Image as PILImage
from torch.testing import assert_close

from drifting_diffusers.data import LabelledImages
from drifting_diffusers.sources import Drawable, Feed
from drifting_diffusers.streams import StreamFeed

ROWS = 10


@pytest.fixture(scope="module")
def dataset():
    """Ten 4 x 4 images of two classes, no two alike."""
    rng = torch.Generator().manual_seed(0)
    pictures = [PILImage.fromarray((torch.rand(4, 4, generator=rng) * 255).byte().numpy()) for _ in range(ROWS)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(ROWS)]}, features=features)


@pytest.fixture(scope="module")
def view(dataset):
    return LabelledImages(dataset, size=(4, 4), channels=1, num_classes=2, image_column="image", label_column="label")


@pytest.fixture
def feed(dataset, view):
    """Makes feeds, and closes them."""
    made = []

    def make(stream=None, **changes):
        common = {"least": 2, "pack": lambda samples: samples, "num_classes": 2, "capacity": 4, "unconditional_capacity": 6}
        stream = dataset.to_iterable_dataset() if stream is None else stream
        made.append(StreamFeed(stream, view, **common | {"push_per_step": 3, "seed": 1, "flip": True, "progress": False} | changes))
        return made[-1]

    yield make
    for one in made:
        one.close()


def held(feed):
    return [bank.state_dict() for bank in (feed.positives, feed.negatives)]


def copied(feed):
    """A state as a checkpoint has it: its tensors are written down at once."""
    state = feed.state_dict()
    banks = {name: {key: value.clone() for key, value in state[name].items()} for name in ("positives", "negatives")}
    return state | banks


def test_images_come_in_order_pass_after_pass(feed, view):
    """10 images at 3 a step: steps reach from one pass into the next."""
    ours = feed(flip=False, capacity=30, unconditional_capacity=30, least=1)
    ours.fill()
    for step in range(9):
        ours.advance(step)
    assert_close(ours.negatives.samples[0], view.gather([i % ROWS for i in range(30)])[0], rtol=0, atol=0)
    assert ours.state_dict()["batches"] == 10
    assert isinstance(ours, Feed)
    assert isinstance(ours.positives, Drawable)


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "through a buffer"])
@pytest.mark.parametrize("push", [3, 5])
def test_it_is_resumed_at_any_position_to_the_same_bits(push, shuffled, feed, dataset):
    """With 5 a step every other step ends with a pass: there the stream that is resumed has nothing left. A shuffle buffer is filled again."""
    stream = dataset.to_iterable_dataset()
    stream = stream.shuffle(seed=3, buffer_size=4) if shuffled else stream
    whole, states, seen = feed(stream, push_per_step=push), [], []
    whole.fill()
    for step in range(8):
        states.append(copied(whole))
        seen.append(whole.advance(step))
    for step, state in enumerate(states):
        again = feed(stream, push_per_step=push)
        again.load_state_dict(state)
        for later in range(step, 8):
            assert_close(again.advance(later), seen[later])
        assert_close(held(again), held(whole), rtol=0, atol=0)


def test_the_position_is_that_of_what_is_in_the_banks_though_more_is_read_already(feed):
    ours = feed(capacity=30)
    ours.fill()
    ours.advance(0)
    ours._next.result()
    assert 3 * ours.state_dict()["batches"] == int(ours.positives.count.sum()) == 9
    assert ours.state_dict()["position"]["rows"] == 9
    assert ours.stream.positions[4]["rows"] == 2  # of the next pass


def test_a_state_is_loaded_while_the_next_images_are_read(feed):
    whole, ours = feed(), feed()
    for each in (whole, ours):
        each.fill()
    state = copied(whole)
    for step in range(3):
        ours.advance(step)
    ours.load_state_dict(state)
    for each in (whole, ours):
        each.advance(0)
    assert_close(held(ours), held(whole), rtol=0, atol=0)


def test_closing_keeps_what_was_read_and_ends_the_thread(feed):
    before = {*threading.enumerate()}
    whole, ours = feed(), feed()
    for each in (whole, ours):
        each.fill()
        each.advance(0)
    whole.advance(1)
    ours.close()
    whole.close()
    assert {*threading.enumerate()} == before
    ours.advance(1)
    assert_close(held(ours), held(whole), rtol=0, atol=0)


def test_two_feeds_of_one_stream_do_not_meet(feed, dataset):
    """Nor does a new one begin where a resumed one did."""
    stream = dataset.to_iterable_dataset()
    ours, alone = feed(stream), feed()
    for each in (ours, alone):
        each.fill()
    other = feed(stream)
    other.load_state_dict(copied(ours))
    third = feed(stream)
    third.fill()
    other.advance(0), third.advance(0)
    for each in (ours, alone):
        each.advance(0)
    assert_close(held(ours), held(alone), rtol=0, atol=0)
    assert_close(held(third), held(alone), rtol=0, atol=0)


def test_mirroring_is_a_function_of_the_seed_and_the_position(feed, view):
    def passes(seed):
        ours = feed(capacity=20, unconditional_capacity=20, least=5, seed=seed, push_per_step=5)
        ours.fill()
        ours.advance(0), ours.advance(1)
        return ours.negatives.samples[0]

    plain = view.gather([i % ROWS for i in range(20)])[0]
    ours = passes(1)
    mirrored = [torch.equal(image, other.flip(2)) for image, other in zip(ours, plain, strict=True)]
    same = [torch.equal(image, other) for image, other in zip(ours, plain, strict=True)]
    assert [a != b for a, b in zip(mirrored, same, strict=True)] == [True] * 20
    assert mirrored[:10] != mirrored[10:]  # an image is not mirrored in every pass
    assert_close(ours, passes(1), rtol=0, atol=0)
    assert not torch.equal(ours, passes(2))


def test_a_class_that_comes_too_seldom_is_named_after_one_pass(feed, dataset):
    stream = dataset.select([0, 2, 4, 6, 1]).to_iterable_dataset()
    with pytest.raises(LookupError, match=r"fewer than 2 images of classes \[1\]: lower positives_per_label"):
        feed(stream).fill()
    assert int(feed(stream, least=1).positives.count.sum()) == 0


def test_a_class_that_comes_late_is_waited_for(feed, dataset):
    ours = feed(dataset.select([0, 2, 4, 6, 8, 0, 2, 1, 3]).to_iterable_dataset())
    ours.fill()
    assert ours.positives.count.tolist() == [4, 2]


def test_an_empty_stream_is_refused(feed, dataset):
    with pytest.raises(ValueError, match="the stream is empty"):
        feed(dataset.to_iterable_dataset().filter(lambda row: False)).fill()


def test_without_classes_labels_are_not_looked_at(feed, dataset):
    ours = feed(dataset.remove_columns("label").to_iterable_dataset(), num_classes=1)
    ours.fill()
    assert ours.advance(0).tolist() == [0, 0, 0]


def test_a_column_that_is_missing_is_named(feed, dataset):
    with pytest.raises(ValueError, match=r"no column 'label'; its columns are \['image', 'kind'\]: set label_column"):
        feed(dataset.rename_column("label", "kind").to_iterable_dataset())
    with pytest.raises(ValueError, match=r"no column 'image'.*set image_column"):
        feed(dataset.rename_column("image", "picture").to_iterable_dataset())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label": 2}, ValueError, r"row 0 of the stream has the label 2 in column 'label', and labels must be integers in \[0, 2\)"),
        ({"label": None}, ValueError, "has the label None in column 'label'"),
        ({"label": "cat"}, ValueError, "has the label 'cat' in column 'label'"),
        ({"image": None}, TypeError, "row 0 of column 'image' must be an image, got None: leave such rows out"),
    ],
)
def test_rows_that_do_not_fit_are_named_where_a_stream_does_not_say_what_it_holds(change, error, message, feed, dataset):
    rows = [dataset[i] | change for i in range(4)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert stream.features is None
    with pytest.raises(error, match=message):
        feed(stream).fill()


def test_what_breaks_while_a_step_runs_reaches_the_next_step(feed, dataset):
    def rows():
        yield from (dataset[i] for i in range(6))
        raise OSError("the connection is gone")

    ours = feed(IterableDataset.from_generator(rows))
    ours.fill()
    with pytest.raises(OSError, match="the connection is gone"):
        ours.advance(0)
