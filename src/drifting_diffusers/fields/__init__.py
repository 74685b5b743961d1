"""Drifting fields: one file per published field, one protocol (`Field`), one result (`Drift`). Imports torch and nothing else."""

from .drifting import DriftingField
from .protocol import Drift, Field, Mean, batch_mean

__all__ = ["Drift", "DriftingField", "Field", "Mean", "batch_mean"]
