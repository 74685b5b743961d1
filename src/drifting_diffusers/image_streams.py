"""Images of a stream (`load_dataset(..., streaming=True)`): in the order in which they come, decoded where they are wanted, from wherever one stopped."""

import functools
import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from datasets import Image, IterableDataset
from PIL.Image import DecompressionBombError
from torch import Tensor

from .data import Box, coin, named_tensor, random_box
from .shapes import Float


class ImageStream:
    """Images of a stream as tensors, in [-1, 1], with labels that are checked.

    Args:
        dataset: rows with an image and an integer label. Of streams that say what they hold only those images are decoded that are asked for.
        size: (height, width) of the tensors.
        channels: 1 for grey, 3 for RGB, 4 for RGBA.
        image_column: the column of images.
        label_column: the column of labels.
        num_classes: labels must lie in [0, num_classes); without it they have no upper bound, and 0 ignores them (all become 0).
        max_samples: only so many images, the first; all if not given.

    Raises:
        TypeError: for a dataset of another kind.
        ValueError: for missing columns.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        *,
        size: tuple[int, int],
        channels: int,
        image_column: str,
        label_column: str,
        num_classes: int | None = None,
        max_samples: int | None = None,
    ):
        _check_stream(dataset, {"image_column": image_column} | ({} if num_classes == 0 else {"label_column": label_column}), max_samples)
        feature = (dataset.features or {}).get(image_column)
        self.image = feature if isinstance(feature, Image) and feature.decode else Image()
        self.rows = dataset.with_format(None)  # from its beginning, wherever the given one stands
        if dataset.features:
            self.rows = self.rows.cast_column(image_column, Image(mode=self.image.mode, decode=False))
        self.size, self.channels, self.num_classes, self.max_samples = size, channels, num_classes, max_samples
        self.image_column, self.label_column = image_column, label_column

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Images as they come, and labels."""
        for number, row in enumerate(islice(self.rows, self.max_samples)):
            yield row.get(self.image_column), self._label(number, row)

    def first(self, n: int) -> tuple[Float[Tensor, "n c h w"], list[int]]:
        """The first n images and their labels; fewer where there are not so many.

        Raises:
            ValueError: if there are none.
        """
        found = list(islice(self, n))
        if not found:
            raise ValueError("the stream is empty: it has no first image")
        return torch.stack([self.tensor(number, image) for number, (image, _) in enumerate(found)]), [label for _, label in found]

    def tensor(self, number: int, image: Any, crop: Callable[[int, int], Box] | None = None) -> Float[Tensor, "c h w"]:
        """The image that came as this row, or a part of it."""
        try:
            image = self.image.decode_example(image) if isinstance(image, dict) else image
        except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:  # what PIL raises for files it cannot read
            raise ValueError(
                f"row {number} of column {self.image_column!r} cannot be read: {error}; leave it out with dataset.filter"
            ) from error
        return named_tensor(number, image, column=self.image_column, size=self.size, channels=self.channels, crop=crop)

    def fingerprint(self) -> dict[str, Any]:
        """Of the first image, and its label: all that is known of a stream before it has passed by."""
        images, labels = self.first(1)
        return {"first_image": hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16], "first_label": labels[0]}

    def _label(self, number: int, row: Mapping[str, Any]) -> int:
        if self.num_classes == 0:
            return 0
        label, end = row.get(self.label_column), float("inf") if self.num_classes is None else self.num_classes
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or not 0 <= label < end:
            allowed = "[0, number of classes)" if self.num_classes is None else f"[0, {self.num_classes})"
            raise ValueError(
                f"row {number} of the stream has the label {label!r} in column {self.label_column!r}, and labels must be integers in {allowed}: "
                "set label_column, or leave such rows out, dataset.filter(...)"
            )
        return int(label)


