"""How fast are latents cached and read? On one thread: OMP_NUM_THREADS=1 python benchmarks/latents.py

Caching: real images of a parquet file through a small AutoencoderKL with three downsamplings and random weights, each image and its mirror image. Reading:
a synthetic cache of 4 x 32 x 32 latents in float16, random rows, from the page cache; best of five rounds, in processor time, which other programs
disturb least.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from diffusers import AutoencoderKL

from drifting_diffusers.data import LabelledImages
from drifting_diffusers.files import write_tensors
from drifting_diffusers.latents import LatentCache, cache_latents

SHAPE, SHARD = (4, 32, 32), 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parquet", help="images to cache, with the columns image and label; without them only reading is timed")
    parser.add_argument("--images", type=int, default=200, help="how many of them")
    parser.add_argument("--rows", type=int, default=50_000, help="of the synthetic cache, 33 kB each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.parquet:
            time_caching(arguments.parquet, arguments.images, Path(folder))
        for stored in ("moments", "sample"):
            time_reading(synthetic(Path(folder, stored), arguments.rows, stored))


def time_caching(parquet: str, n: int, folder: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1}
    vae = AutoencoderKL.from_config(blocks | {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8}).eval()
    dataset = Dataset.from_parquet(parquet)
    assert isinstance(dataset, Dataset)
    for side in (64, 256):
        images = LabelledImages(
            dataset.select(range(n)), size=(side, side), channels=3, num_classes=0, image_column="image", label_column="label"
        )
        started = time.process_time()
        images.gather(range(n))
        read = time.process_time() - started
        started = time.process_time()
        cache_latents(images, vae, folder / str(side))
        print(
            f"caching {n} images at {side:3d} pixels: {n / (time.process_time() - started):8.1f} images/s, reading them {n / read:8.1f} images/s"
        )


def synthetic(folder: Path, n: int, stored: str) -> LatentCache:
    """Random numbers in the format of a cache."""
    rng = torch.Generator().manual_seed(0)
    names = {"moments": ("mean", "std"), "sample": ("latents",)}[stored]
    shards = []
    for first in range(0, n, SHARD):
        shard = {"file": f"{first:08d}.safetensors", "first": first, "images": min(SHARD, n - first)}
        values = {name: torch.randn(shard["images"], 2, *SHAPE, generator=rng).half() for name in names}
        write_tensors(folder / shard["file"], values | {"labels": torch.arange(shard["images"]) % 10})
        shards.append(shard)
    description = {"version": 1, "stored": stored, "dtype": "float16", "flips": True, "images": n, "image_size": [256, 256]}
    description |= {"latent_shape": list(SHAPE), "scaling_factor": 0.18215, "shift_factor": 0.0, "names": None, "shards": shards}
    (folder / "latent_cache.json").write_text(json.dumps(description | {"vae": {"digest": "none"}}))
    return LatentCache(folder)


def time_reading(cache: LatentCache) -> None:
    stored, rng = cache.description["stored"], np.random.default_rng(0)
    size = sum(file.stat().st_size for file in cache.folder.glob("*.safetensors"))
    before = resident()
    cache = LatentCache(cache.folder)
    cache.gather([0, len(cache) - 1])
    print(
        f"\n{stored}: {size / 1e9:.2f} GB in {len(cache.description['shards'])} shards; opening takes {resident() - before:.0f} MB of memory"
    )
    for batch in (128, 4096):
        rows = [rng.integers(0, len(cache), batch).tolist() for _ in range(6)]
        seeds = [[[0, k, i, row] for i, row in enumerate(part)] for k, part in enumerate(rows)]
        gathered = fastest([partial(cache.gather, part) for part in rows])
        varied = fastest([partial(cache.varied, *part, flip=True) for part in zip(rows, seeds, strict=True)])
        print(f"  batches of {batch:4d}: gather {batch / gathered:9,.0f} rows/s, varied {batch / varied:9,.0f} rows/s")


def fastest(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of the fastest; the first warms up."""
    calls[0]()
    seconds = []
    for call in calls[1:]:
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return min(seconds)


def resident() -> float:
    """Memory of this process, mapped files included as far as they were looked at, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


if __name__ == "__main__":
    main()
