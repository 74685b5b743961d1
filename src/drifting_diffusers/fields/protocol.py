r"""A field pulls queries to positives and pushes them from negatives. It is antisymmetric, V(x; p, q) = -V(x; q, p), so it rests when both agree.

A field is any callable with the signature of `Field`. All of it runs without gradient and at least in float32. A wrapper (lookahead, friction)
is a field that holds a field: it calls it again with moved queries and, because `own` says which negatives came from the generator, moved negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..shapes import Float

Mean = Callable[[Tensor, Tensor], Tensor]
"""(totals [..., b], weights [b]) -> means [...] over every problem of the step. With several processes it sums over all of them first, and every call
is a message between them: ask for several means at once."""


def batch_mean(totals: Float[Tensor, "*t b"], weights: Float[Tensor, " b"]) -> Float[Tensor, "*t"]:
    """Means over all problems of this process."""
    return totals.sum(-1) / weights.sum()


def own_of(x: Tensor, negatives: Tensor, own: int | None) -> int:
    """How many of the leading negatives are the queries, if nobody says: all if `negatives is x`, else none. Wrappers ask before they move any."""
    if own is not None:
        return own
    return x.shape[-2] if negatives is x else 0


@dataclass(frozen=True)
class Drift:
    """Where the queries drift, and what was measured on the way.

    Attributes:
        velocity: [b, n, d] (or [n, d]), the step V in the coordinates of x: add it to x, or regress onto x + velocity.
        unit: the length that V was normalised with, [] or [b]. The loss is the mean square of velocity / unit.
        distance: the weighted mean distance of queries and targets, [] or [b], in the coordinates of x.
        strength: mean square of the force before its normalisation, one entry per temperature, [t] or [t, b]. It falls towards the level of
            a finite batch as the distributions agree, while the loss cannot: watch this one.
    """

    velocity: Tensor
    unit: Tensor
    distance: Tensor
    strength: Tensor


@runtime_checkable
class Field(Protocol):
    """The one protocol of all fields."""

    def __call__(
        self,
        x: Tensor,
        *,
        positives: Tensor,
        negatives: Tensor,
        positive_weights: Tensor | None = None,
        negative_weights: Tensor | None = None,
        own: int | None = None,
        mean: Mean = batch_mean,
    ) -> Drift:
        """The drift of x [b, n, d] (or [n, d]) among positives [b, p, d] and negatives [b, m, d].

        Args:
            x: the queries: generated samples.
            positives: samples that attract: real ones.
            negatives: samples that repel: first the generated ones, then any real ones to be pushed from (unconditional, for guidance).
            positive_weights: masses [b, p] >= 0; 1 each if not given.
            negative_weights: masses [b, m] >= 0; 1 each if not given.
            own: how many of the leading negatives are the queries themselves, in order: those pairs (i, i) are masked. Not given, it is all
                of them if `negatives is x`, as in Algorithm 2 of arXiv 2602.04770, else none.
            mean: how means over the whole step are taken.
        """
        ...
