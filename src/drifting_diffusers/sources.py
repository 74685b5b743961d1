r"""Where the real samples of a step come from: banks that fresh samples flow into, or the dataset itself; drawn while the step before runs.

Every fresh sample has a number, its ticket: the row that it reads and all that chance decides of it (mirrored or not, the noise of a latent) are
functions of (seed, ticket). So the tickets that a bank holds are all that a checkpoint needs of it, one integer per sample, and every process that reads
the same tickets holds the same bank.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .bank import SampleBank
from .data import RealSamples
from .shapes import Float, Int

FILL_BATCH = 256  # tickets per read while banks are filled
Drawn = TypeVar("Drawn")


@runtime_checkable
class Drawable(Protocol):
    """What positives and unconditional negatives are drawn from."""

    def draw(self, labels: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
        """N samples of each label, [l, n, ...]; a LookupError for a class that has none."""
        ...


@runtime_checkable
class Feed(Protocol):
    """The real samples of a run."""

    @property
    def positives(self) -> Drawable:
        """Samples by class."""
        ...

    @property
    def negatives(self) -> Drawable | None:
        """Samples of any class, all under label 0."""
        ...

    @property
    def ahead(self) -> bool:
        """Whether the samples of a step may be drawn before the state of the step before is asked for."""
        ...

    def fill(self) -> None:
        """What is needed before step 0."""

    def advance(self, step: int) -> Tensor:
        """Take in the fresh samples of this step; steps come in order. Returns the labels of the fresh ones."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What this step needs to be resumed, apart from what later steps change."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None:
        """Let go of threads and workers; the next step may be asked for all the same."""


