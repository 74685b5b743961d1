r"""The stop-gradient regression: samples are regressed onto where the field carries them, L = |x - sg(x + V)|^2 / u^2 (arXiv 2602.04770, eq. 6).

Its value is the mean square of V and its gradient is -2 V / u. The field divides every temperature's force by its own rms, so **the value is flat
by construction**: with three temperatures it stays between about 1 and 9 however good the samples are. Watch `Drift.strength` and a real distance.
"""

from typing import Any, cast

import torch
from torch import Tensor

from .fields import Drift, DriftingField, Field, Mean, batch_mean
from .fields.engine import Sides
from .fields.stages import Stages, finish
from .shapes import Float


class NonFinite(ValueError):
    """A loss, a gradient or what they were made of is NaN or infinite. A trainer may skip the step."""


def drift_loss(
    generated: Float[Tensor, "b n d"],
    positives: Float[Tensor, "b p d"],
    negatives: Float[Tensor, "b m d"] | None = None,
    *,
    generated_weights: Float[Tensor, "b n"] | None = None,
    positive_weights: Float[Tensor, "b p"] | None = None,
    negative_weights: Float[Tensor, "b m"] | None = None,
    field: Field = DriftingField(temperatures=(0.02, 0.05, 0.2), affinity_floor=1e-3),
    mean: Mean = batch_mean,
) -> tuple[Float[Tensor, " b"], Drift]:
    """The loss of every problem, [b], and what the field measured.

    The generated samples are repelling targets too, each one's pair with itself masked. Differentiable in `generated` only. Computed in
    float32 (float64 for float64 input) whatever the inputs are in; the gradient comes back in the dtype of `generated`.

    Args:
        generated: the samples to be moved.
        positives: real samples that attract.
        negatives: real samples that repel, beside the generated ones (unconditional ones, for guidance).
        generated_weights: masses >= 0 of the generated samples as repelling targets; 1 each if not given.
        positive_weights: masses >= 0; 1 each if not given.
        negative_weights: masses >= 0; 1 each if not given. See `unconditional_weight`.
        field: the drifting field.
        mean: how means over the whole step are taken; several processes need one that sums over them.

    Raises:
        ValueError: shapes that do not fit, an empty class, or negative masses.
        NonFinite: values that are not finite, or all masses 0.
    """
    masses: Any = {"generated_weights": generated_weights, "positive_weights": positive_weights, "negative_weights": negative_weights}
    return finish(drift_loss_stages(generated, positives, negatives, **masses, field=field, mean=mean), mean)


def drift_loss_stages(
    generated: Float[Tensor, "b n d"],
    positives: Float[Tensor, "b p d"],
    negatives: Float[Tensor, "b m d"] | None = None,
    *,
    generated_weights: Float[Tensor, "b n"] | None = None,
    positive_weights: Float[Tensor, "b p"] | None = None,
    negative_weights: Float[Tensor, "b m"] | None = None,
    field: Field,
    mean: Mean,
) -> Stages:
    """`drift_loss` in stages, see `fields.stages`. A field that has none asks `mean` by itself."""
    weights = {"generated_weights": generated_weights, "positive_weights": positive_weights, "negative_weights": negative_weights}
    _check_shapes(generated, positives, negatives, weights)
    x, real = generated.detach(), positives.detach()
    if getattr(field, "staged", False):
        others = () if negatives is None else (negatives.detach(),)
        masses = [generated_weights, *((negative_weights,) if others else ()), positive_weights]
        sides = Sides(x, (x, *others, real), x.shape[1] + sum(t.shape[1] for t in others), own=x.shape[1]).with_masses(masses)
        drift = yield from cast(Any, field).stages(sides)
    else:
        repelling, repelling_weights = _repelling(x, negatives, generated_weights, negative_weights)
        own = {"own": x.shape[1], "mean": mean}
        drift = field(x, positives=real, negatives=repelling, positive_weights=positive_weights, negative_weights=repelling_weights, **own)
    loss: Tensor = cast(Any, _Regression).apply(generated, drift.velocity, drift.unit)
    finite = lambda: torch.isfinite(drift.distance).all() & torch.isfinite(drift.velocity).all()
    if not bool(torch.isfinite(drift.distance).all() & torch.isfinite(loss).all()) and not bool(finite()):  # one wait for the device
        raise NonFinite(_blame(drift, {"generated": generated, "positives": positives, "negatives": negatives}, weights, field))
    return loss, drift


