r"""The field of "Generative Modeling via Drifting" (arXiv 2602.04770, eq. 10): attraction less repulsion, each a mean shift of its own.

    V(x) = E_p[k(x, y) (y - x)] / E_p[k]  -  E_q[k(x, y) (y - x)] / E_q[k]

Algorithm 2 with the softmax over targets alone is this field times a (1 - a), a = Z+ / (Z+ + Z-): at most 1/4, and nothing where one side is far
(law T5). Here a query far from the data is pulled at full length.

The centroid of n weighted targets has a bias of order 1/n. `bias_corrected` replaces the weights p of each row by p (1 + p - sum p^2)
(ABC, arXiv 2604.27239), which leaves O(1/n^2); weights stay nonnegative and still sum to 1.

Lengths are mean distances, V is a length. The own batch is masked: a query is absent from its own negatives. Masses multiply the kernel.

Known limits. With any kernel but the Gaussian it is no gradient (law T8). Local in the temperature: it does not see that far clusters have wrong
masses (law T14).
"""

from dataclasses import dataclass, field

from torch import Tensor

from ..kernels import Kernel, Laplace
from ..shapes import Float
from .frame import FramedField, Problems
from .pulls import pulls


@dataclass(frozen=True)
class MeanShiftField(FramedField):
    """Difference of two mean shifts.

    Attributes:
        kernel: the radial kernel.
        bias_corrected: whether the row weights are those of ABC.
    """

    kernel: Kernel = field(default_factory=Laplace)
    bias_corrected: bool = False

    def force(self, problems: Problems, temperature: float) -> Float[Tensor, "b n d"]:
        log_k = self.kernel.log_value
        attraction, repulsion = pulls(problems, temperature, log_k, log_k, bias_corrected=self.bias_corrected)
        return attraction.shift - repulsion.shift