class Tickets:
    """The order of fresh samples: first the starters, then passes over all rows, each in an order of its own.

    Args:
        starters: rows that come first.
        n: rows of the dataset.
        seed: of the orders, and of what chance decides of a sample.
    """

    def __init__(self, starters: Sequence[int], n: int, *, seed: int):
        self.starters, self.n, self.seed = list(starters), n, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def rows(self, tickets: Sequence[int]) -> list[int]:
        """The row that each ticket reads."""
        first = len(self.starters)
        return [self.starters[t] if t < first else int(self._order_of((t - first) // self.n)[(t - first) % self.n]) for t in tickets]

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n)
        return self._order

    def seeds(self, tickets: Sequence[int]) -> list[tuple[int, int]]:
        """What decides the chance of each."""
        return [(self.seed, ticket) for ticket in tickets]

    def of_step(self, step: int, count: int) -> list[int]:
        """The `count` fresh tickets of a step."""
        first = len(self.starters) + step * count
        return list(range(first, first + count))


class TicketReader:
    """A dataset of torch whose indices are tickets: workers read it. Mirrors half of the samples with `flip`."""

    def __init__(self, data: RealSamples, tickets: Tickets, *, flip: bool):
        self.data, self.tickets, self.flip = data, tickets, flip

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, ticket: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.__getitems__([ticket])

    def __getitems__(self, tickets: list[int]) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"], Int[Tensor, " n"]]:
        rows = self.tickets.rows(tickets)
        samples = self.data.varied(rows, self.tickets.seeds(tickets), flip=self.flip)
        return samples, torch.as_tensor(self.data.labels[rows], dtype=torch.long), torch.tensor(tickets)

    def batches(self, batches: Sequence[list[int]] | Iterator[list[int]], workers: int) -> DataLoader:
        """Samples, labels and tickets of each batch of tickets."""
        own = torch.Generator()  # a loader without one draws from the global one, in a thread of its own, whenever that gets there
        return DataLoader(self, batch_sampler=batches, num_workers=workers, collate_fn=_as_it_is, generator=own)  # pyright: ignore[reportArgumentType]


def _as_it_is(batch: Any) -> Any:
    return batch


class BankFeed:
    """Banks of recent samples (arXiv 2602.04770, A.4); fresh ones flow into them at every step.

    Args:
        data: real samples.
        pack: what banks keep of samples, [n, c, h, w] -> [n, ...].
        num_classes: of the data; 1 without classes.
        capacity: samples kept per class.
        unconditional_capacity: samples of any class kept for guidance; 0 for none.
        push_per_step: fresh samples per step.
        seed: of their order.
        flip: whether half of them are mirrored.
        dtype: of the banks.
        device: of the banks.
        workers: processes that read.
        progress: whether to show how far filling is.
    """

    ahead = True

    def __init__(
        self,
        data: RealSamples,
        *,
        pack: Callable[[Tensor], Tensor],
        num_classes: int,
        capacity: int,
        unconditional_capacity: int,
        push_per_step: int,
        seed: int,
        flip: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        workers: int = 0,
        progress: bool = True,
    ):
        self.push_per_step, self.workers, self.pack, self.progress = push_per_step, workers, pack, progress
        self.tickets = Tickets(data.starters(capacity, seed=seed), len(data), seed=seed)
        self.reader = TicketReader(data, self.tickets, flip=flip)
        shape = tuple(pack(data.gather([0])[0]).shape[1:])
        bank = lambda classes, size: SampleBank(classes, size, shape, dtype=dtype, device=device)
        ring = lambda classes, size: SampleBank(classes, size, (), dtype=torch.long)  # the ticket of every sample, in the same place
        self.positives, self._positive_tickets = bank(num_classes, capacity), ring(num_classes, capacity)
        self.negatives = bank(1, unconditional_capacity) if unconditional_capacity else None
        self._negative_tickets = ring(1, unconditional_capacity) if unconditional_capacity else None
        self._stream: Iterator | None = None
        self._next = 0

    def fill(self) -> None:
        """The starters go into the banks, which are empty, or are again where this was interrupted."""
        for bank in (self.positives, self._positive_tickets, self.negatives, self._negative_tickets):
            if bank is not None:
                bank.next.zero_()
                bank.count.zero_()
        count = len(self.tickets.starters)
        batches = [list(range(i, min(i + FILL_BATCH, count))) for i in range(0, count, FILL_BATCH)]
        for batch in self._shown(self.reader.batches(batches, self.workers), len(batches), "filling the bank"):
            self._push(*batch)

    def advance(self, step: int) -> Int[Tensor, " n"]:
        if self._stream is None or step != self._next:
            self._stream = iter(self.reader.batches(self._steps_from(step), self.workers))
        self._next = step + 1
        samples, labels, tickets = next(self._stream)
        self._push(samples, labels, tickets)
        return labels

    def _steps_from(self, step: int) -> Iterator[list[int]]:
        while True:
            yield self.tickets.of_step(step, self.push_per_step)
            step += 1

    def _push(self, samples: Tensor, labels: Tensor, tickets: Tensor) -> None:
        kept, anything = self.pack(samples), torch.zeros_like(labels)
        self.positives.push(kept, labels)
        self._positive_tickets.push(tickets, labels)
        if self.negatives is not None and self._negative_tickets is not None:
            self.negatives.push(kept, anything)
            self._negative_tickets.push(tickets, anything)

    def state_dict(self) -> dict[str, Any]:
        rings = {"positives": self._positive_tickets, "negatives": self._negative_tickets}
        return {name: {key: value.clone() for key, value in ring.state_dict().items()} for name, ring in rings.items() if ring is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read again what the banks held."""
        self._restore(self.positives, self._positive_tickets, state["positives"])
        if self.negatives is not None and self._negative_tickets is not None:
            self._restore(self.negatives, self._negative_tickets, state["negatives"])
        self._stream = None

    def _restore(self, bank: SampleBank, ring: SampleBank, state: Mapping[str, Tensor]) -> None:
        ring.load_state_dict(dict(state))
        held = torch.arange(ring.capacity) < ring.count[:, None]  # (classes, capacity)
        classes, places = held.nonzero(as_tuple=True)
        order = ring.samples[held].argsort()  # epoch by epoch: each has an order of all rows, which is not made twice
        classes, places, tickets = classes[order], places[order], ring.samples[held][order].tolist()
        batches = [tickets[i : i + FILL_BATCH] for i in range(0, len(tickets), FILL_BATCH)]
        first = 0
        for samples, labels, _ in self._shown(self.reader.batches(batches, self.workers), len(batches), "filling the bank again"):
            here = slice(first, first + len(labels))
            bank.put(classes[here], places[here], self.pack(samples))
            first += len(labels)
        bank.next.copy_(ring.next)
        bank.count.copy_(ring.count)

    def close(self) -> None:
        """Ends the workers; what they read ahead is read again."""
        self._stream = None

    def _shown(self, batches: DataLoader, count: int, what: str) -> Any:
        return tqdm(batches, total=count, desc=what, unit="batch", leave=False, dynamic_ncols=True, disable=not self.progress)


class RowSource:
    """Any sample of a class, read from the dataset when it is drawn: nothing to fill. For data that can be read at random, such as latent caches.

    Args:
        data: real samples.
        labels: the class of every row.
        flip: whether half of the samples are mirrored.
    """

    def __init__(self, data: RealSamples, labels: np.ndarray, *, flip: bool):
        self.data, self.flip = data, flip
        order = np.argsort(labels, kind="stable")
        classes, firsts = np.unique(labels[order], return_index=True)
        self.rows = dict(zip(classes.tolist(), np.split(order, firsts[1:]), strict=True))

    def draw(self, labels: Int[Tensor, " l"], n: int, *, generator: torch.Generator) -> Float[Tensor, "l n c h w"]:
        """N samples of each label: distinct rows where the class has n of them, else with repeats.

        Raises:
            LookupError: for a class without a row.
        """
        missing = sorted({int(label) for label in labels if int(label) not in self.rows})
        if missing:
            raise LookupError(f"classes {missing} have no row in the dataset: add samples of them, or leave these labels out of the step")
        chosen = np.concatenate([self._rows(self.rows[int(label)], n, generator) for label in labels])
        seeds = torch.randint(2**62, (len(chosen),), generator=generator).tolist()
        return self.data.varied(chosen.tolist(), [(seed,) for seed in seeds], flip=self.flip).unflatten(0, (len(labels), n))

    def _rows(self, rows: np.ndarray, n: int, generator: torch.Generator) -> np.ndarray:
        if n > len(rows):
            return rows[torch.randint(len(rows), (n,), generator=generator).numpy()]
        if len(rows) > 8 * n:  # a permutation of a million rows for 32 of them would take longer than reading these
            return rows[_distinct(len(rows), n, generator)]
        return rows[torch.randperm(len(rows), generator=generator)[:n].numpy()]


def _distinct(count: int, n: int, generator: torch.Generator) -> np.ndarray:
    """N different numbers below count, uniformly: draw until there are enough."""
    found: dict[int, None] = {}
    while len(found) < n:
        found |= dict.fromkeys(torch.randint(count, (n,), generator=generator).tolist())
    return np.array(list(found)[:n])


class DatasetFeed:
    """Real samples straight from the dataset; see `RowSource`. It has no state.

    Args:
        data: real samples.
        unconditional: whether negatives of any class are drawn too.
        push_per_step: how many labels `advance` tells, in the order in which a bank would take in their samples.
        seed: of that order.
        flip: whether half of the samples are mirrored.
    """

    ahead = True

    def __init__(self, data: RealSamples, *, unconditional: bool, push_per_step: int, seed: int, flip: bool):
        self.data, self.push_per_step, self.tickets = data, push_per_step, Tickets([], len(data), seed=seed)
        self.positives = RowSource(data, data.labels, flip=flip)
        self.negatives = RowSource(data, np.zeros(len(data), dtype=np.int64), flip=flip) if unconditional else None

    def fill(self) -> None:
        """Nothing to fill."""

    def advance(self, step: int) -> Int[Tensor, " n"]:
        rows = self.tickets.rows(self.tickets.of_step(step, self.push_per_step))
        return torch.as_tensor(self.data.labels[rows], dtype=torch.long)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""

    def close(self) -> None:
        """Nothing to let go of."""


class Ahead(Generic[Drawn]):
    """Makes what the next step needs while a step runs, in a thread of its own; steps must be asked for in order, the last one any number of times.

    Args:
        make: from the number of a step; called once for each, never twice at the same time.
        last: nothing is made ahead for this step and later ones.
    """

    def __init__(self, make: Callable[[int], Drawn], last: int):
        self.make, self.last = make, last
        self._thread: threading.Thread | None = None
        self._made: dict[int, Future] = {}  # of the step that was asked for and the next

    def __call__(self, step: int) -> Drawn:
        if self._made and not min(self._made) <= step <= max(self._made) + 1:
            raise RuntimeError(f"step {max(self._made)} was made, and step {step} is asked for: close this one and make another")
        self._begin(step)
        made = self._made[step].result()
        if step + 1 < self.last:
            self._begin(step + 1)
        self._made.pop(step - 1, None)
        return made

    def _begin(self, step: int) -> None:
        if step not in self._made:
            self._made[step] = Future()
            self._thread = threading.Thread(target=self._make, args=(step, self._made[step]), name="real-samples")
            self._thread.start()

    def _make(self, step: int, made: Future) -> None:
        """In a plain thread: workers that are forked in one of a ThreadPoolExecutor try to join it when they exit, and so fail."""
        try:
            made.set_result(self.make(step))
        except BaseException as error:
            made.set_exception(error)

    def close(self) -> None:
        """Wait for what is being made. It is kept: whoever asks again goes on as if nothing had been closed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
