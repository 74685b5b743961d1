"""Encoders that are trained here. Their activations are what samples are compared in, where pixels are not enough."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from .files import write_tensors
from .shapes import Float, Int


class SmallClassifier(nn.Module):
    """Three convolutions and a linear layer, for small images [n, c, h, w] in [-1, 1] with sides of 8 or more: trained in a minute on a CPU.

    It judges generated images by their class, or, another one, lends its activations as features.

    Args:
        in_channels: channels of the images.
        num_classes: classes told apart.
        width: channels of the first convolution; the next ones have twice and four times as many.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 32):
        super().__init__()
        convolve = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        self.stage1 = nn.Sequential(convolve(in_channels, width), nn.MaxPool2d(2))
        self.stage2 = nn.Sequential(convolve(width, 2 * width), nn.MaxPool2d(2))
        self.stage3 = nn.Sequential(convolve(2 * width, 4 * width), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(16 * width, num_classes))

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """The logits of every class."""
        return self.head(self.stage3(self.stage2(self.stage1(images))))

    def activations(self, images: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n l d"]]:
        """A feature map: the places of the second stage, and the third stage as one vector."""
        places = self.stage2(self.stage1(images))
        return {"stage2": places.flatten(2).mT, "stage3": self.stage3(places)[:, None]}


def train_classifier(
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    num_classes: int | None = None,
    *,
    generator: torch.Generator,
    width: int = 32,
    epochs: int = 8,
    batch_size: int = 128,
    learning_rate: float = 4e-3,
    on_step: Callable[[], object] = lambda: None,
) -> SmallClassifier:
    """A classifier of these real images, mirrored at random; frozen and in evaluation mode.

    Its initial weights and its dropout come from torch's global generator, the order of the images from `generator`. `on_step` is called after
    every batch. It tells apart `num_classes`, as many as there are labels if not given.

    Raises:
        ValueError: for fewer images than one batch.
    """
    model = SmallClassifier(images.shape[1], int(labels.max()) + 1 if num_classes is None else num_classes, width)
    steps = epochs * (len(images) // batch_size)
    if not steps:
        raise ValueError(f"{len(images)} images do not fill one batch of {batch_size}; lower batch_size")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(batch_size)[: len(images) // batch_size]:
            mirrored = torch.rand(len(chosen), 1, 1, 1, generator=generator) < 0.5
            batch = torch.where(mirrored, images[chosen].flip(3), images[chosen])
            loss = nn.functional.cross_entropy(model(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            on_step()
    return model.eval().requires_grad_(False)


def kept_classifier(
    file: Path,
    read: Callable[[], tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]],
    *,
    channels: int,
    num_classes: int,
    seed: int = 0,
    width: int = 32,
    epochs: int = 8,
    batch_size: int = 128,
    name: str = "judge",
) -> SmallClassifier:
    """A classifier of real images, trained once and kept in `file`.

    Args:
        file: safetensors; what lies there is loaded and nothing else is looked at, so its name must say what it was trained on and how.
        read: images and their labels, called if there is no such file.
        channels: of the images.
        num_classes: classes told apart.
        seed: of the initial weights and of the order of images; torch's global generator is left as it was.
        width: see `SmallClassifier`.
        epochs: passes over the images.
        batch_size: images per step, at most as many as there are.
        name: what the progress bar says.
    """
    if file.exists():
        model = SmallClassifier(channels, num_classes, width)
        load_model(model, file)
        return model.eval().requires_grad_(False)
    images, labels = read()
    with torch.random.fork_rng(), tqdm(total=epochs * (len(images) // batch_size), desc=name, unit="step", dynamic_ncols=True) as bar:
        torch.manual_seed(seed)
        rng = torch.Generator().manual_seed(seed)
        choices = {"width": width, "epochs": epochs, "batch_size": batch_size}
        model = train_classifier(images, labels, num_classes, generator=rng, on_step=bar.update, **choices)
    write_tensors(file, model.state_dict())
    return model
