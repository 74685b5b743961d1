"""Drifting Models for diffusers: generators that make an image in one network call.

Importing this package imports nothing else; every public name loads its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "BackboneFeatures": "backbones",
    "Bench": "protocol",
    "ConvNextV2Features": "backbones",
    "Drift": "fields",
    "DriftingConfig": "config",
    "DriftingField": "fields",
    "DriftingGenerator": "generator",
    "DriftingObjective": "objective",
    "DriftingPipeline": "pipeline",
    "DriftingTrainer": "trainer",
    "MaskedAutoencoder": "encoders",
    "MultiScaleStatistics": "features",
    "Pixels": "features",
    "SampleBank": "bank",
    "Windows": "features",
    "drift_loss": "losses",
    "evaluate_pipeline": "protocol",
    "load_extractor": "extractors",
}

__all__ = [
    "BackboneFeatures",
    "Bench",
    "ConvNextV2Features",
    "Drift",
    "DriftingConfig",
    "DriftingField",
    "DriftingGenerator",
    "DriftingObjective",
    "DriftingPipeline",
    "DriftingTrainer",
    "MaskedAutoencoder",
    "MultiScaleStatistics",
    "Pixels",
    "SampleBank",
    "Windows",
    "__version__",
    "drift_loss",
    "evaluate_pipeline",
    "load_extractor",
]

if TYPE_CHECKING:
    from .backbones import BackboneFeatures as BackboneFeatures
    from .backbones import ConvNextV2Features as ConvNextV2Features
    from .bank import SampleBank as SampleBank
    from .config import DriftingConfig as DriftingConfig
    from .encoders import MaskedAutoencoder as MaskedAutoencoder
    from .extractors import load_extractor as load_extractor
    from .features import MultiScaleStatistics as MultiScaleStatistics
    from .features import Pixels as Pixels
    from .features import Windows as Windows
    from .fields import Drift as Drift
    from .fields import DriftingField as DriftingField
    from .generator import DriftingGenerator as DriftingGenerator
    from .losses import drift_loss as drift_loss
    from .objective import DriftingObjective as DriftingObjective
    from .pipeline import DriftingPipeline as DriftingPipeline
    from .protocol import Bench as Bench
    from .protocol import evaluate_pipeline as evaluate_pipeline
    from .trainer import DriftingTrainer as DriftingTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
