r"""The real samples of every step: which labels it has, what is drawn for them, and what a checkpoint must know of it.

Everything is a function of (seed, step, place in the step), so it does not depend on how many processes share the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import IterableDataset
from torch import Tensor

from .bank import SampleBank, restored
from .config import DriftingConfig
from .data import LabelledImages, RealSamples, label_names
from .encoded import Repeated, Samples, converted
from .shapes import Int
from .sources import Ahead, BankFeed, DatasetFeed, Drawable, Feed
from .streams import StreamFeed

LABELS, REAL, NOISE, EVAL = range(4)
"""What a stream of random numbers is for: the first part of its name."""


def random_stream(seed: int, *name: int) -> torch.Generator:
    """Random numbers of their own for every purpose, step and place."""
    words = np.random.SeedSequence((seed, *name)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(words) >> 1)


@dataclass(frozen=True)
class Drawn:
    """The real samples of one step on one process, and the state of where they came from once they were drawn.

    Attributes:
        labels: [l], of this process.
        attracting: [l, p, ...], as banks keep them, what was drawn more than once there once.
        repelling: [l, m, ...]; none without guidance.
        state: of the feed.
    """

    labels: Tensor
    attracting: Samples
    repelling: Samples | None
    state: dict[str, Any]

    @property
    def positives(self) -> Tensor:
        """[l, p, ...], repeats and all."""
        return _dense(self.attracting)

    @property
    def negatives(self) -> Tensor | None:
        """[l, m, ...], repeats and all."""
        return None if self.repelling is None else _dense(self.repelling)


class RealDraws:
    """Draws the real samples of the steps, in order, each while the step before runs.

    Args:
        feed: where they come from.
        config: how many of what.
        classes: of the generator; 1 without classes.
        slots: this process's places in a step.
        device: of the training.
    """

    def __init__(self, feed: Feed, config: DriftingConfig, *, classes: int, slots: range, device: torch.device):
        self.feed, self.config, self.classes, self.slots, self.device = feed, config, classes, slots, device
        self._state: dict[str, Any] = {}
        self._ahead: Ahead[Drawn] | None = None

    def of_step(self, step: int) -> Drawn:
        """The real samples of this step; those of the next are begun. Steps come in order, and one that was left in its middle may come again."""
        if self._ahead is None:
            self._ahead = Ahead(self._draw, self.config.max_steps if self.feed.ahead else 0)
        drawn = self._ahead(step)
        self._state = drawn.state
        return drawn

    def _draw(self, step: int) -> Drawn:
        config = self.config
        labels = self.labels_of(step, self.feed.advance(step))[list(self.slots)]
        rngs = [random_stream(config.seed, REAL, step, slot) for slot in self.slots]
        positives, negatives = drawn_from(self.feed.positives, labels, config.positives_per_label, rngs), None
        if self.feed.negatives is not None:
            negatives = drawn_from(self.feed.negatives, torch.zeros_like(labels), config.unconditional_per_label, rngs)
        if self.device.type == "cuda":  # pinned memory is copied while a step runs
            positives, negatives = (None if real is None else converted(real, _pinned) for real in (positives, negatives))
        return Drawn(labels, cast(Samples, positives), negatives, self.feed.state_dict() if self.feed.ahead else {})

    def labels_of(self, step: int, fresh: Int[Tensor, " n"]) -> Int[Tensor, " l"]:
        """The labels of the whole step, the same on every process: distinct ones while there are enough, else whole rounds of all first."""
        wanted, rng = self.config.labels_per_step, random_stream(self.config.seed, LABELS, step)
        choices = fresh if self.config.labels_from == "data" else torch.arange(self.classes)
        rounds = [torch.randperm(len(choices), generator=rng) for _ in range(-(-wanted // len(choices)))]
        return choices[torch.cat(rounds)[:wanted]]

    def on_device(self, real: Samples) -> Samples:
        """What was drawn, in float32 where it is needed."""
        return converted(real, lambda samples: restored(samples.to(self.device, non_blocking=True)))

    def close(self) -> None:
        """Wait for what is being drawn, and let go of threads and workers; a run that goes on finds what was drawn."""
        if self._ahead is not None:
            self._ahead.close()
        self.feed.close()

    def state_dict(self) -> dict[str, Any]:
        """As it was when the last step was drawn, though the next one may be there already."""
        return self._state if self.feed.ahead else self.feed.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self._state, self._ahead = state, None
        self.feed.load_state_dict(state)


def drawn_from(source: Drawable, labels: Int[Tensor, " l"], n: int, rngs: Sequence[torch.Generator]) -> Samples:
    """N samples of each label, each label's with its own random numbers.

    A sample of a bank that was drawn for several labels is there once. Rows of a dataset are each drawn with a chance of their own (mirrored or not, the
    noise of a latent), so no two are the same.
    """
    each = list(zip(labels.split(1), rngs, strict=True))
    if not isinstance(source, SampleBank):
        return torch.cat([source.draw(label, n, generator=rng) for label, rng in each])
    return source.at(labels, torch.cat([source.places(label, n, generator=rng) for label, rng in each]))


def _dense(samples: Samples) -> Tensor:
    return samples.dense if isinstance(samples, Repeated) else samples


def _pinned(samples: Tensor) -> Tensor:
    return samples.pin_memory() if samples.device.type == "cpu" else samples


def make_feed(
    data: RealSamples | IterableDataset,
    held_out: RealSamples,
    config: DriftingConfig,
    *,
    pack: Callable[[Tensor], Tensor] | None,
    classes: int,
    device: torch.device,
    progress: bool,
) -> Feed:
    """The feed that a config asks for.

    Args:
        data: real samples, or a stream of images.
        held_out: of the same form; what rows of a stream are read like.
        config: of the run.
        pack: what banks that cache features keep of samples; none without them.
        classes: of the generator; 1 without classes.
        device: of the training.
        progress: whether to show how far filling is.

    Raises:
        ValueError: for a stream that is to be read at random, or that is not of images.
    """
    common: dict[str, Any] = {"push_per_step": config.push_per_step, "seed": config.seed, "flip": config.random_flip}
    banks: dict[str, Any] = common | {
        "pack": pack if pack is not None and config.cache_features is True else _as_it_is,
        "num_classes": classes,
        "capacity": config.bank_size,
        "unconditional_capacity": config.unconditional_bank_size if config.unconditional_per_label else 0,
        "dtype": getattr(torch, config.bank_dtype),
        "device": device if config.bank_device == "accelerator" else "cpu",
        "progress": progress,
    }
    if isinstance(data, RealSamples):
        if config.positives_from == "dataset":
            return DatasetFeed(data, unconditional=bool(config.unconditional_per_label), **common)
        return _with_cached_negatives(BankFeed(data, workers=config.dataloader_num_workers, **banks), config, pack, data)
    if config.positives_from == "dataset":
        raise ValueError("positives_from='dataset' reads at random, which a stream cannot: take positives_from='bank'")
    if not isinstance(held_out, LabelledImages):
        raise ValueError(f"a stream is of images, so eval_dataset must be images too, got {type(held_out).__name__}")
    return _with_cached_negatives(StreamFeed(data, held_out, least=config.positives_per_label, **banks), config, pack, held_out)


def _as_it_is(samples: Tensor) -> Tensor:
    return samples


def _with_cached_negatives(
    feed: BankFeed | StreamFeed, config: DriftingConfig, pack: Callable[[Tensor], Tensor] | None, data: RealSamples
) -> Feed:
    """The feed with features in the bank of negatives alone, if the config says so; samples are packed there as they come."""
    there = feed.negatives
    if config.cache_features == "negatives" and pack is not None and there is not None:
        shape = tuple(pack(data.gather([0])[0]).shape[1:])
        feed.negatives = SampleBank(1, there.capacity, shape, dtype=there.samples.dtype, device=there.samples.device, pack=pack)
    return feed


def as_samples(dataset: Any, *, size: tuple[int, int], channels: int, num_classes: int, config: DriftingConfig) -> RealSamples:
    """A dataset as samples of the generator's form.

    Raises:
        ValueError: for samples of another form.
    """
    if isinstance(dataset, RealSamples):
        if (dataset.size, dataset.channels) != (size, channels):
            raise ValueError(
                f"the generator makes samples of {channels} x {size[0]} x {size[1]}, and the dataset has {dataset.channels} x {dataset.size[0]} x "
                f"{dataset.size[1]}: build it with that sample_size and in_channels"
            )
        _check_classes(dataset.labels, num_classes)
        return dataset
    if channels not in (1, 3):
        raise ValueError(
            f"images have 1 or 3 channels and so must noise and samples, got {channels}; build the generator with in_channels=1 or 3, or "
            "train it on a LatentCache"
        )
    columns: dict[str, Any] = {"image_column": config.image_column, "label_column": config.label_column}
    return LabelledImages(dataset, size=size, channels=channels, num_classes=num_classes, **columns)


def class_names(train: Any, held_out: Any, label_column: str) -> list[str] | None:
    """The names of the classes; both datasets must agree on them.

    Raises:
        ValueError: where they do not.
    """
    ours, theirs = (d.names if isinstance(d, RealSamples) else label_names(d, label_column) for d in (train, held_out))
    if ours != theirs:
        raise ValueError(f"train_dataset and eval_dataset must have the same classes in the same order, got {ours} and {theirs}")
    return cast(list[str] | None, ours)


def _check_classes(labels: np.ndarray, num_classes: int) -> None:
    """As images are checked: labels in range, every class there."""
    top = int(labels.max())
    if int(labels.min()) < 0 or top >= max(1, num_classes):
        raise ValueError(
            f"samples have labels from {labels.min()} to {top}, and the generator has num_classes={num_classes}: build it with num_classes={top + 1}"
        )
    empty = sorted(set(range(num_classes)) - set(np.unique(labels).tolist()))
    if empty:
        raise ValueError(f"classes {empty} have no sample; build the generator with the classes there are")
