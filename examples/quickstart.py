"""Watch a Drifting Model learn real pictures: Fashion-MNIST, ten classes, two cores, a few minutes.

Leaves in outputs/quickstart:

    samples.png    generated images beside real ones, class by class
    curves.png     what to watch while it trains: energy distance and strengths, not the loss
    results.json   each number beside the same number for real images
    pipeline/      the model: DriftingPipeline.from_pretrained("outputs/quickstart/pipeline")

Run it again and it goes on where it stopped. `--help` lists what can be changed.
"""

import json
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import datasets
import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from torch import Tensor
from transformers import HfArgumentParser

from drifting_diffusers import DriftingConfig, DriftingGenerator, DriftingObjective, DriftingTrainer, MultiScaleStatistics, Pixels, Windows
from drifting_diffusers.classifiers import SmallClassifier, kept_classifier
from drifting_diffusers.data import LabelledImages
from drifting_diffusers.evaluation import accuracy
from drifting_diffusers.presets import PRESETS

DATA = Path(__file__).parent / "data/fashion_mnist"
Metrics = Callable[[Tensor, Tensor], dict[str, float]]
MEANING = {
    "accuracy": "share that a classifier of real images puts into its class",
    "neighbours": "share whose five nearest training images, in pixels, are mostly of its class",
    "energy": "energy distance to held-out images of the class, in pixels",
    "spread": "mean pixel distance of two images of a class",
}


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/quickstart", metadata={"help": "where everything is written"})
    max_steps: int = field(default=2300, metadata={"help": "training steps; another number is another run: choose a new output_dir"})
    judge_epochs: int = field(default=8, metadata={"help": "passes over the real images of the classifier that judges"})
    encoder_epochs: int = field(default=5, metadata={"help": "passes over the real images of the classifier that lends its features"})
    seed: int = field(default=0, metadata={"help": "decides the initial weights and every draw"})
    guidance: bool = field(default=False, metadata={"help": "teach the guidance scale too: real images of any class repel as well"})


