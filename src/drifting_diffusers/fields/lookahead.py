r"""Lookahead: the target of a step is made of where the samples will drift next, and after that ("Lookahead Drifting Model", arXiv
2605.04060).

    f^0 = x,      f^{i+1} = f^i + step V_i,      V_i = V(f^i; p, q^i),      V = sum_{i=0..K} w_i V~_i

q^i are the negatives with the own batch moved along to f^i; other negatives stay. It costs K more evaluations of the field and no further
call of the generator. Read from the paper: the recursion, and that every V_i is scaled so that their magnitudes are comparable. Ours,
because the source at hand does not say: that `terms` counts the *extra* terms (the paper's k = 1 may be this K = 1 or K = 0), that V~_i
is V_i scaled to the rms of V_0 over all problems of the step, the weights 1 / (K + 1), and the default of `step`.

**The step.** The recursion is written for a V that is a step to take. A field that divides its forces by their rms gives a V that never
gets shorter: with t temperatures its rms is about sqrt(t) to t units, one to three mean distances of the batch, however near the data
are. A whole step of that jumps over everything that there is to see ahead, for ever: small generators then stay far from the data (a test
shows it). So, unless a number is given, no step is longer than the force was before its normalisation:

    step_i = min(1, u sum_tau rms(F_tau) / rms(V_i))

which is 1 where forces are not normalised. A factor on V alone, such as friction or a weight of `Combined` below 1, changes no such step. With a step of 1, weights of 1 and no rescaling, x + V is exactly where K + 1 Euler steps on
the same positives end.

**Several temperatures.** A step of their normalised sum has mostly the direction of the smallest temperatures, which near the data is
noise, and looking ahead along it spoils a small generator (a test shows that too). Let every temperature look ahead by itself:

    temperature_set(Lookahead(DriftingField((0.2,))), (0.02, 0.05, 0.2))

Known limits. Each term is antisymmetric at its place, V_i(f^i; p, q^i) = -V_i(f^i; q^i, p), and vanishes where both agree; the sum is not
antisymmetric in (p, q), because the places depend on the sides. Rescaled, a term that has almost arrived counts as much as one that is
far away. From a far start, where all terms point the same way, nothing was gained.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import in_float
from ..schedules import Schedule, Scheduled
from ..shapes import Float
from .choices import is_number, positive, refuse_schedules, settle
from .frame import per_problem
from .protocol import Drift, Field, Mean, batch_mean, own_of
from .situation import Observer, memories


@dataclass(frozen=True)
class Lookahead:
    """A field that looks `terms` steps ahead with another field.

    Attributes:
        field: any field; its unit, distance and strength at x are reported.
        terms: K, how many terms beside the velocity at x; 0 is the plain field.
        weights: w_0 ... w_K >= 0, their sum above 0. Not given, they are 1 / (K + 1) each where terms are rescaled, else 1 each.
        rescale: whether every V_i gets the rms of V_0 before it is weighted. The places f^i are not touched by it.
        fresh_positives: whether every term sees positives of its own: they are cut into K + 1 parts in order, of sizes that differ by 1 at most.
        step: how much of V_i leads to the next place, above 0. Not given, so much that no step is longer than its force; see the module.

    Raises:
        ValueError: on call, for fewer positives than terms if they are to be fresh, or a schedule that no step was said for.
    """

    field: Field
    terms: int = 1
    weights: tuple[Scheduled, ...] | None = None
    rescale: bool = True
    fresh_positives: bool = False
    step: Scheduled | None = None

    def __post_init__(self):
        settle(self)
        if isinstance(self.terms, bool) or not isinstance(self.terms, int) or self.terms < 0:
            raise ValueError(
                f"terms must be a whole number of at least 0, got {self.terms!r}; 0 is the plain field, 1 looks one step ahead"
            )
        check_weights(self.weights)
        if self.weights is not None and len(self.weights) != self.terms + 1:
            raise ValueError(f"{self.terms} terms and the velocity at x need {self.terms + 1} weights, got {self.weights}")
        if self.terms and any(not isinstance(memory, Observer) for memory in memories(self.field)):
            raise ValueError(
                f"{type(self.field).__name__} remembers the samples it is called with, and lookahead calls it with samples that were moved; "
                "take a field without that memory, as in frechet(moments='batch')"
            )
        ends = (self.step.start, self.step.end) if isinstance(self.step, Schedule) else (self.step,)
        if self.step is not None and not all(map(positive, ends)):
            raise ValueError(
                f"step must be finite and above 0, got {self.step!r}; None takes the length of the force, terms=0 does not look ahead"
            )

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
        """See `Field`. Two means more than the field asks for: the length of every step that is not given, and the rescaling."""
        refuse_schedules(self)
        own = own_of(x, negatives, own)
        parts = self._parts(positives, positive_weights)
        drift = lambda here, q, part: self.field(
            here, positives=part[0], negatives=q, positive_weights=part[1], negative_weights=negative_weights, own=own, mean=mean
        )
        drifts, here, others = [drift(x, negatives, parts[0])], in_float(x), in_float(negatives[..., own:, :])
        for part in parts[1:]:
            here = here + self._stride(drifts[-1], mean) * drifts[-1].velocity
            drifts.append(drift(here, torch.cat([here[..., :own, :], others], dim=-2), part))
        velocities = [drift.velocity for drift in drifts]
        if self.terms and self.rescale:
            velocities = _as_long_as_the_first(velocities, mean)
        weights: Any = self.weights or (1 / len(parts) if self.rescale else 1,) * len(parts)
        total = torch.stack([w * v for w, v in zip(weights, velocities, strict=True)]).sum(0)
        return dataclasses.replace(drifts[0], velocity=total)

    def _stride(self, drift: Drift, mean: Mean) -> Any:
        """How much of a velocity leads to the next place: a number, or [b, 1, 1] where the field measures every problem by itself."""
        if self.step is not None:
            return self.step
        longest = drift.unit * drift.strength.sqrt().sum(0)  # [] or [b]
        squares, entries = _squares(drift.velocity[None])
        rms = (mean(squares, entries)[0] if longest.ndim == 0 else squares[0] / entries).sqrt()
        stride = torch.where(rms > longest, longest / rms, 1.0)
        return stride if drift.velocity.ndim == 2 else per_problem(stride)

    def _parts(self, positives: Tensor, masses: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """What the terms see: all of the positives each, or a part of them each."""
        count = self.terms + 1
        if not self.fresh_positives:
            return [(positives, masses)] * count
        if positives.shape[-2] < count:
            raise ValueError(
                f"{count} terms with fresh positives need at least {count} positives, got {positives.shape[-2]}; take more or fresh_positives=False"
            )
        pieces = [None] * count if masses is None else list(masses.tensor_split(count, dim=-1))
        return list(zip(positives.tensor_split(count, dim=-2), pieces, strict=True))


def check_weights(weights: tuple[Scheduled, ...] | None) -> None:
    """A tuple of finite numbers of at least 0, or of schedules of such, and not all 0, neither where they start nor where they end."""
    if weights is None:
        return
    if not isinstance(weights, tuple):
        raise TypeError(f"weights must be a tuple of numbers, got {weights!r}; write ({weights!r},) for a single one")
    starts = [w.start if isinstance(w, Schedule) else w for w in weights]
    ends = [w.end if isinstance(w, Schedule) and w.shape != "constant" else start for w, start in zip(weights, starts, strict=True)]
    if not all(is_number(w) and 0 <= w < float("inf") for w in [*starts, *ends]) or not (any(starts) and any(ends)):
        raise ValueError(
            f"weights must be finite and at least 0, one of them above 0 at every step, got {weights}; a run that comes to a standstill "
            "has friction"
        )


def _squares(velocities: Tensor) -> tuple[Float[Tensor, "k b"], Float[Tensor, " b"]]:
    """The sum of squares of k velocities [k, b, n, d] (or [k, n, d]) in every problem, and how many numbers that is."""
    squares = (velocities[:, None] if velocities.ndim == 3 else velocities).square().sum((-2, -1))
    return squares, squares.new_full(squares.shape[1:], velocities.shape[-2:].numel())


def _as_long_as_the_first(velocities: list[Tensor], mean: Mean) -> list[Tensor]:
    """All with the rms of the first over every problem of the step. A velocity of 0 stays 0."""
    rms = mean(*_squares(torch.stack(velocities))).sqrt()  # [k]: one message for all terms
    factors = torch.where(rms > 0, rms[0] / rms, 0.0)
    return [velocities[0], *(factor * v for factor, v in zip(factors[1:], velocities[1:], strict=True))]
