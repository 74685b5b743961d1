r"""The drifting field of "Generative Modeling via Drifting" (arXiv 2602.04770, Algorithm 2 and A.6), as its authors released it.

With the targets y = (negatives, positives), masses w, s the w-weighted mean of all distances |x_i - y_j|, and per temperature tau

    a_ij = max( sqrt( softmax_j(l) softmax_i(l) ), floor ) w_j,      l_ij = log k(|x_i - y_j| / s; tau)
    F_i  = sum_{j in +} a_ij A-_i y_j / u  -  sum_{j in -} a_ij A+_i y_j / u,      A+-_i = sum_{j in +-} a_ij,   u = s / sqrt(d)
    V    = sum_tau F_tau / rms(F_tau)

s and each rms are one number for the whole step, so problems are not independent: see `grouping` and `mean`.

Known limits. With the floor on, every target pulls a little at any distance: this keeps far starts trainable, and it freezes low-dimensional
toys between their modes. Measure it against the mean affinity, at most 1/sqrt(n (m + p)): with 1000 targets the floor of 1e-3 binds nearly
everywhere, and with `normalise_force` off the pull then grows without bound. Without it take one temperature of about 1: it is what moves
mass between far modes. With the masked own batch as negatives the field has a bias of order 1/sqrt(n). Because of the rms, V never
shrinks: for particles, switch `normalise_force` off.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..couplings import Coupling, two_sided_softmax
from ..kernels import Kernel, Laplace, undisturbed
from ..shapes import Float
from .choices import check_choice, refuse_schedules, settle
from .engine import Engine, Sides, TorchEngine
from .frame import FramedField, Problems, check_shapes
from .protocol import Drift, batch_mean, own_of
from .stages import Stages, finish
from .triton_plan import available


@dataclass(frozen=True)
class DriftingField(FramedField):
    """The released field. Its parameters are what the paper, the release and their ports do differently; see `algorithm_2` for the paper's text.

    Attributes:
        affinity_floor: the least affinity, in [0, 1), before the weights; 1e-3 pulls from everywhere, 0 is the paper's text.
        self_mask: added to the normalised distance of a sample to itself. Finite in the release, which shows at temperatures above about 10
            and for samples more than 100 mean distances away from all others.
        weights: whether masses multiply the affinities after both softmaxes (release; a target of mass 0 still takes part in them) or
            enter the softmax over targets before it (a target of mass 0 is absent).
        weightless: whether a target of mass 0 takes part in the softmaxes (release) or is absent. Unconditional negatives at guidance scale 1 are
            such targets. It says nothing where masses enter before.
        backend: how the force is computed, to rounding the same: "plain" in whole matrices, as it is written here; "torch", see `engine`; "triton" on CUDA;
            "auto" takes what is fast and can do these choices. It is no choice of a run: two fields that differ in it are equal.

    Raises:
        ValueError: for choices outside their range, or a backend that cannot do them.
    """

    affinity_floor: float = 1e-3
    self_mask: float = 100.0
    weights: Literal["after", "before"] = "after"
    weightless: Literal["present", "absent"] = "present"
    kernel: Kernel = field(default_factory=Laplace)
    coupling: Coupling = two_sided_softmax
    backend: Literal["auto", "plain", "torch", "triton"] = field(default="auto", compare=False)

    by_rows: ClassVar[bool] = False

    def __post_init__(self):
        settle(self)  # the frame's own checks stand below, because they look at the mask
        if not 0 <= self.affinity_floor < 1:
            raise ValueError(f"affinity_floor must lie in [0, 1), got {self.affinity_floor}; the release has 1e-3, the paper's text 0")
        if not (math.isfinite(self.self_mask) and self.self_mask >= 0):
            raise ValueError(
                f"self_mask must be finite and at least 0, got {self.self_mask}; use a large number such as 1e6 for a full mask"
            )
        super().__post_init__()
        check_choice(self, "weights", "after", "before")
        check_choice(self, "weightless", "present", "absent")
        check_choice(self, "backend", "auto", "plain", "torch", "triton")
        if self.backend in ("torch", "triton") and not self.released:
            raise ValueError(
                f"backend={self.backend!r} computes the released force alone: kernel=Laplace(), coupling=two_sided_softmax, weights='after', "
                f"weightless='present'; take backend='auto' for {self}"
            )

    @property
    def farthest(self) -> float:
        return 1 + self.self_mask  # logits, the masked ones too, are distances over temperatures

    @property
    def released(self) -> bool:
        """Whether kernel, coupling and masses are those of the release, which engines compute."""
        return (type(self.kernel), self.coupling, self.weights, self.weightless) == (Laplace, two_sided_softmax, "after", "present")

    @property
    def staged(self) -> bool:
        """Whether `stages` may be called."""
        return type(self) is DriftingField and self.released and self.backend != "plain"

    def __call__(self, x: Tensor, *, positives: Tensor, negatives: Tensor, **more: Any) -> Drift:
        """See `Field`."""
        if not self.staged or 0 in (*x.shape, negatives.shape[-2] + positives.shape[-2]):
            return super().__call__(x, positives=positives, negatives=negatives, **more)
        given = {"positive_weights": None, "negative_weights": None, "own": None, "mean": batch_mean} | more
        own = own_of(x, negatives, given["own"])
        check_shapes(x, positives, negatives, given["positive_weights"], given["negative_weights"], own)
        one: Any = lambda t: None if t is None else t[None] if x.ndim == 2 else t
        queries = one(x)
        repelling = queries if negatives is x else one(negatives)
        sides = Sides(queries, (repelling, one(positives)), negatives.shape[-2], own)
        sides = sides.with_masses([one(given["negative_weights"]), one(given["positive_weights"])])
        drift = finish(self.stages(sides), given["mean"])
        return dataclasses.replace(drift, velocity=drift.velocity[0]) if x.ndim == 2 else drift

    @torch.no_grad()
    def stages(self, sides: Sides) -> Stages:
        """The drift in stages; see `stages.Stages`."""
        refuse_schedules(self)
        b, n, d = sides.queries.shape
        engine, exactly = self._engine(sides), lambda: undisturbed(sides.queries.device)
        with exactly():
            totals, weights = engine.measure()
        measured = yield from self._mean(totals, weights)
        length, unit = self.lengths(measured, d)
        with exactly():
            squares = engine.forces(length) / unit.square()
        strengths = yield from self._mean(squares, squares.new_full((b,), float(n * d)))
        factors = strengths.clamp(min=self.strength_floor).rsqrt() if self.normalise_force else torch.ones_like(strengths)
        with exactly():
            velocity = engine.velocity(factors)
        return Drift(velocity, unit, measured, strengths)

    def _mean(self, totals: Tensor, weights: Tensor) -> Stages:
        """Over the step, or of each problem."""
        if self.grouping == "problem":
            return totals / weights
        return (yield totals, weights)

    def _engine(self, sides: Sides) -> Engine:
        device = sides.queries.device
        choices: Any = (tuple(self.temperatures), self.affinity_floor, self.self_mask)
        on_cuda = device.type == "cuda" and sides.dtype == torch.float32 and available(device)
        if self.backend == "triton" or (self.backend == "auto" and on_cuda):
            from .triton_engine import TritonEngine

            return TritonEngine(sides.queries, sides.targets, sides.own, sides.negatives, sides.masses, *choices)
        return TorchEngine(sides, *choices)

    def force(self, problems: Problems, temperature: float) -> Float[Tensor, "b n d"]:
        """F of one temperature: attraction less repulsion, each weighted with the mass of the other side."""
        parts = []
        for _, part in problems.parts():
            columns = self._columns(part, temperature)
            parts += [torch.cat([self._of_rows(rows, temperature, columns) for _, rows in part.rows()], dim=1)]
        return torch.cat(parts)

    def _columns(self, problems: Problems, temperature: float) -> Float[Tensor, "b 1 t"] | None:
        """What a softmax over queries divides by, where the queries do not fit into one block."""
        found = [self._logits(rows, temperature).logsumexp(dim=1, keepdim=True) for _, rows in _several(problems)]
        return torch.stack(found).logsumexp(dim=0) if found else None

    def _logits(self, rows: Problems, temperature: float) -> Float[Tensor, "b r t"]:
        logits = self.kernel.log_value(rows.distance, temperature)
        return rows.set_own(logits, self.kernel.log_value(rows.own_pairs(rows.distance) + self.self_mask, temperature))

    def _of_rows(self, rows: Problems, temperature: float, columns: Tensor | None) -> Float[Tensor, "b r d"]:
        """Both sides carry the same total mass A+ A-, so the terms in x cancel and x itself does not appear."""
        logits, weights, m = self._logits(rows, temperature), rows.weights, rows.negatives.shape[1]
        more = {} if columns is None else {"columns": columns}
        if self.weights == "before":
            affinity = self.coupling(logits, weights, floor=self.affinity_floor, **more)
        else:
            presence = (weights > 0).to(logits) if weights is not None and self.weightless == "absent" else None
            affinity = self.coupling(logits, presence, floor=self.affinity_floor, **more)
            affinity = affinity if weights is None else affinity * weights[:, None, :]
        negative, positive = affinity[..., :m], affinity[..., m:]
        attraction = (positive * negative.sum(-1, keepdim=True)) @ rows.positives  # (b, r, p) @ (b, p, d)
        repulsion = (negative * positive.sum(-1, keepdim=True)) @ rows.negatives  # (b, r, m) @ (b, m, d)
        return attraction - repulsion


def algorithm_2(temperature: float, coupling: Coupling = two_sided_softmax, self_mask: float = 1e6) -> DriftingField:
    """The paper's Algorithm 2 without the normalisations of A.6: plain distances, no floor, the force as it is.

    Args:
        temperature: kernel width in the coordinates of x.
        coupling: `two_sided_softmax`, or the other rows of the paper's ablation, `row_softmax` (y-softmax only) and `unnormalised` (Z = 1).
        self_mask: added to the distance of a sample to itself.
    """
    return DriftingField(
        (temperature,), normalise_distance=False, normalise_force=False, affinity_floor=0.0, self_mask=self_mask, coupling=coupling
    )


def _several(problems: Problems):
    """Its blocks of rows, if there are more than one."""
    blocks = list(problems.rows())
    return blocks if len(blocks) > 1 else []
