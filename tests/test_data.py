"""From a dataset to tensors: sizes, ranges, order, and what is refused before any work."""

import io
import itertools

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch.testing import assert_close

from drifting_diffusers.data import LabelledImages, ShuffledOrder, label_names, random_box, to_tensor


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


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "L"), (3, "RGBA"), (4, "RGBA"), (1, "LA"), (3, "1"), (3, "P"), (1, "CMYK")])
def test_any_mode_becomes_the_channels_asked_for(channels, mode):
    tensor = to_tensor(PILImage.new(mode, (5, 7), color=0), (6, 4), channels)
    assert tensor.shape == (channels, 6, 4)
    assert tensor.abs().max() <= 1


def test_the_centre_of_a_wide_image_is_kept():
    wide = np.zeros((10, 30), dtype=np.uint8)
    wide[:, 10:20] = 255
    assert to_tensor(PILImage.fromarray(wide), (10, 10), 1).min() > 0.99


def test_resizing_is_lanczos():
    """One column of three is white, the one that the nearest neighbour takes: its neighbours count too."""
    image = PILImage.fromarray(np.tile(np.array([0, 255, 0] * 4, dtype=np.uint8), (12, 1)))
    expected = np.array(image.resize((4, 4), PILImage.Resampling.LANCZOS), dtype=np.float32)
    assert_close(to_tensor(image, (4, 4), 1)[0], torch.from_numpy(expected) / 127.5 - 1)
    assert to_tensor(image, (4, 4), 1).max() < 0  # the nearest pixel is white


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_their_precision(kind, channels):
    values = np.array([[0, 1, 32768, 65535]], dtype=kind)
    image = PILImage.frombytes("I;16" if kind == "<u2" else "I;16B", (4, 1), values.tobytes())
    expected = torch.from_numpy(values.astype(np.float32)) / 65535 * 2 - 1
    assert_close(to_tensor(image, (1, 4), channels), expected.expand(channels, 1, 4))
    assert_close(to_tensor(image, (1, 4), 1)[0, 0, [0, 3]], torch.tensor([-1.0, 1.0]), rtol=0, atol=0)


def test_sixteen_bits_resized_stay_in_range():
    values = np.zeros((16, 16), dtype=np.uint16)
    values[:, 8:] = 65535
    tensor = to_tensor(PILImage.fromarray(values), (12, 12), 1)
    assert (tensor.min(), tensor.max()) == (-1, 1)


@pytest.mark.parametrize(("mode", "channels"), [("I", 1), ("F", 3), ("LAB", 3)])
def test_modes_without_a_known_range_are_refused(mode, channels):
    wanted = {1: "L", 3: "RGB"}[channels]
    with pytest.raises(
        ValueError, match=rf"images of mode '{mode}' .*'L', .*scale the values to 0 ... 255 and image.convert\(\"{wanted}\"\) first"
    ):
        to_tensor(PILImage.new(mode, (4, 4)), (4, 4), channels)


def transparent(mode: str) -> PILImage.Image:
    """A black pixel that cannot be seen, a black one that can."""
    image = PILImage.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":
        image = PILImage.new("P", (2, 1), 0)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = 0
        return image
    return image.convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_white_shows_behind_what_is_transparent(mode, channels):
    assert_close(to_tensor(transparent(mode), (1, 2), channels), torch.tensor([[[1.0, -1.0]]]).expand(channels, 1, 2))


def test_four_channels_are_read_from_rgba_alone():
    assert to_tensor(transparent("RGBA"), (1, 2), 4)[:, 0].tolist() == [[-1.0, -1.0]] * 3 + [[-1.0, 1.0]]
    for mode in ("RGB", "LA", "I;16"):
        with pytest.raises(ValueError, match=rf"4 channels must be of mode \"RGBA\", got '{mode}': image.convert"):
            to_tensor(PILImage.new(mode, (4, 4)), (4, 4), 4)


def test_images_are_turned_upright():
    image = PILImage.fromarray(np.array([[0, 255]], dtype=np.uint8))
    image.getexif()[0x0112] = 3  # upside down
    assert_close(to_tensor(image, (1, 2), 1), torch.tensor([[[1.0, -1.0]]]))


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


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("classes", [3, 1])
def test_labels_below_0_are_rows_without_one(classes):
    rows = Dataset.from_dict(
        {"image": dataset()["image"], "label": [0, -1, 1, -1, 2]}, features=Features({"image": Image(), "label": Value("int64")})
    )
    with pytest.raises(ValueError, match=r"got -1 in column 'label'.*dataset.filter\(lambda row: row\['label'\] >= 0\)") as raised:
        view(rows, num_classes=classes)
    assert "num_classes" not in str(raised.value)


