"""From a dataset to tensors: sizes, ranges, order, and what is refused before any work."""

import itertools

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch.testing import assert_close

from drifting_diffusers.data import LabelledImages, ShuffledOrder, label_names, to_tensor


def dataset(labels=(0, 1, 0, 1, 2), size=(8, 8), names=("a", "b", "c"), mode="RGB"):
    images = [PILImage.new(mode, size, color=i * 20 if mode == "L" else (i * 20, 0, 255)) for i in range(len(labels))]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": images, "label": list(labels)}, features=features)


def view(data, **changes):
    choices = {"size": (8, 8), "channels": 3, "num_classes": 3, "image_column": "image", "label_column": "label"}
    return LabelledImages(data, **(choices | changes))


def test_black_is_minus_one_and_white_is_one():
    image = PILImage.fromarray(np.array([[0, 255]], dtype=np.uint8))
    assert_close(to_tensor(image, (1, 2), 1), torch.tensor([[[-1.0, 1.0]]]))


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "L"), (3, "RGBA"), (4, "RGB")])
def test_any_mode_becomes_the_channels_asked_for(channels, mode):
    tensor = to_tensor(PILImage.new(mode, (5, 7), color=0), (6, 4), channels)
    assert tensor.shape == (channels, 6, 4)
    assert tensor.abs().max() <= 1


def test_the_centre_of_a_wide_image_is_kept():
    wide = np.zeros((10, 30), dtype=np.uint8)
    wide[:, 10:20] = 255
    assert to_tensor(PILImage.fromarray(wide), (10, 10), 1).min() > 0.99


def test_latent_channels_are_refused():
    with pytest.raises(ValueError, match=r"got 5.*latents"):
        to_tensor(PILImage.new("L", (4, 4)), (4, 4), 5)


def test_gather_matches_single_items_and_rectangles_work():
    data = view(dataset(size=(12, 9)), size=(6, 8))
    images, labels = data.gather([3, 0])
    assert images.shape == (2, 3, 6, 8)
    assert labels.tolist() == [1, 0]
    assert_close(images[0], data[3][0])


def test_per_class_and_starters_take_from_every_class():
    data = view(dataset(labels=(2, 1, 0, 1, 0, 0)))
    _, labels = data.per_class(2)
    assert labels.tolist() == [0, 0, 1, 1, 2]
    starters = data.starters(2, seed=0)
    assert sorted(data.labels[starters].tolist()) == [0, 0, 1, 1, 2]
    assert len(set(starters)) == 5
    assert data.starters(2, seed=4) == data.starters(2, seed=4) != data.starters(2, seed=5)


def test_label_names():
    assert label_names(dataset(), "label") == ["a", "b", "c"]
    assert label_names(Dataset.from_dict({"label": [0, 1]}), "label") is None


def test_order_is_a_function_of_seed_and_position():
    take = lambda k, **kw: list(itertools.islice(ShuffledOrder(7, 3, seed=5, **kw), k))
    whole = take(10)
    assert take(6, position=4) == whole[4:]
    items = [i for batch in whole for i in batch]
    assert sorted(items[:7]) == list(range(7))
    assert sorted(items[7:14]) == list(range(7))
    assert items[:7] != items[7:14]
    assert list(itertools.islice(ShuffledOrder(7, 3, seed=6), 10)) != whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "picture"}, r"no column 'picture'.*\['image', 'label'\].*image_column"),
        ({"label_column": "class"}, "no column 'class'"),
        ({"num_classes": 2}, r"\[0, 2\), got values from 0 to 2.*num_classes=3"),
        ({"num_classes": 5}, r"classes \[3, 4\] have no image"),
    ],
)
def test_wrong_columns_and_labels_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        view(dataset(names=("a", "b", "c", "d", "e")), **changes)


@pytest.mark.usefixtures("as_users_see_it")
def test_wrong_kinds_are_refused():
    with pytest.raises(TypeError, match="got list"):
        view([1, 2])
    with pytest.raises(TypeError, match=r"IterableDataset.*streaming=False"):
        view(dataset().to_iterable_dataset())
    with pytest.raises(ValueError, match=r"integers.*class_encode_column"):
        view(dataset().remove_columns("label").add_column("label", ["x"] * 5))
    with pytest.raises(ValueError, match="empty"):
        view(dataset().select([]))


def test_unconditional_data_need_no_labels():
    data = view(dataset().remove_columns("label"), num_classes=0)
    assert set(data.labels.tolist()) == {0}
