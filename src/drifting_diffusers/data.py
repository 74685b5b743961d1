"""From a `datasets.Dataset` to (image in [-1, 1], label), in an order that is a function of the seed and the position alone."""

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from PIL import Image, ImageOps
from torch import Tensor

from .shapes import Float, Int

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels of a sample -> the PIL mode its image is read in


def to_tensor(image: Image.Image, size: tuple[int, int], channels: int) -> Float[Tensor, "c h w"]:
    """The image in [-1, 1], its shorter side resized (Lanczos) and its centre cropped to (height, width) where it is not that size already."""
    if channels not in MODES:
        raise ValueError(f"images have {tuple(MODES)} channels, got {channels}; latents are not images: cache them with a VAE first")
    height, width = size
    image = image.convert(MODES[channels])
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(height, width, channels)
    return pixels.permute(2, 0, 1) / 127.5 - 1


def label_names(dataset: Dataset, label_column: str) -> list[str] | None:
    """The names of a ClassLabel column; None where labels are plain integers."""
    feature = dataset.features[label_column]
    return list(feature.names) if isinstance(feature, ClassLabel) else None


class LabelledImages:
    """A checked view of a dataset: labelled images of one size.

    Args:
        dataset: a map-style dataset with images and integer labels.
        size: (height, width) of the tensors.
        channels: 1 for grey, 3 for RGB.
        num_classes: labels must lie in [0, num_classes) and every class must have an image; 0 ignores labels (all become 0).
        image_column: the column of images.
        label_column: the column of labels.

    Raises:
        ValueError: for missing columns, labels out of range, or classes without an image.
    """

    def __init__(self, dataset: Dataset, *, size: tuple[int, int], channels: int, num_classes: int, image_column: str, label_column: str):
        _check_columns(dataset, [image_column] + ([label_column] if num_classes else []))
        self.labels = np.asarray(dataset[label_column]) if num_classes else np.zeros(len(dataset), dtype=np.int64)
        _check_labels(self.labels, num_classes or 1, label_column)
        self.dataset, self.image_column, self.size, self.channels = dataset, image_column, size, channels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "c h w"], int]:
        return to_tensor(self.dataset[index][self.image_column], self.size, self.channels), int(self.labels[index])

    def gather(self, indices: list[int]) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """The images and labels at these positions."""
        images = [to_tensor(image, self.size, self.channels) for image in self.dataset[indices][self.image_column]]
        return torch.stack(images), torch.as_tensor(self.labels[indices], dtype=torch.long)

    def starters(self, n: int, *, seed: int) -> list[int]:
        """The positions of n images of every class (all where it has fewer), shuffled: what a bank starts with."""
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
        """The first n images of every class, class by class; fewer where a class has fewer."""
        chosen = [np.flatnonzero(self.labels == label)[:n] for label in np.unique(self.labels)]
        return self.gather(np.concatenate(chosen).tolist())


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


def _check_columns(dataset: Dataset, columns: list[str]) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"train_dataset must be a datasets.Dataset, got {type(dataset).__name__}; load it with split=... and streaming=False"
        )
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the dataset has no column {missing[0]!r}; its columns are {dataset.column_names}: set image_column and label_column"
        )
    if not len(dataset):
        raise ValueError("the dataset is empty")


def _check_labels(labels: np.ndarray, num_classes: int, label_column: str) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"column {label_column!r} must hold integers, got {labels.dtype}; use dataset.class_encode_column({label_column!r})"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got values from {labels.min()} to {labels.max()}; build the generator with num_classes={labels.max() + 1}"
        )
    empty = sorted(set(range(num_classes)) - set(np.unique(labels).tolist()))
    if empty:
        raise ValueError(f"classes {empty} have no image; remove them from the labels or build the generator with fewer num_classes")
