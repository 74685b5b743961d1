"""The drifting field on a GPU, against what reading its samples costs: python benchmarks/field_gpu.py

Floor: samples read twice (the length stands between) and the velocity written once, at the bandwidth that a copy has in the same run. Beside it the field in
torch's own operations, the plain path in whole matrices, and the plain path compiled. CUDA events, variants interleaved, the fastest of several rounds; the
engine runs twice a round, which shows the noise. Before it is timed, each engine is compared with the plain path.
"""

import argparse
import datetime
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drifting_diffusers import MaskedAutoencoder
from drifting_diffusers.fields import DriftingField
from drifting_diffusers.fields.engine import Sides, TorchEngine
from drifting_diffusers.fields.triton_engine import TritonEngine, available

TEMPERATURES, FLOOR, MASK = (0.02, 0.05, 0.2), 1e-3, 100.0
PLAIN_BYTES = 24e9
"""The plain path has this many bytes of matrices at most, or it is left out."""


@dataclass(frozen=True)
class Shape:
    """Problems of [n queries that repel each other, m that repel, p that attract] of d dimensions."""

    b: int
    n: int
    p: int
    m: int
    d: int
    source: str = "goals"

    def __str__(self) -> str:
        return f"[{self.b}, {self.n}/{self.p}/{self.m}, {self.d}]"

    @property
    def targets(self) -> int:
        return self.n + self.m + self.p

    def floor_bytes(self, size: int) -> int:
        return self.b * self.d * (2 * self.targets + self.n) * size

    @property
    def plain_bytes(self) -> float:
        """The force's matrices in float32, of one temperature, and the samples."""
        return 4.0 * self.b * (6 * self.n * self.targets + 3 * self.targets * self.d)


GOALS = (Shape(64, 64, 64, 16, 256), Shape(4096, 64, 64, 16, 64), Shape(1, 1024, 1024, 0, 1024), Shape(1, 8192, 8192, 0, 128))
GOALS += (Shape(256, 64, 64, 32, 1280),)


def layers(labels: int) -> Iterator[Shape]:
    """The shapes of all features of the ablation preset's encoder: locations are problems, features of one shape are one call."""
    with torch.device("meta"):
        found = MaskedAutoencoder(in_channels=4, base_channels=256).activations(torch.empty(1, 4, 32, 32))
    shapes = Counter((feature.shape[2], feature.shape[1]) for feature in found.values())
    for (d, locations), features in sorted(shapes.items()):
        yield Shape(labels * locations, 64, 64, 16, d, f"ablation, {features} features of {locations} locations")


