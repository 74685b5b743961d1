"""examples/train_imagenet.py, as a user starts it: images, a stream, latents of real ImageNet images; presets, YAML, resuming."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import AutoencoderKL
from PIL import Image as PILImage
from test_trainer import one_accelerator_per_test
from torch.testing import assert_close

from drifting_diffusers import DriftingPipeline
from drifting_diffusers.config import CONFIG_NAME, DriftingConfig

__all__ = ["one_accelerator_per_test"]

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = """
max_steps: 4
warmup_steps: 1
labels_per_step: 2
generated_per_label: 3
positives_per_label: 3
unconditional_per_label: 2
bank_size: 6
unconditional_bank_size: 8
push_per_step: 4
eval_steps: 2
preview_steps: 4
eval_samples_per_class: 2
save_steps: 2
logging_steps: 1
mixed_precision: no
"""
TINY = {"patch_size": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_class_tokens": 1, "num_style_tokens": 2}


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Parquet files of three classes of 8 x 8 images, and a YAML file."""
    folder = tmp_path_factory.mktemp("data")
    rng = torch.Generator().manual_seed(0)
    features = Features({"picture": Image(), "kind": ClassLabel(names=["a", "b", "c"])})
    for split, n in (("train", 36), ("validation", 24)):
        images = [PILImage.fromarray((torch.rand(8, 8, generator=rng) * 255).byte().numpy()) for _ in range(n)]
        Dataset.from_dict({"picture": images, "kind": [i % 3 for i in range(n)]}, features=features).to_parquet(folder / f"{split}.parquet")
    (folder / "run.yaml").write_text(SMALL + "image_column: picture\nlabel_column: kind\n")
    return folder


def started(folder, output, *flags, **model):
    model = TINY | {"sample_size": 8, "in_channels": 1, "num_classes": 3} | model
    given = ["--config", str(folder / "run.yaml"), "--output_dir", str(output), "--model_config", json.dumps(model)]
    return example("train_imagenet").main([*given, *flags])


def weights(trainer):
    return {name: value.clone() for name, value in trainer.pipeline().transformer.state_dict().items()}


def test_images_from_a_folder_with_flags_over_yaml(folder, tmp_path, capsys):
    flags = ["--dataset_name", str(folder), "--eval_split", "validation", "--max_train_steps", "3", "--more_ema_decays", "0.5"]
    trainer = started(folder, tmp_path / "run", *flags, "--features", "pixels + statistics + classifier")
    said = capsys.readouterr().out
    assert "max_steps" in said
    assert "features: pixels + statistics + classifier" in said
    config = DriftingConfig.from_folder(tmp_path / "run")
    assert (config.max_steps, config.labels_per_step, config.image_column) == (3, 2, "picture")
    pipe = DriftingPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe.labels == ["a", "b", "c"]
    assert_close(pipe.transformer.state_dict(), weights(trainer))
    other = DriftingPipeline.from_pretrained(tmp_path / "run/pipeline-ema-0.5")
    assert not torch.equal(other.transformer.patch_proj.weight, pipe.transformer.patch_proj.weight)
    assert list((tmp_path / "run-classifiers").iterdir())

    again = started(folder, tmp_path / "run", *flags, "--features", "pixels + statistics + classifier")  # finds the run finished
    assert_close(weights(again), weights(trainer), rtol=0, atol=0)


def test_a_stream_trains_and_resumes_to_the_same_bits(folder, tmp_path):
    flags = ["--dataset_name", str(folder), "--eval_split", "validation", "--streaming", "--random_flip", "--features", "pixels"]
    whole = started(folder, tmp_path / "whole", *flags)
    bank = whole.real.feed.positives
    assert bank.count.tolist() == [6, 6, 6]
    half = example("train_imagenet")

    class Killed(half.DriftingTrainer):
        def _after_step(self, outcome, bar):
            super()._after_step(outcome, bar)
            if self.step == 3:
                raise KeyboardInterrupt

    half.DriftingTrainer = Killed
    model = json.dumps(TINY | {"sample_size": 8, "in_channels": 1, "num_classes": 3})
    given = ["--config", str(folder / "run.yaml"), "--output_dir", str(tmp_path / "run"), "--model_config", model, *flags]
    with pytest.raises(KeyboardInterrupt):
        half.main(given)
    again = started(folder, tmp_path / "run", *flags)
    assert_close(weights(again), weights(whole), rtol=0, atol=0)
    assert_close(again.real.feed.positives.state_dict(), bank.state_dict(), rtol=0, atol=0)


def test_latents_of_real_images_from_the_cache_to_a_picture(shared, tmp_path, capsys):
    """1,000 ImageNet images in ten groups of classes: cached by a real VAE of random weights, 20 steps, resumed, evaluated, saved, drawn from."""
    images = Dataset.from_parquet(str(shared / "data/imagenet_samples/train.parquet")).select_columns(["image", "label"]).shuffle(seed=0)
    groups = Features({"image": Image(), "label": ClassLabel(names=[f"group {i}" for i in range(10)])})
    images.map(lambda row: {"label": row["label"] // 100}, features=groups).to_parquet(tmp_path / "train.parquet")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4
    ).save_pretrained(tmp_path / "vae")
    common = ["--vae", str(tmp_path / "vae")]
    example("cache_latents").main(
        ["--dataset_name", str(tmp_path / "train.parquet"), "--output_dir", str(tmp_path / "latents"), "--resolution", "32", "--dtype", "float32",
         "--dataloader_num_workers", "0", *common]
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(SMALL)
    flags = [
        "--preset", "ablation", "--latents", str(tmp_path / "latents"), "--save_steps", "10", "--eval_steps", "10",
        "--preview_steps", "10", "--features", "pixels", "--positives_from", "dataset", *common,
    ]  # fmt: skip
    form = {"sample_size": 16, "in_channels": 4, "num_classes": 10}
    started(tmp_path, tmp_path / "run", *flags, "--max_steps", "10", **form)
    trainer = started(
        tmp_path, tmp_path / "run", *flags, "--max_steps", "20", **form
    )  # at a constant learning rate a longer run has the same beginning
    said = capsys.readouterr().out
    assert "ablation" in said
    assert "checkpoint-10" in said
    assert json.loads((tmp_path / "run" / CONFIG_NAME).read_text())["random_flip"] is True  # of the preset
    assert [path.name for path in sorted((tmp_path / "run/previews").iterdir())] == ["step-000010.png", "step-000020.png"]
    pipe = DriftingPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe(["group 3"], generator=torch.Generator().manual_seed(0)).images[0].size == (32, 32)
    assert pipe.labels[:2] == ["group 0", "group 1"]
    assert trainer.log_history[-1]["energy"] > 0


def test_what_to_train_on_is_asked_for(folder, tmp_path, capsys):
    for flags in ([], ["--latents", "a", "--dataset_name", "b"]):
        with pytest.raises(SystemExit, match="2"):
            started(folder, tmp_path / "run", *flags)
        assert "as --latents or as --dataset_name, one of them" in capsys.readouterr().err
