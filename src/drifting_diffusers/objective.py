r"""The training objective: images -> features -> field -> loss. One drift loss per feature map, summed (arXiv 2602.04770, section 3.4 and A.5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .features import FeatureMap
from .fields import DriftingField, Field, Mean, batch_mean
from .losses import drift_loss
from .shapes import Float


@dataclass(frozen=True)
class Measured:
    """What one feature map saw in a step: its loss (flat by construction), mean distance [], and strength per temperature [t]."""

    loss: Tensor
    distance: Tensor
    strength: Tensor


class DriftingObjective:
    """The sum of the drift losses of all features.

    Every location of a feature map is a problem of its own; its length unit and strengths are shared by all locations and labels of the step.

    Args:
        features: one feature map or several whose names differ; `Pixels` alone is the loss without an encoder.
        field: the drifting field.
    """

    def __init__(self, features: FeatureMap | Sequence[FeatureMap], field: Field = DriftingField()):
        self.feature_maps = [features] if callable(features) else list(features)
        self.field = field
        self.ignored: set[str] = set()
        if not self.feature_maps:
            raise ValueError("an objective needs at least one feature map; `Pixels()` is the simplest")

    def describe(self) -> dict[str, Any]:
        """What is compared and how, as JSON; a feature map that is no module stands there by its name."""
        named = lambda m: repr(m) if isinstance(m, nn.Module) else getattr(m, "__qualname__", type(m).__qualname__)
        return {"features": [named(m) for m in self.feature_maps], "field": repr(self.field)}

    def features(self, images: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n l d"]]:
        """All features of the images by name, in float32: distances underflow in 16 bits."""
        found: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):
            for feature_map in self.feature_maps:
                new = feature_map(images.float())
                repeated = found.keys() & new.keys()
                if repeated:
                    raise ValueError(f"two feature maps give {sorted(repeated)}; names must differ")
                found |= new
        return {name: values for name, values in found.items() if name not in self.ignored}

    @torch.no_grad()
    def ignore_constant(self, images: Float[Tensor, "n c h w"]) -> list[str]:
        """Leave out, from now on, every feature that is the same for all these images, and return their names.

        A feature that carries nothing (a standard deviation over one pixel, a mean after a GroupNorm of one channel) has distances of rounding
        noise, and the field would blow that noise up to unit strength.
        """
        constant = [
            name
            for name, values in self.features(images).items()
            if bool(values.std(dim=0).amax() <= 1e-5 * values.abs().amax().clamp(min=1e-12))
        ]
        self.ignored.update(constant)
        return constant

    def __call__(
        self,
        generated: Float[Tensor, "l n c h w"],
        positives: Float[Tensor, "l p c h w"],
        negatives: Float[Tensor, "l m c h w"] | None = None,
        negative_weights: Float[Tensor, " l"] | None = None,
        mean: Mean = batch_mean,
    ) -> tuple[Float[Tensor, ""], dict[str, Measured]]:
        """The loss of a step over l labels, and what each feature measured. Differentiable in `generated` only.

        Args:
            generated: n samples per label.
            positives: p real images per label.
            negatives: m unconditional real images per label.
            negative_weights: the mass of each label's negatives; see `unconditional_weight`.
            mean: how means over the whole step are taken.
        """
        moved = self._by_label(generated)
        with torch.no_grad():
            attracting = self._by_label(positives)
            repelling = {} if negatives is None else self._by_label(negatives)
        total, measured = generated.new_zeros((), dtype=torch.float32), {}
        for name, values in moved.items():
            locations, others = values.shape[0] // len(generated), repelling.get(name)
            weights = None
            if others is not None and negative_weights is not None:
                weights = negative_weights.float().repeat_interleave(locations)[:, None].expand(others.shape[:2])
            loss, drift = drift_loss(values, attracting[name], others, negative_weights=weights, field=self.field, mean=mean)
            loss = loss.mean()
            total = total + loss
            measured[name] = Measured(loss.detach(), drift.distance, drift.strength)
        return total, measured

    def _by_label(self, images: Float[Tensor, "l n c h w"]) -> dict[str, Float[Tensor, "b n d"]]:
        """Features with one problem per (label, location): [l n, t, d] -> [l t, n, d]."""
        found = self.features(images.flatten(0, 1))
        return {name: values.unflatten(0, images.shape[:2]).transpose(1, 2).flatten(0, 1) for name, values in found.items()}
