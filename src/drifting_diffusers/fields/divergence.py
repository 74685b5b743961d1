r"""The velocities of "Gradient-Flow Drifting" (arXiv 2603.10592): gradient flows of divergences between kernel density estimates of p and q.

    V(x) = w(x) ( grad log p_kde(x) - grad log q_kde(x) )

    weighting   w        V is the gradient of   q flows down
    "kl"        1        log(p / q)             int q log(q / p): the kernel-gradient field
    "p/q"       p / q    p / q                  int p log(p / q), loud where samples are missing
    "q/p"       q / p    -q / p                 int q^2 / 2 p, chi-square, loud where there are too many
    "mmd"       -        p - q                  the maximum mean discrepancy of the kernel: no division

The third column is exact, the fourth holds up to one more smoothing with k. Sources call these rows forward and reverse in different order, so a row is
named by its weight here. Several may be mixed, sum_i c_i V_i. All are gradients (law T8): functions of one scalar times its gradient.

p_kde = E_p[k] has k(0) = 1: densities but for the constant int k, which cancels everywhere but in "mmd", whose size it sets in a mixture. Lengths are
mean distances, units 1 / length as in `KernelGradientField`; "mmd" too, since k has none. The own batch is masked: the estimate q leaves each
query out. Masses multiply the kernel. Coinciding points do not pull each other.

Known limits. p / q ranges over hundreds of orders of magnitude where one side is far; it is computed in logs and cut to [1 / bound, bound] (ours:
otherwise the rms of a step is that of a single query, and all others stand still). A cut w is still a function of p / q, so V is still a gradient.
"p/q" and "q/p" are no antisymmetric fields: exchanging p and q exchanges them, V_p/q(x; p, q) = -V_q/p(x; q, p); they rest at p = q all the same.
"mmd" underflows far from all samples: no force, where "kl" keeps its length. The paper's smoothness condition excludes the Laplace kernel (jitter at
convergence), so the default is the Gaussian.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels import Gaussian, Kernel
from ..shapes import Float
from .choices import is_number, positive
from .frame import FramedField, Problems
from .kernel_gradient import scores

WEIGHTINGS = ("kl", "p/q", "q/p", "mmd")


@dataclass(frozen=True)
class DivergenceField(FramedField):
    """A weighted difference of two scores.

    Attributes:
        kernel: of both density estimates.
        weighting: `kl`, `p/q`, `q/p` or `mmd`, or a tuple of them to mix.
        mixture: one factor for each weighting; 1 each if not given.
        ratio_bound: p / q is cut to [1 / ratio_bound, ratio_bound]; in [1, 1e12], so that squares of forces fit into float32.
    """

    kernel: Kernel = field(default_factory=Gaussian)
    weighting: str | tuple[str, ...] = "kl"
    mixture: tuple[float, ...] | None = None
    ratio_bound: float = 100.0

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.weighting, str | tuple) or not self._weightings or not all(name in WEIGHTINGS for name in self._weightings):
            raise ValueError(f"weighting must be one or several of {', '.join(WEIGHTINGS)}, got {self.weighting!r}")
        if self.mixture is not None and not (isinstance(self.mixture, tuple) and self._fits(self.mixture)):
            raise ValueError(f"mixture must be one finite factor for each of {self._weightings}, got {self.mixture!r}")
        if not (positive(self.ratio_bound) and 1 <= self.ratio_bound <= 1e12):
            raise ValueError(f"ratio_bound must lie in [1, 1e12], got {self.ratio_bound!r}; 1 is the kl weighting, 1e12 hardly a bound")

    def _fits(self, mixture: tuple[Any, ...]) -> bool:
        return len(mixture) == len(self._weightings) and all(is_number(factor) and math.isfinite(factor) for factor in mixture)

    @property
    def _weightings(self) -> tuple[str, ...]:
        return (self.weighting,) if isinstance(self.weighting, str) else self.weighting

    def force(self, problems: Problems, temperature: float) -> Float[Tensor, "b n d"]:
        attraction, repulsion = scores(problems, temperature, self.kernel)
        log_p, log_q = attraction.log_density, repulsion.log_density
        ratio = _difference(log_p, log_q).clamp(-math.log(self.ratio_bound), math.log(self.ratio_bound))
        score = attraction.shift - repulsion.shift
        forces: dict[str, Callable[[], Tensor]] = {
            "kl": lambda: score,
            "p/q": lambda: ratio.exp() * score,
            "q/p": lambda: (-ratio).exp() * score,
            "mmd": lambda: log_p.exp() * attraction.shift - log_q.exp() * repulsion.shift,
        }
        factors = self.mixture or (1.0,) * len(self._weightings)
        parts = [factor * forces[name]() for name, factor in zip(self._weightings, factors, strict=True)]
        return sum(parts[1:], parts[0])


def _difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(p / q), and 0 where nobody is on either side."""
    return (log_p - log_q).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
