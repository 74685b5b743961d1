"""Features by name, for command lines and recipes: "pixels + statistics", "mae_latent_256", "mae_pixel_640 + convnextv2", a folder, a repository."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from .backbones import BackboneFeatures, ConvNextV2Features
from .classifiers import kept_classifier
from .data import RealSamples
from .encoders import MaskedAutoencoder
from .features import FeatureMap, MultiScaleStatistics, Pixels, Windows
from .releases import RELEASES

SIMPLE: dict[str, Callable[[], Any]] = {"pixels": Pixels, "statistics": MultiScaleStatistics, "windows": Windows}
"""What needs no weights."""


def load_features(
    names: str, *, data: RealSamples, num_classes: int, folder: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[FeatureMap]:
    """The feature maps of these names, joined by "+".

    Args:
        names: "pixels", "statistics" (see `MultiScaleStatistics`), "windows"; "classifier", a small one that is trained on the data and kept; an encoder of
            the release, as in "mae_latent_256"; a folder or repository of a `MaskedAutoencoder`; "convnextv2", as the pixel recipe has it (arXiv 2602.04770);
            any other vision model of transformers that `BackboneFeatures` reads.
        data: what is compared.
        num_classes: of the data.
        folder: where a classifier is kept, so that a resumed run meets the same one.
        seed: of a classifier.
        dtype: of the weights of an encoder; its features are float32 in any case.

    Raises:
        ValueError: for no name, or one that repeats.
        FileNotFoundError, OSError: as the loading of models raises them.
    """
    parts = [part.strip() for part in names.split("+")]
    if not all(parts) or len({*parts}) < len(parts):
        raise ValueError(f'features must be different names joined by "+", as in "pixels + statistics", got {names!r}')
    return [_load(part, data, num_classes, Path(folder), seed, dtype) for part in parts]


def _load(name: str, data: RealSamples, num_classes: int, folder: Path, seed: int, dtype: torch.dtype) -> FeatureMap:
    if name in SIMPLE:
        return SIMPLE[name]()
    if name == "classifier":
        return _classifier(data, num_classes, folder, seed).activations
    if name == "convnextv2":
        return ConvNextV2Features.from_pretrained(dtype=dtype)
    if name in RELEASES:
        return MaskedAutoencoder.from_release(name, dtype=dtype).activations
    if _class_of(name) == "MaskedAutoencoder":
        loaded: Any = MaskedAutoencoder.from_pretrained(name, dtype=dtype)
        return loaded.activations
    return BackboneFeatures.from_pretrained(name, dtype=dtype)


def _classifier(data: RealSamples, num_classes: int, folder: Path, seed: int) -> Any:
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes to tell apart, got {num_classes}: choose other features")
    epochs, batch = 5, min(128, len(data))
    return kept_classifier(
        folder / f"encoder-{data.fingerprint()['labels']}-seed{seed}-epochs{epochs}.safetensors",
        lambda: data.gather(range(len(data))),
        channels=data.channels,
        num_classes=num_classes,
        seed=2 * seed + 1,  # 2 * seed is the judge's
        width=16,
        epochs=epochs,
        batch_size=batch,
        name="encoder",
    )


def _class_of(name: str) -> str | None:
    """The diffusers class of a folder or repository; None for one of another kind."""
    config = Path(name, ModelMixin.config_name)
    if not config.is_file():
        if Path(name).exists():
            return None
        try:
            config = Path(hf_hub_download(name, ModelMixin.config_name))
        except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
            return None  # whoever loads it will say so
    return json.loads(config.read_text(encoding="utf-8")).get("_class_name")
