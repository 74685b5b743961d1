r"""What one side, positives or negatives, does to a query through a radial kernel: a pull, and how dense the side is there.

    pull(x) = sum_j w_j g(|x - y_j|) (y_j - x) / sum_j w_j h(|x - y_j|)

g = h = k is the mean shift, g = k with h = k# the sharp field, g = -k'/r with h = k the gradient of log sum_j w_j k. In log space, so that a query far
from all targets still gets a direction. The own batch is masked: a query is absent from its own negatives.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..shapes import Float
from .frame import Problems

LogKernel = Callable[[Tensor, float], Tensor]
"""(distance, temperature) -> log of a positive function of the distance, as in `Laplace().log_value`."""


class Pull(NamedTuple):
    """`shift` is the pull; `log_density` the log of the w-weighted mean of h over the targets, -inf where there is none."""

    shift: Float[Tensor, "b n d"]
    log_density: Float[Tensor, "b n 1"]


def pulls(
    problems: Problems, temperature: float, numerator: LogKernel, normaliser: LogKernel, *, bias_corrected: bool = False
) -> tuple[Pull, Pull]:
    """The pulls of the positives and of the negatives on each query.

    Args:
        problems: whole ones or rows of them.
        temperature: of the kernels.
        numerator: log g.
        normaliser: log h.
        bias_corrected: whether weights p of a row are replaced by p (1 + p - sum p^2) (ABC, arXiv 2604.27239); for g = h.
    """
    found = []
    for own, distance, targets, masses in (
        (False, problems.to_positives, problems.positives, problems.positive_weights),
        (True, problems.to_negatives, problems.negatives, problems.negative_weights),
    ):
        absent = (lambda logits: problems.set_own(logits, -torch.inf)) if own else (lambda logits: logits)
        weighted = (lambda logits: logits) if masses is None else (lambda logits, w=masses: logits + w.log()[:, None])
        upper = absent(weighted(numerator(distance, temperature)))
        lower = upper if numerator == normaliser else absent(weighted(normaliser(distance, temperature)))
        total = lower.logsumexp(dim=-1, keepdim=True)
        share = (upper - total.clamp(min=torch.finfo(total.dtype).min)).exp()  # 0 where nobody is there
        if bias_corrected:
            share = share * (1 + share - share.square().sum(-1, keepdim=True))
        shift = share @ targets - share.sum(-1, keepdim=True) * problems.x
        log_density = (total - _others(problems, masses, own, distance).log()).masked_fill(total.isneginf(), -torch.inf)
        found.append(Pull(shift, log_density))
    return found[0], found[1]


def _others(problems: Problems, masses: Tensor | None, own: bool, distance: Tensor) -> Float[Tensor, "b n 1"]:
    """The mass that each query sees: of all targets but itself, added up without it, so that light others are not lost beside a heavy own one."""
    b, n, count = distance.shape
    end = max(0, min(problems.own - problems.start, n)) if own else 0
    if masses is None:
        seen = distance.new_full((b, n, 1), float(count))
        seen[:, :end] -= 1
        return seen
    seen = masses.sum(1)[:, None, None].repeat(1, n, 1)
    before, after = masses.cumsum(1), masses.flip(1).cumsum(1).flip(1)
    nobody = masses.new_zeros(b, 1)
    others = torch.cat([nobody, before[:, :-1]], dim=1) + torch.cat([after[:, 1:], nobody], dim=1)
    seen[:, :end] = others[:, problems.start : problems.start + end, None]
    return seen
