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
    "EncoderConfig": "config",
    "LatentCache": "latents",
    "MaskedAutoencoder": "encoders",
    "MaskedAutoencoderTrainer": "encoder_trainer",
    "MultiScaleStatistics": "features",
    "Pixels": "features",
    "SampleBank": "bank",
    "Windows": "features",
    "add_lora": "finetuning",
    "cache_latents": "latents",
    "drift_loss": "losses",
    "evaluate_pipeline": "protocol",
    "load_extractor": "extractors",
    "load_features": "feature_loading",
    "merge_lora": "finetuning",
    "shipped_model": "shipped",
    "with_classes": "finetuning",
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
    "EncoderConfig",
    "LatentCache",
    "MaskedAutoencoder",
    "MaskedAutoencoderTrainer",
    "MultiScaleStatistics",
    "Pixels",
    "SampleBank",
    "Windows",
    "__version__",
    "add_lora",
    "cache_latents",
    "drift_loss",
    "evaluate_pipeline",
    "load_extractor",
    "load_features",
    "merge_lora",
    "shipped_model",
    "with_classes",
]

if TYPE_CHECKING:
    from .backbones import BackboneFeatures as BackboneFeatures
    from .backbones import ConvNextV2Features as ConvNextV2Features
    from .bank import SampleBank as SampleBank
    from .config import DriftingConfig as DriftingConfig
    from .config import EncoderConfig as EncoderConfig
    from .encoder_trainer import MaskedAutoencoderTrainer as MaskedAutoencoderTrainer
    from .encoders import MaskedAutoencoder as MaskedAutoencoder
    from .extractors import load_extractor as load_extractor
    from .feature_loading import load_features as load_features
    from .features import MultiScaleStatistics as MultiScaleStatistics
    from .features import Pixels as Pixels
    from .features import Windows as Windows
    from .fields import Drift as Drift
    from .fields import DriftingField as DriftingField
    from .finetuning import add_lora as add_lora
    from .finetuning import merge_lora as merge_lora
    from .finetuning import with_classes as with_classes
    from .generator import DriftingGenerator as DriftingGenerator
    from .latents import LatentCache as LatentCache
    from .latents import cache_latents as cache_latents
    from .losses import drift_loss as drift_loss
    from .objective import DriftingObjective as DriftingObjective
    from .pipeline import DriftingPipeline as DriftingPipeline
    from .protocol import Bench as Bench
    from .protocol import evaluate_pipeline as evaluate_pipeline
    from .shipped import shipped_model as shipped_model
    from .trainer import DriftingTrainer as DriftingTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
