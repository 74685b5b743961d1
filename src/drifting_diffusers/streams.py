r"""Real images from a stream (`load_dataset(..., streaming=True)`): what is too large for a disk flows through the banks once per pass.

A stream cannot be read at random, so its checkpoints hold the banks themselves, with its position; it is read in the order in which it comes, which
should not be sorted by class.
"""

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor
from tqdm.auto import tqdm

from .bank import SampleBank
from .data import LabelledImages
from .image_streams import ImageStream, TrainingStream
from .shapes import Int

Fresh = tuple[Tensor, Tensor]


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
        progress: whether to show how far filling is.
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
        images = ImageStream(
            dataset,
            size=view.size,
            channels=view.channels,
            image_column=view.image_column,
            label_column=view.label_column,
            num_classes=num_classes if num_classes > 1 else 0,
        )
        self.stream = TrainingStream(images, batch_size=push_per_step, seed=seed, flip=flip, crop_area_min=1.0)
        self.least, self.pack, self.progress = least, pack, progress
        shape = tuple(pack(view.gather([0])[0]).shape[1:])
        bank = lambda classes, size: SampleBank(classes, size, shape, dtype=dtype, device=device)
        self.positives = bank(num_classes, capacity)
        self.negatives = bank(1, unconditional_capacity) if unconditional_capacity else None
        self.batches = self._read = 0  # that are in the banks; that were read
        self._parts: Generator | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._next: Future[Fresh] | None = None

    def fill(self) -> None:
        """Read until every class has `least` samples.

        Raises:
            LookupError: if a whole pass has too few of some class.
        """
        with tqdm(desc="filling the bank", unit="batch", leave=False, dynamic_ncols=True, disable=not self.progress) as shown:
            while int(self.positives.count.min()) < self.least:
                shown.update()
                if self.stream.positions[self.batches]["passes"]:
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
        if self._parts is not None:
            self._parts.close()
            self._parts = None

    def _push(self, fresh: Fresh) -> Int[Tensor, " n"]:
        samples, labels = fresh
        kept = self.pack(samples)
        self.positives.push(kept, labels)
        if self.negatives is not None:
            self.negatives.push(kept, torch.zeros_like(labels))
        self.batches += 1
        return labels

    def _fresh(self) -> Fresh:
        """The next images and labels."""
        size = self.stream.batch_size
        if self._parts is None:
            self._parts = self.stream.parts(self._read, range(size), size, threads=2)
        samples, labels, _ = next(self._parts)
        self._read += 1
        return samples, labels

    def state_dict(self) -> dict[str, Any]:
        banks = {"positives": self.positives, "negatives": self.negatives}
        where = {"batches": self.batches, "position": self.stream.positions[self.batches]}
        return where | {name: bank.state_dict() for name, bank in banks.items() if bank is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._next is not None:
            self._next.result()  # nothing else reads while the stream is moved
            self._next = None
        self.positives.load_state_dict(state["positives"])
        if self.negatives is not None:
            self.negatives.load_state_dict(state["negatives"])
        self.close()
        self.batches = self._read = state["batches"]
        self.stream.positions = {self.batches: state["position"]}
