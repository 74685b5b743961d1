r"""Friction as read from the abstract of "DMF" (arXiv 2604.18194): velocities are damped, more and more.

    V <- (1 - gamma_t) V,      gamma_t in [0, 1], linear in the step

Why. Take two generated samples at +-a around one target and the Laplace kernel without any normalisation. The net pull of each towards
the target is

    a exp(-a / tau) (1 - 2 exp(-a / tau)),

which repels below a* = tau ln 2: the pair rests at a spurious distance instead of at the target. The abstract answers with a friction
that grows linearly and bounds the error of a finite run. **The update rule and the ends of the schedule were not found**: the form above,
from 0 to 1 over the run, and `inertial_step`, its form with a memory, are ours.

Known limits. A factor common to all velocities moves no zero of the field: a* stays where it is, friction only decides how far a run gets
on its way there. And in the regression it is a factor of the gradient alone: under plain gradient descent it is one of the learning rate,
and Adam, which divides by the gradient's own size, hardly sees it as long as it changes slowly; schedule the learning rate there. It does
change where it lengthens a step that is taken: particle flows, and the places of `Lookahead(Friction(field, 0.5), step=1.0)`. Without a `step`
lookahead takes steps of the length of the force, which friction leaves as it is: of a normalised field the places are then the same, and the
whole is `Lookahead(field)` times 1 - gamma (a test says so).
"""

import dataclasses
from dataclasses import dataclass
from numbers import Real
from typing import cast

import torch
from torch import Tensor

from ..schedules import Schedule, Scheduled, linear
from ..shapes import Float
from .choices import refuse_schedules, settle
from .protocol import Drift, Field, Mean, batch_mean, own_of

GROWING = linear(0.0, 1.0)
"""From none to a standstill over the whole run."""


@dataclass(frozen=True)
class Friction:
    """A field whose velocities lose the share `friction`; unit, distance and strength stay those of the field.

    Attributes:
        field: any field.
        friction: gamma, in [0, 1]: 0 is the plain field, 1 stands still. Not given, it grows linearly from 0 to 1 over the run.

    Raises:
        ValueError: on call, while friction is a schedule that no step was said for.
    """

    field: Field
    friction: Scheduled = GROWING

    def __post_init__(self):
        settle(self)
        check_friction(self.friction)

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
        """See `Field`."""
        refuse_schedules(self)
        own = own_of(x, negatives, own)
        drift = self.field(
            x,
            positives=positives,
            negatives=negatives,
            positive_weights=positive_weights,
            negative_weights=negative_weights,
            own=own,
            mean=mean,
        )
        return dataclasses.replace(drift, velocity=(1 - cast(float, self.friction)) * drift.velocity)


def inertial_step(
    velocity_before: Float[Tensor, "*b n d"], velocity: Float[Tensor, "*b n d"], friction: float, step: float
) -> Float[Tensor, "*b n d"]:
    """The next velocity of particles that remember theirs, u <- (1 - friction) u + step V; then x <- x + u.

    Args:
        velocity_before: u, 0 at the start.
        velocity: V, of a field at x.
        friction: in [0, 1]. Here 1 is the plain step, without a memory; 0 forgets nothing.
        step: how much of V is added.
    """
    check_friction(friction)
    return (1 - friction) * velocity_before + step * velocity


def check_friction(friction: Scheduled) -> None:
    """A number in [0, 1], or a schedule between two of them."""
    ends = (friction.start, friction.end) if isinstance(friction, Schedule) else (friction,)
    if not all(isinstance(end, Real) and 0 <= end <= 1 for end in ends):
        raise ValueError(f"friction must lie in [0, 1], got {friction!r}; 0 is none, 1 stops everything")
