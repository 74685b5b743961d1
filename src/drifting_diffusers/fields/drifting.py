r"""The drifting field of "Generative Modeling via Drifting" (arXiv 2602.04770, Algorithm 2 and A.6), as its authors released it.

With the targets y = (negatives, positives), masses w, s the w-weighted mean of all distances |x_i - y_j|, and per temperature tau

    a_ij = max( sqrt( softmax_j(l) softmax_i(l) ), floor ) w_j,      l_ij = log k(|x_i - y_j| / s; tau)
    F_i  = sum_{j in +} a_ij A-_i y_j / u  -  sum_{j in -} a_ij A+_i y_j / u,      A+-_i = sum_{j in +-} a_ij,   u = s / sqrt(d)
    V    = sum_tau F_tau / rms(F_tau)

s and each rms are one number for the whole step, so problems are not independent: see `grouping` and `mean`.

Known limits. With the floor on, every target pulls a little at any distance: this keeps far starts trainable, and it freezes low-dimensional
toys between their modes. Measure it against the mean affinity, at most 1/sqrt(n (m + p)): with 1000 targets the floor of 1e-3 binds nearly
everywhere, and with `normalise_force` off the pull then grows without bound. Without it take one temperature of about 1: it is what moves
mass between far modes. With the masked own batch as negatives the field has a bias of order 1/sqrt(n). Because of the rms, V never
shrinks: for particles, switch `normalise_force` off.
"""

import math
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from ..couplings import Coupling, two_sided_softmax
from ..kernels import LEAST_DISTANCE, Kernel, Laplace, exact_products, in_float, pairwise_distance
from ..shapes import Float
from .protocol import Drift, Mean, batch_mean