class TrainingStream:
    """The batches of the steps of a training, pass after pass over a stream.

    What chance decides of an image is a function of (seed, its number); every process reads the whole stream and decodes its share of each batch.

    It goes on from the state that `datasets` keeps of a stream. That of a shuffled one does not hold its buffer, so there the pass is read again up to
    where it was, without decoding.

    Args:
        images: labels are checked as they come.
        batch_size: images of a step, of all processes together.
        seed: of crops and mirroring.
        flip: whether half of the images are mirrored.
        crop_area_min: the least share of its area that is shown of an image; 1 for no crops.

    Attributes:
        positions: step -> where the stream is before it; of the steps that may be asked for.
        size: (height, width) of the images.
        channels: of the images.
    """

    def __init__(self, images: ImageStream, *, batch_size: int, seed: int, flip: bool, crop_area_min: float):
        self.images, self.batch_size, self.seed, self.flip, self.crop_area_min = images, batch_size, seed, flip, crop_area_min
        self.positions: dict[int, dict[str, Any]] = {0: {"passes": 0, "rows": 0, "stream": None}}
        self._buffered = _has_buffer(images.rows._ex_iterable)
        self.size, self.channels = images.size, images.channels

    def fingerprint(self) -> dict[str, Any]:
        """Enough to tell one stream from most others: its first image and label."""
        return self.images.fingerprint()

    def parts(self, step: int, places: range, read: int, threads: int) -> Generator[tuple[Tensor, Tensor, Tensor]]:
        """Samples, labels and numbers of these places of the batch of this step and all later ones, up to `read` at a time.

        Args:
            step: where to begin.
            places: in a batch.
            read: images of a part; none reaches into another batch.
            threads: that decode, at least one.

        Raises:
            RuntimeError: for a step that the stream is behind of, or not at yet.
        """
        if step not in self.positions:
            raise RuntimeError(
                f"the stream stands before the steps {sorted(self.positions)}, and step {step} is asked for: load the checkpoint of that step"
            )
        rows = self._endless(self.positions[step])
        with ThreadPoolExecutor(threads, "decode") as pool:
            while True:
                batch = list(islice(rows, self.batch_size))
                state = None if self._buffered else self.images.rows.state_dict()
                self.positions[step + 1] = {"passes": batch[-1][0], "rows": batch[-1][1], "stream": state}
                for old in [known for known in self.positions if known < step - 1]:  # the step before may be under way
                    del self.positions[old]
                first = step * self.batch_size
                for i in range(places.start, places.stop, read):
                    part = range(i, min(i + read, places.stop))
                    numbers = [first + place for place in part]
                    shown = list(pool.map(self._varied, numbers, [batch[place][2] for place in part]))
                    yield torch.stack(shown), torch.tensor([batch[place][3] for place in part]), torch.tensor(numbers)
                step += 1

    def _endless(self, position: Mapping[str, Any]) -> Iterator[tuple[int, int, Any, int]]:
        """Of every row from there on the pass, how many of the pass there are up to it, the image and the label."""
        rows, passes, done, state = self.images.rows, position["passes"], position["rows"], position["stream"]
        rows.load_state_dict(cast(Any, state))  # None is its beginning
        while True:
            rows.set_epoch(passes)
            behind = 0 if state is None else done
            for image, label in self.images:
                behind += 1
                if behind > done:  # else the pass is read again up to where it was
                    yield passes, behind, image, label
            if behind == 0:
                raise ValueError("the stream is empty: there is nothing to train on")
            passes, done, state = passes + 1, 0, None

    def _varied(self, number: int, image: Any) -> Float[Tensor, "c h w"]:
        """As `LabelledImages.varied` shows images of the same seed."""
        seed, crop = (self.seed, number), None
        if self.crop_area_min < 1:
            crop = functools.partial(random_box, area_min=self.crop_area_min, rng=np.random.default_rng((*seed, 1)))
        shown = self.images.tensor(number, image, crop)
        return shown.flip(2) if self.flip and coin(seed) else shown


def _check_stream(dataset: IterableDataset, columns: Mapping[str, str], max_samples: int | None) -> None:
    if not isinstance(dataset, IterableDataset):
        raise TypeError(f"a stream must be a datasets.IterableDataset, got {type(dataset).__name__}: load it with streaming=True")
    for name, column in columns.items():
        if dataset.column_names is not None and column not in dataset.column_names:
            raise ValueError(f"the stream has no column {column!r}; its columns are {dataset.column_names}: set {name}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}: leave it out for all images")


def _has_buffer(part: Any) -> bool:
    """Whether rows come by way of a shuffle buffer, of which the states of `datasets` do not tell what it held."""
    if type(part).__name__ == "BufferShuffledExamplesIterable":
        return True
    return any(_has_buffer(each) for each in (getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())) if each is not None)
