r"""The field of DriftXpress (arXiv 2605.12183): attraction through a few landmarks, so that it can be that of the whole dataset; repulsion exact.

    V(x) = b+(x) - b-(x),     b+(x) = psi(x) B / psi(x).s,     psi(x) = k(x, U) (W + ridge)^-1/2,   W = k(U, U)
    s = sum_y w psi(y),       B = sum_y w psi(y) y^T,          b-(x) = sum_j k(x, y_j) w_j y_j / sum_j k(x, y_j) w_j

with M landmarks U among the real samples. s and B are sums over real samples that need no query: with `sums="dataset"` they are taken once, over all
samples of each class, and the positives of a step are not looked at any more. Then a step costs n M d for the attraction of n queries in d dimensions,
whatever the size of the dataset, against n p d for p positives; making the sums costs M d per sample and M^3 per class. That needs frozen feature maps
and no augmentation. The paper reports training up to 6.6 times faster than with exact attraction; we have measured no such number.

Lengths are mean distances, V is a length. With `sums="step"` the mean distance is that of the batch; with `sums="dataset"` it is that of two different
landmarks of the class (ours: the width of a sum must be known before the first query), `Drift.distance` and `Drift.unit` are [b] and never change, and
`grouping` says only how the rms are taken. The own batch is masked. Masses multiply the kernel; a target of mass 0 is absent.

Ours, where the source is silent or fragile: landmarks are the first samples (the release draws them at random: show the data in random order); each
row of k(x, U) is divided by its largest entry, which changes no quotient and keeps far queries from underflow; and where psi(x).s falls below
`least_mass` of what it would be without cancellation, as it may with few landmarks, the query is pulled by the landmarks themselves, which are samples,
instead of by a quotient of rounding errors (the release divides by a small number). `report` counts those queries.

Known limits. The error falls with the number of landmarks, slowly where the width is small against their distances: on 2000 samples in the plane at
width 0.5 it is 4e-1, 1.6e-1, 4e-2 and 2e-6 of the attraction with 20, 80, 320 and all (law T17). In many dimensions at width 0.05 samples hardly see
each other, and attraction is that to the nearest landmarks. Guidance reaches the repulsion alone, as unconditional negatives.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..kernels import Kernel, Laplace, pairwise_distance
from ..schedules import Schedule, Scheduled
from ..shapes import Float
from .frame import BLOCK, FramedField, Problems, check_choice, positive
from .landmarks import AttractionSums, Place, Projection, distance, exact, project, projected
from .protocol import Mean
from .pulls import pulls
from .situation import Situation


class Clamping:
    """How many queries the landmarks gave no mass: counted where the samples are, read when somebody asks.

    It counts from the last `reset`, or from the start of this process: it is in no checkpoint. Moved queries of a wrapper count as well.

    Attributes:
        queries: how many have been looked at, once per temperature.
    """

    def __init__(self):
        self.queries, self._clamped = 0, None

    def add(self, clamped: Tensor) -> None:
        """Some more queries, as booleans. Waits for no device."""
        self.queries += clamped.numel()
        found = clamped.sum()
        self._clamped = found if self._clamped is None else self._clamped.to(found.device) + found

    @property
    def clamped(self) -> int:
        """How many of them were clamped. Waits for the device."""
        return 0 if self._clamped is None else int(self._clamped)

    @property
    def share(self) -> float:
        """The clamped ones among all, in [0, 1]; above a few per cent, take more landmarks or a larger temperature."""
        return self.clamped / max(1, self.queries)

    def reset(self) -> None:
        """Count from 0 again."""
        self.__init__()


@dataclass(frozen=True)
class NystromField(FramedField):
    """Attraction through landmarks less a mean shift of the negatives.

    Attributes:
        landmarks: M, per class (`sums="dataset"`; release: 500 for 10 classes, 150 for 100) or per problem (`sums="step"`), at most.
        ridge: added to the eigenvalues of W; the release's value.
        kernel: a positive definite kernel.
        repulsion: whether the negatives are summed exactly, or through the same landmarks with the query's own mass psi.psi taken out.
        sums: whether the attracting sums are those of the step's positives, or of all real samples, shown to `memory` before the first step. Until it
            has seen a feature, that feature has the sums of its steps.
        least_mass: in [0, 1): the least psi(x).s, as a share of the sum of its terms without their signs.
        memory: the sums of all real samples, there with `sums="dataset"`.
        report: how many queries were clamped; shared by all fields made of this one. The trainer logs its `share` as `clamped`.
    """

    temperatures: tuple[Scheduled, ...] = (0.05,)
    landmarks: int = 500
    ridge: float = 1e-4
    kernel: Kernel = field(default_factory=Laplace)
    repulsion: Literal["exact", "nystrom"] = "exact"
    sums: Literal["step", "dataset"] = "step"
    least_mass: float = 1e-3
    memory: AttractionSums | None = field(default=None, compare=False, repr=False)
    report: Clamping = field(default_factory=Clamping, compare=False, repr=False)
    place: Place | None = field(default=None, compare=False, repr=False)

    by_rows: ClassVar[bool] = False  # no query needs another, but the landmarks of a problem are prepared once for all of its rows

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.landmarks, bool) or not isinstance(self.landmarks, int) or self.landmarks < 1:
            raise ValueError(f"landmarks must be a whole number of at least 1, got {self.landmarks!r}; the release has 500 per class")
        if not positive(self.ridge):
            raise ValueError(f"ridge must be finite and above 0, got {self.ridge!r}; the release has 1e-4")
        if not 0 <= self.least_mass < 1:
            raise ValueError(f"least_mass must lie in [0, 1), got {self.least_mass!r}; 1e-3 keeps barycentres near the landmarks")
        check_choice(self, "repulsion", "exact", "nystrom")
        check_choice(self, "sums", "step", "dataset")
        self._check_memory()

    def _check_memory(self) -> None:
        if self.sums == "step":
            if self.memory is not None:
                raise ValueError("this field has sums='step' and a memory of a dataset; say sums='dataset' or leave the memory out")
            return
        if any(isinstance(tau, Schedule) for tau in self.temperatures):
            raise ValueError(f"sums over a dataset are made for fixed temperatures, got {self.temperatures}; take numbers or sums='step'")
        more = {"normalised": self.normalise_distance, "least_length": self.distance_floor, "projected": self.repulsion == "nystrom"}
        mine = AttractionSums(self.landmarks, self.temperatures, self.kernel, self.ridge, **more)  # pyright: ignore[reportArgumentType]
        if self.memory is None:
            object.__setattr__(self, "memory", mine)
        elif self.memory.settings != mine.settings or self.memory.projected < mine.projected:
            raise ValueError(
                f"the memory was made for {self.memory.settings}, projected={self.memory.projected}; this field needs {mine.settings}, "
                f"projected={mine.projected}: leave it out, the field makes its own"
            )

    def within(self, situation: Situation) -> "NystromField":
        """The field that looks at the sums of this feature and these classes, if they were observed."""
        if self.memory is None or situation.feature not in self.memory:
            return self
        return dataclasses.replace(self, place=self.memory.at(situation.feature, situation.labels))

    def centre(self, problems: Problems) -> Float[Tensor, "b 1 d"]:
        return super().centre(problems) if self.place is None else self.place.centre(problems.x)

    def measure(self, problems: Problems, average: Mean) -> Tensor:
        """The batch's mean distance, or the dataset's; what is not finite in the batch makes that not finite too, so that it is noticed."""
        if self.place is None:
            return super().measure(problems, average)
        return self.place.length(problems.x) + 0 * (problems.x.sum((1, 2)) + problems.negatives.sum((1, 2)))

    def force(self, problems: Problems, temperature: float) -> Float[Tensor, "b n d"]:
        found = []
        for part, some in self._parts(problems):
            seen = self._landmarks(problems, some, part, temperature)
            thrown = None
            if self.repulsion == "nystrom":
                thrown = projected(seen, some.negatives, some.negative_weights, self.kernel, temperature)
            found += [torch.cat([self._of_rows(rows, seen, thrown, temperature) for _, rows in some.rows()], dim=1)]
        return torch.cat(found)

    def _parts(self, problems: Problems) -> Iterator[tuple[slice, Problems]]:
        """Some problems at a time, so that neither landmarks nor distances take much memory."""
        b, n, d = problems.x.shape
        p, m = problems.positives.shape[1], problems.negatives.shape[1]
        k = self.landmarks if self.place is not None else min(self.landmarks, p)
        size = max(1, BLOCK // max(1, n * (m + k), k * (d + k), k * p))
        for i in range(0, b, size):
            part = slice(i, min(i + size, b))
            yield part, (problems if size >= b else problems._cut(part, slice(None)))

    def _landmarks(self, whole: Problems, some: Problems, part: slice, temperature: float) -> Projection:
        """Of the dataset, or the first positives that are there."""
        if self.place is not None:
            return self.place.projection(self.temperatures.index(temperature), whole.x, part)
        points, masses = some.positives, some.positive_weights
        present = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device) if masses is None else masses > 0
        first = (~present).int().argsort(dim=1, stable=True)[:, : self.landmarks]
        chosen = points.gather(1, first[..., None].expand(-1, -1, points.shape[-1]))
        return project(chosen, present.gather(1, first), points, masses, self.kernel, temperature, self.ridge)

    def _of_rows(self, rows: Problems, seen: Projection, thrown: Projection | None, temperature: float) -> Float[Tensor, "b r d"]:
        near, _ = self._near(pairwise_distance(rows.x, seen.points), seen, temperature)
        total, size = near @ seen.mass[..., None], near @ seen.mass.abs()[..., None]
        clamped = total <= self.least_mass * size
        self.report.add(clamped)
        shift = (near @ seen.moment - total * rows.x) / total.where(~clamped, 1)
        nobody = torch.finfo(near.dtype).tiny
        to_landmarks = (near @ seen.points - near.sum(-1, keepdim=True) * rows.x) / near.sum(-1, keepdim=True).clamp(min=nobody)
        attraction = shift.where(~clamped, to_landmarks)
        return attraction - (
            self._exact_repulsion(rows, temperature) if thrown is None else self._projected_repulsion(rows, thrown, temperature)
        )

    def _near(self, apart: Tensor, seen: Projection, temperature: float) -> tuple[Float[Tensor, "b r k"], Float[Tensor, "b r 1"]]:
        """k(x, U) over its largest entry, and that."""
        logits = self.kernel.log_value(apart, temperature).masked_fill(~seen.present[:, None], -torch.inf)
        largest = logits.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)  # no landmark at all: exp(-inf) is 0
        return (logits - largest).exp(), largest.exp()

    def _exact_repulsion(self, rows: Problems, temperature: float) -> Float[Tensor, "b r d"]:
        alone = dataclasses.replace(rows, positives=rows.positives[:, :0], positive_weights=None)
        if "distance" in rows.__dict__:  # measured already
            alone.__dict__["distance"] = rows.to_negatives
        log_k = self.kernel.log_value
        return pulls(alone, temperature, log_k, log_k)[1].shift

    def _projected_repulsion(self, rows: Problems, thrown: Projection, temperature: float) -> Float[Tensor, "b r d"]:
        """In float64. The query's own term is 0 above the line, and its mass is taken out below it; nothing where nobody is left."""
        x = exact(rows.x)
        near, scale = self._near(distance(x, thrown.points), thrown, temperature)
        total = near @ thrown.mass[..., None]
        alone = (near @ thrown.inverse * near).sum(-1, keepdim=True) * scale  # psi(x).psi(x), of which own queries have their mass
        own = x.new_zeros(x.shape[:2])
        end = max(0, min(rows.own - rows.start, own.shape[1]))
        own[:, :end] = 1 if rows.negative_weights is None else exact(rows.negative_weights[:, rows.start : rows.start + end])
        left = total - alone * own[..., None]
        clamped = left <= self.least_mass * (near @ thrown.mass.abs()[..., None])
        self.report.add(clamped)
        shift = (near @ thrown.moment - total * x) / left.where(~clamped, 1)
        return shift.where(~clamped, 0).to(rows.x)
