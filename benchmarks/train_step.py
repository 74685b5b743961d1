"""Where does the time of a training step go, and its memory? OMP_NUM_THREADS=1 python benchmarks/train_step.py --preset cifar10 --dataset FOLDER

Takes a step of `DriftingTrainer` apart (draw, generate, encode, field, backward, optimiser), each part timed on its own and alone, so that their sum is
what a step costs without anything running beside it; then times whole steps, in which real samples are drawn while the step before runs. Memory is the
peak above what was there before the part. On a GPU time is waited for and memory is the allocator's.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from drifting_diffusers import DriftingConfig, DriftingGenerator, DriftingObjective, DriftingTrainer
from drifting_diffusers.data import open_images
from drifting_diffusers.draws import as_samples
from drifting_diffusers.feature_loading import load_features
from drifting_diffusers.presets import PRESETS

PARTS = ("draw", "generate", "encode generated", "encode real", "field", "backward", "optimiser")
MEGABYTE = 1e6


class Parts:
    """Seconds and peak memory of every part, step by step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, list[float]] = {name: [] for name in PARTS}
        self.peak: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str):
        before = self._reset_peak()
        started = self._now()
        yield
        self.seconds[name].append(self._now() - started)
        self.peak[name] = max(self.peak[name], self._peak() - before)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() if self.device.type == "cuda" else time.process_time()

    def _reset_peak(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / MEGABYTE
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
        return self._status("VmRSS")

    def _peak(self) -> float:
        return torch.cuda.max_memory_allocated() / MEGABYTE if self.device.type == "cuda" else self._status("VmHWM")

    def _status(self, key: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1000


def one_step(trainer: DriftingTrainer, parts: Parts) -> None:
    """`DriftingTrainer.training_step`, taken apart."""
    objective = trainer.objective
    with parts.part("draw"):
        drawn = trainer.real._draw(trainer.step)
        positives = trainer.real.on_device(drawn.positives)
        negatives = None if drawn.negatives is None else trainer.real.on_device(drawn.negatives)
        guidance = trainer._draw_guidance()
    weights = None if negatives is None else trainer._unconditional_weight(guidance)
    with parts.part("generate"):
        images = trainer._generate(drawn.labels, guidance, trainer.slots)
    with parts.part("encode generated"):
        generated = objective.problems(images)
    with parts.part("encode real"), torch.no_grad():
        attracting = objective.problems(positives)
        repelling = {} if negatives is None else objective.problems(negatives)
    with parts.part("field"):
        slopes, _, _ = objective.slopes({**generated}, attracting, repelling, weights)
    with parts.part("backward"):
        torch.autograd.backward(list(generated.values()), [slopes[name] for name in generated])
    with parts.part("optimiser"):
        trainer._update(lambda: "")


def whole_steps(trainer: DriftingTrainer, count: int) -> tuple[float, float]:
    """Wall seconds per step with everything as in training, and the share of it that waits for real samples."""
    trainer.training_step()  # begins to draw ahead
    trainer._waited, started = 0.0, time.perf_counter()
    for _ in range(count):
        trainer.training_step()
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - started
    return took / count, trainer._waited / took


def make_trainer(arguments: argparse.Namespace, folder: str) -> DriftingTrainer:
    row = PRESETS[arguments.preset]
    changes = {
        "eval_steps": 0,
        "preview_steps": 0,
        "cache_features": arguments.cache_features,
        "mixed_precision": arguments.mixed_precision,
    }
    config = DriftingConfig.preset(arguments.preset, output_dir=f"{folder}/run", **changes)
    torch.manual_seed(0)
    generator = DriftingGenerator(**row.model)
    size, channels = (generator.sample_height, generator.sample_width), row.model["in_channels"]
    data = as_samples(
        open_images(arguments.dataset, arguments.split), size=size, channels=channels, num_classes=row.model["num_classes"], config=config
    )
    features = load_features(arguments.features or row.encoder, data=data, num_classes=row.model["num_classes"], folder=folder)
    return DriftingTrainer(generator, DriftingObjective(features), data, config)


def report(parts: Parts, samples: int, whole: tuple[float, float], clock: str) -> str:
    medians = {name: statistics.median(seconds[1:]) for name, seconds in parts.seconds.items()}  # the first one warms up
    total = sum(medians.values())
    lines = [f"| part | ms ({clock}) | share | generated samples/s | peak MB above before |", "|---|---|---|---|---|"]
    for name, seconds in medians.items():
        lines.append(f"| {name} | {1e3 * seconds:.1f} | {seconds / total:.1%} | {samples / seconds:,.0f} | {parts.peak[name]:.0f} |")
    lines.append(f"| sum | {1e3 * total:.1f} | | {samples / total:,.0f} | |")
    lines.append(f"| whole steps, wall | {1e3 * whole[0]:.1f} | waits {whole[1]:.1%} for real samples | {samples / whole[0]:,.0f} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="cifar10", choices=PRESETS)
    parser.add_argument("--dataset", required=True, help="images: a folder of parquet files, or one file")
    parser.add_argument("--split", default="train")
    parser.add_argument("--features", help="in place of the preset's")
    parser.add_argument("--cache-features", action="store_true", help="keep features of real samples in the bank")
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(arguments, folder)
        device = trainer.accelerator.device
        trainer._begin()
        parts = Parts(device)
        for _ in range(arguments.steps):
            one_step(trainer, parts)
        whole = whole_steps(trainer, arguments.steps)
        trainer._close()
    cached = "features" if arguments.cache_features else "images"
    print(f"{arguments.preset}, bank of {cached}, {device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n")
    print(report(parts, trainer.samples_per_step, whole, "wall" if device.type == "cuda" else "processor time"))


if __name__ == "__main__":
    main()
