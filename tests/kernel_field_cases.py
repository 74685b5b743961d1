"""What the tests of kernel fields share: every field of them, published formulas, clouds of samples."""

import pytest
import torch
from torch import Tensor

from drifting_diffusers.fields import MeanShiftField
from drifting_diffusers.fields.divergence import DivergenceField
from drifting_diffusers.fields.frame import FramedField
from drifting_diffusers.fields.kernel_gradient import KernelGradientField
from drifting_diffusers.fields.score import ScoreField
from drifting_diffusers.fields.sharp import SharpField
from drifting_diffusers.kernels import Gaussian, Laplace, Matern, RationalQuadratic

F64 = torch.float64
KERNELS = {
    "laplace": Laplace(),
    "gaussian": Gaussian(),
    "rational_quadratic": RationalQuadratic(2.0),
    "matern_half_integer": Matern(1.5),
    "matern": Matern(0.8),
}
EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
ANTISYMMETRIC = {
    "mean_shift": MeanShiftField(),
    "mean_shift_bias_corrected": MeanShiftField(bias_corrected=True),
    "score": ScoreField(),
    "score_form": ScoreField((0.2, 0.5), form="score"),
    "sharp": SharpField(),
    "sharp_matern": SharpField((0.3,), kernel=Matern(0.8)),
    "kernel_gradient": KernelGradientField(),
    "kernel_gradient_rational_quadratic": KernelGradientField((0.3,), kernel=RationalQuadratic(0.7)),
    "divergence_kl": DivergenceField(),
    "divergence_mmd": DivergenceField(weighting="mmd"),
}
FIELDS = ANTISYMMETRIC | {
    "divergence_p/q": DivergenceField(weighting="p/q"),
    "divergence_q/p": DivergenceField(weighting="q/p"),
    "divergence_mixed": DivergenceField(weighting=("kl", "q/p"), mixture=(0.5, 2.0)),
}
EVERY_FIELD = pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS.keys())


def plain(cls: type, temperature: float = 0.8, **more) -> FramedField:
    """The published formula: plain lengths, nothing normalised."""
    return cls((temperature,), normalise_distance=False, normalise_force=False, **more)


def clouds(seed: int = 0, d: int = 3, sizes=(16, 20, 24), b: int = 2) -> list[Tensor]:
    """Queries, positives shifted by 1, negatives."""
    generator = torch.Generator().manual_seed(seed)
    x, positives, negatives = (torch.randn(b, n, d, generator=generator, dtype=F64) for n in sizes)
    return [x, positives + 1, negatives]


def masses(seed: int = 1, b: int = 2, p: int = 20, q: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(b, p, generator=generator, dtype=F64) + 0.1, 2 * torch.rand(b, q, generator=generator, dtype=F64) + 0.1


def velocity(field, x: Tensor, positives: Tensor, negatives: Tensor, **more) -> Tensor:
    return field(x, positives=positives, negatives=negatives, **more).velocity


def gap(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def slopes(function, x: Tensor, step: float = 1e-5) -> Tensor:
    """D function / dx by central differences, the new axis last: every query of a function of queries one by one."""
    moves = step * torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.stack([(function(x + e) - function(x - e)) / (2 * step) for e in moves], dim=-1)


def mean_of(k, x: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
    """The w-weighted mean over y of a function of the distance, with distances taken pair by pair."""
    values = k((x[..., :, None, :] - y[..., None, :, :]).norm(dim=-1))
    w = torch.ones_like(y[..., 0]) if w is None else w
    return (values * w[..., None, :]).sum(-1) / w.sum(-1)[..., None]
