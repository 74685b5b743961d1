r"""Entropic optimal transport between weighted samples: Sinkhorn's algorithm, in the log domain and in blocks of rows.

The plan between rows of masses a and columns of masses b (each divided by its sum) at cost C and entropy epsilon is

    P_ij = exp(u_i + v_j - C_ij / epsilon)

and an iteration sets first the rows, then the columns to their masses:

    u_i = log a_i - logsumexp_j(v_j - C_ij / epsilon),      v_j = log b_j - logsumexp_i(u_i - C_ij / epsilon)

It starts from u = log a, v = log b, so that no iteration is the kernel itself, half an iteration is a softmax over the columns, and after whole
iterations the columns are exact and the rows nearly so.

Masses of 0 and infinite costs say that a row, a column or a pair is not there. Where nothing is left there is no NaN but no mass. Masses that no plan
without such pairs can meet, as when one sample has more than half of the mass and may not go to itself, leave a residual for ever.

The number of iterations is fixed. They converge at a rate that falls with epsilon over the range of costs; for a batch against itself, where the
updates of rows and columns could be averaged, plain alternation is especially slow at small epsilon.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import Float

BLOCK = 2**24
"""Entries of the largest block of rows that is in memory beside the costs."""


@dataclass(frozen=True)
class Plan:
    """A plan by its potentials; the matrix itself is never stored.

    Attributes:
        cost: [b, n, m].
        epsilon: the entropy, in units of the cost.
        rows: u [b, n], -inf for an absent row.
        columns: v [b, m], -inf for an absent column.
        row_masses: log a [b, n].
        column_masses: log b [b, m].
    """

    cost: Tensor
    epsilon: float
    rows: Tensor
    columns: Tensor
    row_masses: Tensor
    column_masses: Tensor

    def log_plan(self) -> Float[Tensor, "b n m"]:
        """Log P, all of it."""
        return self.cost / -self.epsilon + self.rows[:, :, None] + self.columns[:, None, :]

    def residual(self) -> Float[Tensor, " b"]:
        """How much mass is not where it should be: the sum of |row sum - a| and of |column sum - b|, in [0, 2]  where the plan has mass 1."""
        own, other = [], torch.zeros_like(self.columns)
        for rows, logits in self._blocks():
            part = (logits + self.rows[:, rows, None]).exp()
            own.append(part.sum(2))
            other = other + part.sum(1)
        excess = lambda sums, masses: (sums - masses.exp()).abs().sum(1)
        return excess(torch.cat(own, dim=1), self.row_masses) + excess(other, self.column_masses)

    def displacement(self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b m d"], *, divide: bool = True) -> Float[Tensor, "b n d"]:
        """T(x) - x, where T(x_i) = sum_j P_ij y_j / sum_j P_ij is the barycentric map; 0 where a row has no column to go to.

        A row's own potential cancels, so rows of mass 0 have a displacement too: that of the map, extended to them.

        Args:
            x: where the rows stand.
            y: where the columns stand.
            divide: whether by the mass of the row; else the result is sum_j exp(v_j - C_ij / epsilon) (y_j - x_i).
        """
        moved = []
        for rows, share in self._blocks():
            if divide:
                share = share.sub_(share.logsumexp(2, keepdim=True).clamp(min=torch.finfo(share.dtype).min))
            share = share.exp_()
            moved.append(share @ y - share.sum(2, keepdim=True) * x[:, rows])
        return torch.cat(moved, dim=1)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        return _blocks(self.cost, self.epsilon, self.columns)


def sinkhorn(
    cost: Float[Tensor, "b n m"],
    epsilon: float,
    *,
    row_weights: Float[Tensor, "b n"] | None = None,
    column_weights: Float[Tensor, "b m"] | None = None,
    iterations: float = 10,
) -> Plan:
    """The plan after a fixed number of iterations.

    Args:
        cost: of every pair; inf for a pair that is not there.
        epsilon: the entropy, above 0, in units of the cost.
        row_weights: masses >= 0; equal ones if not given. They are divided by their sum.
        column_weights: masses >= 0; equal ones if not given. They are divided by their sum.
        iterations: a multiple of 1/2, at least 0; the half sets the rows.

    Raises:
        ValueError: for a number of iterations that is none, or an epsilon that is not above 0.
    """
    check_iterations(iterations)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}; the limit of none is a problem of assignment")
    b, n, m = cost.shape
    log_a = _log_shares(cost.new_ones(b, n) if row_weights is None else row_weights)
    log_b = _log_shares(cost.new_ones(b, m) if column_weights is None else column_weights)
    u, v = log_a, log_b
    for half in range(round(2 * iterations)):
        if half % 2 == 0:
            u = _reach(log_a, torch.cat([logits.logsumexp(2) for _, logits in _blocks(cost, epsilon, v)], dim=1))
        else:
            found = [logits.add_(u[:, rows, None]).logsumexp(1) for rows, logits in _blocks(cost, epsilon, None)]
            v = _reach(log_b, torch.stack(found).logsumexp(0) if len(found) > 1 else found[0])
    return Plan(cost, epsilon, u, v, log_a, log_b)


def check_iterations(iterations: float) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int | float) or not 0 <= iterations < 1e9 or iterations % 0.5:
        raise ValueError(
            f"iterations must be a multiple of 1/2 and at least 0, got {iterations!r}; 0 is the kernel itself and 0.5 sets the rows alone"
        )


def _blocks(cost: Tensor, epsilon: float, columns: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """-C / epsilon (+ v) for some rows at a time, each time in memory of its own."""
    b, n, m = cost.shape
    size = max(1, BLOCK // max(1, b * m))
    for i in range(0, max(1, n), size):
        rows = slice(i, min(i + size, n))
        logits = cost[:, rows] / -epsilon
        yield rows, (logits if columns is None else logits.add_(columns[:, None, :]))


def _log_shares(weights: Tensor) -> Tensor:
    """Log of masses over their sum; -inf for masses of 0, also where all are."""
    return (weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)).log()


def _reach(log_mass: Tensor, log_sum: Tensor) -> Tensor:
    """The potential that gives a row or column its mass; absent where no pair of it is there."""
    return torch.where(log_sum == -torch.inf, -torch.inf, log_mass - log_sum)
