"""Drifting fields: one file per published field, one protocol (`Field`), one result (`Drift`). Imports torch and nothing else."""

from .drifting import DriftingField, algorithm_2
from .mean_shift import MeanShiftField
from .names import FIELDS, read_field, spell
from .protocol import Drift, Field, Mean, batch_mean
from .situation import Memory, Observer, Situation, memories, situated

__all__ = [
    "FIELDS",
    "Drift",
    "DriftingField",
    "Field",
    "Mean",
    "MeanShiftField",
    "Memory",
    "Observer",
    "Situation",
    "algorithm_2",
    "batch_mean",
    "memories",
    "read_field",
    "situated",
    "spell",
]