def milliseconds(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The fastest of each in milliseconds, after two rounds that are not counted."""
    best = dict.fromkeys(calls, float("inf"))
    for k in range(rounds + 2):
        for name, call in calls.items():
            took = milliseconds(call)
            best[name] = best[name] if k < 2 else min(best[name], took)
    return best


def bandwidth(megabytes: int = 1024) -> float:
    """Bytes a second that a copy reads and writes together."""
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    took = interleaved({"copy": lambda: target.copy_(source)}, 10)["copy"]
    return 2 * source.numel() / (took / 1000)


def samples(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rng = torch.Generator("cuda").manual_seed(0)
    counts = (shape.n, shape.m, shape.p) if shape.m else (shape.n, shape.p)
    return tuple(torch.randn(shape.b, k, shape.d, generator=rng, device="cuda", dtype=dtype) for k in counts)


class Staged:
    """An engine's stages with what stands between them: one length, one strength per temperature."""

    def __init__(self, make: Callable[[], Any], entries: int):
        self.make, self.entries = make, entries
        self.engine: Any = make()
        self.length = self.mean(*self.engine.measure())
        self.factors = self.rms(self.engine.forces(self.length))

    def mean(self, totals: Tensor, weights: Tensor) -> Tensor:
        return totals.sum() / weights.sum()

    def rms(self, squares: Tensor) -> Tensor:
        return (squares.sum(1) / self.entries).clamp(min=1e-30).rsqrt()

    def __call__(self) -> Tensor:
        engine = self.make()
        length = self.mean(*engine.measure())
        return engine.velocity(self.rms(engine.forces(length)))


def variants(shape: Shape, points: tuple[Tensor, ...], products: str) -> tuple[Staged, dict[str, Callable[[], Any]]]:
    x, positives, negatives = points[0], points[-1], shape.n + shape.m
    law = (TEMPERATURES, FLOOR, MASK)
    ours = Staged(lambda: TritonEngine(x, points, shape.n, negatives, None, *law, products=products), x.numel())
    engine = ours.engine
    sides = Sides(x, points, negatives, shape.n)
    calls: dict[str, Callable[[], Any]] = {
        "engine": ours,
        "again": ours,
        "measure": engine.measure,
        "forces": lambda: engine.forces(ours.length),
        "velocity": lambda: engine.velocity(ours.factors, dtype=x.dtype),
        "torch": Staged(lambda: TorchEngine(sides, *law), x.numel()),
    }
    if shape.plain_bytes <= PLAIN_BYTES:
        repelling = torch.cat(points[:-1], dim=1)
        calls["plain"] = lambda: DriftingField(backend="plain")(x, positives=positives, negatives=repelling, own=shape.n).velocity
    return ours, calls


def difference(found: Tensor, right: Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def measured(shape: Shape, dtype: torch.dtype, products: str, options: argparse.Namespace, speed: float) -> Iterator[dict[str, Any]]:
    """The rows of one shape."""
    points = samples(shape, dtype)
    ours, calls = variants(shape, points, products)
    if "plain" in calls:
        if options.compile and shape.source == "goals":
            calls["plain, compiled"] = torch.compile(calls["plain"])
        gap = difference(ours(), calls["plain"]())
        if not gap <= 1e-4:
            raise RuntimeError(f"{shape} {dtype}, {products}: the engine is {gap:.1e} from the plain path, so its time means nothing")
    found = interleaved(calls, options.rounds)
    floor = shape.floor_bytes(points[0].element_size()) / speed * 1000
    whole = found["engine"]
    stages = ", ".join(f"{name} {found[name]:.3f} ms" for name in ("measure", "forces", "velocity"))
    kind = f"{str(dtype).removeprefix('torch.')}, {products if products != 'auto' else ours.engine.products}"
    row = {"part": "field", "unit": "times", "better": "lower", "goal": None, "noise": abs(found["again"] / whole - 1)}
    text = f"{shape} {kind} ({shape.source})"
    goal = 2.0 if dtype == torch.bfloat16 else None
    cut = "whole problems" if ours.engine.plan.whole else "tiles"
    yield row | {
        "row": f"{text}: time / floor",
        "value": whole / floor,
        "goal": goal,
        "note": f"{whole:.3f} ms in {cut}: {stages}; floor {floor:.3f} ms",
    }
    for name in ("torch", "plain", "plain, compiled"):
        if name in found:
            yield row | {
                "row": f"{text}: {name} / engine",
                "value": found[name] / whole,
                "better": "higher",
                "note": f"{found[name]:.3f} ms",
            }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["", "times", "goal", "noise", ""], ["---", "---:", "---:", "---:", "---"]]
    for row in rows:
        verdict = "" if row["goal"] is None else "hit; " if row["value"] <= row["goal"] else "missed; "
        goal = "" if row["goal"] is None else f"at most {row['goal']:g}"
        lines.append([row["row"], f"{row['value']:.2f}", goal, f"{row['noise']:.1%}", verdict + row["note"]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def told(words: Sequence[str] | None) -> dict[str, Any]:
    """What was run, when and where."""
    return {
        "command": " ".join(["python", "benchmarks/field_gpu.py", *(words if words is not None else sys.argv[1:])]).partition(" --json")[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--labels", type=int, default=8, help="of the ablation preset's shapes: the preset has 64, and ratios hardly depend on it"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of every timing")
    parser.add_argument("--compile", action="store_true", help="the plain path compiled as well: minutes of compiling")
    parser.add_argument("--small", action="store_true", help="a size that takes seconds")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args(words)
    if not (torch.cuda.is_available() and available("cuda")):
        print("This benchmark needs a CUDA device of compute capability 8.0 or above and Triton, and here is none.", file=sys.stderr)
        return 2
    shapes = [*GOALS, *layers(options.labels)]
    if options.small:
        options.rounds, shapes = 3, [Shape(8, 64, 64, 16, 64), Shape(1, 256, 256, 0, 64)]
    speed, rows = bandwidth(64 if options.small else 1024), []
    print(f"A copy reads and writes {speed / 1e12:.2f} TB/s on {torch.cuda.get_device_name()}.", flush=True)
    for shape in shapes:
        kinds = [(torch.bfloat16, "auto"), (torch.float32, "auto"), (torch.float32, "tf32x3")]
        for dtype, products in kinds if shape.source == "goals" else kinds[:1]:
            rows += measured(shape, dtype, products, options, speed)
            torch.cuda.empty_cache()
        if options.json:  # after every shape: what was found stays, if a later one is stopped
            options.json.write_text(json.dumps(told(words) | {"rows": rows}, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
