"""What does a trained generator save? Two classes of Fashion-MNIST that it never saw, 100 images each: OMP_NUM_THREADS=1 python benchmarks/finetuning.py

A base learns the other eight classes, with the quickstart's network, field and choices. Then `examples/finetune.py` teaches the two with all weights, with
adapters, and, for comparison, a network of fresh weights, for as many steps each. Distances are to 200 held-out images per class. Every run is kept in
the output_dir, and what is there is not made again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from diffusers.utils import make_image_grid
from PIL import Image

from drifting_diffusers import (
    DriftingConfig,
    DriftingGenerator,
    DriftingObjective,
    DriftingPipeline,
    DriftingTrainer,
    MultiScaleStatistics,
    Pixels,
    Windows,
)

REPOSITORY = Path(__file__).parents[1]
sys.path.append(str(REPOSITORY / "examples"))

import finetune  # noqa: E402  # pyright: ignore[reportMissingImports]

LEFT_OUT = (1, 7)  # trousers and sneakers
RUNS = {
    "full": ("base", ["--learning_rate", "2e-3"]),
    "lora": ("base", ["--learning_rate", "1e-2", "--lora_rank", "8"]),
    "scratch": ("fresh", ["--learning_rate", "6e-3"]),
}
"""Where each starts from, and how it learns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", default="outputs/finetuning")
    parser.add_argument("--base_steps", type=int, default=500, help="of the base")
    parser.add_argument("--steps", type=int, default=150, help="of every run")
    parser.add_argument("--images", type=int, default=100, help="to train on, of each new class")
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir)
    train, test = (Dataset.from_parquet(str(REPOSITORY / f"examples/data/fashion_mnist/{split}.parquet")) for split in ("train", "test"))
    assert isinstance(train, Dataset)
    assert isinstance(test, Dataset)
    for split, dataset, count in (("train", train, arguments.images), ("test", test, 200)):
        write_images(dataset, folder / "images" / split, count)
    make_base(train, test, folder, arguments.base_steps)
    found = {}
    for name, (start, options) in RUNS.items():
        where = ["--pretrained_model_name_or_path", str(folder / start / "pipeline"), "--dataset_name", str(folder / "images")]
        steps = ["--max_steps", str(arguments.steps), "--warmup_steps", "20", "--eval_steps", "50", "--cache_features"]
        found[name] = finetune.main([*where, "--output_dir", str(folder / name), *steps, *options])
    sheet: list[Any] = [Image.open(folder / name / "samples.png") for name in RUNS]
    make_image_grid(sheet, rows=len(sheet), cols=1).save(folder / "samples.png")
    print(f"{'':10}{'energy before':>15}{'after':>8}{'real':>8}{'spread':>8}{'real':>8}{'seconds':>9}")
    for name, row in found.items():
        energy = f"{row['before']['energy']:15.3f}{row['metrics']['energy']:8.3f}{row['real']['energy']:8.3f}"
        print(f"{name:10}{energy}{row['metrics']['spread']:8.2f}{row['real']['spread']:8.2f}{row['training_seconds']:9.1f}")


def write_images(dataset: Dataset, folder: Path, count: int) -> None:
    """The first images of the two classes, one folder per class."""
    names = dataset.features["label"].names
    for label in LEFT_OUT:
        into = folder / names[label].replace("/", "-")
        into.mkdir(parents=True, exist_ok=True)
        rows = [row for row, other in enumerate(dataset["label"]) if other == label][:count]
        for i, image in enumerate(dataset.select(rows)["image"]):
            image.save(into / f"{i:03d}.png")


def make_base(train: Dataset, test: Dataset, folder: Path, steps: int) -> None:
    """A pipeline of the other eight classes, and one of the same shape that learned nothing."""
    torch.manual_seed(0)
    small = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32, "num_class_tokens": 0, "num_style_tokens": 8}
    form = {"sample_size": 28, "patch_size": 7, "in_channels": 1, "style_codebook_size": 32, "rope": False, "guidance_embedding": False}
    generator = DriftingGenerator(num_classes=8, **small, **form)
    if not (folder / "fresh").exists():
        DriftingPipeline(generator).save_pretrained(folder / "fresh/pipeline")
    config = DriftingConfig(
        output_dir=str(folder / "base"),
        max_steps=steps,
        labels_per_step=4,
        generated_per_label=16,
        positives_per_label=64,
        unconditional_per_label=0,
        bank_size=800,
        cache_features=True,
        push_per_step=1,
        learning_rate=6e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        ema_decay=0.99,
        eval_steps=0,
        preview_steps=0,
        save_total_limit=1,
    )
    objective = DriftingObjective([Pixels(), MultiScaleStatistics(), Windows()])
    trainer = DriftingTrainer(generator, objective, others(train), config, eval_dataset=others(test))
    found = trainer.train()
    print(f"base: energy {found['energy']:.3f} on its own classes (real {found['energy_real']:.3f}), {trainer.seconds:.0f} s")
    trainer.save_model()


def others(dataset: Dataset) -> Dataset:
    names = dataset.features["label"].names
    kept = [i for i in range(len(names)) if i not in LEFT_OUT]
    rows = [row for row, label in enumerate(dataset["label"]) if label in kept]
    chosen = dataset.select(rows)
    labels = [kept.index(label) for label in chosen["label"]]
    return chosen.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=[names[i] for i in kept]))  # pyright: ignore


if __name__ == "__main__":
    main()