def main(argv: list[str] | None = None) -> dict:
    parser = HfArgumentParser(cast(Any, Arguments), description=(__doc__ or "").splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    datasets.disable_progress_bars()
    train, test = (Dataset.from_parquet(str(DATA / f"{split}.parquet")) for split in ("train", "test"))

    images, labels = view(train).per_class(len(train))  # decoded once: classifiers and neighbours all look at them

    print("1/3  Two classifiers learn the real images: one judges the generated ones, the other lends its features to the training.")
    judge = classifier("judge", images, labels, arguments, width=32, epochs=arguments.judge_epochs)
    encoder = classifier("encoder", images, labels, arguments, width=16, epochs=arguments.encoder_epochs)
    metrics = lambda x, y: {"accuracy": accuracy(judge, x, y), "neighbours": neighbours(x, y, images, labels)}
    real = metrics(*view(test).per_class(len(test)))
    print(f"     The judge is right on {real['accuracy']:.1%} of held-out real images.")

    print("2/3  The generator learns.")
    trainer = make_trainer(arguments, train, test, encoder, metrics)
    found = trainer.train()

    print("3/3  Pictures and numbers.")
    folder = trainer.save_model()
    results = write_results(trainer, folder, found, real)
    draw_samples(trainer)
    report(results, trainer.run.path, folder)
    return results


def view(dataset: Dataset) -> LabelledImages:
    return LabelledImages(dataset, size=(28, 28), channels=1, num_classes=10, image_column="image", label_column="label")


def classifier(name: str, images: Tensor, labels: Tensor, arguments: Arguments, *, width: int, epochs: int) -> SmallClassifier:
    """A small classifier of the real images; kept beside the run, so that going on with a run meets the same one."""
    file = Path(arguments.output_dir + "-classifiers") / f"{name}-seed{arguments.seed}-epochs{epochs}.safetensors"
    seed = 2 * arguments.seed + (name == "encoder")  # judge and encoder start differently and see the images in other orders
    return kept_classifier(file, lambda: (images, labels), channels=1, num_classes=10, seed=seed, width=width, epochs=epochs, name=name)


def neighbours(images: Tensor, labels: Tensor, train_images: Tensor, train_labels: Tensor) -> float:
    """A second judge that shares nothing with the encoder: the label of most of the five nearest training images."""
    nearest = torch.cdist(images.flatten(1), train_images.flatten(1)).topk(5, largest=False).indices  # (n, 5)
    return float((train_labels[nearest].mode(dim=1).values == labels).float().mean())


def make_trainer(arguments: Arguments, train: Dataset, test: Dataset, encoder: SmallClassifier, metrics: Metrics) -> DriftingTrainer:
    torch.manual_seed(arguments.seed)
    shape: dict[str, Any] = PRESETS["fashion-mnist"].model | {"guidance_embedding": arguments.guidance}
    generator = DriftingGenerator(**shape)
    fifth, half = max(1, arguments.max_steps // 5), max(1, arguments.max_steps // 2)
    config = DriftingConfig.preset(
        "fashion-mnist",
        output_dir=arguments.output_dir,
        steps=arguments.max_steps,
        seed=arguments.seed,
        eval_steps=fifth,
        preview_steps=fifth,
        save_steps=half,
        **({"unconditional_per_label": 16, "unguided_share": 0.5} if arguments.guidance else {}),
    )
    return DriftingTrainer(
        generator,
        DriftingObjective([Pixels(), MultiScaleStatistics(), Windows(), encoder.activations]),
        train,
        config,
        eval_dataset=test,
        compute_metrics=metrics,
    )


def write_results(trainer: DriftingTrainer, pipeline: Path, found: dict[str, float], real: dict[str, float]) -> dict:
    """Every number, what it is for real images, and how it was made."""
    each = trainer.config.eval_samples_per_class
    results = {
        "metrics": {name: found[name] for name in MEANING},
        "real": real | {"energy": found["energy_real"], "spread": found["spread_real"]},
        "meaning": MEANING,
        "dataset": "zalando-datasets/fashion_mnist",
        "training_images": len(cast(Any, trainer.train_data)),
        "samples_per_class": each,
        "held_out_per_class": each,
        "steps": trainer.step,
        "training_seconds": round(trainer.seconds, 1),
        "seeds": [trainer.config.seed],
        "command": shlex.join(["python", *sys.argv]),
        "versions": {name: version(name) for name in ("drifting-diffusers", "torch", "diffusers", "accelerate")},
        "python": platform.python_version(),
        "device": str(trainer.accelerator.device),
    }
    for folder in (trainer.run.path, pipeline):  # beside the model too: the card of a push is rendered from it
        (folder / "results.json").write_text(json.dumps(results, indent=2))
    return results


def draw_samples(trainer: DriftingTrainer, columns: int = 10, real_columns: int = 4) -> None:
    """One row per class: generated images on the left, real ones on the right."""
    names = trainer.labels or []
    drawn = trainer.sample(names, num_images_per_label=columns, generator=torch.Generator().manual_seed(1), output_type="np").images
    real = trainer.eval_data.per_class(real_columns)[0].permute(0, 2, 3, 1).numpy() / 2 + 0.5
    figure, panels = plt.subplots(
        len(names), columns + real_columns + 1, figsize=(9, 6), gridspec_kw={"width_ratios": [1] * columns + [0.25] + [1] * real_columns}
    )
    figure.subplots_adjust(left=0.11, right=0.995, bottom=0.005, top=0.955, wspace=0.04, hspace=0.04)
    for panel in panels.flat:
        panel.axis("off")
    for row, name in enumerate(names):
        for column in range(columns):
            panels[row, column].imshow(drawn[row * columns + column], cmap="gray", vmin=0, vmax=1)
        for column in range(real_columns):
            panels[row, columns + 1 + column].imshow(real[row * real_columns + column], cmap="gray", vmin=0, vmax=1)
        panels[row, 0].text(-4, 14, name, ha="right", va="center", fontsize=9)
    figure.text(0.11, 0.975, "generated, one network call each", fontsize=9, color="0.3")
    figure.text(panels[0, columns + 1].get_position().x0, 0.975, "real", fontsize=9, color="0.3")
    figure.savefig(trainer.run.path / "samples.png", dpi=150)
    plt.close(figure)


def report(results: dict, output_dir: Path, pipeline: Path) -> None:
    print(f"\n{'':10}{'generated':>10}{'real':>8}")
    for name, meaning in MEANING.items():
        print(f"{name:10}{results['metrics'][name]:10.3f}{results['real'][name]:8.3f}   {meaning}")
    print(f"\nLook at {output_dir / 'samples.png'} and {output_dir / 'curves.png'}. Draw more with:\n")
    print("    from drifting_diffusers import DriftingPipeline")
    print(f'    pipe = DriftingPipeline.from_pretrained("{pipeline}")')
    print('    pipe(["sneaker", "bag"]).images[0].show()')


if __name__ == "__main__":
    main()
