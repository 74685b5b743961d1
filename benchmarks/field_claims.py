"""What published claims are about, small enough to be run here: annealing, lookahead, Sinkhorn at low temperature, landmarks."""

import json
import math
import statistics
import time
from collections.abc import Iterable
from typing import Any

import field_images
import field_planes
import torch
from field_rows import PLAIN, rows

from drifting_diffusers.fields import Situation, read_field, situated
from drifting_diffusers.schedules import annealing_rate

FREQUENCIES = (2, 4, 8, 16)
LOW = (0.01, 0.1)
"""Temperatures at which classes are counted."""


def steps_to_resolve(frequency: int, annealed: bool, most: int) -> dict:
    """Particle steps until the density has 95 % of the target's wave of this frequency, from none; `most` + 1 if it never has.

    1,024 particles start evenly on [0, 2 pi]; the density of 2,048 targets there is 1 + 0.8 cos(K x). Gaussian, plain lengths and forces, step 1: width 1
    throughout, or annealed from 1 down to 0.1 / K at half the fastest rate of `annealing_rate`.
    """
    width = f"exponential(1.0, {0.1 / frequency!r}, rate={annealing_rate() / 2!r})" if annealed else "1.0"
    field = read_field(f"score(temperatures=({width},), normalise_distance=False, normalise_force=False)")
    even = lambda n: (torch.arange(n, dtype=torch.float64) + 0.5) / n
    grid = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
    mass = (grid + 0.8 / frequency * (frequency * grid).sin()) / (2 * math.pi)  # of the target, up to each place
    data = grid[torch.searchsorted(mass, even(2048))][:, None]
    x = 2 * math.pi * even(1024)[:, None]
    wave = lambda points: 2 * float((frequency * points).cos().mean())
    for step in range(most):
        x = x + situated(field, Situation(step, most))(x, positives=data, negatives=x).velocity
        if wave(x) >= 0.95 * wave(data):
            return {"steps": step + 1, "wave": wave(x), "wave_target": wave(data)}
    return {"steps": most + 1, "wave": wave(x), "wave_target": wave(data)}


def slower(args: Any, plain: str, ahead: str) -> float:
    """How many times longer a step on a plane takes with the second row than with the first."""
    lines = [json.loads(line) for line in (args.output_dir / "planes.jsonl").read_text().splitlines()]
    of = lambda name: statistics.median(
        entry["ms_per_step"] for entry in lines if entry["key"].split("|")[0] == name and "error" not in entry
    )
    return of(ahead) / of(plain)


def jobs(args: Any) -> Iterable[tuple[str, Any, dict]]:
    yield from annealing_jobs(args.most)
    yield from class_jobs(args)
    yield from equal_time_jobs(args)
    yield from sharp_jobs(args)
    for count in (512, 2048, 8192):
        yield f"landmarks|{count}", landmark_speed, {"count": count}


def annealing_jobs(most: int) -> Iterable[tuple[str, Any, dict]]:
    for frequency in FREQUENCIES:
        for annealed in (False, True):
            more = {"frequency": frequency, "annealed": annealed, "most": most}
            yield f"annealing|{'annealed' if annealed else 'fixed'}|{frequency}", steps_to_resolve, more


def class_jobs(args: Any) -> Iterable[tuple[str, Any, dict]]:
    for temperature in LOW:
        for name, text in (("default", PLAIN), ("Sinkhorn", "sinkhorn(temperatures=({t},))")):
            for seed in range(args.seeds):
                more = {"text": text.replace("{t}", f"{temperature:g}"), "seed": seed, "steps": args.image_steps}
                more |= {"folder": args.output_dir / "images", "conditional": False}
                yield f"classes|{name}|{temperature:g}|{seed}", field_images.train, more


def equal_time_jobs(args: Any) -> Iterable[tuple[str, Any, dict]]:
    """Lookahead with as many steps as take the time that the plain field took."""
    from fields import temperatures

    text = rows()["lookahead"].field(temperatures(args.output_dir).get("Algorithm 2"))
    fewer = round(args.steps / slower(args, "Algorithm 2", "lookahead"))
    for target in args.targets:
        for seed in range(args.seeds):
            yield f"equal time|{target}|{seed}", field_planes.train, {"text": text, "target": target, "seed": seed, "steps": fewer}


def sharp_jobs(args: Any) -> Iterable[tuple[str, Any, dict]]:
    """The sharp field at the temperature of the mean shift, so that nothing but the normaliser differs."""
    from fields import temperatures

    text = rows()["sharp"].field(temperatures(args.output_dir).get("mean shift"))
    for target in args.targets:
        for seed in range(args.seeds):
            yield f"sharp|{target}|{seed}", field_planes.train, {"text": text, "target": target, "seed": seed, "steps": args.steps}


def landmark_speed(count: int, landmarks: int = 150, queries: int = 64, dimensions: int = 256, repeats: int = 7) -> dict:
    """Milliseconds of a call with `count` real samples per class, by pairs and by sums over landmarks, one after the other, medians."""
    generator = torch.Generator().manual_seed(0)
    real, x = torch.randn(count, 1, dimensions, generator=generator), torch.randn(1, queries, dimensions, generator=generator)
    exact, cached = read_field("mean_shift(temperatures=(0.05,))"), read_field(f"nystrom(sums='dataset', landmarks={landmarks})")
    cached.memory.observe("", real, torch.zeros(count, dtype=torch.long))
    cached = situated(cached, Situation(0, 1, "", torch.zeros(1, dtype=torch.long)))
    everyone = real.transpose(0, 1).contiguous()
    calls = {
        "pairs_ms": lambda: exact(x, positives=everyone, negatives=x, own=queries),
        "pairs_again_ms": lambda: exact(x, positives=everyone, negatives=x, own=queries),
        "landmarks_ms": lambda: cached(x, positives=everyone[:, :queries], negatives=x, own=queries),
    }
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            took[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(times) for name, times in took.items()} | {"landmarks": landmarks, "queries": queries}
