"""`drifting-diffusers train`: a generator from a preset, a file and flags; examples/train_imagenet.py does the same in steps to change."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..arguments import ConfigParser, describe
from ..config import DriftingConfig
from ..presets import PRESETS
from .launching import Launch, launch

if TYPE_CHECKING:
    from ..generator import DriftingGenerator
    from ..trainer import DriftingTrainer

DESCRIPTION = """\
Train a one-step generator by drifting: a published recipe, or your own, on one GPU or many, or on CPUs.

Real samples are images (--dataset_name: a dataset of the Hub, a folder of images, parquet files; --streaming for what no disk holds) or latents that
examples/cache_latents.py wrote (--latents). The same command again goes on where it stopped. The loss says nothing: look at the distances that are
logged, and at the pictures in OUTPUT_DIR/previews.

--num_processes starts that many processes; `accelerate launch -m drifting_diffusers.cli train ...` and torchrun do as well, with all of their options.
"""

EXAMPLES = """\
examples:
  drifting-diffusers train --preset fashion-mnist --dataset_name zalando-datasets/fashion_mnist --eval_split test --output_dir outputs/clothes
  drifting-diffusers train --config run.yaml --learning_rate 1e-3
  drifting-diffusers train --preset ablation --latents latents/train --eval_latents latents/val --num_processes 8
  accelerate launch -m drifting_diffusers.cli train --config run.yaml --push_to_hub --hub_model_id user/drifting-b
  ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m drifting_diffusers.cli train --config run.yaml

A file run.yaml has the options by name:
  preset: fashion-mnist
  dataset_name: my/images
  max_steps: 5000
"""


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Arguments:
    """What is trained on what."""

    preset: str | None = option(None, "a recipe; what follows and what --config says goes over it")
    latents: str | None = option(None, "folder of a latent cache to train on")
    eval_latents: str | None = option(None, "folder of a latent cache of held-out images")
    dataset_name: str | None = option(
        None, "images to train on: a dataset of the Hub, a folder of images or of parquet files, or one such file"
    )
    train_split: str = option("train", "split to train on")
    eval_split: str | None = option(None, "split of held-out images; without one distances are to training images")
    streaming: bool = option(False, "read training images as a stream; needs --eval_split")
    max_train_samples: int | None = option(None, "train on so many images only, the first of a shuffle")
    features: str | None = option(
        None,
        'what samples are compared in, joined by "+": pixels, statistics, windows, classifier, mae_latent_256, convnextv2, a folder ...',
    )
    features_dtype: Literal["bfloat16", "float32"] = option("bfloat16", "precision of encoders on a GPU; on a CPU it is float32")
    model_config: str | None = option(
        None, "arguments of the generator over those of the preset: JSON, as in '{\"num_layers\": 6}', or a file of it"
    )
    vae: str | None = option(
        None, "decoder of latents, for pictures and the pipeline: a folder or a repository, as in stabilityai/sd-vae-ft-mse"
    )
    vae_subfolder: str | None = option(None, "where in it, for pipelines: vae")
    extractor: str | None = option(
        None, "what evaluations look through besides: inception, lite0, dinov2, ...; samples themselves if not given"
    )
    extractor_weights: str | None = option(None, "file of its weights")

    def __post_init__(self):
        if (self.latents is None) == (self.dataset_name is None):
            raise ValueError("give what to train on as --latents or as --dataset_name, one of them")


def parser(**how: Any) -> argparse.ArgumentParser:
    """The verb's parser: fields of dataclasses are its options."""
    made = ConfigParser((Arguments, DriftingConfig, Launch), description=DESCRIPTION, epilog=EXAMPLES, **how)
    made.set_defaults(values=made.values)
    return made


def run(options: argparse.Namespace) -> None:
    """Train, or start what trains."""
    arguments, config, processes = options.values(options)
    launch(processes, options.words)
    from ..trainer import DriftingTrainer

    trainer = DriftingTrainer(config=config, **trainer_arguments(arguments, config))
    train_and_save(trainer, arguments)


