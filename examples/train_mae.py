"""Train the feature encoder that generators are compared in, a masked autoencoder (arXiv 2602.04770, A.3), on one GPU or many.

    accelerate launch examples/train_mae.py --preset mae-latent-256 --dataset_name imagefolder_or_parquet_or_hub_name
    accelerate launch examples/train_mae.py --preset mae-pixel-640 --dataset_name ... --eval_split validation
    accelerate launch examples/train_mae.py --preset mae-latent-256 --latents outputs/latents --crop_area_min 1

Images are cropped at random before a VAE encodes them as they come; --latents trains on a cache of examples/cache_latents.py, without crops. With
--streaming images pass by in the order in which they come and never lie on a disk. Leaves
previews and encoder/ in the output_dir: MaskedAutoencoder.from_pretrained loads it, DriftingObjective(encoder.activations) compares samples in it.
Run the same command again and it goes on where it stopped.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from diffusers import AutoencoderKL

from drifting_diffusers import MaskedAutoencoder
from drifting_diffusers.arguments import describe, parse_arguments
from drifting_diffusers.config import EncoderConfig
from drifting_diffusers.data import RealSamples, label_names, open_images
from drifting_diffusers.encoder_trainer import MaskedAutoencoderTrainer
from drifting_diffusers.latents import LatentCache
from drifting_diffusers.presets import ENCODER_PRESETS
from drifting_diffusers.sampling import processes

VAE = "stabilityai/sd-vae-ft-mse"  # the release's


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Arguments:
    preset: str | None = option(None, "a recipe; what follows and what --config says goes over it")
    dataset_name: str | None = option(
        None, "images to train on: a dataset of the Hub, a folder of images or of parquet files, or one such file"
    )
    train_split: str = option("train", "split to train on")
    eval_split: str | None = option(None, "split of held-out images; without one evaluations are of training images")
    streaming: bool = option(False, "read training images as a stream; needs --eval_split")
    max_train_samples: int | None = option(None, "train on so many images only, the first of a shuffle, of a stream the first")
    resolution: int = option(256, "side of the images in pixels")
    latents: str | None = option(None, "folder of a latent cache to train on; needs --crop_area_min 1")
    eval_latents: str | None = option(None, "folder of a latent cache of held-out images")
    vae: str | None = option(
        None, f"an AutoencoderKL, for an encoder of latents: a folder or a repository; {VAE} for presets of latents if not given"
    )
    vae_subfolder: str | None = option(None, "where in it, for pipelines: vae")
    channels: int | None = option(None, "of the images of an encoder of pixels: 1 for grey, 3 for colour; the preset's, else 3")
    base_channels: int | None = option(None, "of the encoder's first stage, a multiple of 32; the preset's, else 640")
    layers_per_stage: list[int] = field(default_factory=list, metadata={"help": "residual blocks of its four stages; 3 4 6 3 if not given"})
    input_patch_size: int | None = option(None, "side of the squares of pixels that it reads as one position; the preset's, else 1")
    mask_patch_size: int | None = option(None, "side of the squares of positions that are masked together; 2 if not given")


def main(argv: list[str] | None = None) -> MaskedAutoencoderTrainer:
    arguments, config = parse_arguments((Arguments, EncoderConfig), argv, description=__doc__)
    with processes().local_main_process_first():  # what is downloaded or unpacked is so once
        train, held_out = real_samples(arguments, config.seed)
        vae = open_vae(arguments)
    torch.manual_seed(config.seed)
    trainer = MaskedAutoencoderTrainer(
        make_encoder(arguments, config, [train, held_out], vae),
        train,
        config,
        size=None if arguments.latents else (arguments.resolution, arguments.resolution),
        eval_dataset=held_out,
        vae=vae,
    )
    trainer.accelerator.print(describe(config, arguments.preset))
    found = trainer.train()
    folder = trainer.save_model()
    for decay in config.more_ema_decays:
        trainer.save_model(f"{folder}-ema-{decay:g}", ema_decay=decay)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    trainer.accelerator.print(
        f"{numbers}\n{folder}: MaskedAutoencoder.from_pretrained loads it; previews are in {trainer.run.path}/previews"
    )
    return trainer


def real_samples(arguments: Arguments, seed: int) -> tuple[Dataset | IterableDataset | RealSamples, Dataset | RealSamples | None]:
    """What is trained on and what is held out, which may be nothing."""
    name = arguments.dataset_name
    if (arguments.latents is None) == (name is None):
        raise SystemExit("give what to train on as --dataset_name or as --latents, one of them")
    if arguments.streaming and (name is None or arguments.eval_split is None):
        raise SystemExit("--streaming is of images, --dataset_name, and needs held-out ones, --eval_split")
    if name is None:
        return LatentCache(arguments.latents or ""), LatentCache(arguments.eval_latents) if arguments.eval_latents else None
    train = open_images(name, arguments.train_split, streaming=arguments.streaming)
    held_out = open_images(name, arguments.eval_split) if arguments.eval_split else None
    if arguments.max_train_samples is not None and arguments.streaming:
        train = train.take(arguments.max_train_samples)
    elif arguments.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(arguments.max_train_samples, len(train))))
    return train, held_out


def model_of(arguments: Arguments) -> dict[str, Any]:
    return dict(ENCODER_PRESETS[arguments.preset].model) if arguments.preset else {}


def open_vae(arguments: Arguments) -> AutoencoderKL | None:
    of_latents = model_of(arguments).get("in_channels") == 4
    name = arguments.vae or (VAE if of_latents and not arguments.latents else None)
    return AutoencoderKL.from_pretrained(name, subfolder=arguments.vae_subfolder) if name else None


def make_encoder(arguments: Arguments, config: EncoderConfig, data: list[Any], vae: AutoencoderKL | None) -> MaskedAutoencoder:
    """The encoder of the preset, with what the arguments say, for the channels and classes of the data: what is trained on, and what is held out."""
    train = data[0]
    given = {name: getattr(arguments, name) for name in ("base_channels", "layers_per_stage", "input_patch_size", "mask_patch_size")}
    model = model_of(arguments) | {name: value for name, value in given.items() if value not in (None, [])}
    if isinstance(train, RealSamples):
        model["in_channels"] = train.channels
    elif vae is not None:
        model["in_channels"] = vae.config.latent_channels
    else:
        model["in_channels"] = arguments.channels or model.get("in_channels", 3)
    if config.classification_steps:
        model["num_classes"] = count_classes(data, config.label_column)
    return MaskedAutoencoder(**model)


def count_classes(data: list[Any], label_column: str) -> int:
    """By their names, or by the labels; those of a stream are not known before it has passed by."""
    names = [each.names if isinstance(each, RealSamples) else label_names(each, label_column) for each in data if each is not None]
    if names[0] is not None:
        return len(names[0])
    readable = next(each for each in data if not isinstance(each, IterableDataset))
    return int(np.max(readable.labels if isinstance(readable, RealSamples) else readable[label_column])) + 1


if __name__ == "__main__":
    main()
