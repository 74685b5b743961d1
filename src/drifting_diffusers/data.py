"""From a `datasets.Dataset` to (image in [-1, 1], label), in an order that is a function of the seed and the position alone."""

import functools
import hashlib
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import ClassLabel, Dataset, IterableDataset, load_dataset
from PIL import Image, ImageOps
from torch import Tensor

from .chance import coins, generators
from .shapes import Float, Int

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels of a sample -> the PIL mode its image is read in
READABLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "I;16L", "I;16B", "I;16N")
"""The PIL modes whose range of values is known. That of "I" and "F" is not: PIL would clip them to 0 and 255."""
ASPECTS = (3 / 4, 4 / 3)  # of random crops, width over height
Box = tuple[int, int, int, int]


def to_tensor(
    image: Image.Image, size: tuple[int, int], channels: int, crop: Callable[[int, int], Box] | None = None
) -> Float[Tensor, "c h w"]:
    """The image in [-1, 1], its shorter side resized (Lanczos) and its centre cropped to (height, width) where it is not that size already.

    With `crop`, (width, height) -> (left, top, right, bottom), that part is resized to this size in place of it, whatever its aspect ratio.

    It is turned upright as its EXIF data say. Grey of 16 bits keeps its precision, 65535 is 1. For 1 or 3 channels what is transparent shows white
    behind it; 4 channels are read from RGBA images alone.

    Raises:
        ValueError: for other numbers of channels, or a mode that cannot be read.
    """
    _check_channels(channels)
    height, width = size
    image = _converted(ImageOps.exif_transpose(image), channels)
    if crop is not None:
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=crop(*image.size))
    elif image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(height, width, -1).clamp(0, 255)  # in mode F Lanczos overshoots
    return pixels.permute(2, 0, 1).expand(channels, -1, -1) / 127.5 - 1


def _converted(image: Image.Image, channels: int) -> Image.Image:
    """The image in the mode of its channels; of 16 bits in mode F, in [0, 255]."""
    if image.mode not in READABLE:
        raise ValueError(
            f"images of mode {image.mode!r} have no known range; the modes are {READABLE}: scale the values to 0 ... 255 and "
            f'image.convert("{MODES[min(channels, 3)]}") first'
        )
    if channels == 4 and image.mode != "RGBA":
        raise ValueError(
            f'images of 4 channels must be of mode "RGBA", got {image.mode!r}: image.convert("RGBA") first, or take 3 channels'
        )
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image).astype(np.float32) / 257)  # 65535 = 255 * 257
    if channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def random_box(width: int, height: int, *, area_min: float, rng: np.random.Generator) -> Box:
    """A part of an image, (left, top, right, bottom), as torchvision's RandomResizedCrop is documented to choose it.

    Its share of the area is uniform in [area_min, 1], its aspect ratio log-uniform in `ASPECTS`, its place uniform. Ten times is tried for one that
    fits; then it is the largest in the centre whose aspect ratio lies there.
    """
    low, high = ASPECTS
    for _ in range(10):
        area, aspect = width * height * rng.uniform(area_min, 1), np.exp(rng.uniform(np.log(low), np.log(high)))
        w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = max(1, min(width, round(height * high))), max(1, min(height, round(width / low)))
    return (width - w) // 2, (height - h) // 2, (width - w) // 2 + w, (height - h) // 2 + h


def open_images(name: str, split: str, *, streaming: bool = False) -> Any:
    """A split of a dataset of the Hub, of a folder of images or parquet files, or of one such file.

    Args:
        name: of the dataset, folder or file.
        split: of it; for a single file "train" is the only one.
        streaming: an `IterableDataset` in place of a `Dataset`.

    Raises:
        FileNotFoundError, ValueError: as `datasets.load_dataset` does.
    """
    path, load = Path(name), partial(cast(Any, load_dataset), streaming=streaming)
    if path.is_file():
        return load("parquet" if path.suffix == ".parquet" else "imagefolder", data_files=name, split="train")
    if path.is_dir():
        found = sorted(path.glob(f"**/{split}*.parquet"))
        if found:
            return load("parquet", data_files=[str(file) for file in found], split="train")
    return load(name, split=split)


def label_names(dataset: Dataset | IterableDataset, label_column: str) -> list[str] | None:
    """The names of a ClassLabel column; None where labels are plain integers, or where a stream does not say what it holds."""
    feature = (dataset.features or {}).get(label_column)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


