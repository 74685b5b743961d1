"""Encode a dataset of images with a VAE, once: the latents that a generator of latents is trained on.

    python examples/cache_latents.py --dataset_name imagefolder_or_parquet_or_hub_name --output_dir outputs/latents
    accelerate launch examples/cache_latents.py ...    # on all GPUs; run again after an interruption, it goes on

With --streaming images pass by once and never lie on a disk: every process reads the whole stream and encodes its share. Leaves in the output_dir the shards, `latent_cache.json`, and `reconstructions.png`: originals above what the VAE makes of their cached latents.
Read them with `drifting_diffusers.latents.LatentCache(output_dir)`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch import Tensor

from drifting_diffusers.arguments import parse_arguments
from drifting_diffusers.data import LabelledImages, label_names, open_images
from drifting_diffusers.image_streams import ImageStream
from drifting_diffusers.latent_streams import cache_stream
from drifting_diffusers.latents import LatentCache, cache_latents
from drifting_diffusers.sampling import processes
from drifting_diffusers.sheets import INK, MARGIN, PAPER, pictures


@dataclass
class Arguments:
    dataset_name: str = field(metadata={"help": "a dataset of the Hub, a folder of images or of parquet files, or a parquet file"})
    output_dir: str = field(metadata={"help": "where the cache is written; all processes must see it"})
    split: str = field(default="train", metadata={"help": "of the dataset"})
    streaming: bool = field(default=False, metadata={"help": "read the images as a stream, once, in the order in which it comes"})
    image_column: str = field(default="image", metadata={"help": "column of images"})
    label_column: str = field(default="label", metadata={"help": "column of classes, integers"})
    vae: str = field(default="stabilityai/sd-vae-ft-mse", metadata={"help": "an AutoencoderKL: a folder or a repository of the Hub"})
    vae_subfolder: str | None = field(default=None, metadata={"help": "where in it, for pipelines: vae"})
    vae_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "precision of encoding: float16 overflows in some VAEs"}
    )
    resolution: int = field(default=256, metadata={"help": "side of the images in pixels: shorter side resized, centre cropped"})
    dtype: Literal["float16", "bfloat16", "float32"] = field(default="float16", metadata={"help": "of what is stored"})
    one_sample: bool = field(default=False, metadata={"help": "store one latent drawn per image, as the release does, not mean and std"})
    flips: bool = field(default=True, metadata={"help": "encode mirror images as well; --no_flips leaves them out"})
    max_samples: int | None = field(default=None, metadata={"help": "encode only so many images, the first"})
    batch_size: int = field(default=32, metadata={"help": "images per call of the VAE, and process"})
    shard_size: int = field(default=4096, metadata={"help": "images per file: what an interruption may cost"})
    dataloader_num_workers: int = field(
        default=4, metadata={"help": "processes that decode images, for each that encodes; of a stream threads"}
    )


def main(argv: list[str] | None = None) -> LatentCache:
    (arguments,) = parse_arguments((Arguments,), argv, description=__doc__)
    state = processes()
    with state.local_main_process_first():  # what is downloaded or unpacked is so once
        dataset = open_images(arguments.dataset_name, arguments.split, streaming=arguments.streaming)
        vae = AutoencoderKL.from_pretrained(arguments.vae, subfolder=arguments.vae_subfolder, dtype=getattr(torch, arguments.vae_dtype))
    choices = {
        "source": {"dataset": arguments.dataset_name, "split": arguments.split, "resize": "shorter side, Lanczos; centre crop"},
        "moments": not arguments.one_sample,
        "flips": arguments.flips,
        "dtype": getattr(torch, arguments.dtype),
        "batch_size": arguments.batch_size,
        "shard_size": arguments.shard_size,
        "num_workers": arguments.dataloader_num_workers,
        "state": state,
    }
    names = label_names(dataset, arguments.label_column)
    started = time.monotonic()
    if arguments.streaming:
        form = {"size": (arguments.resolution,) * 2, "image_column": arguments.image_column, "label_column": arguments.label_column}
        cache = cache_stream(dataset, vae, arguments.output_dir, **form, names=names, max_samples=arguments.max_samples, **choices)
        images = ImageStream(dataset, channels=vae.config.in_channels, **form)
    else:
        images = view(dataset, arguments, channels=vae.config.in_channels)
        cache = cache_latents(images, vae, arguments.output_dir, names=names, **choices)
    if state.is_main_process:
        seconds = time.monotonic() - started
        size = sum(file.stat().st_size for file in cache.folder.glob("*.safetensors"))
        print(f"{len(cache)} images in {seconds:.0f} s ({len(cache) / seconds:.1f} images/s, those kept from before included),", end=" ")
        print(f"{size / 1e9:.2f} GB of latents {cache.channels} x {cache.size[0]} x {cache.size[1]} in {cache.folder}")
        draw_reconstructions(cache, *shown(images, len(cache)), vae)
    return cache


def view(dataset: Dataset, arguments: Arguments, *, channels: int) -> LabelledImages:
    """Checked images, so many as asked for. Of the first few of a dataset some classes may have none, so that only the labels themselves are checked."""
    if arguments.max_samples is not None:
        dataset = dataset.select(range(min(arguments.max_samples, len(dataset))))
    columns: dict[str, Any] = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    labels = np.asarray(dataset[arguments.label_column])
    size = (arguments.resolution, arguments.resolution)
    if arguments.max_samples is None:
        return LabelledImages(dataset, size=size, channels=channels, num_classes=int(labels.max()) + 1, **columns)
    images = LabelledImages(dataset, size=size, channels=channels, num_classes=0, **columns)
    images.labels = labels
    return images


def shown(images: LabelledImages | ImageStream, count: int, columns: int = 8) -> tuple[Sequence[int], Tensor]:
    """Rows that lie evenly in the dataset, of a stream the first ones, and their images."""
    if isinstance(images, ImageStream):
        originals = images.first(min(columns, count))[0]
        return range(len(originals)), originals
    rows = np.linspace(0, count - 1, min(columns, count)).round().astype(int).tolist()
    return rows, images.gather(rows)[0]


@torch.no_grad()
def decode(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Images in [-1, 1] of scaled latents, one by one: a decoder needs much memory."""
    unscaled = z / (vae.config.scaling_factor or 1.0) + (vae.config.shift_factor or 0.0)
    parts: list[Any] = [one.to(vae.device, vae.dtype) for one in unscaled.split(1)]
    return torch.cat([vae.decode(part).sample.float().cpu() for part in parts]).clamp(-1, 1)