def train_and_save(trainer: "DriftingTrainer", arguments: Arguments) -> None:
    """Train to the end, save a pipeline for every average of the weights, and say how far it came."""
    if arguments.dataset_name and not Path(arguments.dataset_name).exists():
        trainer.about.setdefault("dataset", arguments.dataset_name)  # of the Hub: the card names it
    processes = trainer.accelerator.num_processes
    how = (
        f"features: {_features(arguments)}; {processes} {'process' if processes == 1 else 'processes'} on {trainer.accelerator.device.type}"
    )
    trainer.accelerator.print(f"{describe(trainer.config, arguments.preset)}\n{how}")
    found = trainer.train()
    folder = trainer.save_model()
    for decay in trainer.config.more_ema_decays:
        trainer.save_model(f"{folder}-ema-{decay:g}", ema_decay=decay)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    trainer.accelerator.print(
        f"{numbers}\n{folder}: draw from it with drifting-diffusers sample, measure it with drifting-diffusers evaluate"
    )


def trainer_arguments(arguments: Arguments, config: DriftingConfig) -> dict[str, Any]:
    """What a `DriftingTrainer` takes beside its config: generator, objective, real images, and what decodes and measures."""
    import torch
    from diffusers import AutoencoderKL

    from ..draws import as_samples
    from ..extractors import load_extractor
    from ..feature_loading import load_features
    from ..objective import DriftingObjective

    vae = AutoencoderKL.from_pretrained(arguments.vae, subfolder=arguments.vae_subfolder) if arguments.vae else None
    train, held_out = real_samples(arguments, config.seed)
    torch.manual_seed(config.seed)
    generator = make_generator(arguments, config)
    data = as_samples(
        train if held_out is None or not arguments.streaming else held_out,
        size=(generator.sample_height, generator.sample_width),
        channels=generator.config.in_channels,
        num_classes=generator.config.num_classes,
        config=config,
    )
    features = load_features(
        _features(arguments),
        data=data,
        num_classes=generator.config.num_classes,
        folder=f"{config.output_dir}-classifiers",
        seed=config.seed,
        dtype=getattr(torch, arguments.features_dtype) if torch.cuda.is_available() else torch.float32,
    )
    return {
        "generator": generator,
        "objective": DriftingObjective(features),
        "train_dataset": train if arguments.streaming else data,
        "eval_dataset": held_out,
        "vae": vae,
        "extractor": load_extractor(arguments.extractor, weights=arguments.extractor_weights) if arguments.extractor else None,
    }


def _features(arguments: Arguments) -> str:
    return arguments.features or (PRESETS[arguments.preset].encoder if arguments.preset else "pixels + statistics")


def real_samples(arguments: Arguments, seed: int) -> tuple[Any, Any]:
    """What is trained on and what is held out, which may be nothing."""
    from ..data import open_images
    from ..latents import LatentCache

    name = arguments.dataset_name
    if name is None:
        return LatentCache(arguments.latents or ""), LatentCache(arguments.eval_latents) if arguments.eval_latents else None
    held_out = open_images(name, arguments.eval_split) if arguments.eval_split else None
    train = open_images(name, arguments.train_split, streaming=arguments.streaming)
    if arguments.max_train_samples is not None:
        train = (
            train.take(arguments.max_train_samples)
            if arguments.streaming
            else train.shuffle(seed=seed).select(range(min(arguments.max_train_samples, len(train))))
        )
    return train, held_out


def make_generator(arguments: Arguments, config: DriftingConfig) -> "DriftingGenerator":
    """The generator of the preset, with what --model_config says; guidance is embedded where it is trained."""
    from ..generator import DriftingGenerator

    model: dict[str, Any] = {"guidance_embedding": bool(config.unconditional_per_label)}
    if arguments.preset:
        model |= PRESETS[arguments.preset].model
    if arguments.model_config is not None:
        text = arguments.model_config
        model |= json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    return DriftingGenerator(**model)
