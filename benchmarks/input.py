"""How fast are latents read, and what does resuming cost? OMP_NUM_THREADS=1 python benchmarks/input.py

Synthetic latents of 4 x 32 x 32, both mirrors, read in batches of random rows from the page cache: `LatentCache`, one .pt file per image, an Array3D column and
a column of bytes of `datasets`. Each variant makes the same batch, float32 latents [n, 4, 32, 32], half of them those of mirror images; of moments each draws new noise.
Rows per second of processor time on one core, variants interleaved, the fastest of several rounds; the first variant runs twice a round, which shows the noise.

The cache has so many shards that a batch is spread over as many of them as it is over those of ImageNet (313 of 4,096 images).
"""

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import latents
import numpy as np
import torch
from datasets import Array3D, Dataset, Features, Value
from torch import Tensor

from drifting_diffusers.latents import LatentCache
from drifting_diffusers.sources import Tickets

SHAPE, SCALING = latents.SHAPE, 0.18215
IMAGENET, STEPS = 1_281_167, (1, 1_000_000)
FIELDS = {"moments": ("mean", "std"), "sample": ("latents",)}
CACHE, AGAIN, FILES, ARRAYS, BYTES = "LatentCache", "LatentCache again", "one .pt file per image", "Array3D column", "bytes column"
NOISE = "LatentCache's noise alone"
GOALS = {FILES: 20.0, ARRAYS: 10.0}
Stored = Callable[[list[int], list[int]], list[Tensor]]  # rows and which are mirrored -> [n, c, h, w] each


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    parser.add_argument("--small", action="store_true", help="a size that takes seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    count, batches, rounds = (256, (8, 16), 2) if arguments.small else (4096, (64, 128, 1024), 7)
    rows, tables = [], []
    with tempfile.TemporaryDirectory() as folder:
        for stored in FIELDS:
            caches = written(Path(folder, stored), count, stored)
            for kind, found in variants(caches, stored).items():
                speeds = {batch: measured(found, count, batch, rounds) for batch in batches}
                rows += ratios(speeds[batches[-2]], kind, batches[-2])
                tables.append(speed_table(speeds, kind))
            tables.append(opening_table(caches, Path(folder, stored), stored))
    found, table = resuming(1000 if arguments.small else IMAGENET, rounds)
    report(arguments.json, rows + found, [*tables, table])


# -- the same latents in four forms


def written(folder: Path, count: int, stored: str) -> dict[str, Any]:
    """Each form in a folder of its name, and what opens it."""
    latents.SHARD = max(16, count // 256)
    cache = latents.synthetic(folder / CACHE, count, stored)
    both = [torch.cat([part[name] for part in _parts(cache)]) for name in FIELDS[stored]]  # [count, 2, c, h, w] each
    values = torch.stack(both, dim=1).numpy()  # [count, moments, 2, c, h, w]
    (folder / FILES).mkdir()
    for row, value in enumerate(values):
        content = {
            f"{name}{end}": part
            for name, pair in zip(FIELDS[stored], value, strict=True)
            for end, part in zip(("", "_flip"), pair, strict=True)
        }
        torch.save(content, folder / FILES / f"{row:07d}.pt")
    shape = (values[0].size // (SHAPE[1] * SHAPE[2]), *SHAPE[1:])
    columns: dict[str, tuple[Features, Callable[[np.ndarray], Any]]] = {
        ARRAYS: (Features({"x": Array3D(shape, "float16")}), lambda value: value.reshape(shape)),
        BYTES: (Features({"x": Value("binary")}), lambda value: value.tobytes()),
    }
    for name, (features, made) in columns.items():
        Dataset.from_dict({"x": [made(value) for value in values]}, features=features).save_to_disk(folder / name)
    return {
        CACHE: partial(LatentCache, folder / CACHE),
        FILES: lambda: sorted((folder / FILES).iterdir()),
        ARRAYS: lambda: Dataset.load_from_disk(str(folder / ARRAYS)).with_format("torch"),
        BYTES: lambda: Dataset.load_from_disk(str(folder / BYTES)),
    }


def _parts(cache: LatentCache) -> list[dict[str, Tensor]]:
    from safetensors.torch import load_file

    return [load_file(cache.folder / shard["file"]) for shard in cache.description["shards"]]


# -- reading them


def stored_readers(caches: dict[str, Any], stored: str) -> dict[str, Stored]:
    """How a batch is read from each form, as quickly as its interface allows: what is stored of the rows, or of their mirror images."""
    files, arrays, binary = (caches[name]() for name in list(caches)[1:4])
    names = FIELDS[stored]

    def of_files(rows: list[int], mirrored: list[int]) -> list[Tensor]:
        loaded = [(torch.load(files[row], weights_only=False), "_flip" if flip else "") for row, flip in zip(rows, mirrored, strict=True)]
        return [torch.from_numpy(np.stack([one[name + end] for one, end in loaded])) for name in names]

    def of_column(values: Callable[[list[int]], Tensor]) -> Stored:
        def read(rows: list[int], mirrored: list[int]) -> list[Tensor]:
            found = values(rows).reshape(len(rows), len(names), 2, *SHAPE)
            return [found[torch.arange(len(rows)), i, torch.tensor(mirrored)] for i in range(len(names))]

        return read

    return {
        CACHE: partial(of_cache, caches[CACHE]()),
        FILES: of_files,
        ARRAYS: of_column(lambda rows: arrays[rows]["x"]),
        BYTES: of_column(lambda rows: torch.frombuffer(bytearray(b"".join(binary[rows]["x"])), dtype=torch.float16)),
    }


def of_cache(cache: LatentCache, rows: list[int], mirrored: list[int]) -> list[Tensor]:
    """Without the noise: what `varied` does before it draws."""
    at = np.array(rows)
    order, (shard, place) = np.argsort(at), cache._places(at, np.array(mirrored))
    back = torch.from_numpy(np.argsort(order))
    return [values[back] for values in cache._stored(shard[order], place[order])]


def finished(stored: list[Tensor]) -> Tensor:
    """What is trained on, in the quickest way: noise of the whole batch from one generator, so that no sample has noise of its own."""
    if len(stored) == 1:
        return stored[0].float()
    mean, std = stored
    return torch.randn(mean.shape).mul_(std).add_(mean).mul_(SCALING)


def variants(caches: dict[str, Any], stored: str) -> dict[str, dict[str, Callable[[list[int], list[int]], Any]]]:
    """Of each kind of reading, the forms; that of the cache twice."""
    found, cache = stored_readers(caches, stored), caches[CACHE]()
    varied = lambda rows, mirrored: cache.varied(rows, [(0, row) for row in rows], flip=True)
    drawn = {name: (lambda rows, mirrored, read=read: finished(read(rows, mirrored))) for name, read in found.items()}
    gathered = {"LatentCache.gather, not mirrored": lambda rows, mirrored: cache.gather(rows)[0]}
    ready = {CACHE: varied, AGAIN: varied} | gathered | {name: read for name, read in drawn.items() if name != CACHE}
    if stored == "sample":
        return {"one stored sample": ready}
    ready[NOISE] = only_noise
    return {"moments, as stored": {CACHE: found[CACHE], AGAIN: found[CACHE]} | found, "moments, new noise": ready}


def measured(found: dict[str, Callable[[list[int], list[int]], Any]], count: int, batch: int, rounds: int) -> dict[str, float]:
    """Rows per second of processor time."""
    rng, seconds = np.random.default_rng(0), dict.fromkeys(found, float("inf"))
    for warming in (True, *[False] * rounds):
        rows, mirrored = rng.integers(0, count, batch).tolist(), rng.integers(0, 2, batch).tolist()
        for name, read in found.items():
            started = time.process_time()
            made = read(rows, mirrored)
            took = time.process_time() - started
            seconds[name] = seconds[name] if warming else min(seconds[name], took)
            first = made[0] if isinstance(made, list) else made
            if first.shape[-4:] != (batch, *SHAPE):
                raise RuntimeError(f"{name} made {list(first.shape)}")
    return {name: batch / took for name, took in seconds.items()}


def ratios(speeds: dict[str, float], kind: str, batch: int) -> list[dict[str, Any]]:
    """Rows of the goals."""
    shared = {"part": "input", "unit": "times", "better": "higher", "noise": abs(speeds[AGAIN] / speeds[CACHE] - 1), "note": ""}
    if kind == "moments, new noise":
        share = speeds[CACHE] / speeds[NOISE]
        shared["note"] = (
            f"{share:.0%} of the time of LatentCache is NumPy drawing the noise, which every sample has from a generator of its own"
        )
    named = lambda other: {"row": f"{kind}: rows per second and core, LatentCache / {other}, batch {batch}"}
    return [shared | named(other) | {"value": speeds[CACHE] / speeds[other], "goal": goal} for other, goal in GOALS.items()]


def only_noise(rows: list[int], mirrored: list[int]) -> Tensor:
    """As NumPy draws it for the cache, by a generator that is there."""
    rng, noise = np.random.default_rng(0), np.empty((len(rows), *SHAPE), np.float32)
    for of_one in noise:
        rng.standard_normal(dtype=np.float32, out=of_one)
    return torch.from_numpy(noise)


# -- opening


def opening(open_it: Callable[[], Any], folder: Path, *, cold: bool) -> tuple[float, float]:
    """Wall seconds, and MB of memory that the opened keeps beside what is mapped from files."""
    gc.collect()
    if cold:
        for file in folder.rglob("*"):
            if file.is_file():
                forget(file)
    ctypes.CDLL(None).malloc_trim(0)  # what is free already is not there before
    before, started = anonymous(), time.perf_counter()
    kept = open_it()
    took = time.perf_counter() - started
    return took, anonymous() - before if kept is not None else 0.0


def forget(file: Path) -> None:
    """Drop a file from the page cache."""
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def anonymous() -> float:
    """Memory of this process that no file stands behind, in MB."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1000


# -- resuming


def resuming(n: int, rounds: int) -> tuple[list[dict[str, Any]], str]:
    """Which rows does a step read? Asked of a run that begins at this step, over as many images as ImageNet has."""
    seconds = dict.fromkeys((*STEPS, "again"), float("inf"))
    for _ in range(max(5, rounds)):
        for key in seconds:
            started = time.process_time()
            tickets = Tickets([], n, seed=0)
            tickets.rows(tickets.of_step(STEPS[0] if key == "again" else key, 128))
            seconds[key] = min(seconds[key], time.process_time() - started)
    first, late = (seconds[step] for step in STEPS)
    row = {
        "part": "input",
        "row": f"resuming: which rows a step reads, step {STEPS[1]:,} / step {STEPS[0]}",
        "unit": "times",
        "value": late / first,
        "goal": 1.1,
        "better": "lower",
        "noise": abs(seconds["again"] / first - 1),
        "note": f"{1e3 * first:.1f} ms of processor time, {n:,} images: one order of all of them",
    }
    table = "| resume at step | ms of processor time |\n| --- | ---: |\n" + "\n".join(
        f"| {step:,} | {1e3 * seconds[step]:.2f} |" for step in STEPS
    )
    return [row], table


# -- telling


def speed_table(speeds: dict[int, dict[str, float]], kind: str) -> str:
    times = lambda found, name: "" if name.startswith(CACHE) else f" ({found[CACHE] / found[name]:.1f} x)"
    names = [name for name in next(iter(speeds.values())) if name != AGAIN]
    lines = [[name, *[f"{found[name]:,.0f}{times(found, name)}" for found in speeds.values()]] for name in names]
    noise = ["noise: the first row timed twice", *[f"{abs(found[AGAIN] / found[CACHE] - 1):.1%}" for found in speeds.values()]]
    return table_of([f"{kind}: rows/s and core", *[f"batch {batch:,}" for batch in speeds]], [*lines, noise])


def opening_table(caches: dict[str, Any], folder: Path, stored: str) -> str:
    lines = []
    for name, open_it in caches.items():
        size = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file()) / 1e6
        (cold, _), (warm, memory) = (opening(open_it, folder / name, cold=cold) for cold in (True, False))
        lines.append([name, f"{size:.0f}", f"{1e3 * cold:.1f}", f"{1e3 * warm:.1f}", f"{max(0.0, memory):.1f}"])
    return table_of([f"opening, {stored}", "MB on disk", "ms, cold", "ms, warm", "MB of memory"], lines)


def table_of(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---", *["---:"] * (len(head) - 1)], *lines])


def report(file: Path | None, rows: list[dict[str, Any]], tables: list[str]) -> None:
    goals = [
        [row["row"], f"{row['value']:.2f}", f"{row['goal']:g}", f"{row['noise']:.1%}", "hit" if hit(row) else "missed"] for row in rows
    ]
    tables = [table_of(["ratio", "measured", "goal", "noise", ""], goals), *tables]
    print("\n\n".join(tables))
    print("\n".join(sorted({f"\n{row['note']}" for row in rows if row["note"]})))
    if file is not None:
        found = {
            "command": " ".join(["OMP_NUM_THREADS=1", "python", "benchmarks/input.py", *sys.argv[1:]]).partition(" --json")[0],
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": f"{processor()}, {torch.get_num_threads()} thread",
            "torch": torch.__version__,
            "rows": rows,
            "tables": tables[1:],
        }
        file.write_text(json.dumps(found, indent=1) + "\n")


def hit(row: dict[str, Any]) -> bool:
    return row["value"] >= row["goal"] if row["better"] == "higher" else row["value"] <= row["goal"]


def processor() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
