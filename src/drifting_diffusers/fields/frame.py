r"""What kernel fields have in common: lengths measured in mean distances, one force per temperature, each divided by its rms, summed.

With s the w-weighted mean distance of queries and targets, in the coordinates x / s,

    V / s = sum_tau F_tau / rms(F_tau),      u = s / sqrt(d)  the unit of the loss      (arXiv 2602.04770, A.6)

A field of this frame is its force F. s and each rms are one number for the whole step, so problems are not independent: see `grouping` and `mean`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..kernels import LEAST_DISTANCE, distances, in_float, undisturbed
from ..schedules import Scheduled
from ..shapes import Float
from .choices import check_choice as check_choice
from .choices import check_field, check_temperatures, refuse_schedules, settle
from .choices import positive as positive
from .protocol import Drift, Mean, batch_mean, own_of

BLOCK = 2**24
"""Entries of the largest [queries, targets] block that a force is computed in: 64 MB in float32, whatever the number of samples."""
BLOCK_ON_CPU = 2**20
"""The same on a processor, where small blocks stay in the cache."""


@dataclass(frozen=True)
class Problems:
    """The problems of a step, or some rows (queries) of some of them: always three axes, at least float32, no missing masses but None for all 1.

    Attributes:
        x: queries [b, n, d].
        positives: [b, p, d].
        negatives: [b, m, d].
        positive_weights: [b, p], or None where all are 1.
        negative_weights: [b, m], or None where all are 1.
        own: how many of the leading negatives are the queries of the whole problem, in order.
        start: index of the first query of these rows in the whole problem.
    """

    x: Tensor
    positives: Tensor
    negatives: Tensor
    positive_weights: Tensor | None = None
    negative_weights: Tensor | None = None
    own: int = 0
    start: int = 0

    @cached_property
    def distance(self) -> Float[Tensor, "b n t"]:
        """Distances to the targets (negatives, positives), computed once. Queries are exactly `LEAST_DISTANCE` from themselves."""
        found = distances(self.x, torch.cat([self.negatives, self.positives], dim=1))
        return self.set_own(found, LEAST_DISTANCE)

    @property
    def to_negatives(self) -> Float[Tensor, "b n m"]:
        return self.distance[..., : self.negatives.shape[1]]

    @property
    def to_positives(self) -> Float[Tensor, "b n p"]:
        return self.distance[..., self.negatives.shape[1] :]

    @cached_property
    def weights(self) -> Float[Tensor, "b t"] | None:
        """Masses of (negatives, positives); None where all are 1."""
        if self.negative_weights is None and self.positive_weights is None:
            return None
        pairs = ((self.negatives, self.negative_weights), (self.positives, self.positive_weights))
        return torch.cat([points.new_ones(points.shape[:2]) if mass is None else mass for points, mass in pairs], dim=1)

    def set_own(self, matrix: Tensor, value: float | Tensor) -> Tensor:
        """Write a value into the entries [b, query, negative] that pair a query with itself, in place."""
        pairs = matrix.diagonal(offset=self.start, dim1=1, dim2=2)
        count = max(0, min(self.own - self.start, pairs.shape[1]))
        pairs[:, :count] = value if not isinstance(value, Tensor) else value[:, :count]
        return matrix

    def own_pairs(self, matrix: Tensor) -> Tensor:
        """The entries [b, pairs] of a matrix [b, query, negative or target] that pair a query with itself, all that it holds."""
        return matrix.diagonal(offset=self.start, dim1=1, dim2=2)

    def in_lengths(self, length: Tensor) -> "Problems":
        """In units of a length, [] or [b]; the distances are divided, not computed again."""
        divide = lambda t: t / per_problem(length)
        scaled = dataclasses.replace(self, x=divide(self.x), positives=divide(self.positives), negatives=divide(self.negatives))
        if "distance" in self.__dict__:
            scaled.__dict__["distance"] = self.distance.div_(per_problem(length))  # in place: nobody needs the others any more
            del self.__dict__["distance"]
        return scaled

    def parts(self) -> Iterator[tuple[slice, "Problems"]]:
        """Some problems at a time, whole, in blocks that stay small."""
        b, n, targets = len(self.x), self.x.shape[1], self.negatives.shape[1] + self.positives.shape[1]
        size = max(1, self._block // max(1, n * targets))
        for i in range(0, b, size):
            part = slice(i, min(i + size, b))
            yield part, (self if size >= b else self._cut(part, slice(None)))

    @property
    def _block(self) -> int:
        return BLOCK_ON_CPU if self.x.device.type == "cpu" else BLOCK

    def rows(self) -> Iterator[tuple[slice, "Problems"]]:
        """Some queries of all these problems at a time, in blocks that stay small."""
        b, n, targets = len(self.x), self.x.shape[1], self.negatives.shape[1] + self.positives.shape[1]
        size = max(1, self._block // max(1, b * targets))
        for i in range(0, n, size):
            rows = slice(i, min(i + size, n))
            yield rows, (self if size >= n else self._cut(slice(None), rows))

    def in_rows(self, force: Callable[["Problems"], Tensor]) -> Float[Tensor, "b n d"]:
        """A function of queries one by one, taken in blocks."""
        return torch.cat([torch.cat([force(rows) for _, rows in part.rows()], dim=1) for _, part in self.parts()])

    def _cut(self, part: slice, rows: slice) -> "Problems":
        one = lambda t: t if t is None else t[part]
        cut = Problems(
            self.x[part, rows],
            self.positives[part],
            self.negatives[part],
            one(self.positive_weights),
            one(self.negative_weights),
            self.own,
            self.start + (rows.start or 0),
        )
        if "distance" in self.__dict__:
            cut.__dict__["distance"] = self.distance[part, rows]
        return cut


Force = Callable[[Problems, float], Tensor]
"""(problems in mean distances, temperature) -> F [b, n, d] in the same coordinates."""


@dataclass(frozen=True)
class FramedField:
    """A field that is a force F(problems, temperature); a subclass writes `force`, and `by_rows` if a query's force needs no other query.

    Attributes:
        temperatures: kernel widths, in mean distances of the batch (in plain distances with `normalise_distance` off); a `Schedule` may stand
            for a number.
        normalise_distance: whether lengths are measured in mean distances s.
        normalise_force: whether the force of each temperature is divided by its rms.
        grouping: whether s and the rms are means over the whole step (release) or over each problem (some ports).
        distance_floor: the least s and u, so that a collapsed batch divides by something.
        strength_floor: the least mean square of a force, for the same reason.
    """

    temperatures: tuple[Scheduled, ...] = (0.02, 0.05, 0.2)
    normalise_distance: bool = True
    normalise_force: bool = True
    grouping: Literal["batch", "problem"] = "batch"
    distance_floor: float = 1e-3
    strength_floor: float = 1e-8

    by_rows: ClassVar[bool] = True
    """Whether a query's force depends on no other query, so that huge problems may be cut."""

    def __post_init__(self):
        settle(self)
        check_temperatures(self.temperatures, self.farthest)
        for name in ("distance_floor", "strength_floor"):
            if not positive(getattr(self, name)):
                raise ValueError(
                    f"{name} must be finite and above 0, got {getattr(self, name)!r}: a collapsed batch is divided by it; the release has "
                    f"{type(self).__dataclass_fields__[name].default:g}"
                )
        check_choice(self, "grouping", "batch", "problem")

    @property
    def farthest(self) -> float:
        """The largest distance, in mean distances, that a temperature must bear."""
        return 1.0

    def force(self, problems: Problems, temperature: float) -> Float[Tensor, "b n d"]:
        """F, in the coordinates of the problems, not yet divided by its rms."""
        raise NotImplementedError(f"{type(self).__name__} is a frame for fields; a field writes `force`")

    def __call__(
        self,
        x: Float[Tensor, "*b n d"],
        *,
        positives: Float[Tensor, "*b p d"],
        negatives: Float[Tensor, "*b m d"],
        positive_weights: Float[Tensor, "*b p"] | None = None,
        negative_weights: Float[Tensor, "*b m"] | None = None,
        own: int | None = None,
        mean: Mean = batch_mean,
    ) -> Drift:
        """See `Field`.

        Raises:
            ValueError: for shapes that do not fit each other, `own` outside [0, min(n, m)], or a schedule that no step was said for.
        """
        own = own_of(x, negatives, own)
        return self.drift(self.force, self.by_rows, x, positives, negatives, positive_weights, negative_weights, own, mean)

    @torch.no_grad()
    def drift(self, force: Force, by_rows: bool, x: Tensor, positives: Tensor, negatives: Tensor, *rest: Any) -> Drift:
        """A force, this field's or one that a wrapper made of it, in this field's frame. The rest is masses, `own` and `mean`."""
        positive_weights, negative_weights, own, mean = rest
        check_shapes(x, positives, negatives, positive_weights, negative_weights, own)
        refuse_schedules(self)
        one: Any = lambda t: in_float(t[None] if x.ndim == 2 else t) if t is not None else None
        with undisturbed(x.device):
            problems = Problems(one(x), one(positives), one(negatives), one(positive_weights), one(negative_weights), own)
            drift = self._drift(force, by_rows, _about(self.centre(problems), problems), mean)
        return dataclasses.replace(drift, velocity=drift.velocity[0]) if x.ndim == 2 else drift

    def centre(self, problems: Problems) -> Float[Tensor, "#b 1 #d"]:
        """What problems are centred about, the mean of all targets: distances and forces do not change, the rounding error of both does."""
        return torch.cat([problems.negatives, problems.positives], dim=1).mean(dim=1, keepdim=True)

    def measure(self, problems: Problems, average: Mean) -> Tensor:
        """The length s that all others are measured in, [] or [b]."""
        return mean_distance(problems, average)

    def lengths(self, measured: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
        """What distances and what velocities are measured in, of the mean distance."""
        if not self.normalise_distance:
            return torch.ones_like(measured), torch.ones_like(measured)
        return measured.clamp(min=self.distance_floor), (measured / math.sqrt(dimensions)).clamp(min=self.distance_floor)

    def _drift(self, force: Force, by_rows: bool, problems: Problems, mean: Mean) -> Drift:
        average = mean if self.grouping == "batch" else torch.divide
        measured = self.measure(problems, average)
        length, unit = self.lengths(measured, problems.x.shape[-1])
        problems = problems.in_lengths(length)
        whole = (lambda tau: problems.in_rows(lambda rows: force(rows, tau))) if by_rows else (lambda tau: force(problems, tau))
        forces = [whole(tau) * per_problem(length / unit) for tau in self.temperatures]  # in units u
        squares = torch.stack([force.square().sum((1, 2)) for force in forces])
        entries = squares.new_full(squares.shape[1:], forces[0][0].numel())
        strengths = average(squares, entries)  # [t] or [t, b]: one message for all temperatures
        if self.normalise_force:
            rms = strengths.clamp(min=self.strength_floor).sqrt()
            forces = [force / per_problem(size) for force, size in zip(forces, rms, strict=True)]
        return Drift(sum(forces[1:], forces[0]) * per_problem(unit), unit, measured, strengths)


@dataclass(frozen=True)
class WrappedForce:
    """A wrapper that makes another force of a framed field's, in the same frame: subclasses write `force` with `self.field.force`."""

    field: Any

    def __post_init__(self):
        settle(self)
        check_field(self.field)
        if not (hasattr(self.field, "force") and hasattr(self.field, "drift")):
            raise TypeError(
                f"{type(self).__name__} needs a field with a force per temperature, got {type(self.field).__name__}; wrap the field inside it instead"
            )

    @property
    def by_rows(self) -> bool:
        return self.field.by_rows

    @property
    def drift(self) -> Callable[..., Drift]:
        return self.field.drift

    def force(self, problems: Problems, temperature: float) -> Float[Tensor, "b n d"]:
        raise NotImplementedError(f"{type(self).__name__} is a frame for wrappers; a wrapper writes `force`")

    __call__ = FramedField.__call__


def mean_distance(problems: Problems, average: Mean) -> Tensor:
    """The mean over queries and targets, weighted with the masses of the targets; the self pairs (near 0) count, as in the release."""
    return mean_over_pairs(problems, problems.distance, average)


def mean_over_pairs(problems: Problems, values: Float[Tensor, "b n t"], average: Mean) -> Tensor:
    """The mean of something over queries and targets, weighted with the masses of the targets."""
    n, targets = values.shape[1:]
    columns = values.sum(1)
    if problems.weights is None:
        return average(columns.sum(1), columns.new_full(columns.shape[:1], float(n * targets)))
    return average((columns * problems.weights).sum(1), n * problems.weights.sum(1))


def per_problem(value: Tensor) -> Tensor:
    """[] as it is, [b] as [b, 1, 1]."""
    return value if value.ndim == 0 else value[:, None, None]


def check_shapes(
    x: Tensor, positives: Tensor, negatives: Tensor, positive_weights: Tensor | None, negative_weights: Tensor | None, own: int
) -> None:
    """Of shapes alone, so that no device is waited for. Masses that would merely broadcast give wrong means in silence."""
    if x.ndim not in (2, 3):
        raise ValueError(f"x must be [problems, samples, dimensions] or [samples, dimensions], got {list(x.shape)}")
    for name, points, masses in (("positive", positives, positive_weights), ("negative", negatives, negative_weights)):
        if points.ndim != x.ndim or (points.shape[:-2], points.shape[-1]) != (x.shape[:-2], x.shape[-1]):
            raise ValueError(
                f"{name}s must have the problems and dimensions of x {list(x.shape)}, got {list(points.shape)}; only the number of samples may differ"
            )
        if masses is not None and masses.shape != points.shape[:-1]:
            raise ValueError(
                f"{name}_weights must be one mass per sample, {list(points.shape[:-1])}, got {list(masses.shape)}; expand them first"
            )
    most = min(x.shape[-2], negatives.shape[-2])
    if not 0 <= own <= most:
        raise ValueError(f"own must lie in [0, {most}], got {own}: it counts the leading negatives that are the queries themselves")


def _about(centre: Tensor, problems: Problems) -> Problems:
    x, positives, negatives = (t - centre for t in (problems.x, problems.positives, problems.negatives))
    return dataclasses.replace(problems, x=x, positives=positives, negatives=negatives)
