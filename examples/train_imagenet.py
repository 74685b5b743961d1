"""Train a one-step generator by drifting: the recipes of arXiv 2602.04770, or your own, on one GPU or many.

    accelerate launch examples/train_imagenet.py --preset ablation --latents latents/train --eval_latents latents/val
    accelerate launch examples/train_imagenet.py --config run.yaml --push_to_hub --hub_model_id user/drifting-b

Real samples are images (--dataset_name: a dataset of the Hub, a folder of images, parquet files; --streaming for
what no disk holds) or latents that examples/cache_latents.py wrote (--latents). Run the same command again and it
goes on where it stopped. docs/imagenet.md has the whole way.

This is `drifting-diffusers train` as a script: copy it where flags are not enough, and put your own generator,
objective or data in the place of what `trainer_arguments` makes of the flags.
"""

from drifting_diffusers import DriftingConfig, DriftingTrainer
from drifting_diffusers.arguments import parse_arguments
from drifting_diffusers.cli.train import Arguments, train_and_save, trainer_arguments


def main(argv: list[str] | None = None) -> DriftingTrainer:
    arguments, config = parse_arguments((Arguments, DriftingConfig), argv, description=__doc__)
    parts = trainer_arguments(arguments, config)  # generator, objective, train_dataset, eval_dataset, vae, extractor
    trainer = DriftingTrainer(config=config, **parts)
    train_and_save(trainer, arguments)
    return trainer


if __name__ == "__main__":
    main()
