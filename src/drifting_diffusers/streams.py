r"""Real images from a stream (`load_dataset(..., streaming=True)`): what is too large for a disk flows through the banks once per pass.

A stream cannot be read at random, so its checkpoints hold the banks themselves, with its position; it is read in the order in which it comes, which
should not be sorted by class.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from datasets import IterableDataset
from torch import Tensor

from .bank import SampleBank
from .data import LabelledImages, coin
from .shapes import Float, Int

Fresh = tuple[Tensor, Tensor, dict[str, Any]]


class StreamFeed:
    """Banks of recent samples that a stream of images flows into; see `BankFeed`. The images of the next step are read while a step runs.

    Args:
        dataset: rows with an image and a label.
        view: how an image becomes a tensor, and which columns there are.
        least: samples that every class must have before step 0.
        pack: what banks keep of samples, [n, c, h, w] -> [n, ...].
        num_classes: of the data; 1 without classes.
        capacity: samples kept per class.
        unconditional_capacity: samples of any class kept for guidance; 0 for none.
        push_per_step: fresh samples per step.
        seed: of the mirroring.
        flip: whether half of the samples are mirrored.
        dtype: of the banks.
        device: of the banks.
        progress: whether to say what is waited for.
    """

    ahead = False

    def __init__(
        self,
        dataset: IterableDataset,
        view: LabelledImages,
        *,
        least: int,
        pack: Callable[[Tensor], Tensor],
        num_classes: int,
        capacity: int,
        unconditional_capacity: int,
        push_per_step: int,
        seed: int,
        flip: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        progress: bool = True,
    ):
        _check_columns(dataset, {"image_column": view.image_column} | ({"label_column": view.label_column} if num_classes > 1 else {}))
        self.dataset = copy.copy(dataset)  # where it stands is ours alone
        self.dataset.load_state_dict(cast(Any, None))
        self.view, self.least, self.pack = view, least, pack
        self.push_per_step, self.seed, self.flip, self.progress = push_per_step, seed, flip, progress
        shape = tuple(pack(view.gather([0])[0]).shape[1:])
        bank = lambda classes, size: SampleBank(classes, size, shape, dtype=dtype, device=device)
        self.positives = bank(num_classes, capacity)
        self.negatives = bank(1, unconditional_capacity) if unconditional_capacity else None
        self.read = self.passes = 0  # images so far; whole passes so far
        self._position: dict[str, Any] = {"read": 0, "passes": 0, "stream": None}  # after what is in the banks
        self._rows = self._stream(resumed=False)
        self._pool: ThreadPoolExecutor | None = None
        self._next: Future[Fresh] | None = None

    def fill(self) -> None:
        """Read until every class has `least` samples.

        Raises:
            LookupError: if a whole pass has too few of some class.
        """
        while int(self.positives.count.min()) < self.least:
            if self.passes:
                counts = self.positives.count
                scarce = (counts < self.least).nonzero().flatten().tolist()
                raise LookupError(
                    f"a pass over the stream has fewer than {self.least} images of classes {scarce[:20]}: lower positives_per_label, or build the "
                    "generator for the classes there are"
                )
            self._push(self._fresh())

    def advance(self, step: int) -> Int[Tensor, " n"]:
        fresh = self._next.result() if self._next is not None else self._fresh()
        labels = self._push(fresh)
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._next = self._pool.submit(self._fresh)
        return labels

    def close(self) -> None:
        """Wait for what is being read and end the thread; what was read is kept for the next step."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None

    def _push(self, fresh: Fresh) -> Int[Tensor, " n"]:
        samples, labels, self._position = fresh
        kept = self.pack(samples)
        self.positives.push(kept, labels)
        if self.negatives is not None:
            self.negatives.push(kept, torch.zeros_like(labels))
        return labels

    def _fresh(self) -> Fresh:
        """The next images and labels, and where the stream is behind them."""
        rows = list(itertools.islice(self._rows, self.push_per_step))
        samples = torch.stack([self._tensor(self.read + i, row) for i, row in enumerate(rows)])
        labels = torch.tensor([self._label(self.read + i, row) for i, row in enumerate(rows)])
        self.read += len(rows)
        return samples, labels, {"read": self.read, "passes": self.passes, "stream": self.dataset.state_dict()}

    def _label(self, number: int, row: Mapping[str, Any]) -> int:
        classes, column = len(self.positives.count), self.view.label_column
        if classes == 1:
            return 0
        label = row.get(column)
        if not isinstance(label, int | np.integer) or not 0 <= label < classes:
            raise ValueError(
                f"image {number} of the stream has the label {label!r} in column {column!r}, and labels must be integers in [0, {classes}): set "
                "label_column, or leave such rows out, dataset.filter(...)"
            )
        return int(label)

    def _tensor(self, number: int, row: Mapping[str, Any]) -> Float[Tensor, "c h w"]:
        image = self.view.tensor(number, row.get(self.view.image_column))
        return image.flip(2) if self.flip and coin((self.seed, number)) else image

    def _stream(self, *, resumed: bool) -> Iterator[Mapping[str, Any]]:
        """Pass after pass; one that was resumed may have ended already."""
        while True:
            empty = not resumed
            resumed = False
            self.dataset.set_epoch(self.passes)
            for row in self.dataset:
                empty = False
                yield row
            if empty:
                raise ValueError("the stream is empty: there is nothing to train on")
            self.passes += 1

    def state_dict(self) -> dict[str, Any]:
        banks = {"positives": self.positives, "negatives": self.negatives}
        return {"position": self._position} | {name: bank.state_dict() for name, bank in banks.items() if bank is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._next is not None:
            self._next.result()  # nothing else reads while the stream is moved
            self._next = None
        self.positives.load_state_dict(state["positives"])
        if self.negatives is not None:
            self.negatives.load_state_dict(state["negatives"])
        self._position = state["position"]
        self.read, self.passes = self._position["read"], self._position["passes"]
        if self._position["stream"] is not None:
            self.dataset.load_state_dict(self._position["stream"])
        self._rows = self._stream(resumed=self._position["stream"] is not None)


def _check_columns(dataset: IterableDataset, wanted: Mapping[str, str]) -> None:
    """Of a stream that says what it holds; many of the Hub do not."""
    for name, column in wanted.items():
        if dataset.column_names is not None and column not in dataset.column_names:
            raise ValueError(f"the stream has no column {column!r}; its columns are {dataset.column_names}: set {name}")
