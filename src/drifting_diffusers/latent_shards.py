"""What a folder of latents is made of, whoever writes it: what a VAE tells of images, the contract that says what of, files that are there or not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from .chance import generators
from .extractors import digest
from .files import write_tensors, write_text
from .shapes import Float

VERSION = 1
DESCRIPTION, UNFINISHED = "latent_cache.json", "unfinished.json"
STORED = {"moments": ("mean", "std"), "sample": ("latents",)}  # what a shard holds beside its labels
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SAME, VARIED = range(2)  # the first word of a seed: of the noise of a row, of a draw
BESIDE = {"vae_name", "source", "stream"}  # of a description: the same weights and images may be called otherwise, and have come otherwise


@torch.no_grad()
def posterior(vae: ModelMixin, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k y x"], Float[Tensor, "b k y x"]]:
    """Mean and standard deviation of the latents of images, unscaled, on the CPU."""
    found = vae.encode(images.to(vae.device, vae.dtype))
    if not isinstance(getattr(found, "latent_dist", None), DiagonalGaussianDistribution):
        raise TypeError(
            f"the vae must tell a normal posterior, `encode(images).latent_dist`, as AutoencoderKL does; got {type(vae).__name__}"
        )
    exact = DiagonalGaussianDistribution(found.latent_dist.parameters.float())
    return exact.mean.cpu(), exact.std.cpu()


def encoded(images: Float[Tensor, "b c h w"], vae: ModelMixin, first: int, contract: dict[str, Any]) -> list[Float[Tensor, "b f k y x"]]:
    """What is stored of consecutive images: mean and std, or one latent each."""
    views = []
    for mirrored in range(1 + contract["flips"]):
        moments = posterior(vae, images.flip(3) if mirrored else images)
        if contract["stored"] == "sample":
            moments = (drawn(*moments, of_rows(range(first, first + len(images)), mirrored), contract),)
        views.append(moments)
    stored = [torch.stack(tensors, dim=1).to(getattr(torch, contract["dtype"])) for tensors in zip(*views, strict=True)]
    if not all(tensor.isfinite().all() for tensor in stored):
        raise ValueError(
            f"latents of the images {first} to {first + len(images) - 1} are not finite, encoded in {vae.dtype} and stored in {contract['dtype']}: "
            f"take a vae in float32 or bfloat16, and dtype=torch.bfloat16 or torch.float32 if that is not enough"
        )
    return stored


def of_rows(rows: Sequence[int], mirrored: int = 0) -> list[np.random.Generator]:
    """The chance of images, or mirror images, that is the same whenever they are looked at."""
    return generators([(SAME, row, mirrored) for row in rows])


def drawn(
    mean: Float[Tensor, "n k y x"], std: Float[Tensor, "n k y x"], chance: Sequence[np.random.Generator], scales: dict[str, Any]
) -> Float[Tensor, "n k y x"]:
    """One scaled latent each."""
    noise = np.empty(mean.shape, dtype=np.float32)
    for rng, of_one in zip(chance, noise, strict=True):
        rng.standard_normal(dtype=np.float32, out=of_one)
    eps = torch.from_numpy(noise)
    return eps.mul_(std).add_(mean).sub_(scales["shift_factor"]).mul_(scales["scaling_factor"])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def agreed(
    vae: ModelMixin,
    image_size: tuple[int, int],
    latent_shape: list[int],
    *,
    names: Sequence[str] | None,
    moments: bool,
    flips: bool,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What a contract says, apart from which images and which weights."""
    return {
        "version": VERSION,
        "stored": "moments" if moments else "sample",
        "dtype": name_of(dtype),
        "flips": flips,
        "image_size": list(image_size),
        "latent_shape": latent_shape,
        "scaling_factor": float(vae.config.get("scaling_factor") or 1.0),
        "shift_factor": float(vae.config.get("shift_factor") or 0.0),
        "names": None if names is None else list(names),
    }


def weights_of(vae: ModelMixin, source: dict[str, Any] | None) -> dict[str, Any]:
    """What a contract says of the weights, and what they and the images are called."""
    called = {"vae_name": str(vae.config.get("_name_or_path") or ""), "source": source or {}}
    return {"vae": {"digest": digest(vae), "encoded_in": name_of(vae.dtype)}} | called


def shards_of(n: int, shard_size: int) -> list[dict[str, Any]]:
    """The files of n images, with the first of each and how many it holds."""
    firsts = range(0, n, shard_size)
    return [
        {"file": f"{i:05d}-of-{len(firsts):05d}.safetensors", "first": first, "images": min(shard_size, n - first)}
        for i, first in enumerate(firsts)
    ]


def write_shard(file: Path, found: list[list[Tensor]], labels: Sequence[int] | np.ndarray, contract: dict[str, Any]) -> None:
    """What `encoded` told of the batches of a shard, and their labels."""
    stored = dict(zip(STORED[contract["stored"]], map(torch.cat, zip(*found, strict=True)), strict=True))
    write_tensors(file, stored | {"labels": torch.as_tensor(labels, dtype=torch.long)})


def claim(folder: Path, contract: dict[str, Any], beside: set[str] = BESIDE) -> None:
    """Write down what the shards will be of, or refuse those of something else.

    Args:
        folder: of the shards.
        contract: what they will be of.
        beside: entries that may differ.

    Raises:
        ValueError: if the folder holds something else.
    """
    contract = json.loads(json.dumps(contract))
    for file in (folder / DESCRIPTION, folder / UNFINISHED):
        if file.exists():
            there = json.loads(file.read_text(encoding="utf-8"))
            different = [key for key in sorted({*contract, *there} - beside) if contract.get(key) != there.get(key)]
            if different:
                wanted, found = ({key: _brief(key, side.get(key)) for key in different} for side in (contract, there))
                raise ValueError(
                    f"{folder} holds latents of something else: asked for {wanted}, there is {found}; choose another folder, or delete this one"
                )
            return
    write_text(folder / UNFINISHED, json.dumps(contract, indent=2) + "\n")


def _brief(key: str, value: Any) -> Any:
    return f"{len(value)} of up to {value[0]['images']} images" if key == "shards" and value else value


def finish(folder: Path, shards: list[dict[str, Any]]) -> None:
    """The description appears when all that it tells of is there."""
    missing = [shard["file"] for shard in shards if not (folder / shard["file"]).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {missing} although all processes are done: do all of them see this folder?")
    if (folder / UNFINISHED).exists():
        (folder / UNFINISHED).rename(folder / DESCRIPTION)


def check_choices(dtype: torch.dtype, batch_size: int, shard_size: int) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"latents are stored in {', '.join(map(str, DTYPES))}, got {dtype}")
    if min(batch_size, shard_size) < 1:
        raise ValueError(f"batch_size and shard_size must be at least 1, got {batch_size} and {shard_size}")


def latent_shape(image: Float[Tensor, "1 c h w"], vae: ModelMixin) -> list[int]:
    """Of the latent of an image."""
    channels, *size = image.shape[1:]
    wanted = vae.config.get("in_channels", channels)
    if channels != wanted:
        raise ValueError(f"the vae reads images of {wanted} channels, got {channels}: open the images with channels={wanted}")
    shape = list(posterior(vae, image)[0].shape[1:])
    factor = round(size[0] / shape[1])
    if any(side % factor for side in size):
        raise ValueError(f"height and width must be multiples of {factor}, the vae's factor, got {tuple(size)}: take another size")
    return shape
