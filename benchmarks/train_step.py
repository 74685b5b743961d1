"""What does each saving of a training step save, and where does the rest go? OMP_NUM_THREADS=1 python benchmarks/train_step.py --preset cifar10

Two tables. Each saving alone: the same work with and without it, interleaved in one process, minimum of the rounds, with the peak of memory above what
was there before; the last column is the same variant against itself, the machine's own noise. And a step of the preset taken apart (draw, generate,
encode, field, backward, optimiser), each part alone, then whole steps, in which real samples are drawn while the step before runs. Times are of the
processor, on a GPU of the clock, waited for. Images are noise unless --dataset gives some: what a step costs does not depend on them. A step with fewer labels
than the preset's (--labels) is scaled up, and marked. Banks hold 128 samples per class.
"""

import argparse
import ctypes
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch
from noise import Noise, noise_images

from drifting_diffusers import DriftingConfig, DriftingGenerator, DriftingObjective, DriftingTrainer, MaskedAutoencoder
from drifting_diffusers.classifiers import SmallClassifier
from drifting_diffusers.data import RealSamples, open_images
from drifting_diffusers.draws import as_samples
from drifting_diffusers.encoded import Repeated
from drifting_diffusers.feature_loading import load_features
from drifting_diffusers.features import compile_networks
from drifting_diffusers.fields import Situation
from drifting_diffusers.presets import PRESETS

MEGABYTE = 1e6
WIDTHS = {"mae_latent_256": 256, "mae_latent_640": 640}
SMALL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}


