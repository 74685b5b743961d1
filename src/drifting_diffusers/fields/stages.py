"""Fields in stages, for steps of many features: what must be averaged over all problems of a step is asked for, not waited for.

A generator that yields (totals [..., b], weights [b]) and is sent their mean, as `Mean` would give it. So the scalars of all features travel in one message between
processes, and problems of several features are one call.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .protocol import Mean

Stages = Generator[tuple[Tensor, Tensor], Tensor, Any]
"""What returns its result in the end, a `Drift` or a loss."""


def finish(stages: Stages, mean: Mean) -> Any:
    """The result of one, with a message per mean."""
    try:
        totals, weights = next(stages)
        while True:
            totals, weights = stages.send(mean(totals, weights))
    except StopIteration as done:
        return done.value


@dataclass
class Call:
    """Stages of one call, over the problems of one feature or of several in a row.

    Attributes:
        stages: of the call.
        sizes: problems of each feature; with several, every problem is sent the mean of its feature.
        result: what the stages returned.
        error: what they raised.
    """

    stages: Stages
    sizes: tuple[int, ...]
    result: Any = None
    error: Exception | None = None

    def advance(self, answer: Tensor | None, failures: tuple[type[Exception], ...]) -> tuple[Tensor, Tensor] | None:
        """The next request, or None after the last."""
        try:
            return next(self.stages) if answer is None else self.stages.send(answer)
        except StopIteration as done:
            self.result = done.value
        except failures as error:
            self.error = error
        return None


def finish_together(calls: Sequence[Call], mean: Mean, failures: tuple[type[Exception], ...] = ()) -> None:
    """Results of several, with one message for all of their first means, one for all of their second, and so on; what one raises stops no other."""
    waiting = [(call, call.advance(None, failures)) for call in calls]
    while asked := [(call, request) for call, request in waiting if request is not None]:
        sums = [[_by_feature(part, call.sizes) for part in request] for call, request in asked]
        flat = torch.cat([part.flatten() for pair in sums for part in pair])
        reduced = mean(flat[:, None], flat.new_ones(1)).split([part.numel() for pair in sums for part in pair])  # over processes alone
        waiting = []
        for i, (call, _) in enumerate(asked):
            totals, weights = (found.view_as(part).to(part.dtype) for found, part in zip(reduced[2 * i :], sums[i], strict=False))
            waiting.append((call, call.advance(_to_problems(totals / weights, call.sizes), failures)))


def _by_feature(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[..., b] -> sums [..., f]."""
    return torch.stack([part.sum(-1) for part in values.split(sizes, dim=-1)], dim=-1)


def _to_problems(means: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[..., f] -> [...] for one feature, [..., b] for several."""
    if len(sizes) == 1:
        return means[..., 0]
    return torch.cat([means[..., i : i + 1].expand(*means.shape[:-1], size) for i, size in enumerate(sizes)], dim=-1)
