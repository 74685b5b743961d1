r"""An evaluation from beginning to end: draw, look, compare, write down how.

The result is one JSON file, from which cards and tables are rendered. It holds every number with its mean and standard deviation over seeds, the same
number for real images, and all that is needed to make it again.
"""

import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from .files import write_text
from .meters import METRIC_OF, METRICS, FeatureSet, Reference, measure
from .sampling import PipelineSamples, Samples, extract, processes


@dataclass(frozen=True)
class Bench:
    """What generated samples are put on: everything that stays the same from one pipeline to the next.

    Args:
        reference: real images, as the extractor sees them.
        extractor: what sees.
        metrics: names of `METRICS`; all possible ones if empty.
        held_out: other real images: the column of real numbers.
        judge: a classifier of the classes.
        judged_by_extractor: whether the extractor's own logits are of these classes.
        folder: for shards of features and for results; nothing is kept without one.
        batch_size: samples per call.
    """

    reference: Reference
    extractor: Any
    metrics: tuple[str, ...] = ()
    held_out: FeatureSet | None = None
    judge: nn.Module | None = None
    judged_by_extractor: bool = False
    folder: Path | None = None
    batch_size: int = 100
    state: PartialState = field(default_factory=processes)

    def measure(self, samples: Samples, name: str) -> dict[str, float]:
        """The numbers of these samples; shards of their features lie in a folder of this name."""
        return self.look(self.see(samples, name))

    def see(self, samples: Samples, name: str) -> FeatureSet:
        """The features of these samples."""
        return extract(
            samples,
            self.extractor,
            judge=self.judge,
            judged_by_extractor=self.judged_by_extractor,
            folder=None if self.folder is None else self.folder / "features" / name,
            batch_size=self.batch_size,
            description=name,
            state=self.state,
        )

    def look(self, seen: FeatureSet) -> dict[str, float]:
        """The numbers of samples whose features are there already."""
        return measure(seen, self.reference, extractor=self.extractor, metrics=self.metrics or None, held_out=self.held_out)

    def leading(self, found: Mapping[str, Any]) -> str:
        """Which of these numbers says which guidance scale is best: that of the first metric asked for that has a direction, else the first there is.

        Of all metrics the first is the Frechet distance, which small evaluations lack. Of a metric that gives several numbers it is the first.
        """
        wanted = [METRICS[name] for name in self.metrics or METRICS]
        numbers = [next(iter(metric.gives), self.extractor.distance_name) for metric in wanted if metric.better != "as real"]
        return next((number for number in numbers if number in found), next(iter(found)))