def draw_reconstructions(cache: LatentCache, rows: Sequence[int], originals: Tensor, vae: AutoencoderKL) -> None:
    """Originals above reconstructions of these rows; below each pair its class and peak signal to noise ratio."""
    reconstructions = decode(vae, cache.gather(rows)[0])
    psnr = -10 * ((originals - reconstructions) / 2).square().mean(dim=(1, 2, 3)).log10()
    above, below = pictures(originals), pictures(reconstructions)
    width, height = above[0].size
    text = max(10, width // 16)  # height of letters
    top = text + 2 * MARGIN
    page = Image.new("RGB", (len(rows) * (width + MARGIN) + MARGIN, 2 * height + 2 * top + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN // 2), "above: original; below: decoded from its cached latent", fill=INK, font_size=text)
    for column, row in enumerate(rows):
        x = MARGIN + column * (width + MARGIN)
        page.paste(above[column], (x, top))
        page.paste(below[column], (x, top + height + MARGIN))
        caption = cache.names[cache.labels[row]].split(",")[0] if cache.names else f"row {row}"
        draw.text(
            (x, 2 * height + top + MARGIN + 2), f"{float(psnr[column]):.1f} dB  {caption}"[: 2 * width // text], fill=INK, font_size=text
        )
    page.save(cache.folder / "reconstructions.png")


if __name__ == "__main__":
    main()
