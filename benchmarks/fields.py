"""Every field on the same data, from the same seeds, with the same small generators: what docs/fields.md shows.

    python benchmarks/fields.py tune planes images claims cost --jobs 2 && python benchmarks/fields.py page

Every result is a line in OUTPUT_DIR/NAME.jsonl and is not made again. `tune` chooses each row's temperature, on a seed that no table reports; `planes` and `images`
fill the table; `claims` are the experiments that published claims are about; `cost` takes time and memory alone; `page` writes docs/fields.md, its numbers
and its pictures. Training is on one thread each; times are of a machine that runs as many trainings as --jobs says.
"""

import argparse
import json
import math
import multiprocessing
import platform
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import field_claims
import field_cost
import field_images
import field_page
import field_planes
import torch
from field_rows import TEMPERATURES, TUNING_SEED, rows
from tqdm import tqdm

PARTS = ("tune", "planes", "images", "claims", "cost", "page")
Job = tuple[str, Callable[..., dict], dict[str, Any]]


def tune_jobs(args: argparse.Namespace) -> Iterable[Job]:
    for name, row in rows().items():
        for temperature in TEMPERATURES if row.tuned else ():
            for target in args.targets:
                text = row.field(temperature)
                yield (
                    f"{name}|{temperature:g}|{target}",
                    field_planes.train,
                    {"text": text, "target": target, "seed": TUNING_SEED, "steps": args.tuning_steps},
                )


def plane_jobs(args: argparse.Namespace) -> Iterable[Job]:
    chosen = temperatures(args.output_dir)
    for name, row in rows().items():
        text = row.field(chosen.get(row.like or name))
        for target in args.targets:
            for seed in range(args.seeds):
                yield f"{name}|{target}|{seed}", field_planes.train, {"text": text, "target": target, "seed": seed, "steps": args.steps}


def image_jobs(args: argparse.Namespace) -> Iterable[Job]:
    for name, text in field_images.rows().items():
        for seed in range(args.seeds):
            more = {"text": text, "seed": seed, "steps": args.image_steps, "folder": args.output_dir / "images"}
            yield f"{name}|{seed}", field_images.train, more


def temperatures(folder: Path) -> dict[str, float]:
    """The temperature of each row with the least energy distance over all targets, in logarithms; on the tuning seed."""
    found: dict[str, dict[float, list[float]]] = {}
    for result in read(folder / "tune.jsonl").values():
        name, temperature, _ = result["key"].split("|")
        energy = result.get("energy", math.inf)  # a field that failed there is not taken there
        found.setdefault(name, {}).setdefault(float(temperature), []).append(max(energy, 1e-9) if math.isfinite(energy) else math.inf)
    worth = lambda energies: float(torch.tensor(energies).log().mean())
    return {name: min(tried, key=lambda t: worth(tried[t])) for name, tried in found.items()}


def read(file: Path) -> dict[str, dict[str, Any]]:
    lines = file.read_text().splitlines() if file.exists() else []
    return {entry["key"]: entry for entry in map(json.loads, lines)}


def single_thread() -> None:
    torch.set_num_threads(1)


def attempt(function: Callable[..., dict], arguments: dict[str, Any]) -> dict[str, Any]:
    """A field that fails is a result as well."""
    try:
        return function(**arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def run(name: str, jobs: Iterable[Job], args: argparse.Namespace, workers: int) -> None:
    """Make what is missing of OUTPUT_DIR/NAME.jsonl."""
    file = args.output_dir / f"{name}.jsonl"
    done = read(file)
    left = [job for job in jobs if job[0] not in done and (not args.only or any(word in job[0] for word in args.only))]
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=single_thread) as pool,
        file.open("a") as out,
        tqdm(total=len(left), desc=name) as bar,
    ):
        waiting = {pool.submit(attempt, function, more): (key, more) for key, function, more in left}
        for ready in as_completed(waiting):
            key, more = waiting[ready]
            out.write(json.dumps({"key": key, "field": more.get("text"), **ready.result()}) + "\n")
            out.flush()
            bar.update()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/fields"))
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs", help="where `page` writes")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tuning_steps", type=int, default=300, help="of a plane, while temperatures are chosen")
    parser.add_argument("--steps", type=int, default=600, help="of a plane")
    parser.add_argument("--image_steps", type=int, default=300)
    parser.add_argument("--most", type=int, default=1500, help="particle steps in which a wave is resolved or not")
    parser.add_argument("--size", type=int, default=8192, help="queries, positives and own negatives whose cost is taken")
    parser.add_argument("--targets", nargs="+", choices=field_planes.TARGETS, default=list(field_planes.TARGETS))
    parser.add_argument("--only", nargs="+", default=[], help="jobs whose key holds one of these words")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    jobs = {"tune": tune_jobs, "planes": plane_jobs, "images": image_jobs, "claims": field_claims.jobs, "cost": field_cost.jobs}
    for part in args.parts:
        if part == "images":  # the classifiers are made once, before anyone wants them
            for name in ("judge", "encoder"):
                field_images.classifier(name, args.output_dir / "images")
        if part == "page":
            field_page.write({name: read(args.output_dir / f"{name}.jsonl") for name in jobs}, args, platform.machine())
        else:
            run(part, list(jobs[part](args)), args, 1 if part == "cost" else args.jobs)


if __name__ == "__main__":
    main()