class RealSamples(ABC):
    """Labelled samples that can be read by row: images, or latents of images.

    Attributes:
        labels: [rows], integers.
        size: (height, width) of a sample.
        channels: of a sample.
        names: of the classes by label, where they have names.
    """

    labels: np.ndarray
    size: tuple[int, int]
    channels: int
    names: list[str] | None

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def gather(self, rows: Sequence[int]) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """The samples and labels of these rows, the same at every call."""

    @abstractmethod
    def varied(self, rows: Sequence[int], seeds: Sequence[Sequence[int]], *, flip: bool) -> Float[Tensor, "n c h w"]:
        """The samples of these rows as training sees them: what chance decides of a sample is a function of its seed.

        Args:
            rows: positions, repeats allowed.
            seeds: one per row, of non-negative integers.
            flip: whether half of them are mirrored.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Enough to tell one set of samples from another, as JSON: the labels in order, and the first and last sample."""
        return fingerprint_of(self.labels, self.gather([0, len(self) - 1])[0])

    def starters(self, n: int, *, seed: int) -> list[int]:
        """The positions of n samples of every class (all where it has fewer), shuffled: what a bank starts with."""
        order = np.random.default_rng((seed, len(self))).permutation(len(self))
        seen: Counter[int] = Counter()
        chosen = []
        for i in order.tolist():
            label = int(self.labels[i])
            if seen[label] < n:
                seen[label] += 1
                chosen.append(i)
        return chosen

    def per_class(self, n: int) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """The first n samples of every class, class by class; fewer where a class has fewer."""
        return self.gather(np.concatenate(self.rows_per_class(n)).tolist())

    def rows_per_class(self, n: int) -> list[np.ndarray]:
        """Where they are, one array per class."""
        order = np.argsort(self.labels, kind="stable")
        firsts = np.unique(self.labels[order], return_index=True)[1]
        return [rows[:n] for rows in np.split(order, firsts[1:])]


def fingerprint_of(labels: np.ndarray, ends: Float[Tensor, "2 c h w"]) -> dict[str, Any]:
    """That of samples with these labels, the first and the last of which are `ends`."""
    digest = lambda array: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
    return {"images": len(labels), "labels": digest(labels), "first_and_last": digest(ends.numpy())}


def coin(seed: Sequence[int]) -> bool:
    """Heads or tails, a function of the seed."""
    return bool(np.random.default_rng(tuple(seed)).random() < 0.5)


