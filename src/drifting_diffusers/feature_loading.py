"""Features by name, for command lines and recipes: "pixels + statistics", "mae_latent_256", "mae_pixel_640 + convnextv2", a folder, a repository."""

import hashlib
import json
import math
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

CLASSIFIER_STEPS = 300  # at least, of a classifier that lends its features


def load_features(
    names: str, *, data: RealSamples, num_classes: int, folder: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[FeatureMap]:
    """The feature maps of these names, joined by "+".

    Args:
        names: "pixels"; "statistics" (see `MultiScaleStatistics`) and "windows", in about six steps over a sample; "classifier", a small one that is trained
            on the data and kept; an encoder of the release, as in "mae_latent_256"; a folder or repository of a `MaskedAutoencoder`; "convnextv2", as
            the pixel recipe has it (arXiv 2602.04770); any other vision model of transformers that `BackboneFeatures` reads.
        data: what is compared.
        num_classes: of the data.
        folder: where a classifier is kept, so that a resumed run meets the same one.
        seed: of a classifier.
        dtype: of the weights of an encoder; its features are float32 in any case.

    Raises:
        ValueError: for no name, one that repeats, or features that do not fit the data.
        FileNotFoundError, OSError: as the loading of models raises them.
    """
    parts = [part.strip() for part in names.split("+")]
    if not all(parts) or len({*parts}) < len(parts):
        raise ValueError(f'features must be different names joined by "+", as in "pixels + statistics", got {names!r}')
    step = _step(data.size)
    known: dict[str, Callable[[], Any]] = {
        "pixels": Pixels,
        "statistics": lambda: MultiScaleStatistics(mean_scales=(step,), edge_scales=(step,)),
        "windows": lambda: Windows(side=2 * step, stride=step),
        "classifier": lambda: _classifier(data, num_classes, Path(folder), seed).activations,
    }
    return [known[part]() if part in known else _network(part, data, dtype) for part in parts]


def _step(size: tuple[int, int]) -> int:
    """About a sixth of the image, dividing both sides."""
    whole = math.gcd(*size)
    return max(step for step in range(1, max(2, whole // 6) + 1) if whole % step == 0)


def _network(name: str, data: RealSamples, dtype: torch.dtype) -> FeatureMap:
    """The features of pretrained weights."""
    if name in RELEASES or _class_of(name) == "MaskedAutoencoder":
        model: Any = (MaskedAutoencoder.from_release if name in RELEASES else MaskedAutoencoder.from_pretrained)(name, dtype=dtype)
        if model.config.in_channels != data.channels:
            raise ValueError(
                f"{name} sees {model.config.in_channels} channels and the samples have {data.channels}: take an encoder of those, or statistics"
            )
        return model.activations
    if data.channels not in (1, 3):
        raise ValueError(
            f"{name} sees images and these samples are latents of {data.channels} channels: take mae_latent_256, statistics, or an encoder of latents"
        )
    if name == "convnextv2":
        return ConvNextV2Features.from_pretrained(dtype=dtype)
    try:
        return BackboneFeatures.from_pretrained(name, dtype=dtype)
    except OSError as error:
        known = "pixels, statistics, windows, classifier, convnextv2, an encoder of the release as in mae_latent_256"
        raise OSError(f"features {name!r} are neither one of {known}, nor a folder or repository that can be read: {error}") from error


def _classifier(data: RealSamples, num_classes: int, folder: Path, seed: int) -> Any:
    """Five passes over the samples, more where they are few."""
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes to tell apart, got {num_classes}: take statistics, or an encoder")
    batch = min(128 if len(data) > 2000 else 32, len(data))
    epochs = max(5, -(-CLASSIFIER_STEPS * batch // len(data)))
    what = json.dumps([data.fingerprint(), epochs, batch, seed])
    return kept_classifier(
        folder / f"encoder-{hashlib.sha256(what.encode()).hexdigest()[:16]}.safetensors",
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
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except ValueError as error:
        raise ValueError(f"{config} cannot be read ({error}): copy the folder anew") from error
