"""A tiny training run in a process of its own, for tests of several processes and of processes that are killed.

python train_worker.py OUTPUT_DIR '{"config": {...}, ...}'        started by torchrun or alone; leaves OUTPUT_DIR/weights.safetensors
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import save_file

from drifting_diffusers import DriftingConfig, DriftingGenerator, DriftingObjective, DriftingTrainer, MultiScaleStatistics, Pixels
from drifting_diffusers.fields import batch_mean

SMALL = {
    "max_steps": 5,
    "labels_per_step": 4,
    "generated_per_label": 4,
    "positives_per_label": 4,
    "unconditional_per_label": 2,
    "bank_size": 8,
    "unconditional_bank_size": 10,
    "push_per_step": 3,
    "warmup_steps": 1,
    "learning_rate": 1e-3,
    "random_flip": True,
    "eval_steps": 0,
    "eval_samples_per_class": 3,
    "preview_steps": 0,
    "save_steps": 2,
    "logging_steps": 1,
}

FSDP = {  # what examples/accelerate_configs/fsdp2.yaml makes of the environment
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "DriftingBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def dataset():
    """Four classes of 8 x 8 images of very different contrast, so that the means of a part of the labels are far from those of all."""
    rng = torch.Generator().manual_seed(0)
    labels = [i % 4 for i in range(48)]
    pixels = torch.randn(48, 8, 8, generator=rng)
    images = [PILImage.fromarray((128 + 30 * 0.3**label * p).clamp(0, 255).byte().numpy()) for label, p in zip(labels, pixels, strict=True)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c", "d"])})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def generator():
    torch.manual_seed(0)
    model = DriftingGenerator(
        sample_size=8, patch_size=4, in_channels=1, num_classes=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_class_tokens=1, num_style_tokens=2, style_codebook_size=4,
    )  # fmt: skip
    for parameter in model.parameters():  # the output layer starts at 0, where all samples are alike and rounding decides
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def kill_within(trainer, name, step):
    """SIGKILL in the middle of this method, after so many steps; of `_save_state` when all is written but what tells of the step."""
    method = getattr(trainer, name)

    def struck(*arguments):
        if trainer.step == step:
            if name == "_save_state":
                trainer.accelerator.save_state(str(arguments[0]))
            os.kill(os.getpid(), signal.SIGKILL)
        method(*arguments)

    setattr(trainer, name, struck)


def main(folder: str, options: dict) -> None:
    if options.get("fsdp"):  # Accelerate shards on GPUs only, torch with gloo as well: let it believe that these are some
        os.environ |= FSDP
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    data = dataset()
    config = DriftingConfig(output_dir=folder, **(SMALL | options.get("config", {})))
    trainer = DriftingTrainer(generator(), DriftingObjective([Pixels(), MultiScaleStatistics()]), data, config, eval_dataset=data)
    if options.get("local_means"):
        trainer._mean = batch_mean
    if "signal" in options:  # at the end of this step, checkpoint and all
        after, (step, number) = trainer._after_step, options["signal"]

        def strike(outcome, bar):
            after(outcome, bar)
            if trainer.step == step and not Path(folder, "struck").exists():
                Path(folder, "struck").touch()
                os.kill(os.getpid(), getattr(signal, number))

        trainer._after_step = strike
    if "kill" in options:
        kill_within(trainer, *options["kill"])
    found = trainer.train()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        model = trainer.ema.models[config.ema_decay]
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, Path(folder) / "weights.safetensors")
        (Path(folder) / "found.json").write_text(json.dumps(found))
    print("kind", type(trainer.generator).__name__, "processes", trainer.accelerator.num_processes)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
