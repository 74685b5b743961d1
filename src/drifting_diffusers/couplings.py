r"""A coupling turns logits log k(x_i, y_j) into affinities a_ij >= 0: how much query i listens to target j.

Rows are queries, columns are targets. A coupling is any function `(logits [b, n, m], weights [b, m] | None, *, floor) -> affinities [b, n, m]`;
`weights` are the masses of the targets when they are to enter the normalisation, and a target of mass 0 is then absent: its affinities are 0.
Where the logits are some rows of a huge matrix, `columns` [b, 1, m] is the logsumexp over all of its rows.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .shapes import Float


@runtime_checkable
class Coupling(Protocol):
    def __call__(self, logits: Tensor, weights: Tensor | None = None, *, floor: float = 0.0, columns: Tensor | None = None) -> Tensor: ...


def two_sided_softmax(
    logits: Float[Tensor, "*b n m"],
    weights: Float[Tensor, "*b m"] | None = None,
    *,
    floor: float = 0.0,
    columns: Float[Tensor, "*b 1 m"] | None = None,
) -> Float[Tensor, "*b n m"]:
    """The geometric mean of the softmax over targets and the softmax over queries (arXiv 2602.04770, Algorithm 2).

    Taken in log space: the product of two small softmaxes underflows in float32 long before its square root does.
    """
    over_targets = torch.log_softmax(_weighted(logits, weights), dim=-1)
    # a target's mass cancels here: it is constant along its column
    over_queries = torch.log_softmax(logits, dim=-2) if columns is None else logits - columns
    return _present(((over_targets + over_queries) / 2).exp().clamp(min=floor), weights)


def row_softmax(
    logits: Float[Tensor, "*b n m"],
    weights: Float[Tensor, "*b m"] | None = None,
    *,
    floor: float = 0.0,
    columns: Float[Tensor, "*b 1 m"] | None = None,
) -> Float[Tensor, "*b n m"]:
    """The softmax over targets alone: each query's affinities sum to 1 (the "y-softmax only" row of the paper's ablation)."""
    return _present(torch.softmax(_weighted(logits, weights), dim=-1).clamp(min=floor), weights)


def unnormalised(
    logits: Float[Tensor, "*b n m"],
    weights: Float[Tensor, "*b m"] | None = None,
    *,
    floor: float = 0.0,
    columns: Float[Tensor, "*b 1 m"] | None = None,
) -> Float[Tensor, "*b n m"]:
    """The kernel itself (Z = 1 in the paper's ablation). Far from all targets it underflows to the floor."""
    return _present(_weighted(logits, weights).exp().clamp(min=floor), weights)


COUPLINGS: dict[str, Coupling] = {c.__name__: c for c in (two_sided_softmax, row_softmax, unnormalised)}


def _weighted(logits: Tensor, weights: Tensor | None) -> Tensor:
    return logits if weights is None else logits + weights.log()[..., None, :]


def _present(affinities: Tensor, weights: Tensor | None) -> Tensor:
    """The floor must not bring back a target whose mass is 0."""
    return affinities if weights is None else affinities.where((weights > 0)[..., None, :], 0.0)
