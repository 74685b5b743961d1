"""Train a one-step generator by drifting: the recipes of arXiv 2602.04770, or your own, on one GPU or many.

    accelerate launch examples/train_imagenet.py --preset ablation --latents latents/train --eval_latents latents/val
    accelerate launch examples/train_imagenet.py --config run.yaml --push_to_hub --hub_model_id user/drifting-b

Real samples are images (--dataset_name: a dataset of the Hub, a folder of images, parquet files; --streaming for
what no disk holds) or latents that examples/cache_latents.py wrote (--latents). Run the same command again and it
goes on where it stopped. docs/imagenet.md has the whole way.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL

from drifting_diffusers import DriftingConfig, DriftingGenerator, DriftingObjective, DriftingTrainer
from drifting_diffusers.arguments import describe, parse_arguments
from drifting_diffusers.data import open_images
from drifting_diffusers.draws import as_samples
from drifting_diffusers.extractors import load_extractor
from drifting_diffusers.feature_loading import load_features
from drifting_diffusers.latents import LatentCache
from drifting_diffusers.presets import PRESETS


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Arguments:
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


def main(argv: list[str] | None = None) -> DriftingTrainer:
    arguments, config = parse_arguments((Arguments, DriftingConfig), argv, description=__doc__)
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
    names = arguments.features or (PRESETS[arguments.preset].encoder if arguments.preset else "pixels + statistics")
    features = load_features(
        names,
        data=data,
        num_classes=generator.config.num_classes,
        folder=f"{config.output_dir}-classifiers",
        seed=config.seed,
        dtype=getattr(torch, arguments.features_dtype) if torch.cuda.is_available() else torch.float32,
    )
    trainer = DriftingTrainer(
        generator,
        DriftingObjective(features),
        train if arguments.streaming else data,
        config,
        eval_dataset=held_out,
        vae=vae,
        extractor=load_extractor(arguments.extractor, weights=arguments.extractor_weights) if arguments.extractor else None,
    )
    trainer.accelerator.print(f"{describe(config, arguments.preset)}\nfeatures: {names}")
    found = trainer.train()
    folder = trainer.save_model()
    for decay in config.more_ema_decays:
        trainer.save_model(f"{folder}-ema-{decay:g}", ema_decay=decay)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    trainer.accelerator.print(
        f"{numbers}\n{folder}: DriftingPipeline.from_pretrained loads it; evaluate it with drifting-diffusers evaluate"
    )
    return trainer


def real_samples(arguments: Arguments, seed: int) -> tuple[Any, Any]:
    """What is trained on and what is held out, which may be nothing."""
    name = arguments.dataset_name
    if (arguments.latents is None) == (name is None):
        raise SystemExit("give what to train on as --latents or as --dataset_name, one of them")
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


def make_generator(arguments: Arguments, config: DriftingConfig) -> DriftingGenerator:
    """The generator of the preset, with what --model_config says; guidance is embedded where it is trained."""
    model: dict[str, Any] = {"guidance_embedding": bool(config.unconditional_per_label)}
    if arguments.preset:
        model |= PRESETS[arguments.preset].model
    if arguments.model_config is not None:
        text = arguments.model_config
        model |= json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    return DriftingGenerator(**model)


if __name__ == "__main__":
    main()
