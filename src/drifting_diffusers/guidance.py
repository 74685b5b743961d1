r"""Guidance is learned, not applied: the generator is told a scale alpha and trained on the target that this scale means, so sampling stays one call.

With the generated samples of a class diluted by real unconditional ones, q~ = (1 - g) q(.|c) + g p(.|0) and alpha = 1 / (1 - g), the field rests at
q = alpha p(.|c) - (alpha - 1) p(.|0) (arXiv 2602.04770, section 3.5 and A.7).
"""

import math

import torch
from torch import Tensor

from .shapes import Float


def guidance_quantile(u: Float[Tensor, "*b"], *, low: float = 1.0, high: float = 4.0, power: float = 3.0) -> Float[Tensor, "*b"]:
    """The guidance scale at quantile u of the density ~ alpha^-power on [low, high].

    Args:
        u: quantiles in [0, 1].
        low: the least scale; 1 is no guidance.
        high: the largest scale.
        power: how fast large scales become rare; the paper has 3 and 5, 1 is uniform in log alpha.

    Raises:
        ValueError: unless 0 < low <= high.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"guidance scales must satisfy 0 < low <= high, got low={low}, high={high}; the paper's are 1 and 4")
    p = 1 - power
    if p == 0:
        return (math.log(low) + u * (math.log(high) - math.log(low))).exp()
    return (low**p + u * (high**p - low**p)) ** (1 / p)


def draw_guidance(
    n: int,
    *,
    generator: torch.Generator,
    low: float = 1.0,
    high: float = 4.0,
    power: float = 3.0,
    unguided_share: float = 0.0,
) -> Float[Tensor, " n"]:
    """N guidance scales from the power law, on the generator's device; a share of them is set to 1 (0.5 for the paper's latent L/2)."""
    if not 0 <= unguided_share <= 1:
        raise ValueError(f"unguided_share must lie in [0, 1], got {unguided_share}")
    u, coin = torch.rand(2, n, generator=generator, device=generator.device)
    return torch.where(coin < unguided_share, 1.0, guidance_quantile(u, low=low, high=high, power=power))


def unconditional_weight(guidance_scale: Float[Tensor, "*b"], num_generated: int, num_unconditional: int) -> Float[Tensor, "*b"]:
    """The mass of each unconditional negative, (alpha - 1)(n_generated - 1) / n_unconditional (A.7).

    At scale 1 it is 0. In the released field a target of mass 0 still takes part in both softmaxes; `DriftingField(weightless="absent")` leaves it out.
    """
    return (guidance_scale - 1) * (num_generated - 1) / max(1, num_unconditional)