def png(image: PILImage.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def column(entries, feature=None):
    """Unlabelled data; entries as they lie in the file."""
    return Dataset.from_dict({"image": entries}, features=feature and Features({"image": feature}))


NOT_IMAGES = {
    "paths": (lambda: column(["a.png"]), TypeError, r"row 0 of column 'image' must be an image, got str 'a.png': take dataset.cast_column\('image', datasets.Image\(\)\)"),
    "undecoded": (lambda: dataset().cast_column("image", Image(decode=False)), TypeError, r"must be an image, got dict .*cast_column\('image', datasets.Image"),
    "torch": (lambda: dataset().with_format("torch"), TypeError, r"must be an image, got Tensor: take dataset.with_format\(None\)"),
    "numbers": (lambda: column([[[1.0]]]), TypeError, r"must be an image, got list: take dataset.with_format\(None\)"),
    "nothing": (lambda: column([None], Image()), TypeError, r"row 0 of column 'image' must be an image, got None: leave such rows out, dataset.filter"),
    "broken": (lambda: column([{"path": None, "bytes": b"no image"}], Image()), ValueError, r"row 0 of column 'image' cannot be read: cannot identify"),
    "missing": (lambda: column(["/nowhere/a.png"], Image()), ValueError, r"row 0 of column 'image' cannot be read: .*nowhere/a.png"),
    "float": (lambda: column([PILImage.new("I", (8, 8))], Image()), ValueError, r"row 0 of column 'image' cannot be read: images of mode 'I'"),
}  # fmt: skip


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("what", NOT_IMAGES)
def test_what_is_no_image_is_refused_before_any_work(what):
    build, kind, message = NOT_IMAGES[what]
    with pytest.raises(kind, match=message):
        view(build(), num_classes=0)


def test_an_unreadable_row_is_named():
    good = png(PILImage.new("RGB", (8, 8)))
    for bad, kind, message in (
        (b"no image", ValueError, "row 2 .* cannot be read"),
        (good[:-30], ValueError, "row 2 .*"),
        (None, TypeError, "row 2 .* got None"),
    ):
        rows = [{"path": None, "bytes": data} for data in (good, good)] + [bad and {"path": None, "bytes": bad}]
        data = view(column(rows, Image()), num_classes=0)
        for read in (lambda data=data: data.gather([1, 2]), lambda data=data: data[2]):
            with pytest.raises(kind, match=message):
                read()


def test_the_rows_can_be_iterated():
    assert [label for _, label in view(dataset())] == [0, 1, 0, 1, 2]


def test_unconditional_data_need_no_labels():
    data = view(dataset().remove_columns("label"), num_classes=0)
    assert set(data.labels.tolist()) == {0}


def test_random_boxes_have_the_areas_and_aspect_ratios_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(200, 150, area_min=0.2, rng=rng) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert boxes.min() >= 0
    assert (right.max(), bottom.max()) == (200, 150)
    areas, aspects = (right - left) * (bottom - top) / (200 * 150), (right - left) / (bottom - top)
    assert 0.19 < areas.min() < 0.22
    assert 0.95 < areas.max() <= 1
    assert 0.74 < aspects.min() < 0.77
    assert 1.3 < aspects.max() < 1.35
    assert len({tuple(box) for box in boxes}) > 3900
    small = areas < 0.4  # of which nothing is tried again
    assert abs(np.median(np.log(aspects[small]))) < 0.03  # log-uniform around 1
    assert abs(np.mean(left[small] / (200 - (right - left)[small])) - 0.5) < 0.03  # anywhere


@pytest.mark.parametrize(("size", "box"), [((90, 10), (38, 0, 51, 10)), ((10, 90), (0, 38, 10, 51))])
def test_where_no_box_fits_it_is_the_centre(size, box):
    assert random_box(*size, area_min=1, rng=np.random.default_rng(0)) == box


def test_varied_images_are_crops_that_are_functions_of_their_seeds():
    ramp = np.add.outer(np.arange(32), 4 * np.arange(40)).astype(np.uint8)  # value = row + 4 * column
    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    data = Dataset.from_dict({"image": [PILImage.fromarray(ramp)] * 2, "label": [0, 0]}, features=features)
    cropped, plain = (view(data, channels=1, num_classes=1, crop_area_min=area) for area in (0.2, 1.0))
    seeds = [(5, k) for k in range(20)]
    images = cropped.varied([0] * 20, seeds, flip=False)
    assert images.shape == (20, 1, 8, 8)
    assert len(images.unique(dim=0)) == 20
    assert_close(cropped.varied([1, 0], [seeds[7], seeds[3]], flip=False), images[[7, 3]], rtol=0, atol=0)
    extent = (images[:, 0, 0, -1] - images[:, 0, 0, 0]) * 127.5 / 4 / 40  # share of the width that is seen
    assert 0.3 < extent.min() < extent.max() <= 1
    mirrored = cropped.varied([0] * 20, seeds, flip=True)
    heads = (mirrored != images).flatten(1).any(1)
    assert_close(torch.where(heads[:, None, None, None], images.flip(3), images), mirrored, rtol=0, atol=0)
    assert 4 < heads.sum() < 16
    for area_min in (0.2, 1.0):
        assert_close(view(data, channels=1, num_classes=1, crop_area_min=area_min).gather([0])[0], plain.gather([0])[0])
    assert_close(plain.varied([0], [(5, 0)], flip=False), plain.gather([0])[0], rtol=0, atol=0)


def test_classes_may_be_without_an_image_where_that_is_said():
    data = dataset(labels=(0, 2, 2))
    assert view(data, complete=False).labels.tolist() == [0, 2, 2]
    with pytest.raises(ValueError, match=r"classes \[1\] have no image"):
        view(data)
