"""Drifting fields: one file per published field, one protocol (`Field`), one result (`Drift`). Imports torch and nothing else."""

from .combined import Combined, temperature_set
from .divergence import DivergenceField
from .drifting import DriftingField, algorithm_2
from .frame import FramedField, Problems
from .frechet import FrechetField
from .friction import Friction, inertial_step
from .kernel_gradient import KernelGradientField
from .landmarks import AttractionSums
from .lookahead import Lookahead
from .mean_shift import MeanShiftField
from .moments import Moments
from .names import FIELDS, read_field, spell
from .nystrom import Clamping, NystromField
from .protocol import Drift, Field, Mean, batch_mean
from .score import ScoreField
from .sharp import SharpField, sharp_potential
from .sinkhorn import SinkhornField, w_flow
from .situation import Memory, Observer, Situation, memories, situated
from .symmetrised import Symmetrised
from .velocity_guidance import VelocityGuidance

__all__ = [
    "FIELDS",
    "AttractionSums",
    "Clamping",
    "Combined",
    "DivergenceField",
    "Drift",
    "DriftingField",
    "Field",
    "FramedField",
    "FrechetField",
    "Friction",
    "KernelGradientField",
    "Lookahead",
    "Mean",
    "MeanShiftField",
    "Memory",
    "Moments",
    "NystromField",
    "Observer",
    "Problems",
    "ScoreField",
    "SharpField",
    "SinkhornField",
    "Situation",
    "Symmetrised",
    "VelocityGuidance",
    "algorithm_2",
    "batch_mean",
    "inertial_step",
    "memories",
    "read_field",
    "sharp_potential",
    "situated",
    "spell",
    "temperature_set",
    "w_flow",
]