@dataclass(frozen=True)
class DriftingField:
    """The released field. Its parameters are what the paper, the release and their ports do differently.

    The paper's Algorithm 2 without the normalisations of A.6 is
    `DriftingField((tau,), affinity_floor=0.0, self_mask=1e6, normalise_distance=False, normalise_force=False)`.

    Attributes:
        temperatures: kernel widths, in mean distances of the batch (in plain distances with `normalise_distance` off).
        affinity_floor: the least affinity, in [0, 1), before the weights; 1e-3 pulls from everywhere, 0 is the paper's text.
        self_mask: added to the normalised distance of a sample to itself. Finite in the release, which shows at temperatures above about 10
            and for samples more than 100 mean distances away from all others.
        weights: whether masses multiply the affinities after both softmaxes (release; a target of mass 0 still takes part in them) or
            enter the softmax over targets before it (a target of mass 0 is absent).
        weightless: whether a target of mass 0 takes part in the softmaxes (release) or is absent. Unconditional negatives at guidance scale 1 are
            such targets. It says nothing where masses enter before.
        grouping: whether s and the rms are means over the whole step (release) or over each problem (some ports).
        normalise_distance: whether distances are divided by their mean s.
        normalise_force: whether the force of each temperature is divided by its rms.
        distance_floor: the least s and u, so that a collapsed batch divides by something.
        strength_floor: the least mean square of a force, for the same reason.
    """

    temperatures: tuple[float, ...] = (0.02, 0.05, 0.2)
    affinity_floor: float = 1e-3
    self_mask: float = 100.0
    weights: Literal["after", "before"] = "after"
    weightless: Literal["present", "absent"] = "present"
    grouping: Literal["batch", "problem"] = "batch"
    normalise_distance: bool = True
    normalise_force: bool = True
    distance_floor: float = 1e-3
    strength_floor: float = 1e-8
    kernel: Kernel = field(default_factory=Laplace)
    coupling: Coupling = two_sided_softmax

    def __post_init__(self):
        if not 0 <= self.affinity_floor < 1:
            raise ValueError(f"affinity_floor must lie in [0, 1), got {self.affinity_floor}; the release has 1e-3, the paper's text 0")
        if not (math.isfinite(self.self_mask) and self.self_mask >= 0):
            raise ValueError(
                f"self_mask must be finite and at least 0, got {self.self_mask}; use a large number such as 1e6 for a full mask"
            )
        _check_temperatures(self.temperatures, self.self_mask)
        for name in ("distance_floor", "strength_floor"):
            if not _positive(getattr(self, name)):
                raise ValueError(
                    f"{name} must be finite and above 0, got {getattr(self, name)!r}: a collapsed batch is divided by it; the release has "
                    f"{type(self).__dataclass_fields__[name].default:g}"
                )
        choices = {"weights": ("after", "before"), "weightless": ("present", "absent"), "grouping": ("batch", "problem")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    @torch.no_grad()
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
            ValueError: for shapes that do not fit each other, or `own` outside [0, min(n, m)].
        """
        own = (x.shape[-2] if negatives is x else 0) if own is None else own
        _check_shapes(x, positives, negatives, positive_weights, negative_weights, own)
        one: Any = lambda t: t[None] if t is not None and x.ndim == 2 else t
        with torch.autocast(x.device.type, enabled=False), exact_products():  # in 16 bits distances underflow at temperature 0.02
            drift = self._drift(one(x), one(positives), one(negatives), one(positive_weights), one(negative_weights), own, mean)
        return replace(drift, velocity=drift.velocity[0]) if x.ndim == 2 else drift

    def _drift(
        self,
        x: Tensor,
        positives: Tensor,
        negatives: Tensor,
        positive_weights: Tensor | None,
        negative_weights: Tensor | None,
        own: int,
        mean: Mean,
    ) -> Drift:
        weights = _masses(negatives, negative_weights, positives, positive_weights)
        x, targets = in_float(x), torch.cat([in_float(negatives), in_float(positives)], dim=1)
        centre = targets.mean(dim=1, keepdim=True)  # distances and forces do not change, the rounding error of both does
        x, targets = x - centre, targets - centre

        distance = pairwise_distance(x, targets)  # (b, n, m + p)
        distance.diagonal(dim1=1, dim2=2)[:, :own] = LEAST_DISTANCE  # known, where the expanded square leaves rounding noise
        average = mean if self.grouping == "batch" else torch.divide
        measured = _mean_distance(distance, weights, average)
        if self.normalise_distance:
            distance = distance / _per_problem(measured.clamp(min=self.distance_floor))
            unit = (measured / math.sqrt(x.shape[-1])).clamp(min=self.distance_floor)
        else:
            unit = torch.ones_like(measured)
        distance.diagonal(dim1=1, dim2=2)[:, :own] += self.self_mask

        targets = targets / _per_problem(unit)
        forces = [self._force(distance, targets, weights, negatives.shape[1], temperature) for temperature in self.temperatures]
        squares = torch.stack([force.square().sum((1, 2)) for force in forces])
        strengths = average(
            squares, squares.new_full(squares.shape[1:], forces[0][0].numel())
        )  # (t) or (t, b): one message for all temperatures
        if self.normalise_force:
            rms = strengths.clamp(min=self.strength_floor).sqrt()
            forces = [force / _per_problem(size) for force, size in zip(forces, rms, strict=True)]
        return Drift(sum(forces[1:], forces[0]) * _per_problem(unit), unit, measured, strengths)

    def _force(self, distance: Tensor, targets: Tensor, weights: Tensor | None, m: int, temperature: float) -> Float[Tensor, "b n d"]:
        """F of one temperature: attraction less repulsion, each weighted with the mass of the other side.

        Both carry the same total mass A+ A-, so the terms in x cancel and x itself does not appear.
        """
        logits = self.kernel.log_value(distance, temperature)
        if self.weights == "before":
            affinity = self.coupling(logits, weights, floor=self.affinity_floor)
        else:
            presence = (weights > 0).to(logits) if weights is not None and self.weightless == "absent" else None
            affinity = self.coupling(logits, presence, floor=self.affinity_floor)
            affinity = affinity if weights is None else affinity * weights[:, None, :]
        negative, positive = affinity[..., :m], affinity[..., m:]
        attraction = (positive * negative.sum(-1, keepdim=True)) @ targets[:, m:]  # (b, n, p) @ (b, p, d)
        repulsion = (negative * positive.sum(-1, keepdim=True)) @ targets[:, :m]  # (b, n, m) @ (b, m, d)
        return attraction - repulsion


def _positive(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and float(value) > 0


def _check_temperatures(temperatures: Any, self_mask: float) -> None:
    if not isinstance(temperatures, tuple | list):
        raise TypeError(f"temperatures must be a tuple of numbers, got {temperatures!r}; write ({temperatures!r},) for a single one")
    if not temperatures or not all(map(_positive, temperatures)):
        raise ValueError(f"temperatures must be one or more finite numbers above 0, got {temperatures}; the paper's are (0.02, 0.05, 0.2)")
    least = (1 + self_mask) / torch.finfo(torch.float32).max
    if min(temperatures) <= least:  # logits, the masked ones too, are distances over temperatures
        raise ValueError(
            f"temperatures must be above {least:g}, got {temperatures}: a masked distance over a smaller one overflows float32"
        )


def _check_shapes(
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


def _masses(negatives: Tensor, negative_weights: Tensor | None, positives: Tensor, positive_weights: Tensor | None) -> Tensor | None:
    """Masses of (negatives, positives), [b, m + p]; None where all are 1."""
    if negative_weights is None and positive_weights is None:
        return None
    parts = [
        in_float(points).new_ones(points.shape[:2]) if weights is None else in_float(weights)
        for points, weights in ((negatives, negative_weights), (positives, positive_weights))
    ]
    return torch.cat(parts, dim=1)


def _mean_distance(distance: Tensor, weights: Tensor | None, average: Mean) -> Tensor:
    """The mean over queries and targets, weighted with the masses of the targets; the self pairs (near 0) count, as in the release."""
    _, n, m = distance.shape
    columns = distance.sum(1)  # (b, m + p)
    if weights is None:
        return average(columns.sum(1), columns.new_full(columns.shape[:1], float(n * m)))
    return average((columns * weights).sum(1), n * weights.sum(1))


def _per_problem(value: Tensor) -> Tensor:
    """[] as it is, [b] as [b, 1, 1]."""
    return value if value.ndim == 0 else value[:, None, None]
