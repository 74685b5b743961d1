"""A small generator of Fashion-MNIST at 14 x 14 pixels, trained for a few hundred steps with any field, from the same seeds, through `DriftingTrainer`."""

import re
import tempfile
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from field_rows import rows as all_rows

from drifting_diffusers import DriftingConfig, DriftingGenerator, DriftingObjective, DriftingTrainer
from drifting_diffusers.classifiers import SmallClassifier, kept_classifier
from drifting_diffusers.data import LabelledImages
from drifting_diffusers.evaluation import accuracy
from drifting_diffusers.features import Pixels
from drifting_diffusers.presets import PRESETS

SIZE = 14
"""Pixels of a side: half of the data's, so that sixty trainings fit into minutes."""
DATA = Path(__file__).parents[1] / "examples/data/fashion_mnist"

ROWS = {
    "released": "drifting",
    "Algorithm 2": "drifting(affinity_floor=0.0)",
    "rows only": "drifting(affinity_floor=0.0, coupling=row_softmax)",
    "unnormalised": "drifting(affinity_floor=0.0, coupling=unnormalised)",
    "mean shift": "mean_shift",
    "mean shift, ABC": "mean_shift(bias_corrected=True)",
    "score": "score",
    "score, annealed": "score(temperatures=(exponential(1.0, 0.2),))",
    "sharp": "sharp",
    "kernel gradient": "kernel_gradient",
    "KL": "divergence",
    "p/q": 'divergence(weighting="p/q")',
    "MMD": 'divergence(weighting="mmd")',
    "chi-square": 'divergence(weighting="q/p")',
    "Sinkhorn": "sinkhorn",
    "Sinkhorn, masked": 'sinkhorn(own_term="masked")',
    "Nystrom": 'nystrom(sums="dataset", landmarks=150)',
    "Frechet": 'frechet(grouping="problem")',
    "lookahead": "combined((lookahead(drifting(temperatures=(0.02,))), lookahead(drifting(temperatures=(0.05,))), lookahead(drifting(temperatures=(0.2,)))))",
    "friction": "friction(drifting, linear(0.0, 0.9))",
}
"""Every field with its defaults; here nothing was tuned. A field of `FIELDS` that no row names gets a row of its own."""


def rows() -> dict[str, str]:
    named = set(re.findall(r"\w+", " ".join(ROWS.values())))
    return ROWS | {name: name for name, row in all_rows().items() if row.text == name and name not in named}


def classifier(name: str, folder: Path) -> SmallClassifier:
    """A judge, or another and smaller network that lends its activations."""
    width, epochs, seed = {"judge": (32, 8, 0), "encoder": (16, 5, 1)}[name]
    everything = lambda: images("train").per_class(8000)
    file = folder / f"{name}.safetensors"
    return kept_classifier(file, everything, channels=1, num_classes=10, seed=seed, width=width, epochs=epochs, name=name)


def images(split: str, told: bool = True) -> LabelledImages:
    """All images of a split, or as if they were of one class."""
    dataset = cast(Dataset, Dataset.from_parquet(str(DATA / f"{split}.parquet")))
    if not told:
        dataset = dataset.remove_columns("label").add_column("label", [0] * len(dataset))  # pyright: ignore[reportCallIssue]
    classes = 10 if told else 1
    return LabelledImages(dataset, size=(SIZE, SIZE), channels=1, num_classes=classes, image_column="image", label_column="label")


def train(text: str, *, seed: int, steps: int, folder: Path, conditional: bool = True, **choices) -> dict:
    """Train with a field and measure class accuracy, energy distance and spread, or, without labels, how many classes are there.

    Args:
        text: the field, as `read_field` takes it.
        seed: of weights and every draw.
        steps: of training.
        folder: of classifiers and runs; what a run writes is removed in the end.
        conditional: whether the generator is told the class.
        **choices: further choices of the config.
    """
    judge, encoder = (classifier(name, folder) for name in ("judge", "encoder"))
    torch.manual_seed(seed)
    model = PRESETS["fashion-mnist"].model | {"sample_size": SIZE} | ({} if conditional else {"num_classes": 1})
    shape = (
        {} if conditional else {"labels_per_step": 1, "generated_per_label": 80, "positives_per_label": 320, "eval_samples_per_class": 1000}
    )
    with tempfile.TemporaryDirectory(dir=folder) as run:
        config = DriftingConfig.preset(
            "fashion-mnist",
            output_dir=f"{run}/run",
            steps=steps,
            seed=seed,
            field=text,
            eval_steps=0,
            preview_steps=0,
            save_steps=steps,
            **shape | choices,
        )
        trainer = DriftingTrainer(
            DriftingGenerator(**model),
            DriftingObjective([Pixels(), encoder.activations]),
            images("train", conditional),
            config,
            eval_dataset=images("test", conditional),
            compute_metrics=lambda x, y: told(judge, x, y) if conditional else classes(judge, x),
        )
        found = trainer.train()
    drawn = trainer.generate(torch.arange(10).repeat_interleave(4) % model["num_classes"], rng=torch.Generator().manual_seed(1))
    tiles = drawn.add(1).mul(127.5).round().to(torch.uint8).flatten(1).tolist() if seed == 0 else None
    return {"tiles": tiles, "ms_per_step": 1000 * trainer.seconds / steps} | {name: float(value) for name, value in found.items()}


def told(judge: SmallClassifier, samples: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    return {"accuracy": accuracy(judge, samples, labels)} | classes(judge, samples)


@torch.no_grad()
def classes(judge: SmallClassifier, samples: torch.Tensor) -> dict[str, float]:
    """How many classes the judge sees in at least 2 % of the samples, a fifth of their due, and the least share of one."""
    share = torch.bincount(judge(samples).argmax(1), minlength=10) / len(samples)
    return {"classes": float((share >= 0.02).sum()), "least_class": float(share.min())}
