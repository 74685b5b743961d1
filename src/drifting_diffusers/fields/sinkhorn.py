r"""Transport fields: W-Flow (arXiv 2605.11755) and Sinkhorn-Drifting (arXiv 2603.12366), cross less self.

    V(x) = T_{q,p}(x) - T_{q,q'}(x),      T_{q,p}(x_i) = sum_j P_ij y_j / sum_j P_ij,      P the entropic plan from the queries to the targets

With the cost |x - y|^2 / 2 this is the velocity of the Wasserstein gradient flow of the Sinkhorn divergence OT(q, p) - OT(q, q) / 2 - OT(p, p) / 2. Both
marginals are balanced (see `transport.sinkhorn`), so mass moves between far clusters where a kernel field hears nothing (law T14).

Units. A temperature is the entropy epsilon over the mean cost: with the quadratic cost lengths are measured in root mean square distances, so that the
mean of |x - y|^2 is 1; with the linear cost |x - y| in mean distances. `Drift.distance` is that length.

Iterations. W-Flow has 10 or 1. Half a one sets the rows alone: the mean shift of a Gaussian (quadratic) or Laplace (linear) kernel, the flow of a KL.
None is the kernel itself, not divided by its sum: the MMD field sum_j b_j k_ij (y_j - x_i). (The authors name the two so; the division is left out as
the second needs it.) Law T16.

The self term q'. W-Flow has a second generated batch (FID 7.08 in its ablation), masking the pairs (i, i) of the one batch comes near (7.45), and doing neither
does not work (17.57): at small epsilon a batch is transported onto itself and T_{q,q}(x) = x. `own_term` says which:

    "independent"   each half of the own samples is a batch of W-Flow's, and the other half its second batch. Ours: W-Flow generates twice as many
                    samples and moves one half of them. The cross term is taken per half too, so it is W-Flow's estimator for batches of n / 2.
    "masked"        the pairs (i, i) are absent from the plan.
    "same"          they are not.

With own = 0 the negatives given are the independent batch, whatever `own_term` says.

Negatives beyond the own ones enter the self term as further columns: guidance by a mixture ("distribution" guidance). Their mass of
(alpha - 1)(n - 1) (`guidance.unconditional_weight`) is meant beside n - 1 own samples, so where there are n / 2 or n of them, as for a plan that gives every
column its mass, masked or not, it is scaled in proportion (ours). Guidance of velocities is a wrapper, `VelocityGuidance`. Masses of own samples are masses of queries too.

Known limits. Particles that stay the same from step to step need "same": halves that are not drawn anew push each other apart, d(a - b)/dt = a - b, and so do masked
neighbours at small epsilon. Queries are not moved one by one: V of a query depends on all of them. With "independent" it depends on which half a query is in, and it has no
bias at p = q only if there are as many positives as the half has samples; with "masked" a bias remains. Antisymmetric in p and q for given negatives (own = 0).
The scale of the cost and of epsilon are as read from the authors' code; the other choices are labelled ours.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..kernels import pairwise_distance
from ..schedules import Scheduled
from ..shapes import Float
from ..transport import check_iterations, sinkhorn
from .frame import FramedField, Mean, Problems, check_choice, mean_over_pairs
from .velocity_guidance import VelocityGuidance


class _Batch(NamedTuple):
    """Queries that are transported together, and the negatives of their self term."""

    x: Tensor
    masses: Tensor | None
    negatives: Tensor
    negative_masses: Tensor | None


@dataclass(frozen=True)
class SinkhornField(FramedField):
    """Difference of two barycentric maps.

    Attributes:
        temperatures: entropies, in mean squared distances with the quadratic cost, in mean distances with the linear one.
        cost: "quadratic", |x - y|^2 / 2, or "linear", |x - y|.
        iterations: of Sinkhorn's algorithm, a multiple of 1/2.
        own_term: what the self term does with the queries themselves; see above.
    """

    temperatures: tuple[Scheduled, ...] = (0.05,)
    cost: Literal["quadratic", "linear"] = "quadratic"
    iterations: float = 10
    own_term: Literal["independent", "masked", "same"] = "independent"

    by_rows: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "cost", "quadratic", "linear")
        check_choice(self, "own_term", "independent", "masked", "same")
        check_iterations(self.iterations)

    def measure(self, problems: Problems, average: Mean) -> Tensor:
        """The root mean square distance, or the mean one where the cost is linear; without a matrix of distances left in memory."""
        if self.cost == "linear":
            return mean_over_pairs(problems, _mean_distances(problems), average)
        return mean_over_pairs(problems, _mean_squares(problems), average).clamp(min=0).sqrt()

    def force(self, problems: Problems, temperature: float) -> Float[Tensor, "b n d"]:
        parts = []
        for _, part in problems.parts():
            moved = []
            for batch in self._batches(part):
                cross = self._pull(batch.x, batch.masses, part.positives, part.positive_weights, temperature)
                own = part if self.own_term == "masked" else None
                moved.append(cross - self._pull(batch.x, batch.masses, batch.negatives, batch.negative_masses, temperature, own))
            parts.append(torch.cat(moved, dim=1))
        return torch.cat(parts)

    def _pull(
        self, x: Tensor, x_masses: Tensor | None, y: Tensor, y_masses: Tensor | None, epsilon: float, own: Problems | None = None
    ) -> Tensor:
        """T(x) - x; the pairs of `own` are absent."""
        cost = _half_squares(x, y) if self.cost == "quadratic" else pairwise_distance(x, y)
        if own is not None:
            own.set_own(cost, torch.inf)
        plan = sinkhorn(cost, epsilon, row_weights=x_masses, column_weights=y_masses, iterations=self.iterations)
        return plan.displacement(x, y, divide=self.iterations > 0)

    def _batches(self, problems: Problems) -> list[_Batch]:
        x, own, negatives, masses = problems.x, problems.own, problems.negatives, problems.negative_weights
        n = x.shape[1]
        if own == 0 or (self.own_term == "masked" and self.iterations < 1):
            return [_Batch(x, _query_masses(problems), negatives, masses)]
        if self.own_term != "independent":
            return [_Batch(x, _query_masses(problems), negatives, _beside_all(problems, slice(0, own)))]
        if own != n or n % 2:
            raise ValueError(
                f"own_term='independent' halves the own samples, so all queries must be own and of even number, got {n} queries of which {own} "
                f"are own; generate an even number, take own_term='masked', or give an independent batch as negatives with own=0"
            )
        halves, found = (slice(0, n // 2), slice(n // 2, n)), []
        for mine, other in (halves, halves[::-1]):
            keep = lambda values, other=other: torch.cat([values[:, other], values[:, own:]], dim=1)
            beside = _beside_all(problems, other)
            mine_masses = None if masses is None else masses[:, mine]
            found.append(_Batch(x[:, mine], mine_masses, keep(negatives), None if beside is None else keep(beside)))
        return found


def w_flow(size: Literal["b", "l", "xl"] = "b") -> VelocityGuidance:
    """The published settings of W-Flow: B has 10 iterations at epsilon 0.05, L one at 0.05, XL one at 0.01; guidance of velocities in all."""
    settings = {"b": (0.05, 10), "l": (0.05, 1), "xl": (0.01, 1)}
    if size not in settings:
        raise ValueError(f"size must be one of {tuple(settings)}, got {size!r}")
    epsilon, iterations = settings[size]
    return VelocityGuidance(SinkhornField((epsilon,), iterations=iterations))


def _query_masses(problems: Problems) -> Tensor | None:
    """What the queries weigh as own negatives; 1 where they are none."""
    if problems.negative_weights is None or problems.own == 0:
        return None
    masses = problems.negative_weights.new_ones(problems.x.shape[:2])
    masses[:, : problems.own] = problems.negative_weights[:, : problems.own]
    return masses


def _beside_all(problems: Problems, columns: slice) -> Tensor | None:
    """Masses of the negatives where these own samples are columns, rather than all but the query."""
    own, m = problems.own, problems.negatives.shape[1]
    if problems.negative_weights is None and m == own:
        return None
    masses = problems.negatives.new_ones(problems.negatives.shape[:2]) if problems.negative_weights is None else problems.negative_weights
    meant = masses[:, :own].sum(1, keepdim=True) * (max(1, own - 1) / own)
    scale = masses[:, columns].sum(1, keepdim=True) / meant.clamp(min=torch.finfo(masses.dtype).tiny)
    return torch.cat([masses[:, :own], masses[:, own:] * scale], dim=1)


def _half_squares(x: Tensor, y: Tensor) -> Float[Tensor, "b n m"]:
    """|x - y|^2 / 2 in one matrix."""
    products = (x @ y.mT).neg_()
    return products.add_(x.square().sum(-1)[..., :, None] / 2).add_(y.square().sum(-1)[..., None, :] / 2).clamp_(min=0)


def _mean_squares(problems: Problems) -> Float[Tensor, "b 1 t"]:
    """Mean over the queries of the squared distance to each target: in closed form, with no matrix."""
    x, y = problems.x, torch.cat([problems.negatives, problems.positives], dim=1)
    centre = x.mean(1, keepdim=True)
    spread = (x - centre).square().sum(2).mean(1)
    return ((y - centre).square().sum(2) + spread[:, None])[:, None]


def _mean_distances(problems: Problems) -> Float[Tensor, "b 1 t"]:
    """Mean over the queries of the distance to each target, in blocks."""
    found = []
    for _, part in problems.parts():
        sums = torch.stack([rows.distance.sum(1, keepdim=True) for _, rows in part.rows()])
        found.append(sums.sum(0) / problems.x.shape[1])
    return torch.cat(found)
