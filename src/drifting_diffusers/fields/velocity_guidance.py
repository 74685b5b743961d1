r"""Guidance at the level of velocities (W-Flow, arXiv 2605.11755), for any field with a force:

    V = F(x; p_c, q) + w F(x; p_c, p_0),      w = alpha - 1

q are the own negatives and p_0 the further ones, real and unconditional. For a transport field the second term is w (T_{q,p_c} - T_{q,p_0}); in W-Flow's
ablation this is better than unconditional samples among the negatives of one field, 7.08 against 7.29.

w is recovered from the masses that `guidance.unconditional_weight` gives, (alpha - 1)(n - 1) in all: it is the total mass of the further negatives over
(n - 1) / n of the own mass. Among themselves they keep their relative masses. The rms is of the whole sum, as this wraps the force.

Without further negatives, or with own = 0, where nobody says which negatives are unconditional, it is the field inside. At alpha = 1 the masses are 0 and so is the
second term.

Known limits. In the second term the queries are nobody's negatives, so own masses do not enter, and a transport field takes all queries as rows of one plan (ours).
A field whose force depends on the number of its negatives, as `DriftingField`'s does, weighs the second term by it.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shapes import Float
from .frame import Problems, WrappedForce


@dataclass(frozen=True)
class VelocityGuidance(WrappedForce):
    """The field inside, guided by its velocity from unconditional to conditional samples.

    Attributes:
        field: a field with a force per temperature.
    """

    def force(self, problems: Problems, temperature: float) -> Float[Tensor, "b n d"]:
        own, m = problems.own, problems.negatives.shape[1]
        if own == 0 or own == m:
            return self.field.force(problems, temperature)
        free = self.field.force(_among(problems, slice(0, own), own), temperature)
        strength = guidance_strength(problems)[:, None, None]
        guided = strength * self.field.force(_among(problems, slice(own, m), 0), temperature)
        return free + guided.where(strength != 0, 0.0)  # moments of no mass are no number, and 0 times them neither


def guidance_strength(problems: Problems) -> Float[Tensor, " b"]:
    """W = alpha - 1, from the masses of the negatives; 0 where the own samples have no mass."""
    own, masses = problems.own, problems.negative_weights
    if masses is None:
        masses = problems.negatives.new_ones(problems.negatives.shape[:2])
    meant = masses[:, :own].sum(1) * (max(1, own - 1) / own)
    return torch.where(meant > 0, masses[:, own:].sum(1) / meant.clamp(min=torch.finfo(masses.dtype).tiny), 0.0)


def _among(problems: Problems, some: slice, own: int) -> Problems:
    """The same queries and positives among some of the negatives, whose mean mass is 1 where they are not own."""
    m, masses = problems.negatives.shape[1], problems.negative_weights
    masses = None if masses is None else masses[:, some]
    if masses is not None and not own:
        masses = masses / masses.mean(1, keepdim=True).clamp(min=torch.finfo(masses.dtype).tiny)
    found = dataclasses.replace(problems, negatives=problems.negatives[:, some], negative_weights=masses, own=own)
    distance: Tensor | None = problems.__dict__.get("distance")
    if distance is not None:
        found.__dict__["distance"] = torch.cat([distance[..., :m][..., some], distance[..., m:]], dim=-1)
    return found