class _Regression(torch.autograd.Function):
    """|x - sg(x + V)|^2 / u^2 per problem, a mean over samples and dimensions, and its gradient -2 V / u^2: no graph is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, velocity: Tensor, unit: Tensor) -> Tensor:
        ctx.save_for_backward(velocity, unit)
        ctx.dtype = x.dtype
        squares = torch.linalg.vector_norm(velocity, dim=2).square_().sum(1)  # of rows first: a norm of millions loses digits
        return squares / (unit.square() * velocity[0].numel())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        velocity, unit = ctx.saved_tensors
        factors = gradients[0] * (-2 / velocity[0].numel()) / unit.square()
        return (velocity * factors[:, None, None]).to(ctx.dtype), None, None


def _repelling(
    x: Tensor, negatives: Tensor | None, generated_weights: Tensor | None, negative_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Own samples first, then the negatives, and their masses."""
    if negatives is None:
        return x, generated_weights
    negatives = negatives.detach()
    points = torch.cat([x.to(torch.promote_types(x.dtype, negatives.dtype)), negatives], dim=1)
    if generated_weights is None and negative_weights is None:
        return points, None
    ones = lambda t: torch.ones(t.shape[:2], device=t.device, dtype=torch.promote_types(t.dtype, torch.float32))
    masses = [ones(p) if w is None else w for p, w in ((x, generated_weights), (negatives, negative_weights))]
    return points, torch.cat(masses, dim=1)


def _check_shapes(generated: Tensor, positives: Tensor, negatives: Tensor | None, weights: dict[str, Tensor | None]) -> None:
    samples = {"generated": generated, "positives": positives} | ({} if negatives is None else {"negatives": negatives})
    for name, points in samples.items():
        if points.ndim != 3 or not points.is_floating_point():
            raise ValueError(
                f"{name} must be floating-point samples [problems, samples, dimensions], got {points.dtype} {tuple(points.shape)}"
            )
        if (points.shape[0], points.shape[2]) != (generated.shape[0], generated.shape[2]):
            raise ValueError(
                f"{name} must have the problems and dimensions of generated {tuple(generated.shape)}, got {tuple(points.shape)}; only the number of samples may differ"
            )
    if 0 in generated.shape or positives.shape[1] == 0:
        raise ValueError(
            f"every problem needs at least one generated and one positive sample of at least one dimension, "
            f"got generated {tuple(generated.shape)} and positives {tuple(positives.shape)}; leave an empty class out of the batch"
        )
    for (name, w), owner in zip(weights.items(), ("generated", "positives", "negatives"), strict=True):
        if w is not None:
            _check_masses(name, w, samples.get(owner))


def _check_masses(name: str, w: Tensor, points: Tensor | None) -> None:
    if points is None:
        raise ValueError(f"{name} were given without negatives; pass both or neither")
    if w.shape != points.shape[:2]:
        raise ValueError(f"{name} must be one mass per sample, {tuple(points.shape[:2])}, got {tuple(w.shape)}")
    if w.numel() and bool((w < 0).any()):
        raise ValueError(f"{name} must be at least 0, got {w.min().item():g}; to push from a sample make it a negative instead")


def _blame(drift: Drift, samples: dict[str, Tensor | None], weights: dict[str, Tensor | None], field: Field) -> str:
    """Why the mean distance or the velocity is not finite."""
    samples, weights = ({name: None if t is None else t.detach() for name, t in given.items()} for given in (samples, weights))
    for name, values in (samples | weights).items():
        if values is not None and not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).sum())
            return f"{name} holds {bad} NaN or infinite values of {values.numel()}; all must be finite. Look for a feature that divides by zero or a diverged generator"
    given = [(points, w) for points, w in zip(samples.values(), weights.values(), strict=True) if points is not None]
    masses = torch.cat([torch.ones_like(points[..., 0]) if w is None else w for points, w in given], dim=1)
    empty = (masses == 0).all(dim=1)
    if empty.all() or (drift.distance.ndim and empty.any()):  # one mean for all problems, or one for each
        return f"all masses are 0 in problems {empty.nonzero().flatten().tolist()}, so there is no mean distance; give at least one sample a mass above 0"
    largest = max(float(points.abs().max()) for points, _ in given if points.numel())
    if largest < 1e17:
        massless = [name for name, w in weights.items() if w is not None and bool((w == 0).all(dim=1).any())]
        why = f"; in some problem all {' and all '.join(massless)} are 0, and this field needs mass on every side" if massless else ""
        return f"the velocity of {type(field).__name__} is not finite, though all samples and masses are{why}"
    return f"squared distances overflow float32: the largest value is {largest:g}, at most about 1e18 is possible; scale the features down"
