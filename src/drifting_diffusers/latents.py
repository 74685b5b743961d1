r"""Latents of images, made once by a VAE and kept on disk: what a generator of latents is trained on.

A VAE tells of an image the mean and the standard deviation of its latent; what a generator learns is

    z = (mean + std * eps - shift) * scaling,    eps ~ N(0, 1).

The cache holds mean and std of every image and of its mirror image, which is encoded as well: encoding does not commute with mirroring. So eps can be
new whenever a latent is drawn. The release of Drifting Models (arXiv 2602.04770) draws it once and keeps one z per image and mirror image: `moments=False`.

    cache_latents(images, vae, "latents")
    data = LatentCache("latents")

A folder of safetensors shards, each `labels` [n] and `mean`, `std` [n, flips, c, h, w], or `latents` [n, flips, c, h, w], and of a description,
`latent_cache.json`. In float16, the default, a latent is off by at most 2^-11 of its mean's and its noise's size, 0.0002 in rms over rms
(bfloat16: 0.0017).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .chance import coins, generators
from .data import RealSamples
from .latent_shards import (
    DESCRIPTION,
    STORED,
    UNFINISHED,
    VARIED,
    VERSION,
    agreed,
    check_choices,
    claim,
    drawn,
    encoded,
    finish,
    latent_shape,
    name_of,
    of_rows,
    shards_of,
    weights_of,
    write_shard,
)
from .sampling import processes
from .shapes import Float, Int

CHUNK = 32  # latents computed at a time: they stay in the processor's cache
BITS = {2: torch.int16, 4: torch.int32}  # by bytes
AGAIN = "run cache_latents (of a stream cache_stream) with the same arguments again: it makes only what is missing"


class LatentCache(RealSamples):
    """The latents of a folder that `cache_latents` wrote, read through memory maps: what is not looked at is not loaded.

    Threads may share it, and worker processes open the files for themselves.

    Args:
        folder: what `cache_latents` wrote.

    Attributes:
        labels: [rows], int64.
        size: (height, width) of a latent.
        channels: of a latent.
        names: of the classes, None where they have none.
        description: what the cache is of, as `latent_cache.json` says it.

    Raises:
        FileNotFoundError: if the folder holds no cache, an unfinished one, or one without all of its shards.
        ValueError: if a file is damaged, or was written by a later version.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).resolve()
        self.description = _description(self.folder)
        self.channels, *size = self.description["latent_shape"]
        self.size = (size[0], size[1])
        self.names: list[str] | None = self.description["names"]
        self._draws, self._dtype = self.description["stored"] == "moments", getattr(torch, self.description["dtype"])
        self._firsts = np.array([shard["first"] for shard in self.description["shards"]])
        labels, self._shards = zip(*(_open(self.folder, shard, self.description) for shard in self.description["shards"]), strict=True)
        self.labels = np.concatenate(labels)

    def __reduce__(self):
        return type(self), (self.folder,)

    def gather(self, rows: Sequence[int]) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """The scaled latents [n, c, h, w] of these rows in float32, not mirrored, and their labels. A row's eps is a function of the row alone."""
        at = self._checked(rows)
        chance = of_rows(at.tolist()) if self._draws else []
        return self._latents(at, np.zeros_like(at), chance), torch.from_numpy(self.labels[at])

    def varied(self, rows: Sequence[int], seeds: Sequence[Sequence[int]], *, flip: bool) -> Float[Tensor, "n c h w"]:
        """The scaled latents [n, c, h, w] of these rows in float32; which are mirrored, and eps, are functions of the seeds.

        Args:
            rows: positions, repeats allowed.
            seeds: one per row, of non-negative integers.
            flip: whether half of them are those of mirror images.

        Raises:
            ValueError: if mirror images are asked for and the cache has none.
        """
        if flip and not self.description["flips"]:
            raise ValueError(
                f"{self.folder} holds no mirrored images: train with random_flip=False, or write another cache with flips=True"
            )
        at = self._checked(rows)
        if len(at) != len(seeds):
            raise ValueError(f"every row needs a seed, got {len(at)} rows and {len(seeds)} seeds")
        seeds = [(VARIED, *seed) for seed in seeds]
        if not self._draws:
            return self._latents(at, np.array(coins(seeds), dtype=np.int64) if flip else np.zeros_like(at), [])
        chance = generators(seeds)
        heads = np.array([rng.random() < 0.5 for rng in chance], dtype=np.int64)
        return self._latents(at, heads * flip, chance)

    def fingerprint(self) -> dict[str, Any]:
        """Enough to tell one cache from another: what `RealSamples` says, the digest of the VAE, and whether moments are stored."""
        return super().fingerprint() | {"vae": self.description["vae"]["digest"], "stored": self.description["stored"]}

    def _checked(self, rows: Sequence[int]) -> np.ndarray:
        at = np.asarray(rows, dtype=np.int64)
        if len(at) and (at.min() < 0 or at.max() >= len(self)):
            raise IndexError(f"rows must lie in [0, {len(self)}), got values from {at.min()} to {at.max()}")
        return at

    def _latents(self, rows: np.ndarray, mirrored: np.ndarray, chance: Sequence[np.random.Generator]) -> Float[Tensor, "n c h w"]:
        """In the order of the files, so that neighbours on disk are read together."""
        out = torch.empty(len(rows), self.channels, *self.size)
        order = np.argsort(rows, kind="stable")
        shard, place = self._places(rows, mirrored)
        for first in range(0, len(rows), CHUNK):
            part = order[first : first + CHUNK]
            mean, *std = self._stored(shard[part], place[part])
            z = drawn(mean.float(), std[0].float(), [chance[i] for i in part], self.description) if std else mean.float()
            out[torch.from_numpy(part)] = z
        return out

    def _places(self, rows: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each row, and where in it the entry is."""
        shard = np.searchsorted(self._firsts, rows, side="right") - 1
        return shard, (rows - self._firsts[shard]) * (1 + self.description["flips"]) + mirrored

    def _stored(self, shard: np.ndarray, place: np.ndarray) -> list[Tensor]:
        """The entries at these places of these sorted shards as they lie there: mean and std, or latents, each [n, c, h, w]."""
        found = [np.empty((len(place), *self.description["latent_shape"]), dtype=bits.dtype) for bits in self._shards[0]]
        for i, (at, one) in enumerate(zip(shard.tolist(), place.tolist(), strict=True)):
            for bits, rows in zip(self._shards[at], found, strict=True):
                rows[i] = bits[one]
        return [torch.from_numpy(rows).view(self._dtype) for rows in found]


def cache_latents(
    images: RealSamples,
    vae: ModelMixin,
    folder: str | os.PathLike,
    *,
    names: Sequence[str] | None = None,
    source: dict[str, Any] | None = None,
    moments: bool = True,
    flips: bool = True,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 32,
    shard_size: int = 4096,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    state: PartialState | None = None,
) -> LatentCache:
    """Write the latents of all images into a folder. What was interrupted goes on with the shards that are missing, to the same bits.

    Several processes share the shards through the folder, which all of them must see.

    Args:
        images: in [-1, 1], [channels, height, width] as the VAE reads them, with labels from 0.
        vae: a VAE of diffusers that tells a normal posterior (AutoencoderKL). It encodes in its own dtype, the moments are computed in float32.
            It is moved to the device.
        folder: new, or that of a cache of the same.
        names: of the classes, in the order of their labels.
        source: what to remember of the images, as JSON: name, split, how they were resized.
        moments: keep mean and std; otherwise one latent is drawn and kept, half as much to store.
        flips: encode and keep mirror images as well, twice as much to store.
        dtype: of what is stored: float16, bfloat16 or float32.
        batch_size: images per call of the VAE.
        shard_size: images per file; an interruption costs at most that many.
        num_workers: processes that read and decode images; 0 is this one.
        device: that encodes; that of the process if not given.
        state: of the processes that share the work.

    Raises:
        ValueError: if the folder holds latents of something else, the images do not fit the VAE, their labels are none, or latents overflow.
        TypeError: if the VAE tells no posterior.
    """
    folder, state = Path(folder), state or processes()
    check_choices(dtype, batch_size, shard_size)
    _check_labels(images, names)
    vae = vae.to(device or state.device)  # pyright: ignore[reportArgumentType]
    shape = latent_shape(images.gather([0])[0], vae)
    contract = agreed(vae, images.size, shape, names=names, moments=moments, flips=flips, dtype=dtype)
    contract |= {"images": len(images), "shards": shards_of(len(images), shard_size)}
    if state.is_main_process:
        claim(folder, contract | {"dataset": images.fingerprint()} | weights_of(vae, source))
    state.wait_for_everyone()
    mine = contract["shards"][state.process_index :: state.num_processes]
    missing = [shard for shard in mine if not (folder / shard["file"]).exists()]
    total, left = (sum(shard["images"] for shard in shards) for shards in (mine, missing))
    with tqdm(
        total=total, initial=total - left, desc="latents", unit="image", dynamic_ncols=True, disable=not state.is_main_process
    ) as bar:
        _write_shards(images, vae, folder, contract, missing, batch_size=batch_size, num_workers=num_workers, bar=bar)
    state.wait_for_everyone()
    if state.is_main_process:
        finish(folder, contract["shards"])
    state.wait_for_everyone()
    return LatentCache(folder)


def _write_shards(
    images: RealSamples,
    vae: ModelMixin,
    folder: Path,
    contract: dict[str, Any],
    shards: list[dict[str, Any]],
    *,
    batch_size: int,
    num_workers: int,
    bar: tqdm,
) -> None:
    """No batch reaches into another shard, so that a shard is the same whichever are written with it."""
    rows = [range(shard["first"], shard["first"] + shard["images"]) for shard in shards]
    batches = [[shard[i : i + batch_size] for i in range(0, len(shard), batch_size)] for shard in rows]
    data = _Batches(images, [batch for parts in batches for batch in parts])
    # with a generator of its own: a loader without one draws from the global one
    read = iter(DataLoader(data, batch_size=None, num_workers=num_workers if shards else 0, generator=torch.Generator()))
    for shard, all_rows, parts in zip(shards, rows, batches, strict=True):
        found = []
        for part in parts:
            found.append(encoded(next(read), vae, part.start, contract))
            bar.update(len(part))
        write_shard(folder / shard["file"], found, images.labels[list(all_rows)], contract)


class _Batches(Dataset):
    """Images by the batch, for the workers of a DataLoader."""

    def __init__(self, images: RealSamples, batches: list[range]):
        self.images, self.batches = images, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Float[Tensor, "b c h w"]:
        return self.images.gather(self.batches[index])[0]


def _description(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    if not file.exists():
        if (folder / UNFINISHED).exists():
            raise FileNotFoundError(f"the latent cache {folder} is unfinished: {AGAIN}")
        raise FileNotFoundError(
            f"{folder} is no latent cache, it has no {DESCRIPTION}: give a folder that drifting_diffusers.latents.cache_latents wrote"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): delete it and {AGAIN}") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        got = found.get("version") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{file} must have version {VERSION}, got {got}: update drifting_diffusers, or write the cache anew")
    return found


def _open(folder: Path, shard: dict[str, Any], description: dict[str, Any]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The labels of a shard, loaded, and what else it holds, mapped: images and their mirror images one after the other, [n * flips, c, h, w].

    It is mapped as integers of the same width: NumPy, which copies rows with less ado than torch, knows no bfloat16.
    """
    file = folder / shard["file"]
    if not file.exists():
        raise FileNotFoundError(f"the latent cache {folder} lacks {shard['file']}: copy it from where the cache was made, or {AGAIN}")
    shape = (shard["images"], 1 + description["flips"], *description["latent_shape"])
    try:
        with safe_open(file, framework="pt") as opened:
            labels = opened.get_tensor("labels").numpy().copy()
            tensors = [opened.get_tensor(name) for name in STORED[description["stored"]]]
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it and {AGAIN}") from error
    if len(labels) != shard["images"] or any(tensor.shape != shape or name_of(tensor.dtype) != description["dtype"] for tensor in tensors):
        got = [(list(tensor.shape), name_of(tensor.dtype)) for tensor in tensors]
        raise ValueError(
            f"{file} is not the one that {DESCRIPTION} tells of: its tensors must be {list(shape)} in {description['dtype']}, got {got}; delete it and {AGAIN}"
        )
    return labels, [tensor.flatten(0, 1).view(BITS[tensor.element_size()]).numpy() for tensor in tensors]


def _check_labels(images: RealSamples, names: Sequence[str] | None) -> None:
    low, high = images.labels.min(), images.labels.max()
    if low < 0 or (names is not None and high >= len(names)):
        allowed = f"[0, {len(names)}), as there are names" if names is not None else "[0, number of classes)"
        raise ValueError(
            f"labels must lie in {allowed}; got values from {low} to {high}: leave out rows without a label, or give all names"
        )
