"""Recent real samples by class: what the generated ones are compared with (arXiv 2602.04770, A.4)."""

from collections.abc import Callable

import torch
from torch import Tensor

from .encoded import Repeated, Samples
from .shapes import Int


class SampleBank:
    """A ring buffer per class. The newest `capacity` samples of every class are kept; older ones are overwritten.

    Args:
        num_classes: classes; 1 for a bank of unconditional negatives, pushed with label 0.
        capacity: samples kept per class; the paper has 128, and 1000 for the unconditional bank.
        sample_shape: shape of one sample, as it is kept.
        dtype: what samples are stored in. uint8 is of images: [-1, 1] in 256 levels, exact for 8-bit images that were not resized.
        device: where they are stored; draws come from there.
        pack: what is kept of samples, [n, ...] -> [n, *sample_shape]; themselves if not given.
    """

    def __init__(
        self,
        num_classes: int,
        capacity: int,
        sample_shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pack: Callable[[Tensor], Tensor] | None = None,
    ):
        if num_classes < 1 or capacity < 1:
            raise ValueError(f"a bank needs at least one class and one place per class, got {num_classes} classes and capacity {capacity}")
        self.samples = torch.zeros(num_classes, capacity, *sample_shape, dtype=dtype, device=device)
        self.pack = pack
        self.next = torch.zeros(num_classes, dtype=torch.long)  # where the next sample of a class goes
        self.count = torch.zeros(num_classes, dtype=torch.long)  # how many places of a class are filled

    @property
    def capacity(self) -> int:
        return self.samples.shape[1]

    def push(self, samples: Tensor, labels: Int[Tensor, " n"]) -> None:
        """Store samples [n, ...] of the given classes, in order; see `stored` for how.

        Raises:
            ValueError: for shapes or labels that do not fit the bank; nothing is stored then.
        """
        samples = samples if self.pack is None else self.pack(samples)
        if samples.shape[1:] != self.samples.shape[2:] or labels.shape != samples.shape[:1]:
            raise ValueError(
                f"samples must be [n, {', '.join(map(str, self.samples.shape[2:]))}] with labels [n], got {list(samples.shape)} and {list(labels.shape)}"
            )
        self._check_labels(labels)
        samples = stored(samples.to(self.samples.device), self.samples.dtype)
        for label in labels.unique().tolist():
            new = samples[(labels == label).to(samples.device)][-self.capacity :]
            skipped = int((labels == label).sum()) - len(new)  # more than a whole ring: those would be overwritten at once
            places = (self.next[label] + skipped + torch.arange(len(new))) % self.capacity
            self.samples[label, places.to(samples.device)] = new
            self.next[label] = (self.next[label] + skipped + len(new)) % self.capacity
            self.count[label] = min(self.capacity, int(self.count[label]) + skipped + len(new))

    def put(self, labels: Int[Tensor, " n"], places: Int[Tensor, " n"], samples: Tensor) -> None:
        """Store samples [n, ...] in these places of the rings; what is the newest and how many there are does not change."""
        device, samples = self.samples.device, samples if self.pack is None else self.pack(samples)
        self.samples[labels.to(device), places.to(device)] = stored(samples.to(device), self.samples.dtype)

    def draw(self, labels: Int[Tensor, " l"], n: int, *, generator: torch.Generator) -> Tensor:
        """N samples of each label, [l, n, ...], as they are stored: distinct ones where the bank holds n of that class, else with repeats.

        Raises:
            ValueError: for no labels, labels that do not fit the bank, or n below 1.
            LookupError: for a class of which no sample was pushed yet. Zeros would train on black images.
        """
        return self.samples[labels[:, None].to(self.samples.device), self.places(labels, n, generator=generator).to(self.samples.device)]

    def places(self, labels: Int[Tensor, " l"], n: int, *, generator: torch.Generator) -> Int[Tensor, "l n"]:
        """Where in the ring of its class each sample of a draw is; errors are those of `draw`."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}: to draw nothing, do not call draw")
        if not len(labels):
            raise ValueError("labels are empty: give at least one class to draw from")
        self._check_labels(labels)
        missing = sorted({int(label) for label in labels if self.count[label] == 0})
        if missing:
            raise LookupError(f"no sample yet for classes {missing}: push them before drawing, or leave these labels out of the step")
        counts = self.count[labels].tolist()
        some = lambda count: (
            torch.randperm(count, generator=generator)[:n] if count >= n else torch.randint(count, (n,), generator=generator)
        )
        return torch.stack([some(count) for count in counts])

    def at(self, labels: Int[Tensor, " l"], places: Int[Tensor, "l n"]) -> Samples:
        """The samples at these places of the rings of these classes, [l, n, ...], every distinct one once where some repeat."""
        flat, samples = labels[:, None] * self.capacity + places, self.samples.flatten(0, 1)
        once, back = flat.unique(return_inverse=True)
        if len(once) == flat.numel():
            return samples[flat.to(samples.device)]
        return Repeated(samples[once.to(samples.device)], back)

    def _check_labels(self, labels: Tensor) -> None:
        if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < len(self.count)):
            raise ValueError(f"labels must lie in [0, {len(self.count)}), got values from {int(labels.min())} to {int(labels.max())}")

    def state_dict(self) -> dict[str, Tensor]:
        return {"samples": self.samples, "next": self.next, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["samples"].shape != self.samples.shape:
            raise ValueError(
                f"the saved bank is {list(state['samples'].shape)}, this one {list(self.samples.shape)}; build it with the saved classes and capacity"
            )
        self.samples.copy_(state["samples"])
        self.next.copy_(state["next"])
        self.count.copy_(state["count"])


def stored(samples: Tensor, dtype: torch.dtype) -> Tensor:
    """Samples as a bank keeps them: images in [-1, 1] as 0 to 255 in uint8, anything else cast."""
    if dtype == torch.uint8 and samples.is_floating_point():
        samples = ((samples.float() + 1) * 127.5).round().clamp(0, 255)
    return samples.to(dtype)


def restored(samples: Tensor) -> Tensor:
    """What a bank drew, in float32: images in [-1, 1] from uint8."""
    return samples.float() / 127.5 - 1 if samples.dtype == torch.uint8 else samples.float()
