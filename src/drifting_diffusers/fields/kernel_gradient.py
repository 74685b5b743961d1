r"""The field of "Kernel-Gradient Drifting Models" (arXiv 2605.10727): the displacement y - x of the mean shift becomes the gradient of the kernel.

    V(x) = grad log (k * p)(x)  -  grad log (k * q)(x),      grad_x k(|x - y|) = (-k'(r) / r) (y - x)

A difference of scores of kernel density estimates, for every kernel: a gradient (law T8), a descent of a smoothed KL divergence, and at rest only where
p = q if the kernel is characteristic. For the Gaussian it is the mean shift over tau^2. The Laplace kernel smooths with k here, and with k# in
`SharpField`.

Units: 1 / length. Lengths are mean distances s, so the force is in 1 / s, and a plain step (`normalise_force` off) is s^2 times V in the coordinates
of x. With `normalise_force` on, the unit drops out. The own batch is masked. Masses multiply the kernel.

Where the kernel has a kink (Laplace, Matern with nu <= 1/2) its gradient at r = 0 is set to 0, as in the paper. Points closer than
`LEAST_DISTANCE` in mean distances count as coinciding, for all kernels (ours): the factor 1 / r would blow their rounding errors up.

Known limits. Beside a kink the pull of a near neighbour has length 1 / tau whatever the distance, and its direction flips across it: particles
jitter at convergence. The paper works with large batches and a cap on steps. Its forms on manifolds and on the simplex are not here.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import LEAST_DISTANCE, Kernel, Laplace
from ..shapes import Float
from .frame import FramedField, Problems
from .pulls import Pull, pulls


@dataclass(frozen=True)
class KernelGradientField(FramedField):
    """Difference of two gradients of log density estimates.

    Attributes:
        kernel: the radial kernel that smooths both; the paper has several, the default is ours.
    """

    kernel: Kernel = field(default_factory=Laplace)

    def force(self, problems: Problems, temperature: float) -> Float[Tensor, "b n d"]:
        attraction, repulsion = scores(problems, temperature, self.kernel)
        return attraction.shift - repulsion.shift


def scores(problems: Problems, temperature: float, kernel: Kernel) -> tuple[Pull, Pull]:
    """The gradients of log (k * p) and of log (k * q) at the queries, and both logs."""

    def log_pull(distance: Tensor, temperature: float) -> Tensor:
        coinciding = distance <= LEAST_DISTANCE * (1 + 1e-6)  # without normalisation it is just this floor
        return kernel.log_pull(distance, temperature).masked_fill(coinciding, -torch.inf)

    return pulls(problems, temperature, log_pull, kernel.log_value)