class Clock:
    """Seconds of what is called, or its peak of memory: one at a time, because a peak is seen where memory was given back before, and taking it again costs time.

    Args:
        device: where it runs.
        memory: whether the peak is looked at.
    """

    def __init__(self, device: torch.device, memory: bool = False):
        self.cuda, self.memory = device.type == "cuda", memory

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if self.cuda else time.process_time()

    def __call__(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Seconds, and megabytes at the peak above what was there before; infinity or 0 for what is not looked at."""
        if self.memory:
            before = self._reset_peak()
            found = work()
            peak = self._peak() - before
            del found
            return math.inf, max(0.0, peak)
        started = self.now()
        found = work()
        seconds = self.now() - started
        del found
        return seconds, 0.0

    def _reset_peak(self) -> float:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / MEGABYTE
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, else the next peak hides in it
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
        return self._status("VmRSS")

    def _peak(self) -> float:
        return torch.cuda.max_memory_allocated() / MEGABYTE if self.cuda else self._status("VmHWM")

    def _status(self, key: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1000


def clocks(device: torch.device, rounds: int) -> list[Clock]:
    """One per round: a peak of memory, then times, of which the first does not count, because memory was just given back."""
    return [Clock(device, memory=True), *[Clock(device)] * (rounds + 1)]


# -- each saving alone


def savings(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One row per saving: an encoder of the latent recipes, of `--width` channels, and `--images` images of a step."""
    width, images, labels = arguments.width, arguments.images, 4
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    blocks = (1, 1, 1, 1) if arguments.small else (3, 4, 6, 3)
    make = lambda: cast(Any, MaskedAutoencoder(4, width, blocks).eval().to(device))
    plain, trainable, last = (make().to(dtype) if dtype != torch.float32 else make() for _ in range(3))
    plain.requires_grad_(False), last.requires_grad_(False)
    last.to(memory_format=torch.channels_last)
    objective = DriftingObjective([plain.activations])
    x = torch.randn(images, 4, 32, 32, device=device)
    drawn = torch.randint(images, (labels, images // 2), generator=torch.Generator().manual_seed(0))
    once, back = drawn.unique(return_inverse=True)
    repeated = Repeated(x[once.to(device)], back)
    packed = Repeated(objective.pack(repeated.distinct), back)

    def through(encoder: MaskedAutoencoder) -> Any:
        images = x.clone().requires_grad_()
        sum(values.square().mean() for values in encoder.activations(images).values()).backward()
        encoder.zero_grad()
        return images.grad

    def without_graph(mode: Any) -> Any:
        with mode():
            return plain.activations(x)

    def dense() -> Any:
        with torch.inference_mode():
            return objective.problems(repeated.dense)

    def kept_once() -> Any:
        found = objective.encode(repeated)
        return found, [found[name].shape for name in found]

    def from_bank() -> Any:
        found = objective.encode(packed)
        return found, [found[name].shape for name in found]

    work: dict[str, tuple[Callable, Callable]] = {
        "encoder frozen: forward + backward, against a trainable one": (lambda: through(trainable), lambda: through(plain)),
        "real images in inference mode, against a graph that is thrown away": (
            lambda: through_graph(plain, x),
            lambda: without_graph(torch.inference_mode),
        ),
        "inference mode, against no_grad": (lambda: without_graph(torch.no_grad), lambda: without_graph(torch.inference_mode)),
        f"distinct images once ({len(once)} of {drawn.numel()} drawn)": (dense, kept_once),
        "features kept in the bank, against encoding distinct images": (kept_once, from_bank),
        "channels_last: forward + backward": (lambda: through(plain), lambda: through(last)),
    }
    if not arguments.no_compile:
        compiled = make().to(plain.dtype).requires_grad_(False)
        compile_networks(compiled.activations)
        through(compiled)
        work["compile_features: forward + backward"] = (lambda: through(plain), lambda: through(compiled))
    return [compared(name, *pair, arguments.rounds, device) for name, pair in work.items()]


def through_graph(encoder: MaskedAutoencoder, x: torch.Tensor) -> Any:
    """As if nobody had said that there is no gradient."""
    return encoder.activations(x.clone().requires_grad_())


def compared(name: str, without: Callable, saving: Callable, rounds: int, device: torch.device) -> dict[str, Any]:
    """Both, interleaved, and the first once more: how far the same work differs from itself."""
    measured: dict[str, list[tuple[float, float]]] = {"without": [], "with": [], "again": []}
    for which in (without, saving):
        which()  # warm
    for clock in clocks(device, rounds):
        for key, work in zip(measured, (without, saving, without), strict=True):
            measured[key].append(clock(work))
    seconds = {key: min(s for s, _ in values) for key, values in measured.items()}
    memory = {key: max(m for _, m in values) for key, values in measured.items()}
    return {
        "saving": name,
        "seconds_without": seconds["without"],
        "seconds_with": seconds["with"],
        "time_ratio": seconds["with"] / seconds["without"],
        "noise": seconds["again"] / seconds["without"],
        "megabytes_without": memory["without"],
        "megabytes_with": memory["with"],
        "memory_ratio": memory["with"] / max(memory["without"], 1e-9),
    }


# -- a step of a preset


def make_trainer(arguments: argparse.Namespace, folder: str, **changes: Any) -> DriftingTrainer:
    row, (labels, generated) = PRESETS[arguments.preset], sizes(arguments)
    quiet = {"eval_steps": 0, "preview_steps": 0, "save_steps": 10**6, "eval_samples_per_class": 2}
    quiet |= {"mixed_precision": arguments.mixed_precision}
    if arguments.cache_features is not None:
        quiet["cache_features"] = False if arguments.cache_features == "none" else arguments.cache_features
    quiet |= {"labels_per_step": labels, "generated_per_label": generated, "bank_size": 128, "unconditional_bank_size": 1000}
    if arguments.small:
        quiet |= {"bank_size": 16, "unconditional_bank_size": 32, "positives_per_label": 8}
        quiet |= {"unconditional_per_label": 4} if row.config.get("unconditional_per_label", 16) else {}
    config = DriftingConfig.preset(arguments.preset, output_dir=f"{folder}/run", **(quiet | changes))
    torch.manual_seed(0)
    generator = DriftingGenerator(**(row.model | (SMALL if arguments.small else {}) | ({"num_classes": classes_of(arguments)})))
    return DriftingTrainer(
        generator, DriftingObjective(features_of(arguments, row, folder, config)), samples_of(arguments, row, config), config
    )


def sizes(arguments: argparse.Namespace) -> tuple[int, int]:
    config = DriftingConfig.preset(arguments.preset)
    return arguments.labels or config.labels_per_step, 4 if arguments.small else config.generated_per_label


def classes_of(arguments: argparse.Namespace) -> int:
    """As many as a step has, where images are noise: no bank of more needs filling."""
    return PRESETS[arguments.preset].model["num_classes"] if arguments.dataset else max(10, sizes(arguments)[0])


def samples_of(arguments: argparse.Namespace, row: Any, config: DriftingConfig) -> RealSamples:
    generator = DriftingGenerator(**(row.model | SMALL))
    size, channels, classes = (generator.sample_height, generator.sample_width), row.model["in_channels"], classes_of(arguments)
    if arguments.dataset:
        data: Any = open_images(arguments.dataset, arguments.split)
    elif channels in (1, 3):
        data = noise_images(classes, config.bank_size, channels, size)
    else:
        data = Noise(classes, config.bank_size, channels, size)
    return as_samples(data, size=size, channels=channels, num_classes=classes, config=config)


def features_of(arguments: argparse.Namespace, row: Any, folder: str, config: DriftingConfig) -> list[Any]:
    """Those of the preset, with networks that learned nothing: they cost the same."""
    names = (arguments.features or row.encoder).split(" + ")
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    made: list[Any] = []
    for name in names:
        if name in WIDTHS:
            made.append(MaskedAutoencoder(4, arguments.width if arguments.small else WIDTHS[name]).to(dtype).activations)
        elif name == "classifier":
            made.append(SmallClassifier(row.model["in_channels"], row.model["num_classes"], width=16).activations)
        else:
            data = samples_of(arguments, row, config)
            made += load_features(name, data=data, num_classes=row.model["num_classes"], folder=folder, dtype=dtype)
    return made


def one_step(trainer: DriftingTrainer, part: Callable[[str, Callable], Any]) -> None:
    """`DriftingTrainer.training_step` in one pass, taken apart."""
    objective = trainer.objective
    drawn = part("draw", lambda: trainer.real._draw(trainer.step))
    real = [None if real is None else trainer.real.on_device(real) for real in (drawn.attracting, drawn.repelling)]
    guidance = trainer._draw_guidance()
    weights = None if real[1] is None else trainer._unconditional_weight(guidance)
    images = part("generate", lambda: trainer._generate(drawn.labels, guidance, trainer.slots))
    generated = part("encode generated", lambda: objective.problems(images))
    attracting, repelling = part("encode real", lambda: [{} if r is None else dict(objective.encode(r)) for r in real])
    now = Situation(trainer.step, trainer.config.max_steps, labels=drawn.labels)
    compare = lambda: objective.slopes({**generated}, attracting, repelling, weights, mean=trainer._mean, situation=now)
    slopes, _, _ = part("field", compare)
    part("backward", lambda: torch.autograd.backward(list(generated.values()), [slopes[name] for name in generated]))
    part("optimiser", lambda: trainer._update(lambda: ""))


def taken_apart(arguments: argparse.Namespace) -> dict[str, Any]:
    """Least seconds and peak megabytes of every part; wall seconds of whole steps, and the share that waits for real samples."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(arguments, folder)
        trainer._begin()
        found: dict[str, tuple[float, float]] = {}

        def part(name: str, work: Callable, clock: Clock) -> Any:
            box: list[Any] = []
            seconds, peak = clock(lambda: box.append(work()))
            least, most = found.get(name, (seconds, peak))
            found[name] = min(least, seconds), max(most, peak)
            return box[0]

        for clock in clocks(trainer.accelerator.device, arguments.rounds):
            one_step(trainer, lambda name, work, clock=clock: part(name, work, clock))
        whole = whole_steps(trainer, arguments.rounds)
        again = whole_steps(trainer, arguments.rounds)
        trainer._close()
    total = sum(seconds for seconds, _ in found.values())
    scale = DriftingConfig.preset(arguments.preset).labels_per_step / sizes(arguments)[0]
    rows = [{"part": n, "seconds": s, "share": s / total, "megabytes": m} for n, (s, m) in found.items()]
    return {"parts": rows, "seconds": total, "whole_steps": whole, "whole_steps_again": again, "scale": scale}


def whole_steps(trainer: DriftingTrainer, count: int) -> dict[str, float]:
    """With everything as in training."""
    trainer.training_step()  # begins to draw ahead
    trainer._waited, clock = 0.0, Clock(trainer.accelerator.device)
    started, then = time.perf_counter(), clock.now()
    seconds = min(clock(trainer.training_step)[0] for _ in range(count))
    wall = (time.perf_counter() - started) / count
    return {
        "seconds": seconds,
        "wall": wall,
        "waits": trainer._waited / max(time.perf_counter() - started, 1e-9),
        "all": clock.now() - then,
    }


def passes(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole steps in one pass and in two, with fewer and fewer labels at once, interleaved."""
    count = sizes(arguments)[0]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pieces = sorted({0, max(1, count // 4), 1})
        trainers = {size: make_trainer(arguments, f"{folder}/{size}", labels_per_microbatch=size) for size in pieces}
        for trainer in trainers.values():
            trainer._begin()
            trainer.training_step()
        measured: dict[int, list[tuple[float, float]]] = {size: [] for size in trainers}
        for clock in clocks(trainers[0].accelerator.device, arguments.rounds):
            for size, trainer in trainers.items():
                measured[size].append(clock(trainer.training_step))
        for trainer in trainers.values():
            trainer._close()
    one = [min(s for s, _ in measured[0]), max(m for _, m in measured[0])]
    for size, values in measured.items():
        seconds, memory = min(s for s, _ in values), max(m for _, m in values)
        rows.append(
            {"labels_per_microbatch": size, "time_ratio": seconds / one[0], "megabytes": memory, "memory_ratio": memory / max(one[1], 1e-9)}
        )
    return rows


# -- the report


def tables(report: dict[str, Any], arguments: argparse.Namespace) -> str:
    lines = [
        f"| saving alone, encoder of {arguments.width} channels | time with / without | memory with / without | MB without | noise |",
        "|---|---|---|---|---|",
    ]
    for row in report.get("savings", []):
        lines.append(
            f"| {row['saving']} | {row['time_ratio']:.2f} | {row['memory_ratio']:.2f} | {row['megabytes_without']:.0f} | {row['noise']:.2f} |"
        )
    step = report["step"]
    count = sizes(arguments)[0]
    lines += ["", f"| part of a step of {arguments.preset}, {count} labels | ms | share | peak MB |", "|---|---|---|---|"]
    lines += [f"| {r['part']} | {1e3 * r['seconds']:.1f} | {r['share']:.1%} | {r['megabytes']:.0f} |" for r in step["parts"]]
    whole, again = step["whole_steps"], step["whole_steps_again"]
    lines.append(f"| sum | {1e3 * step['seconds']:.1f} | | |")
    lines.append(
        f"| a whole step, the draw of the next beside it | {1e3 * whole['seconds']:.1f} (again {1e3 * again['seconds']:.1f}) | waits {whole['waits']:.1%} | |"
    )
    if step["scale"] > 1:
        lines.append(f"| the preset's step, **extrapolated** x {step['scale']:.3g} | {1e3 * step['scale'] * whole['seconds']:,.0f} | | |")
    if report.get("passes"):
        lines += ["", "| labels_per_microbatch | time / one pass | peak memory / one pass | MB |", "|---|---|---|---|"]
        lines += [
            f"| {r['labels_per_microbatch']} | {r['time_ratio']:.2f} | {r['memory_ratio']:.2f} | {r['megabytes']:.0f} |"
            for r in report["passes"]
        ]
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="cifar10", choices=PRESETS)
    parser.add_argument("--dataset", help="images: a folder of parquet files, or one file; noise if not given")
    parser.add_argument("--split", default="train")
    parser.add_argument("--features", help="in place of the preset's, joined by ' + '")
    parser.add_argument(
        "--cache-features", choices=("none", "negatives", "all"), help="what banks keep features of; the preset's choice if not given"
    )
    parser.add_argument("--labels", type=int, help="labels per step, where the preset's do not fit; the time is scaled up")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU if there is one")
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--width", type=int, default=64, help="of the encoder of the first table, 256 and 640 are the recipes'")
    parser.add_argument("--images", type=int, default=16, help="of the first table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("savings", "step", "passes"), help="one of the tables")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--small", action="store_true", help="seconds: to see that it runs")
    parser.add_argument("--json", type=Path, help="where the numbers go as well")
    arguments = parser.parse_args(argv)
    if arguments.small:
        arguments.width, arguments.images, arguments.rounds, arguments.no_compile = 32, 4, 2, True
        arguments.labels = arguments.labels or 2
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.device == "cpu":
        import os

        os.environ["ACCELERATE_USE_CPU"] = "true"
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report: dict[str, Any] = {
        "command": "python benchmarks/train_step.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()}, one thread",
        "torch": torch.__version__,
        "savings": savings(arguments, device) if arguments.only in (None, "savings") else [],
        "step": taken_apart(arguments),
        "passes": passes(arguments) if arguments.only in (None, "passes") else [],
    }
    report["rows"] = [*report["savings"], *report["step"]["parts"], *report["passes"]]
    report["tables"] = [tables(report, arguments)]
    print(f"\n{report['machine']}, torch {report['torch']}, {torch.get_num_threads()} thread(s), {report['date']}\n\n{report['tables'][0]}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