def evaluate_pipeline(
    pipeline: Any,
    bench: Bench,
    *,
    num_samples: int = 50_000,
    guidance_scales: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure a pipeline at every guidance scale and seed; see `summarise` for what comes back.

    Args:
        pipeline: draws the samples.
        bench: what they are compared with, and how.
        num_samples: per scale and seed; distances fall with it, so compare equal numbers only.
        guidance_scales: the pipeline's own if empty.
        seeds: each gives samples of its own.
        about: further entries of the result: dataset, licence, command.

    Raises:
        ValueError: for scales or seeds that repeat, or metrics that cannot be measured.
    """
    scales = [float(scale) for scale in guidance_scales] or [float(pipeline.config.guidance_scale)]
    for name, values in (("guidance_scales", scales), ("seeds", list(seeds))):
        if len(set(values)) != len(values) or not values:
            raise ValueError(f"{name} must be different and at least one, got {values}")
    started, rows = time.monotonic(), []
    for scale in scales:
        values = []
        for seed in seeds:
            samples = PipelineSamples(pipeline, num_samples, seed=seed, guidance_scale=scale)
            values.append(bench.measure(samples, f"guidance-{scale:g}-seed-{seed}"))
        rows.append({"guidance_scale": scale, "metrics": over_seeds(values)})
    timing = {"seconds": round(time.monotonic() - started, 1), "images": num_samples * len(scales) * len(seeds)}
    own = {"num_samples": num_samples, "seeds": list(seeds), "labels": "sample i is of class i mod the number of classes", "timing": timing}
    return summarise(rows, bench, own | (about or {}))


def evaluate_images(samples: Samples, bench: Bench, *, about: dict[str, Any] | None = None) -> dict[str, Any]:
    """Measure images that are there already."""
    started = time.monotonic()
    rows = [{"guidance_scale": None, "metrics": over_seeds([bench.measure(samples, "images")])}]
    timing = {"seconds": round(time.monotonic() - started, 1), "images": len(samples)}
    return summarise(rows, bench, {"num_samples": len(samples), "seeds": [], "timing": timing} | (about or {}))


def over_seeds(values: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation of every number; the deviation of one seed is unknown, None."""
    return {
        name: {
            "mean": statistics.fmean(each[name] for each in values),
            "sd": statistics.stdev(each[name] for each in values) if len(values) > 1 else None,
            "values": [each[name] for each in values],
        }
        for name in values[0]
    }


def summarise(rows: list[dict[str, Any]], bench: Bench, about: dict[str, Any]) -> dict[str, Any]:
    """The content of `results.json`.

    Returns:
        `metrics`, `sd`: the numbers of the best guidance scale, and their deviation over seeds; `guidance_scale`: that scale; `sweep`: all scales;
        `real`: the numbers of held-out real images; `meaning`, `better`: of every number; and how it was made.
    """
    kinds = {number: METRICS[METRIC_OF.get(number, "frechet")] for number in rows[0]["metrics"]}
    leading = bench.leading(kinds)
    sign = -1 if kinds[leading].better == "higher" else 1
    best = min(rows, key=lambda row: sign * row["metrics"][leading]["mean"])
    real = bench.look(bench.held_out) if bench.held_out is not None else None
    return {
        "metrics": {number: found["mean"] for number, found in best["metrics"].items()},
        "sd": {number: found["sd"] for number, found in best["metrics"].items()},
        "guidance_scale": best["guidance_scale"],
        "real": real,
        "real_samples": len(bench.held_out) if bench.held_out is not None else None,
        "sweep": rows,
        "meaning": {number: kind.meaning for number, kind in kinds.items()},
        "better": {number: kind.better for number, kind in kinds.items()},
        "extractor": bench.extractor.describe(),
        "reference": bench.reference.description,
        **about,
        **circumstances(),
    }


def circumstances() -> dict[str, Any]:
    """Where and with what a number was made."""
    packages = ("drifting-diffusers", "torch", "diffusers", "torchmetrics", "transformers")
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "device": str(processes().device),
        "processes": processes().num_processes,
    }


def _commit() -> str | None:
    """Of the working copy this library runs from; None for an installed one."""
    git: Callable[..., Any] = lambda *words: subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=False
    )
    try:
        found, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        return None
    return None if found.returncode else found.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def write_results(results: dict[str, Any], file: Path) -> None:
    """Write `results.json`; numbers that are not finite are refused, JSON has none."""
    bad = [name for name, value in results["metrics"].items() if not math.isfinite(value)]
    if bad:
        raise ValueError(f"{bad} are not finite: the samples are degenerate in this extractor; look at them first")
    write_text(file, json.dumps(results, indent=2, allow_nan=False) + "\n")


def table(results: dict[str, Any]) -> str:
    """The numbers as markdown: mean and deviation over seeds, and what real images reach."""
    real = results["real"] or {}
    lines = ["| | generated | real | better |", "|---|---|---|---|"]
    for name, value in results["metrics"].items():
        sd = results["sd"][name]
        spread = f" ± {_short(sd)}" if sd is not None else ""
        lines.append(f"| {name} | {_short(value)}{spread} | {_short(real[name]) if name in real else '-'} | {results['better'][name]} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    """Four digits that count."""
    return f"{value:.4g}"
