r"""The score difference of "Generative Drifting is Secretly Score Matching" (arXiv 2603.09936): the mean shift field of the Gaussian kernel.

With k = exp(-r^2 / 2 sigma^2) and p_sigma, q_sigma the densities smoothed with it,

    V(x) = E_p[k (y - x)] / E_p[k]  -  E_q[k (y - x)] / E_q[k]  =  sigma^2 grad log( p_sigma(x) / q_sigma(x) )

exactly, for finite samples too: the smoothed densities are then kernel density estimates (law T7). So V is a gradient, and it rests only where
p = q: a Gaussian's Fourier transform has no zeros. The self term of the own batch is left out of q_sigma, per query.

sigma is the temperature, in mean distances. V is a length; `form="score"` leaves out sigma^2, and V has units 1 / length: in the frame that
is 1 / s, and a plain step (`normalise_force` off) is then s^2 times the score in the coordinates of x. With `normalise_force` on, each
temperature is divided by its own rms and both forms are the same field.

A mode of frequency K fades at the rate sigma^2 K^2 exp(-sigma^2 K^2 / 2) (law T10), so a fixed width needs a time exp(O(sigma^2 K^2)) for fine
detail, and an annealed one, sigma(t) = sigma_0 exp(-r t), O(log K) (law T11):

    ScoreField((exponential(1.0, 0.05, rate=0.5 * annealing_rate()),), normalise_force=False)

with `schedules.annealing_rate` for the fastest r that still damps every mode. sigma_0, r and the default width of 0.2 mean distances are ours: the
paper's experiments were not available. So is which form they were run in; the default is the field that drifting computes.

Known limits. The rates hold for a small gap and a target that is level over a few sigma. A narrow Gaussian forgets its far neighbours faster
than any other kernel here: it hears nobody but the nearest target. Far clusters with wrong masses are left as they are (law T14).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..kernels import Gaussian
from ..schedules import Scheduled
from ..shapes import Float
from .choices import check_choice
from .frame import FramedField, Problems
from .pulls import pulls


@dataclass(frozen=True)
class ScoreField(FramedField):
    """Difference of two scores of Gaussian density estimates.

    Attributes:
        temperatures: widths sigma, in mean distances; schedules anneal them.
        form: `mean_shift` is sigma^2 grad log(p / q), a length; `score` is grad log(p / q), 1 / length.
    """

    temperatures: tuple[Scheduled, ...] = (0.2,)
    form: Literal["mean_shift", "score"] = "mean_shift"

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "form", "mean_shift", "score")

    def force(self, problems: Problems, temperature: float) -> Float[Tensor, "b n d"]:
        log_k = Gaussian().log_value
        attraction, repulsion = pulls(problems, temperature, log_k, log_k)
        shift = attraction.shift - repulsion.shift
        return shift if self.form == "mean_shift" else shift / temperature**2