class LabelledImages(RealSamples):
    """A checked view of a dataset: labelled images of one size.

    Args:
        dataset: a map-style dataset with images and integer labels.
        size: (height, width) of the tensors.
        channels: 1 for grey, 3 for RGB, 4 for RGBA.
        num_classes: labels must lie in [0, num_classes); 0 ignores them (all become 0).
        image_column: the column of images.
        label_column: the column of labels.
        complete: whether every class must have an image.
        crop_area_min: `varied` shows a random part of every image, of at least this share of its area, in (0, 1]; see `random_box`. With 1 it shows
            what `gather` does.

    Raises:
        ValueError: for missing columns, labels out of range, classes without an image, or a first image that cannot be read.
        TypeError: for a dataset of another kind, or a column that holds no images.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        size: tuple[int, int],
        channels: int,
        num_classes: int,
        image_column: str,
        label_column: str,
        complete: bool = True,
        crop_area_min: float = 1.0,
    ):
        _check_channels(channels)
        _check_columns(dataset, [image_column] + ([label_column] if num_classes else []))
        self.labels = np.asarray(dataset[label_column]) if num_classes else np.zeros(len(dataset), dtype=np.int64)
        _check_labels(self.labels, num_classes or 1, label_column, complete)
        self.dataset, self.image_column, self.label_column = dataset, image_column, label_column
        self.size, self.channels, self.crop_area_min = size, channels, crop_area_min
        self.names = label_names(dataset, label_column) if num_classes else None
        self.gather([0])

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "c h w"], int]:
        return self.tensor(index, self._read([index])[0]), int(self.labels[index])

    def gather(self, rows: Sequence[int]) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        rows = list(rows)
        images = [self.tensor(row, image) for row, image in zip(rows, self._read(rows), strict=True)]
        return torch.stack(images), torch.as_tensor(self.labels[rows], dtype=torch.long)

    def varied(self, rows: Sequence[int], seeds: Sequence[Sequence[int]], *, flip: bool) -> Float[Tensor, "n c h w"]:
        images = self.gather(rows)[0] if self.crop_area_min == 1 else self._cropped(list(rows), seeds)
        if not flip:
            return images
        mirrored = torch.tensor(coins(seeds))[:, None, None, None]
        return torch.where(mirrored, images.flip(3), images)

    def _cropped(self, rows: list[int], seeds: Sequence[Sequence[int]]) -> Float[Tensor, "n c h w"]:
        rngs = generators([(*seed, 1) for seed in seeds])  # the coin of a seed throws with the seed alone
        crops = [functools.partial(random_box, area_min=self.crop_area_min, rng=rng) for rng in rngs]
        return torch.stack([self.tensor(*shown) for shown in zip(rows, self._read(rows), crops, strict=True)])

    def _read(self, rows: Sequence[int]) -> list[Any]:
        """The entries of these rows, decoded; the first that cannot be is named."""
        try:
            return list(self.dataset[list(rows)][self.image_column])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises for files it cannot read
            if len(rows) == 1:
                raise ValueError(
                    f"row {rows[0]} of column {self.image_column!r} cannot be read: {error}; leave it out with dataset.select"
                ) from error
        return [image for row in rows for image in self._read([row])]

    def tensor(self, row: int, image: Any, crop: Callable[[int, int], Box] | None = None) -> Float[Tensor, "c h w"]:
        """An image that came as this row, or a part of it, in the form of the others."""
        return named_tensor(row, image, column=self.image_column, size=self.size, channels=self.channels, crop=crop)


def named_tensor(
    row: int, image: Any, *, column: str, size: tuple[int, int], channels: int, crop: Callable[[int, int], Box] | None = None
) -> Float[Tensor, "c h w"]:
    """`to_tensor` of what came as this row, which is named where it is no image that can be read."""
    where = f"row {row} of column {column!r}"
    if not isinstance(image, Image.Image):
        raise TypeError(f"{where} must be an image, got {_kind(image)}: {_way_out(image, column)}")
    try:
        return to_tensor(image, size, channels, crop)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


class ShuffledOrder:
    """Endless batches of indices, each pass over the n items in an order of its own. Batch k is a function of (seed, k): resuming needs only k."""

    def __init__(self, n: int, batch_size: int, *, seed: int, position: int = 0):
        self.n, self.batch_size, self.seed, self.position = n, batch_size, seed, position

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0)
        for first in itertools.count(self.position * self.batch_size, self.batch_size):
            batch = []
            for k in range(first, first + self.batch_size):
                if k // self.n != epoch:
                    epoch = k // self.n
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
                batch.append(int(order[k % self.n]))
            yield batch


def _kind(entry: Any) -> str:
    if entry is None:
        return "None"
    return f"{type(entry).__name__} {entry!r}"[:80] if isinstance(entry, str | dict) else type(entry).__name__


def _way_out(entry: Any, column: str) -> str:
    if entry is None:
        return f"leave such rows out, dataset.filter(lambda row: row[{column!r}] is not None)"
    if isinstance(entry, str | bytes | dict):
        return f"take dataset.cast_column({column!r}, datasets.Image())"
    return f"take dataset.with_format(None), and dataset.cast_column({column!r}, datasets.Image()) where the column is no image column yet"


def _check_channels(channels: int) -> None:
    if channels not in MODES:
        raise ValueError(f"images have {tuple(MODES)} channels, got {channels}; latents are not images: cache them with a VAE first")


def _check_columns(dataset: Dataset, columns: list[str]) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"a dataset must be a map-style datasets.Dataset, got {type(dataset).__name__}; load it with split=... and streaming=False"
        )
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the dataset has no column {missing[0]!r}; its columns are {dataset.column_names}: set image_column and label_column"
        )
    if not len(dataset):
        raise ValueError("the dataset is empty")


def _check_labels(labels: np.ndarray, num_classes: int, label_column: str, complete: bool) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"column {label_column!r} must hold integers, got {labels.dtype}; use dataset.class_encode_column({label_column!r})"
        )
    if labels.min() < 0:
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got {labels.min()} in column {label_column!r}, which often means no label: "
            f"leave such rows out, dataset.filter(lambda row: row[{label_column!r}] >= 0)"
        )
    if labels.max() >= num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got values from {labels.min()} to {labels.max()}; build the network with num_classes={labels.max() + 1}"
        )
    empty = sorted(set(range(num_classes)) - set(np.unique(labels).tolist()))
    if empty and complete:
        raise ValueError(f"classes {empty} have no image; remove them from the labels or build the generator with fewer num_classes")
