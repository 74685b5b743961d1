"""Latents of a stream of images (`load_dataset(..., streaming=True)`): what is too large for a disk passes by once, and its latents stay.

Every process reads the whole stream and takes every N-th shard; rows of other shards, and of those that are there already, pass by undecoded. How many
images there are is known at the end, so until then shards bear no total in their names.
"""

import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from datasets import IterableDataset
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from .data import fingerprint_of
from .files import write_text
from .image_streams import ImageStream
from .latent_shards import (
    BESIDE,
    DESCRIPTION,
    UNFINISHED,
    agreed,
    check_choices,
    claim,
    encoded,
    finish,
    latent_shape,
    shards_of,
    weights_of,
    write_shard,
)
from .latents import LatentCache
from .sampling import processes
from .shapes import Float

KNOWN_AT_THE_END = {"images", "shards", "dataset"}  # of a description
Found = TypeVar("Found")


def cache_stream(
    dataset: IterableDataset,
    vae: ModelMixin,
    folder: str | os.PathLike,
    *,
    size: tuple[int, int],
    image_column: str = "image",
    label_column: str = "label",
    names: Sequence[str] | None = None,
    max_samples: int | None = None,
    source: dict[str, Any] | None = None,
    moments: bool = True,
    flips: bool = True,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 32,
    shard_size: int = 4096,
    num_workers: int = 1,
    device: torch.device | str | None = None,
    state: PartialState | None = None,
) -> LatentCache:
    """Write the latents of all images of a stream into a folder, in one pass: to the same bits as `cache_latents` those of the same images in this order.

    What was interrupted goes on with the shards that are missing, to the same bits; the stream must come in the same order again. The next images are
    read and decoded while some are encoded. A cache that is whole is not read again beyond its first image.

    Args:
        dataset: rows with an image and an integer label, in the same order for every process.
        vae: a VAE of diffusers that tells a normal posterior (AutoencoderKL); see `cache_latents`.
        folder: new, or that of a cache of the same; all processes must see it.
        size: (height, width) of the images.
        image_column: the column of images.
        label_column: the column of labels.
        names: of the classes, in the order of their labels.
        max_samples: encode only so many images, the first.
        source: what to remember of the images, as JSON: name, split, how they were resized.
        moments: keep mean and std; otherwise one latent is drawn and kept, half as much to store.
        flips: encode and keep mirror images as well, twice as much to store.
        dtype: of what is stored: float16, bfloat16 or float32.
        batch_size: images per call of the VAE.
        shard_size: images per file; an interruption costs at most that many to encode.
        num_workers: threads that decode images.
        device: that encodes; that of the process if not given.
        state: of the processes that share the work.

    Raises:
        ValueError: if the folder holds latents of something else, the stream is empty or came in another order than before, its images do not fit the
            VAE, a label is missing or out of range, or latents overflow.
        TypeError: if the dataset is no stream, or the VAE tells no posterior.
    """
    folder, state = Path(folder), state or processes()
    check_choices(dtype, batch_size, shard_size)
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}: they are threads, and one of them decodes")
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    classes = None if names is None else len(names)
    stream = ImageStream(dataset, size=size, channels=vae.config.in_channels, **columns, num_classes=classes, max_samples=max_samples)
    vae = vae.to(device or state.device)  # pyright: ignore[reportArgumentType]
    first = stream.first(1)[0]
    contract = agreed(vae, size, latent_shape(first, vae), names=names, moments=moments, flips=flips, dtype=dtype)
    contract["stream"] = {"max_samples": max_samples, "shard_size": shard_size} | stream.fingerprint()
    if state.is_main_process:
        contract |= weights_of(vae, source)
        claim(folder, contract, BESIDE - {"stream"} | KNOWN_AT_THE_END)
    state.wait_for_everyone()
    if not _whole(folder):
        mine = lambda shard: shard % state.num_processes == state.process_index
        progress = {"desc": "latents", "unit": "image", "dynamic_ncols": True, "total": max_samples}
        with tqdm(**progress, disable=not state.is_main_process) as bar, ThreadPoolExecutor(num_workers, "decode") as pool:
            passing = _Pass(stream, folder, mine, pool, batch_size=batch_size, shard_size=shard_size)
            _write_shards(passing, vae, contract, bar)
        state.wait_for_everyone()
        if state.is_main_process:
            _conclude(passing, first, contract)
        state.wait_for_everyone()
    return LatentCache(folder)


@dataclass(frozen=True)
class _Batch:
    """Consecutive images of one shard, and the number of the first."""

    first: int
    images: Float[Tensor, "b c h w"]


