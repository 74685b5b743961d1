"""What the comparison of fields compares: one row per field of the library, and the settings that published claims are about.

A row is an expression of `read_field`; `{t}` stands for the temperature, in mean distances, which `fields.py tune` chooses on a seed of its own.
"""

import dataclasses
from dataclasses import dataclass

from drifting_diffusers.fields import FIELDS

TEMPERATURES = (0.05, 0.2, 0.5, 1.0)
TUNING_SEED = 100
"""Not one of the seeds that are reported."""


@dataclass(frozen=True)
class Row:
    """A field with its parameters. `like` names the row whose temperature is taken, so that a wrapper and what it wraps differ in nothing else."""

    text: str
    like: str | None = None

    @property
    def tuned(self) -> bool:
        return "{t}" in self.text and self.like is None

    def field(self, temperature: float | None) -> str:
        return self.text.replace("{t}", f"{temperature:g}") if temperature is not None else self.text


PLAIN = "drifting(temperatures=({t},), affinity_floor=0.0)"

ROWS: dict[str, Row] = {
    "released": Row("drifting"),
    "released, no floor": Row("drifting(affinity_floor=0.0)"),
    "Algorithm 2": Row(PLAIN),
    "rows only": Row("drifting(temperatures=({t},), affinity_floor=0.0, coupling=row_softmax)"),
    "unnormalised": Row("drifting(temperatures=({t},), affinity_floor=0.0, coupling=unnormalised)"),
    "mean shift": Row("mean_shift(temperatures=({t},))"),
    "mean shift, ABC": Row("mean_shift(temperatures=({t},), bias_corrected=True)", like="mean shift"),
    "score": Row("score(temperatures=({t},))"),
    "score, annealed": Row("score(temperatures=(exponential(1.0, {t}),))"),
    "sharp": Row("sharp(temperatures=({t},))"),
    "kernel gradient": Row("kernel_gradient(temperatures=({t},))"),
    "KL": Row("divergence(temperatures=({t},))"),
    "p/q": Row('divergence(temperatures=({t},), weighting="p/q")'),
    "MMD": Row('divergence(temperatures=({t},), weighting="mmd")'),
    "chi-square": Row('divergence(temperatures=({t},), weighting="q/p")'),
    "Sinkhorn": Row("sinkhorn(temperatures=({t},))"),
    "Sinkhorn, masked": Row('sinkhorn(temperatures=({t},), own_term="masked")', like="Sinkhorn"),
    "Nystrom": Row("nystrom(temperatures=({t},), landmarks=64)"),
    "Frechet": Row("frechet"),
    "lookahead": Row(f"lookahead({PLAIN}, terms=1)", like="Algorithm 2"),
    "friction": Row(f"friction({PLAIN}, linear(0.0, 0.9))", like="Algorithm 2"),
}
"""The table. A field of `FIELDS` that no row names gets a row of its own, with its defaults."""


def rows() -> dict[str, Row]:
    named = {row.text.split("(")[0] for row in ROWS.values()}
    return ROWS | {name: Row(name) for name, field in FIELDS.items() if name not in named and not _needs_another(field)}


def _needs_another(field: type) -> bool:
    """A wrapper has no defaults: it is a row with what it wraps."""
    return any(entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING for entry in dataclasses.fields(field))
