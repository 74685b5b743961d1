"""Pictures of an evaluation: what a number means can be seen, and what no number says too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw
from torch import Tensor

from .meters import FeatureSet, Reference
from .neighbours import nearest
from .sampling import Samples
from .shapes import Float

MARGIN, LINE = 6, 16  # pixels around and above pictures
INK, PAPER, MARK = (40, 40, 40), (255, 255, 255), (209, 73, 91)


def pictures(images: Float[Tensor, "n c h w"], side: int = 64) -> list[Image.Image]:
    """PIL images, small ones enlarged without smoothing to about `side` pixels."""
    shown: Any = VaeImageProcessor().postprocess(images.float().cpu(), output_type="pil")
    factor = max(1, round(side / max(images.shape[2:])))
    return [image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in shown]


def class_grid(samples: Samples, names: Sequence[str], *, rows: int = 8, most_classes: int = 20) -> Image.Image:
    """The first samples of every class, one column per class, its name above; of many classes, evenly chosen ones."""
    if samples.labels is None:
        images = pictures(samples.images(range(min(len(samples), rows * rows))))
        columns = min(rows, len(images))
        return make_image_grid(images[: len(images) // columns * columns], rows=len(images) // columns, cols=columns)
    classes = samples.labels.unique()
    chosen = classes[torch.linspace(0, len(classes) - 1, min(most_classes, len(classes))).round().long()].tolist()
    columns = [pictures(samples.images((samples.labels == label).nonzero()[:rows, 0].tolist())) for label in chosen]
    width, height = columns[0][0].size
    page = Image.new("RGB", (len(columns) * (width + 2) + MARGIN, LINE + MARGIN + rows * (height + 2)), PAPER)
    draw = ImageDraw.Draw(page)
    for x, (label, column) in enumerate(zip(chosen, columns, strict=True)):
        name = names[label].split(",")[0] if names else str(label)
        draw.text((MARGIN + x * (width + 2), 3), _cut(draw, name, width), fill=INK)
        for y, image in enumerate(column):
            page.paste(image, (MARGIN + x * (width + 2), LINE + y * (height + 2)))
    return page


def memorisation_sheet(
    generated: tuple[Samples, FeatureSet], training: tuple[Samples, Reference], held_out: FeatureSet | None, *, pairs: int = 24
) -> Image.Image:
    """The generated samples that lie nearest to a training image, each above it, nearest first.

    Below each pair stands its distance over the median distance of held-out images to theirs, or the distance itself without those: about 1 is what
    a new real image has, near 0 a copy.

    Args:
        generated: samples and their features.
        training: images and the reference that was made of them.
        held_out: features of other real images.
        pairs: how many are shown.
    """
    real = training[1].samples
    if real is None or training[1].chosen is None:
        raise ValueError("this reference holds moments only: make it of a dataset to see its images")
    distances, indices = nearest(generated[1].features, real.features)
    unit = float(nearest(held_out.features, real.features)[0].median()) if held_out is not None else 1.0
    order = distances.argsort()[:pairs].tolist()
    above = pictures(generated[0].images(order))
    below = pictures(training[0].images(training[1].chosen[indices[order]].tolist()))
    width, height = above[0].size
    columns = min(12, len(order))
    rows = -(-len(order) // columns)
    cell = 2 * height + LINE + 2 * MARGIN
    page = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, LINE + MARGIN + rows * cell), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, 3), "above: generated, below: its nearest training image; distance, 1 is a held-out image's", fill=INK)
    for k, i in enumerate(order):
        x, y = MARGIN + k % columns * (width + MARGIN), LINE + MARGIN + k // columns * cell
        page.paste(above[k], (x, y))
        page.paste(below[k], (x, y + height + 2))
        draw.text((x, y + 2 * height + 3), f"{float(distances[i]) / unit:.2f}", fill=MARK)
    return page


def reconstruction_sheet(
    images: Float[Tensor, "n c h w"], masks: Float[Tensor, "n 1 h w"], filled: Float[Tensor, "n c h w"]
) -> Image.Image:
    """Images, below each what an autoencoder saw of it, and below that what it filled in.

    Args:
        images: in [-1, 1].
        masks: 1 where a pixel was masked.
        filled: the images with what was masked filled in.
    """
    rows = [pictures(each, side=96) for each in (images, images * (1 - masks), filled)]
    names = ("image", "with what is masked in grey", "filled in")
    width, height = rows[0][0].size
    page = Image.new("RGB", (len(images) * (width + 2) + 2 * MARGIN, 3 * (LINE + height + MARGIN) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for y, (name, row) in enumerate(zip(names, rows, strict=True)):
        top = MARGIN + y * (LINE + height + MARGIN)
        draw.text((MARGIN, top), name, fill=INK)
        for x, image in enumerate(row):
            page.paste(image, (MARGIN + x * (width + 2), top + LINE))
    return page


def sweep_plot(results: dict[str, Any], file: Path) -> None:
    """Every number against the guidance scale, with its deviation over seeds and the line of real images."""
    import matplotlib.pyplot as plt

    rows, names = results["sweep"], list(results["metrics"])
    scales = [row["guidance_scale"] for row in rows]
    columns = min(4, len(names))
    figure, panels = plt.subplots(
        -(-len(names) // columns), columns, figsize=(3.2 * columns, 2.6 * -(-len(names) // columns)), squeeze=False, layout="constrained"
    )
    for panel, name in zip(panels.flat, names, strict=False):
        found = [row["metrics"][name] for row in rows]
        panel.errorbar(scales, [f["mean"] for f in found], [f["sd"] or 0 for f in found], fmt="o-", color="#30638e", markersize=4)
        if results["real"] and name in results["real"]:
            panel.axhline(results["real"][name], color="0.5", linestyle="--", linewidth=1)
        panel.axvline(results["guidance_scale"], color="#d1495b", linewidth=1, alpha=0.5)
        panel.set_title(f"{name} ({results['better'][name]})", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels.flat)[len(names) :]:
        panel.axis("off")
    figure.supxlabel("guidance scale; dashed: held-out real images, red: the best scale", fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def training_curves(history: Sequence[dict[str, Any]], file: Path) -> None:
    """Energy distance of the evaluations, and the strength of the field in every feature; the loss is flat by construction.

    Args:
        history: the lines of a run's log.
        file: where the picture goes.
    """
    import matplotlib.pyplot as plt

    evaluations, logged = ([entry for entry in history if key in entry] for key in ("energy", "loss"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    if evaluations:
        left.plot([e["step"] for e in evaluations], [e["energy"] for e in evaluations], "o-", color="#d1495b", label="generated")
        left.axhline(evaluations[-1]["energy_real"], color="0.5", linestyle="--", label="real images")
        left.legend(frameon=False)
    left.set(title="Energy distance to held-out images", xlabel="step", yscale="log")
    names = sorted(key for key in (logged[-1] if logged else ()) if key.startswith("strength/"))
    last = max((name.rsplit("/", 1)[1] for name in names), default="", key=lambda number: int(number or 0))
    for name in (name for name in names if name.endswith(f"/{last}")):
        found = [(e["step"], e[name]) for e in logged if name in e]
        right.plot(*zip(*found, strict=True), linewidth=1, label=name.split("/")[1])
    right.set(title="Strength of the field at its last temperature", xlabel="step", yscale="log")
    if 0 < len(right.lines) <= 12:
        right.legend(frameon=False, fontsize=8)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _cut(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    while text and draw.textlength(text) > width:
        text = text[:-1]
    return text
