"""Teach a trained pipeline your own classes: some hundred labelled images, one GPU or a CPU.

    python examples/finetune.py --pretrained_model_name_or_path PIPELINE --dataset_name FOLDER_OR_HUB --output_dir runs/mine
    accelerate launch examples/finetune.py ... --lora_rank 8 --push_to_hub

The folder holds a folder of images per class. Classes that the pipeline knows by the same name go on from what they are, others start from the mean.
Leaves in the output_dir pipeline/, samples.png (generated images, then real ones, class by class), results.json, and what every run leaves. Beside it
lie OUTPUT_DIR-latents, for pipelines that draw latents, and OUTPUT_DIR-classifier. Run it again and it goes on where it stopped.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from datasets import ClassLabel, Dataset, get_dataset_split_names
from diffusers.utils import make_image_grid
from PIL import Image

from drifting_diffusers import DriftingConfig, DriftingGenerator, DriftingObjective, DriftingPipeline, DriftingTrainer, load_features
from drifting_diffusers.arguments import parse_arguments
from drifting_diffusers.data import LabelledImages, RealSamples, open_images
from drifting_diffusers.finetuning import add_lora, kept_classes, with_classes
from drifting_diffusers.hub import upload
from drifting_diffusers.latents import cache_latents
from drifting_diffusers.sampling import processes
from drifting_diffusers.sheets import pictures
from drifting_diffusers.shipped import find_pipeline

SPLIT_SEED = 0  # another split would be another experiment, so it does not follow --seed


@dataclass
class Arguments:
    pretrained_model_name_or_path: str = field(
        metadata={"help": "the pipeline to start from: a folder, a repository of the Hub, or fashion-mnist, which comes along"}
    )
    dataset_name: str = field(metadata={"help": "a dataset of the Hub, a folder of images or of parquet files, or a parquet file"})
    train_split: str = field(default="train", metadata={"help": "of the dataset"})
    eval_split: str | None = field(
        default=None, metadata={"help": "what distances are to; validation or test if not given, else a part of the train split"}
    )
    held_out_share: float = field(
        default=0.2, metadata={"help": "that part, where there is no other split; 0 measures on the training images"}
    )
    class_name: str | None = field(
        default=None, metadata={"help": "name of the only class, where all images are of one and have no labels"}
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": 'what samples are compared in, joined by "+": pixels, statistics, windows; classifier, trained on your images; a released encoder such as '
            "mae_latent_256; a folder or repository of a MaskedAutoencoder or of a vision model of transformers. If not given, the first three, and the "
            "classifier for two and more classes of at most 64 x 64"
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "rank of adapters; 0 trains all weights"})
    lora_alpha: float | None = field(default=None, metadata={"help": "adapters are scaled by this over the rank; the rank if not given"})
    base_model: str | None = field(
        default=None, metadata={"help": "repository that the card names as base; the pipeline's if it came from the Hub"}
    )
    license: str | None = field(default=None, metadata={"help": "of the fine-tuned weights, as the Hub spells it: apache-2.0"})

    def __post_init__(self):
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share must lie in [0, 1), got {self.held_out_share}; 0.2 holds out a fifth")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be at least 0, got {self.lora_rank}; 0 trains all weights")


def choice(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Choices(DriftingConfig):
    """Choices of a run on some hundred images. A 0 stands for what fits the images, see `fitted`."""

    max_steps: int = choice(1000, "optimiser steps of the whole run")
    learning_rate: float = choice(1e-4, "AdamW's, after the warm-up; lower than from scratch, for adapters about five times higher")
    lr_scheduler_type: Literal["constant", "cosine"] = choice("cosine", "what follows the linear warm-up from 1e-6")
    warmup_steps: int = choice(50, "steps of the warm-up")
    ema_decay: float = choice(0.99, "decay per step of the averaged weights, which are what is sampled and saved")
    labels_per_step: int = choice(0, "classes per step; 0 for all, up to 8")
    generated_per_label: int = choice(0, "generated samples per class and step; 0 for 64 over all classes of the step, at least 16 of each")
    positives_per_label: int = choice(0, "real samples per class and step; 0 for those of the smallest class, up to 64")
    unconditional_per_label: int = choice(
        0, "real samples of any class that repel; 0 for 16 if the pipeline was trained with guidance, else none"
    )
    bank_size: int = choice(0, "real samples kept per class; 0 for those of the largest class, up to 512")
    unconditional_bank_size: int = choice(0, "real samples of any class kept; 0 for all, up to 1000")
    push_per_step: int = choice(8, "fresh real samples pushed into the banks per step")
    eval_samples_per_class: int = choice(
        0, "generated samples per class in an evaluation; 0 for half of the smallest held-out class, up to 100"
    )
    eval_steps: int = choice(100, "steps between evaluations; 0 for none before the end")
    preview_steps: int = choice(100, "steps between preview pictures; 0 for none, else there is always one at the end")
    save_steps: int = choice(250, "steps between checkpoints; there is always one at the end")
    save_total_limit: int = choice(1, "newest checkpoints kept")

    @classmethod
    def rules(cls) -> dict[str, Any]:
        free = ("labels_per_step", "generated_per_label", "positives_per_label", "bank_size", "unconditional_bank_size")
        at_least_0 = ("be at least 0; 0 is what fits the images", lambda value: value >= 0)
        return super().rules() | dict.fromkeys((*free, "eval_samples_per_class"), at_least_0)

    @classmethod
    def order(cls) -> tuple[tuple[str, str, str], ...]:
        return tuple(pair for pair in super().order() if pair[0] == "warmup_steps")  # the rest is checked when the zeros are filled in

    @classmethod
    def presets(cls) -> dict[str, Any]:
        return {}  # those are of runs from scratch

    def fitted(self, data: RealSamples, held_out: RealSamples, generator: DriftingGenerator) -> DriftingConfig:
        """The config with every 0 filled in."""
        counts, total = np.unique(data.labels, return_counts=True)[1], len(data)
        labels = self.labels_per_step or min(len(counts), 8)
        positives = self.positives_per_label or min(int(counts.min()), 64)
        fitting: dict[str, Any] = {
            "labels_per_step": labels,
            "generated_per_label": max(16, 64 // labels),
            "positives_per_label": positives,
            "unconditional_per_label": min(16, total) if generator.config.guidance_embedding else 0,
            "bank_size": max(positives, min(int(counts.max()), 512)),
            "unconditional_bank_size": max(self.unconditional_per_label, min(1000, total)),
            "eval_samples_per_class": max(2, min(int(np.unique(held_out.labels, return_counts=True)[1].min()) // 2, 100)),
        }
        given: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return DriftingConfig(**given | {name: value for name, value in fitting.items() if not given[name]})


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments, choices = parse_arguments((Arguments, Choices), argv, description=(__doc__ or "").splitlines()[0])
    state = processes()
    with state.local_main_process_first():  # what is downloaded, unpacked or trained here is so once
        base = DriftingPipeline.from_pretrained(find_pipeline(arguments.pretrained_model_name_or_path))
        train, held_out = read(arguments, choices)
        names = cast(ClassLabel, train.features[choices.label_column]).names
        generator = adapted(base, names, arguments, choices.seed)
    train, held_out = (
        None if split is None else samples(split, which, base, arguments, choices)
        for split, which in ((train, "train"), (held_out, "eval"))
    )
    assert train is not None
    with state.local_main_process_first():
        classes = len(np.unique(train.labels))
        usual = "pixels + statistics + windows" + (" + classifier" if classes > 1 and max(train.size) <= 64 else "")
        folder = f"{choices.output_dir}-classifier"
        maps = load_features(arguments.features or usual, data=train, num_classes=classes, folder=folder, seed=choices.seed)
    config = choices.fitted(train, held_out or train, generator)
    trainer = DriftingTrainer(generator, DriftingObjective(maps), train, config, eval_dataset=held_out, vae=base.vae)
    trainer.run.setup |= {"base": arguments.pretrained_model_name_or_path, "classes": names}  # another one is another run
    trainer.run.check()
    trainer.about = origin(arguments)
    trainer.evaluate()  # before the first step: what the base is worth
    trainer.train()
    if state.is_main_process:
        return finish(trainer, base, arguments)
    return {}


def read(arguments: Arguments, config: DriftingConfig) -> tuple[Dataset, Dataset | None]:
    """Images to train on and images to measure with, both with names of classes."""
    train = named(open_images(arguments.dataset_name, arguments.train_split), arguments, config)
    splits = [] if Path(arguments.dataset_name).is_file() else get_dataset_split_names(arguments.dataset_name)
    other = arguments.eval_split or next((split for split in ("validation", "test") if split in splits), None)
    if other is not None:
        return train, named(open_images(arguments.dataset_name, other), arguments, config)
    if not arguments.held_out_share:
        return train, None
    counts = np.unique(train[config.label_column], return_counts=True)[1]
    if int(counts.min() * arguments.held_out_share) < 4:
        raise SystemExit(
            f"held_out_share={arguments.held_out_share} of a class of {counts.min()} images leaves fewer than 4 to measure with: take "
            f"--held_out_share {min(0.5, math.ceil(400 / counts.min()) / 100):.2g}, more images, or 0 to measure on the training images"
        )
    parts = train.train_test_split(arguments.held_out_share, seed=SPLIT_SEED, stratify_by_column=config.label_column)
    return parts["train"], parts["test"]


def named(dataset: Dataset, arguments: Arguments, config: DriftingConfig) -> Dataset:
    """The dataset with a label column that names its classes."""
    column, only = config.label_column, arguments.class_name
    if column in dataset.column_names:
        if only is not None:
            raise SystemExit(f"class_name={only!r} is for images without labels, and there is a column {column!r}: leave it out")
        return dataset if isinstance(dataset.features[column], ClassLabel) else dataset.class_encode_column(column)
    if only is None:
        raise SystemExit(
            f"the dataset has no column {column!r}; its columns are {dataset.column_names}: set --label_column, put the images of each class into a "
            "folder of its name, or, where all are of one class, set --class_name"
        )
    labels = cast(Any, np.zeros(len(dataset), dtype=np.int64))
    return dataset.add_column(column, labels, feature=ClassLabel(names=[only]))  # pyright: ignore[reportCallIssue]


def adapted(base: DriftingPipeline, names: list[str], arguments: Arguments, seed: int) -> DriftingGenerator:
    known = kept_classes(names, base.labels)
    generator = with_classes(base.transformer, len(names), labels=names, base_labels=base.labels)
    if processes().is_main_process:
        told = lambda ids: ", ".join(names[i] for i in ids) or "none"
        print(f"Classes that the base knows by name: {told(known)}; new ones: {told(i for i in range(len(names)) if i not in known)}")
    return add_lora(generator, arguments.lora_rank, alpha=arguments.lora_alpha, seed=seed) if arguments.lora_rank else generator


def samples(dataset: Dataset, which: str, base: DriftingPipeline, arguments: Arguments, config: DriftingConfig) -> RealSamples:
    """What the generator makes: images of its size, or their latents, cached once."""
    generator, classes = base.transformer, len(cast(ClassLabel, dataset.features[config.label_column]).names)
    form: dict[str, Any] = {"num_classes": classes, "image_column": config.image_column, "label_column": config.label_column}
    size, channels = (generator.sample_height, generator.sample_width), generator.config.in_channels
    if base.vae is None:
        return LabelledImages(dataset, size=size, channels=channels, **form)
    factor = 2 ** (len(base.vae.config.block_out_channels) - 1)
    size = (size[0] * factor, size[1] * factor)
    images = LabelledImages(dataset, size=size, channels=base.vae.config.in_channels, **form)
    folder, source = Path(f"{config.output_dir}-latents", which), {"dataset": arguments.dataset_name, "split": which}
    return cache_latents(images, base.vae, folder, names=images.names, source=source, flips=config.random_flip)


def finish(trainer: DriftingTrainer, base: DriftingPipeline, arguments: Arguments) -> dict[str, Any]:
    """Pipeline, pictures and numbers, and the push."""
    pipe, config, folder = trainer.pipeline(), trainer.config, trainer.run.path / "pipeline"
    pipe.register_to_config(guidance_scale=base.config.guidance_scale)
    pipe.save_pretrained(folder)
    results = numbers(trainer, base, arguments)
    for place in (trainer.run.path, folder):  # beside the model too: the card of a push is rendered from it
        (place / "results.json").write_text(json.dumps(results, indent=2))
    sheet = draw(trainer, pipe)
    for place in (trainer.run.path, folder):
        sheet.save(place / "samples.png")
    after, before, real = (results[of]["energy"] for of in ("metrics", "before", "real"))
    print(f"Energy distance to held-out images: {before:.3f} before, {after:.3f} now, {real:.3f} between real ones. See {trainer.run.path}")
    if config.push_to_hub:
        upload(pipe, folder, config.hub_model_id or trainer.run.path.name, private=config.hub_private_repo)
    return results


def origin(arguments: Arguments) -> dict[str, str]:
    """Where base and images came from, as far as that is the Hub, and the licence."""
    hub = lambda name: None if Path(name).exists() else name
    base = arguments.base_model or hub(find_pipeline(arguments.pretrained_model_name_or_path))
    found = {"base_model": base, "dataset": hub(arguments.dataset_name), "license": arguments.license}
    return {name: value for name, value in found.items() if value is not None}


def numbers(trainer: DriftingTrainer, base: DriftingPipeline, arguments: Arguments) -> dict[str, Any]:
    """Energy distance and spread, what they were at the start and are for real images, and how they were made."""
    looks = [entry for entry in trainer.log_history if "energy" in entry]
    first, last, config = looks[0], looks[-1], trainer.config
    found = {
        "metrics": {name: last[name] for name in ("energy", "spread")},
        "before": {name: first[name] for name in ("energy", "spread")},
        "real": {name: last[f"{name}_real"] for name in ("energy", "spread")},
        "better": {"energy": "lower"},
        **origin(arguments),
        "training_images": len(cast(RealSamples, trainer.train_data)),
        "classes": trainer.labels,
        "held_out": trainer.eval_data is not trainer.train_data,
        "samples_per_class": config.eval_samples_per_class,
        "features": sorted({type(getattr(one, "__self__", one)).__name__ for one in trainer.objective.feature_maps}),
        "lora_rank": arguments.lora_rank or None,
        "steps": trainer.step,
        "training_seconds": round(trainer.seconds, 1),
        "seeds": [config.seed],
        "versions": {name: version(name) for name in ("drifting-diffusers", "torch", "diffusers")},
    }
    return {name: value for name, value in found.items() if value is not None}


def draw(trainer: DriftingTrainer, pipe: DriftingPipeline, columns: int = 8, real_columns: int = 4) -> Image.Image:
    """One row per class, of up to 20: generated images, a gap, real ones."""
    classes = range(min(len(trainer.labels or []), 20))
    drawn = pipe(list(classes), num_images_per_label=columns, generator=torch.Generator().manual_seed(1), output_type="pt").images
    rows = np.stack(trainer.eval_data.rows_per_class(real_columns)[: len(classes)])
    with torch.no_grad():
        real = pipe.decode(trainer.eval_data.gather(rows.flatten().tolist())[0].to(drawn.device)).clamp(-1, 1)
    ours, theirs = (pictures(images.cpu().float()) for images in (2 * torch.as_tensor(drawn) - 1, real))
    gap = Image.new("RGB", ours[0].size, "white")
    ordered = [image for row in classes for image in (*ours[row * columns :][:columns], gap, *theirs[row * real_columns :][:real_columns])]
    return make_image_grid(ordered, rows=len(classes), cols=columns + 1 + real_columns)


if __name__ == "__main__":
    main()
