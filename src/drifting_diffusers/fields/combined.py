r"""Several fields at once, V = sum_i w_i V_i: a set of temperatures for a field that has one, mixtures of published fields.

Each field normalises its own forces, so none drowns the others. Velocities are added in the coordinates of x: the fields of a sum should
measure lengths in the same unit, or else weigh accordingly; unit and distance of the sum are those of the first field, and the strengths
of all follow one another.

Known limits. Every field computes its own distances, so a sum of one-temperature fields costs as many times one field; where a field has
a set of temperatures, as fields of `frame.FramedField` have, that set is the same and cheaper (a test says so). Antisymmetric if all its
fields are.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..schedules import Scheduled
from ..shapes import Float
from .choices import is_field, refuse_schedules, settle
from .lookahead import check_weights
from .protocol import Drift, Field, Mean, batch_mean, own_of


@dataclass(frozen=True)
class Combined:
    """A weighted sum of fields.

    Attributes:
        fields: one or more of any kind.
        weights: one per field, at least 0, their sum above 0; 1 each if not given. A field of weight 0 is still asked, for its strength.

    Raises:
        ValueError: on call, for a weight that is a schedule that no step was said for.
    """

    fields: tuple[Field, ...]
    weights: tuple[Scheduled, ...] | None = None

    def __post_init__(self):
        settle(self)
        if not isinstance(self.fields, tuple) or not self.fields or not all(map(is_field, self.fields)):
            raise TypeError(f"Combined needs a tuple of one or more fields, got {self.fields!r}; names are written without quotes")
        check_weights(self.weights)
        if self.weights is not None and len(self.weights) != len(self.fields):
            raise ValueError(f"{len(self.fields)} fields need as many weights, got {self.weights}")

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "*b n d"],
        *,
        positives: Float[Tensor, "*b p d"],
        negatives: Float[Tensor, "*b m d"],
        positive_weights: Float[Tensor, "*b p"] | None = None,
        negative_weights: Float[Tensor, "*b m"] | None = None,
        own: int | None = None,
        mean: Mean = batch_mean,
    ) -> Drift:
        """See `Field`."""
        refuse_schedules(self)
        own = own_of(x, negatives, own)
        given: Any = {"positives": positives, "negatives": negatives, "own": own, "mean": mean}
        given |= {"positive_weights": positive_weights, "negative_weights": negative_weights}
        drifts = [field(x, **given) for field in self.fields]
        weights: Any = self.weights or (1,) * len(drifts)
        total = torch.stack([w * drift.velocity for w, drift in zip(weights, drifts, strict=True)]).sum(0)
        return Drift(total, drifts[0].unit, drifts[0].distance, _joined([drift.strength for drift in drifts]))


def temperature_set(field: Field, temperatures: Sequence[Scheduled]) -> Combined:
    """The sum of one field at several temperatures.

    Args:
        field: a field with an attribute `temperatures`, or a wrapper of such a field, whose other choices are kept.
        temperatures: one or more, each with a field, a normalisation and a memory of its own. Memories are new: show them the data afterwards.

    Raises:
        TypeError: for a field without temperatures to choose.
    """
    return Combined(tuple(_at(field, temperature) for temperature in temperatures))


def _at(field: Any, temperature: Scheduled) -> Any:
    entries = [entry for entry in dataclasses.fields(field) if entry.init] if dataclasses.is_dataclass(field) else []
    names = [entry.name for entry in entries]
    if "temperatures" in names:  # what is remembered, which is no choice, is of other temperatures
        return type(field)(
            **{e.name: getattr(field, e.name) for e in entries if e.compare or e.name == "backend"} | {"temperatures": (temperature,)}
        )
    if "field" in names:
        replace: Any = dataclasses.replace
        return replace(field, field=_at(field.field, temperature))
    raise TypeError(
        f"{type(field).__name__} has no temperatures to choose; give a field with that attribute, or write Combined((...)) by hand"
    )


def _joined(strengths: list[Tensor]) -> Tensor:
    """One after the other; [t] becomes [t, b] where another is, because one field groups by problem."""
    problems = next((s.shape[1] for s in strengths if s.ndim == 2), None)
    return torch.cat([s if problems is None or s.ndim == 2 else s[:, None].expand(-1, problems) for s in strengths])
