r"""The Frechet distance as a drift (arXiv 2604.28190): every sample goes where the affine map between two Gaussian fits sends it.

    V(x) = T(x) - x,     T(x) = mu_r + A (x - mu_g),     A = S_g^-1/2 (S_g^1/2 S_r S_g^1/2)^1/2 S_g^-1/2
    FD = |mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_g^1/2 S_r S_g^1/2)^1/2)

with the means and covariances of the real samples r (the positives, by mass) and of the generated ones g (the negatives, by mass, the own ones not
masked). The paper descends FD itself; with moments of N samples its gradient in a sample is 2 (x - T(x)) / N (law T22), so regression onto x + V is
the same descent, without a graph through a matrix root. It takes moments over many more samples than a step has, from a queue of 50000 or from an
exponential average with decay 0.999, and lets the gradient pass through the current ones only, as every drift does.

V is a length in the coordinates of x. s is the rms distance of a generated and a real sample, sqrt(tr S_r + tr S_g + |mu_r - mu_g|^2) (ours), so no
pairs are formed: `strength` is the mean of |V|^2 / (u^2 d) = |V|^2 / s^2, which is FD / s^2 with moments of the step. Unlike kernel forces V is not
divided by its rms unless asked (ours): it is the gradient of a distance, and falls with it.

Ours, too: unconditional negatives of guidance are part of g with their masses, as in q~ = (1 - gamma) q + gamma p, so T carries the mixture to the real
samples, and at rest the mixture has their moments, where any q does that. Pooled over all problems, labels count by their mass. A queue is one of moments,
every call is one step of it, and one whose sums are not finite is not remembered. Covariances are divided by the mass, not by one less.

With fewer samples than dimensions, or a collapsed generator, S_g has no inverse: `ridge` times the mean eigenvalue of both sides is added to both, so
equal samples still rest, and no direction is widened more than about sqrt(2 / ridge) times at once. Matrices are float64, and on a device without it
(MPS) they are on the CPU: two eigenvalue problems of d x d per call, half a minute for d = 2048 on one core. Take it for pooled features, d <= 2048.
A device is waited for by both eigenvalue problems, and twice more with a memory: whether the sums are finite, and how many samples they are of.

Known limits. Only two moments are seen: V is 0 between any two distributions that share them. With moments of one class per step pooled, it is the
class mixture that is matched. Moments of the step are biased by about d / n: more samples than dimensions, or a memory.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..schedules import Scheduled
from ..shapes import Float
from .frame import Force, FramedField, Problems, check_choice, positive
from .moments import Gaussian, Moments, gaussian_of, over_processes, sums_of
from .protocol import Drift, Mean, batch_mean
from .situation import Situation


@dataclass(frozen=True)
class FrechetField(FramedField):
    """The affine transport between Gaussian fits.

    Attributes:
        moments: whether both sides' moments are those of the step (`batch`), of the last steps (`queue`), or averaged over all (`average`).
        window: how many generated samples a queue holds at least, over all processes; the paper's is 50000. To be chosen with `queue` alone.
        decay: of the average, per step, in [0, 1); the paper's is 0.999. To be chosen with `average` alone.
        ridge: added to both covariances, in mean eigenvalues of the two.
        grouping: whether the problems of a step are pooled (the unconditional distance), or each has moments of its own; a memory needs the first.
        temperatures: there is one force and it has no width; not to be chosen.
        memory: the moments so far, by feature. A field made by `dataclasses.replace` shares it, and would take a queue for an average: to change `moments`,
            make a new field, or give `memory=Moments()`.
        feature: whose moments they are; see `within`.
    """

    temperatures: tuple[Scheduled, ...] = field(default=(1.0,), init=False, repr=False, compare=False)
    normalise_force: bool = False
    moments: Literal["batch", "queue", "average"] = "batch"
    window: int = 50_000
    decay: float = 0.999
    ridge: float = 1e-6
    memory: Moments = field(default_factory=Moments, compare=False, repr=False)
    feature: str = field(default="", compare=False, repr=False)

    by_rows: ClassVar[bool] = False  # the map is that of all queries

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "moments", "batch", "queue", "average")
        if self.moments != "batch" and self.grouping != "batch":
            raise ValueError(f"moments={self.moments!r} are those of all problems together; take grouping='batch', or moments='batch'")
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be a whole number of samples, at least 1, got {self.window!r}; the paper has 50000")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay!r}; the paper has 0.999")
        if not positive(self.ridge):
            raise ValueError(f"ridge must be finite and above 0, got {self.ridge!r}: a covariance of few samples has no inverse; take 1e-6")
        for name, moments in (("window", "queue"), ("decay", "average")):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if self.moments != moments and value != default:
                raise ValueError(
                    f"{name} has no effect with moments={self.moments!r}, got {value!r}; take moments={moments!r}, or leave {name} at {default}"
                )

    def within(self, situation: Situation) -> "FrechetField":
        """The field that remembers the moments of this feature."""
        return dataclasses.replace(self, feature=situation.feature)

    def centre(self, problems: Problems) -> Float[Tensor, "1 1 1"]:
        """Nothing: moments of several problems and steps have one origin."""
        return problems.x.new_zeros(1, 1, 1)

    def measure(self, problems: Problems, average: Any) -> Tensor:
        """The rms distance of a generated and a real sample, from moments."""
        real, generated = self._gaussians(problems)
        spread = (real.covariance + generated.covariance).diagonal(dim1=-2, dim2=-1).sum(-1)
        squared = (real.mean - generated.mean).square().sum((-2, -1)) + spread
        return squared.clamp(min=0).sqrt().to(problems.x)

    def force(self, problems: Problems, temperature: float) -> Float[Tensor, "b n d"]:
        """T(x) - x. Problems that a wrapper made of others have their own moments, those of this process alone.

        Raises:
            ValueError: for such problems, if moments are remembered: there is no telling which of them are the step's.
        """
        real, generated = self._gaussians(problems)
        matrix = affine_map(generated.covariance, real.covariance, self.ridge)
        matrix = matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return (problems.x - generated.mean.to(problems.x)) @ matrix.to(problems.x) + (real.mean - generated.mean).to(problems.x)

    def _drift(self, force: Force, by_rows: bool, problems: Problems, mean: Mean) -> Drift:
        return super()._drift(force, by_rows, self._fitted(problems, mean), mean)

    def _gaussians(self, problems: Problems) -> tuple[Gaussian, Gaussian]:
        if isinstance(problems, Fitted) and "gaussians" in problems.__dict__:
            return problems.__dict__["gaussians"]
        if self.moments != "batch":
            raise ValueError(
                f"moments={self.moments!r} belong to the samples of a step, not to moved ones; wrap a field with moments='batch'"
            )
        return self._gaussians(self._fitted(problems, batch_mean))

    def _fitted(self, problems: Problems, mean: Mean) -> "Fitted":
        d = problems.x.shape[-1]
        sides = ((problems.positives, problems.positive_weights), (problems.negatives, problems.negative_weights))
        real, generated = (sums_of(points, masses) for points, masses in sides)
        if self.grouping == "batch":
            real, generated = self._pooled(torch.stack([real.sum(0), generated.sum(0)]), problems.x.shape[0] * problems.x.shape[1], mean)
        fitted = Fitted(**{entry.name: getattr(problems, entry.name) for entry in dataclasses.fields(problems)})
        fitted.__dict__["gaussians"] = (gaussian_of(real, d), gaussian_of(generated, d))
        return fitted

    def _pooled(self, sums: Float[Tensor, "2 k"], count: int, mean: Mean) -> Tensor:
        """(real, generated) sums of the step or of the memory."""
        sums, number = over_processes(sums, count, mean)
        if self.moments == "batch" or not bool(torch.isfinite(sums).all()):
            return sums
        if self.moments == "queue":
            return self.memory.queued(self.feature, sums, round(number), self.window)
        return self.memory.averaged(self.feature, sums / number, self.decay)


class Fitted(Problems):
    """Problems with the moments of both sides; `dataclasses.replace` leaves those behind, because they may be wrong then."""

    def in_lengths(self, length: Tensor) -> Problems:
        scaled = super().in_lengths(length)
        if "gaussians" in self.__dict__:
            scaled.__dict__["gaussians"] = tuple(side.in_lengths(length) for side in self.__dict__["gaussians"])
        return scaled


def affine_map(source: Float[Tensor, "*b d d"], target: Float[Tensor, "*b d d"], ridge: float) -> Float[Tensor, "*b d d"]:
    """A with A S A = R, symmetric and at least 0: the optimal transport between Gaussians of covariance S and R.

    Args:
        source: S, in float64; what is not finite is taken for 0, as the means are not finite either.
        target: R.
        ridge: added to both, in mean eigenvalues of the two.
    """
    source, target = (m.nan_to_num(0.0, 0.0, 0.0) for m in (source, target))
    d = source.shape[-1]
    mean_eigenvalue = (source + target).diagonal(dim1=-2, dim2=-1).sum(-1) / (2 * d)
    more = (ridge * mean_eigenvalue).clamp(min=0)[..., None, None] * torch.eye(d, dtype=source.dtype, device=source.device)
    least = torch.finfo(source.dtype).tiny
    values, vectors = torch.linalg.eigh(source + more)
    values = values.clamp(
        min=(ridge * mean_eigenvalue / 2).clamp(min=math.sqrt(least))[..., None]
    )  # rounding may leave them below the ridge
    root, inverse_root = ((vectors * power[..., None, :]) @ vectors.mT for power in (values.sqrt(), values.rsqrt()))
    between, directions = torch.linalg.eigh(root @ (target + more) @ root)
    middle = (directions * between.clamp(min=0).sqrt()[..., None, :]) @ directions.mT
    return inverse_root @ middle @ inverse_root
