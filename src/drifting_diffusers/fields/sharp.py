r"""The field of "Drifting Fields are not Conservative" (arXiv 2604.06333): the mean shift, normalised with the sharp kernel k#.

    V#(x) = E_p[k (y - x)] / E_p[k#]  -  E_q[k (y - x)] / E_q[k#]  =  grad log (k# * p)  -  grad log (k# * q),      k#(r) = int_r^inf s k(s) ds

since grad_x k# = k (y - x). So V# is a gradient for every radial kernel (law T8; the mean shift is one for the Gaussian alone, where k# = tau^2 k), a
difference of scores that rests only where p = q if k# is characteristic. `sharp_potential` is the scalar whose gradient it is: with L = mean_i [log q#(x_i) - log p#(x_i)],

    V#(x_i) = -n dL/dx_i      in the coordinates of x: `normalise_distance` and `normalise_force` off

Descending L is the same as regressing x onto sg(x + V#), up to the size of the step.

Units: V# is 1 / length, where the mean shift is a length. The frame measures lengths in mean distances s, so the force is in 1 / s, and a plain step
(`normalise_force` off) is s^2 V#. That is of the order of 1 / tau^2 mean shifts, tau in mean distances, so among several temperatures the
smallest leads. With `normalise_force` on, each is divided by its own rms and the unit drops out.

The own batch is masked. Masses multiply both kernels. The kernel must have a k#: the rational quadratic one needs alpha > 1.

Known limits. For the Laplace kernel k / k# = 1 / (tau (r + tau)): a query far from all its targets is pulled with 1 / tau at most, where the mean
shift has the whole distance. Like all local fields it does not see wrong masses of far clusters (law T14).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import Kernel, Laplace, exact_products, in_float, pairwise_distance
from ..shapes import Float
from .choices import positive
from .frame import FramedField, Problems, check_shapes
from .protocol import own_of
from .pulls import pulls


@dataclass(frozen=True)
class SharpField(FramedField):
    """Difference of two mean shifts, each normalised with k#.

    Attributes:
        kernel: the radial kernel k; the paper has several, the default is that of the released field.
    """

    kernel: Kernel = field(default_factory=Laplace)

    def force(self, problems: Problems, temperature: float) -> Float[Tensor, "b n d"]:
        attraction, repulsion = pulls(problems, temperature, self.kernel.log_value, self.kernel.log_sharp)
        return attraction.shift - repulsion.shift


def sharp_potential(
    x: Float[Tensor, "*b n d"],
    positives: Float[Tensor, "*b p d"],
    negatives: Float[Tensor, "*b m d"],
    *,
    temperature: float,
    kernel: Kernel = Laplace(),
    positive_weights: Float[Tensor, "*b p"] | None = None,
    negative_weights: Float[Tensor, "*b m"] | None = None,
    own: int | None = None,
) -> Float[Tensor, "*b"]:
    """L = mean_i [log E_q k#(|x_i - y|) - log E_p k#(|x_i - y|)] of every problem: differentiable in x alone, V#(x_i) = -n dL/dx_i.

    Targets are constants, also where they are the queries, and a query is absent from its own negatives. A side on which a query sees nobody
    does not count. Distances are plain: `temperature` is in the coordinates of x. Whole matrices [b, n, m + p] are in memory, and a few of
    them are kept for the gradient.

    Args:
        x: the queries; the gradient comes back in their dtype, L is in float32 at least.
        positives: samples that attract.
        negatives: samples that repel, first the queries themselves.
        temperature: width of the kernel, above 0.
        kernel: k, which must have a k#.
        positive_weights: masses >= 0; 1 each if not given. Mass 0 is absence.
        negative_weights: masses >= 0; 1 each if not given.
        own: how many of the leading negatives are the queries; not given, all if `negatives is x`, else none.

    Raises:
        ValueError: for shapes that do not fit each other, `own` outside [0, min(n, m)], or a temperature that is not above 0.
    """
    own = own_of(x, negatives, own)
    check_shapes(x, positives, negatives, positive_weights, negative_weights, own)
    if not positive(temperature):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
    one = lambda t: in_float(t[None] if x.ndim == 2 else t)
    mass = lambda points, w: torch.ones_like(points[..., 0]) if w is None else one(w.detach())
    with torch.autocast(x.device.type, enabled=False), exact_products():
        p, q = one(positives.detach()), one(negatives.detach())
        centre = torch.cat([q, p], dim=1).mean(dim=1, keepdim=True)  # distances do not change, their rounding errors do
        p_mass, q_mass = mass(p, positive_weights), mass(q, negative_weights)
        moved, log_density = one(x) - centre, lambda *side: _log_density(kernel, temperature, *side)
        gap = log_density(moved, q - centre, q_mass, own) - log_density(moved, p - centre, p_mass, 0)
    potential = gap.mean(dim=1)
    return potential[0] if x.ndim == 2 else potential


def _log_density(kernel: Kernel, temperature: float, x: Tensor, targets: Tensor, masses: Tensor, own: int) -> Float[Tensor, "b n"]:
    """The log of the mean of k# over the targets that a query sees, and 0, without gradient, where it sees none."""
    absent = (masses == 0)[:, None].repeat(1, x.shape[1], 1)
    absent.diagonal(dim1=1, dim2=2)[:, :own] = True
    alone = absent.all(dim=-1)
    hidden = absent & ~alone[..., None]  # a row of nothing but -inf has a gradient of NaN
    logits = masses.clamp(min=torch.finfo(masses.dtype).tiny).log()[:, None].expand(absent.shape).masked_fill(hidden, -torch.inf)
    log_sharp = kernel.log_sharp(pairwise_distance(x, targets), temperature)
    return ((log_sharp + logits).logsumexp(dim=-1) - logits.logsumexp(dim=-1)).where(~alone, 0.0)