class _Pass:
    """A stream passing by once.

    Args:
        stream: of images.
        folder: of the shards.
        mine: whether a shard is this process's, by its number.
        pool: decodes images.
        batch_size: images of a batch.
        shard_size: images of a shard; no batch reaches into another.

    Attributes:
        labels: of the images so far.
        last: the last image so far, as it came.
    """

    def __init__(
        self,
        stream: ImageStream,
        folder: Path,
        mine: Callable[[int], bool],
        pool: ThreadPoolExecutor,
        *,
        batch_size: int,
        shard_size: int,
    ):
        self.stream, self.folder, self.mine, self.pool, self.batch_size, self.shard_size = (
            stream,
            folder,
            mine,
            pool,
            batch_size,
            shard_size,
        )
        self.labels, self.last = array("q"), None

    def __iter__(self) -> Iterator[_Batch]:
        """What of it is to be encoded here."""
        held, wanted = [], False
        for number, (image, label) in enumerate(self.stream):
            shard, place = divmod(number, self.shard_size)
            if place == 0:
                if number:
                    self._compare(shard - 1)
                wanted = self.mine(shard) and there(self.folder, shard) is None
            self.labels.append(label)
            self.last = image
            if wanted:
                held.append(image)
            if len(held) == self.batch_size or (held and place == self.shard_size - 1):
                yield self._decoded(number + 1 - len(held), held)
                held = []
        if held:
            yield self._decoded(len(self.labels) - len(held), held)

    def _decoded(self, first: int, held: list[Any]) -> _Batch:
        return _Batch(first, torch.stack(list(self.pool.map(self.stream.tensor, range(first, first + len(held)), held))))

    def labels_of(self, shard: int) -> np.ndarray:
        return np.array(self.labels[shard * self.shard_size : (shard + 1) * self.shard_size], dtype=np.int64)

    def _compare(self, shard: int) -> None:
        """A mistake is told early by whoever passes by a shard that is there."""
        file = there(self.folder, shard)
        if file is not None and self.mine(shard):
            self.check(shard, file)

    def check(self, shard: int, file: Path) -> None:
        """Whether a file is of the images that passed by.

        Raises:
            ValueError: if its labels are others.
        """
        with safe_open(file, framework="np") as opened:
            stored = opened.get_tensor("labels")
        if not np.array_equal(stored, self.labels_of(shard)):
            first = shard * self.shard_size
            raise ValueError(
                f"{file} holds {len(stored)} images with other labels than the stream has from row {first} on: the stream must come in the same order "
                "again, whole, and for every process; if it is this one, delete the file and run again"
            )


def _write_shards(passing: _Pass, vae: ModelMixin, contract: dict[str, Any], bar: tqdm) -> None:
    """Every shard as soon as it is full: what follows may be cut off."""
    found: list[list[Tensor]] = []
    for batch in _ahead(iter(passing)):
        found.append(encoded(batch.images, vae, batch.first, contract))
        behind = batch.first + len(batch.images)
        bar.update(behind - bar.n)  # where the stream is, not how many were encoded here
        if behind % passing.shard_size == 0:
            _write(passing, found, behind, contract)
            found = []
    if found:
        _write(passing, found, len(passing.labels), contract)
    bar.update(len(passing.labels) - bar.n)


def _write(passing: _Pass, found: list[list[Tensor]], behind: int, contract: dict[str, Any]) -> None:
    """The shard that ends before this row."""
    first = behind - sum(len(part[0]) for part in found)
    file = passing.folder / f"{_prefix(first // passing.shard_size)}unknown.safetensors"
    write_shard(file, found, passing.labels[first:behind], contract)


def _ahead(found: Iterator[Found]) -> Iterator[Found]:
    """The same, each made in a thread while the one before is used."""
    with ThreadPoolExecutor(1, "stream") as pool:
        following = pool.submit(next, found, None)
        while (one := following.result()) is not None:
            following = pool.submit(next, found, None)
            yield one


def _conclude(passing: _Pass, first: Float[Tensor, "1 c h w"], contract: dict[str, Any]) -> None:
    """The shards get their names, when all are there and of what passed by, and the description its numbers."""
    folder, count = passing.folder, len(passing.labels)
    shards = shards_of(count, passing.shard_size)
    files = [there(folder, i) for i in range(len(shards))]
    for i, file in enumerate(files):
        if file is not None:
            passing.check(i, file)
    beyond = sorted({file.name for file in folder.glob("*-of-*.safetensors")} - {file.name for file in files if file is not None})
    if beyond:
        raise ValueError(
            f"the stream ended after {count} images, and {folder} holds {beyond} of later ones: run again if it was cut off, or delete them"
        )
    ends = torch.cat([first, passing.stream.tensor(count - 1, passing.last)[None]])
    contract = contract | {"images": count, "shards": shards, "dataset": fingerprint_of(np.array(passing.labels), ends)}
    if (folder / DESCRIPTION).exists():
        claim(folder, contract)  # of a cache that was whole and lost a shard, all is known
    else:
        write_text(folder / UNFINISHED, json.dumps(contract, indent=2) + "\n")
    for file, shard in zip(files, shards, strict=True):
        if file is not None:
            file.rename(folder / shard["file"])
    finish(folder, shards)


def _prefix(shard: int) -> str:
    return f"{shard:05d}-of-"


def there(folder: Path, shard: int) -> Path | None:
    """The file of a shard, with the total in its name or still without."""
    return next(iter(folder.glob(f"{_prefix(shard)}*.safetensors")), None)


def _whole(folder: Path) -> bool:
    """Whether there is nothing left to do."""
    file = folder / DESCRIPTION
    return file.exists() and all((folder / shard["file"]).exists() for shard in json.loads(file.read_text(encoding="utf-8"))["shards"])
