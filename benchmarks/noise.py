"""Real samples that are noise: what a step costs does not depend on what they show."""

from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from drifting_diffusers.data import RealSamples


class Noise(RealSamples):
    """Latents of noise, some of every class."""

    def __init__(self, classes: int, each: int, channels: int, size: tuple[int, int]):
        self.labels, self.size, self.channels, self.names = np.arange(classes * each) % classes, size, channels, None

    def gather(self, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rng = lambda row: torch.Generator().manual_seed(int(row))
        return torch.stack([torch.randn(self.channels, *self.size, generator=rng(row)) for row in rows]), torch.as_tensor(
            self.labels[list(rows)]
        )

    def varied(self, rows: Any, seeds: Any, *, flip: bool) -> torch.Tensor:
        return self.gather(rows)[0]


def noise_images(classes: int, each: int, channels: int, size: tuple[int, int]) -> Dataset:
    """Images of noise, so that they are decoded and read as others are."""
    shape = (classes * each, *size, channels) if channels > 1 else (classes * each, *size)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=classes)})
    return Dataset.from_dict(
        {"image": [PILImage.fromarray(p) for p in pixels], "label": [i % classes for i in range(len(pixels))]}, features=features
    )
