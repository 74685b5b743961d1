"""The drift losses of many features of a step: features of equal shape in one call, scalars of all in two messages."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .fields import Drift, Mean, batch_mean
from .fields.stages import Call, finish_together
from .losses import NonFinite, drift_loss, drift_loss_stages

WAVE = 2**26
"""Entries [problems, queries, targets] of features that are in work together on a CPU: a message waits for all of a wave, and so does its memory."""
WAVE_ON_GPU = 2**29
BATCH = 2**24
"""Numbers that are copied to make one call of features of equal shape: small calls cost launches, large ones do not."""


@dataclass(frozen=True)
class Pair:
    """One feature of the generated and the real samples of a step.

    Attributes:
        name: of the feature.
        generated: [b, n, d].
        positives: [b, p, d].
        negatives: [b, m, d], or None.
        negative_weights: [b, m], or None where all are 1.
        field: of this feature and step.
    """

    name: str
    generated: Tensor
    positives: Tensor
    negatives: Tensor | None
    negative_weights: Tensor | None
    field: Any

    @property
    def entries(self) -> int:
        b, n, _ = self.generated.shape
        return b * n * (n + self.positives.shape[1] + (0 if self.negatives is None else self.negatives.shape[1]))

    @property
    def staged(self) -> bool:
        return bool(getattr(self.field, "staged", False))

    @property
    def kind(self) -> tuple:
        """What features of one call have in common."""
        shapes = tuple(None if t is None else (t.shape[1:], t.dtype) for t in (self.generated, self.positives, self.negatives))
        return (*shapes, self.negative_weights is None, self.field)


def waves(pairs: Iterable[Pair], mean: Mean) -> Iterator[list[Pair]]:
    """Features that are compared together: as many as fit, or one by one where nothing is won, on a processor that asks nobody else."""
    wave, entries = [], 0
    for pair in pairs:
        on_gpu = pair.generated.device.type != "cpu"
        if wave and entries + pair.entries > (WAVE_ON_GPU if on_gpu else WAVE):
            yield wave
            wave, entries = [], 0
        wave, entries = [*wave, pair], entries + pair.entries
        if mean is batch_mean and not on_gpu:
            yield wave
            wave, entries = [], 0
    if wave:
        yield wave


def compare(pairs: Sequence[Pair], mean: Mean) -> list[tuple[Tensor, Drift] | NonFinite]:
    """The loss [b] of every feature and what its field measured, or why there is none. Every process asks for as many means, whatever it meets."""
    if len(pairs) == 1 or not all(pair.staged and pair.field.grouping == "batch" for pair in pairs):
        return [_alone(pair, mean) for pair in pairs]
    groups = list(_groups(pairs))
    calls = [Call(_stages(group), tuple(len(pair.generated) for pair in group)) for group in groups]
    finish_together(calls, mean, (NonFinite,))
    found = {}
    for group, call in zip(groups, calls, strict=True):
        results: Any = [_alone(pair, batch_mean) for pair in group] if call.error else _split(call.result, call.sizes)
        if call.error and not any(isinstance(result, NonFinite) for result in results):  # another process's
            results = [call.error] * len(group)
        found |= {pair.name: result for pair, result in zip(group, results, strict=True)}
    return [found[pair.name] for pair in pairs]


def _alone(pair: Pair, mean: Mean) -> tuple[Tensor, Drift] | NonFinite:
    try:
        return drift_loss(
            pair.generated, pair.positives, pair.negatives, negative_weights=pair.negative_weights, field=pair.field, mean=mean
        )
    except NonFinite as error:
        return error


def _groups(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Features of one kind, up to what may be copied."""
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        group, numbers = [], 0
        for pair in (pair for pair in pairs if pair.kind == kind):
            size = sum(t.numel() for t in (pair.generated, pair.positives, pair.negatives) if t is not None)
            if group and numbers + size > BATCH:
                yield group
                group, numbers = [], 0
            group, numbers = [*group, pair], numbers + size
        yield group


def _stages(group: Sequence[Pair]) -> Any:
    """One call of all features of a group."""
    if len(group) == 1:
        parts: Any = group[0]
    else:
        one = lambda name: None if getattr(group[0], name) is None else torch.cat([getattr(pair, name) for pair in group])
        names = ("generated", "positives", "negatives", "negative_weights")
        parts = dataclasses.replace(group[0], **{name: one(name) for name in names})
    return drift_loss_stages(
        parts.generated, parts.positives, parts.negatives, negative_weights=parts.negative_weights, field=parts.field, mean=batch_mean
    )


def _split(result: tuple[Tensor, Drift], sizes: tuple[int, ...]) -> list[tuple[Tensor, Drift]]:
    """Of each feature: its losses, and its means, which all of its problems have."""
    loss, drift = result
    if len(sizes) == 1:
        return [(loss, drift)]
    parts = zip(
        *(t.split(sizes, dim=-1) for t in (loss, drift.unit, drift.distance, drift.strength)), drift.velocity.split(sizes), strict=True
    )
    return [(one, Drift(velocity, unit[0], distance[0], strength[..., 0])) for one, unit, distance, strength, velocity in parts]
