"""The trainer: one step is the recipe, a resumed run is the run that never stopped, and wrong set-ups are refused before any work."""

import dataclasses
import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch.testing import assert_close

from drifting_diffusers import (
    DriftingConfig,
    DriftingField,
    DriftingGenerator,
    DriftingObjective,
    DriftingPipeline,
    DriftingTrainer,
    Pixels,
)
from drifting_diffusers.trainer import _halves

SMALL = {
    "max_steps": 6,
    "labels_per_step": 2,
    "generated_per_label": 3,
    "positives_per_label": 4,
    "unconditional_per_label": 2,
    "bank_size": 8,
    "unconditional_bank_size": 10,
    "push_per_step": 4,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "random_flip": True,
    "eval_steps": 3,
    "eval_samples_per_class": 3,
    "preview_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def images():
    """Three classes of 8 x 8 images: a bright column at one of three places, with noise."""
    rng = torch.Generator().manual_seed(0)
    labels = [i % 3 for i in range(36)]
    pixels = (torch.rand(36, 8, 8, generator=rng) * 60).byte()
    for i, label in enumerate(labels):
        pixels[i, :, 2 * label : 2 * label + 2] = 220
    features = Features({"image": Image(), "label": ClassLabel(names=["left", "middle", "right"])})
    return Dataset.from_dict({"image": [PILImage.fromarray(p.numpy()) for p in pixels], "label": labels}, features=features)


def tiny_generator(**changes):
    torch.manual_seed(0)
    small = {"sample_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 3, "num_layers": 1, "num_attention_heads": 2}
    small |= {"attention_head_dim": 8, "num_class_tokens": 1, "num_style_tokens": 2, "style_codebook_size": 4}
    return DriftingGenerator(**(small | changes))


def trainer(images, folder, *, generator=None, objective=None, **changes):
    config = DriftingConfig(output_dir=str(folder), **(SMALL | changes))
    return DriftingTrainer(generator or tiny_generator(), objective or DriftingObjective(Pixels()), images, config, eval_dataset=images)


def weights(of):
    return {name: value.clone() for name, value in of.ema.module.state_dict().items()}


def test_a_run_leaves_what_it_promises(images, tmp_path, capsys):
    run = trainer(images, tmp_path / "run")
    found = run.train()
    assert set(found) == {"energy", "energy_real", "spread", "spread_real"}
    assert "flat by construction" in capsys.readouterr().out
    assert DriftingConfig.from_folder(tmp_path / "run") == run.config
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert [p.name for p in (tmp_path / "run/previews").iterdir()] == ["step-000006.png"]
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines == run.log_history
    assert [line["step"] for line in lines if "energy" in line] == [3, 6]
    assert {"strength/pixels/0", "strength/pixels/2", "distance/pixels", "grad_norm", "learning_rate", "loss"} <= set(lines[0])

    folder = run.save_model()
    pipe = DriftingPipeline.from_pretrained(folder)
    assert pipe.labels == ["left", "middle", "right"]
    ours = run.sample(["left", 2], generator=torch.Generator().manual_seed(1), output_type="pt").images
    assert_close(pipe(["left", 2], generator=torch.Generator().manual_seed(1), output_type="pt").images, ours)
    assert ours.shape == (2, 1, 8, 8)


def test_resuming_is_never_having_stopped(images, tmp_path):
    """Bit for bit: killed after step 3, the last checkpoint is of step 2, and the same command goes on from there."""
    whole = trainer(images, tmp_path / "whole")
    whole.train()

    killed = trainer(images, tmp_path / "killed")
    killed._after_step = stop_at(killed, 3)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = trainer(images, tmp_path / "killed", generator=tiny_generator(num_layers=1))
    with torch.no_grad():
        again.accelerator.unwrap_model(again.generator).patch_proj.weight.fill_(7.0)  # whatever it starts from, the checkpoint counts
    again.train()

    for name, value in weights(whole).items():
        assert_close(weights(again)[name], value, rtol=0, atol=0, msg=name)
    assert_close(again.bank.samples, whole.bank.samples, rtol=0, atol=0)
    assert_close(again.unconditional_bank.samples, whole.unconditional_bank.samples, rtol=0, atol=0)
    assert again.optimizer.state_dict()["state"][0]["step"] == whole.optimizer.state_dict()["state"][0]["step"]
    assert again.log_history == whole.log_history


def stop_at(run, step):
    after = run._after_step

    def stop(outcome, bar):
        after(outcome, bar)
        if run.step == step:
            raise KeyboardInterrupt

    return stop


def test_the_seed_decides_everything(images, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name) % 1000)  # the global generator plays no part
        run = trainer(images, tmp_path / name, seed=seed, max_steps=3)
        run.train()
        runs.append(weights(run))
    assert_close(runs[0], runs[1], rtol=0, atol=0)
    assert not torch.equal(runs[0]["patch_proj.weight"], runs[2]["patch_proj.weight"])


def test_training_lowers_the_energy_distance(images, tmp_path):
    run = trainer(
        images,
        tmp_path / "run",
        generator=tiny_generator(guidance_embedding=False),
        unconditional_per_label=0,
        max_steps=150,
        labels_per_step=3,
        generated_per_label=8,
        positives_per_label=8,
        random_flip=False,
        learning_rate=1e-2,
        warmup_steps=5,
        ema_decay=0.9,
        lr_scheduler_type="cosine",
        save_steps=200,
        eval_steps=0,
        eval_samples_per_class=6,
    )
    before = run.generate(torch.arange(3).repeat_interleave(6), rng=torch.Generator().manual_seed(0))
    assert before.abs().max() == 0  # the output layer starts at zero
    found = run.train()
    assert found["energy"] < 2.5 * found["energy_real"]
    assert 0.5 < found["spread"] / found["spread_real"] < 1.5
    columns = run.generate(torch.arange(3), rng=torch.Generator().manual_seed(0)).mean(dim=(1, 2)).reshape(3, 4, 2).mean(-1)
    assert columns.argmax(dim=1).tolist() == [0, 1, 2]  # every class has its bright column where it belongs


def test_an_unconditional_generator_trains(images, tmp_path):
    run = trainer(
        images, tmp_path / "run", generator=tiny_generator(num_classes=0, guidance_embedding=False), unconditional_per_label=0, max_steps=2
    )
    assert run.train()["energy"] > 0
    assert len(run.sample(num_images_per_label=2).images) == 2


def test_gradient_checkpointing_and_workers_change_nothing(images, tmp_path):
    plain = trainer(images, tmp_path / "a", max_steps=2)
    other = trainer(images, tmp_path / "b", max_steps=2, gradient_checkpointing=True, dataloader_num_workers=1)
    plain.train(), other.train()
    assert_close(weights(plain), weights(other))


def test_the_averaged_weights_are_an_exponential_average(images, tmp_path):
    run = trainer(images, tmp_path / "run", max_steps=3, ema_decay=0.5)
    seen = []
    after = run._after_step
    run._after_step = lambda outcome, bar: (seen.append(run.generator.patch_proj.weight.detach().clone()), after(outcome, bar))
    run.train()
    assert_close(run.ema.module.patch_proj.weight, 0.25 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2])


def test_a_diverged_step_stops_with_the_last_checkpoint_intact(images, tmp_path):
    run = trainer(images, tmp_path / "run")
    after = run._after_step

    def poison(outcome, bar):
        after(outcome, bar)
        if run.step == 2:
            with torch.no_grad():
                run.generator.proj_out.weight.fill_(float("nan"))

    run._after_step = poison
    with pytest.raises(ValueError, match="generated holds"):
        run.train()
    assert list(run.run.checkpoints()) == [2]


def test_a_gradient_that_is_not_finite_stops_the_run(images, tmp_path):
    poles = lambda x: {"root": x.flatten(1)[:, None].abs().sqrt()}  # at 0, where an untrained generator stands, its slope is infinite
    run = trainer(images, tmp_path / "run", objective=DriftingObjective(poles))
    with pytest.raises(FloatingPointError, match=r"step 0 is not finite \(norm nan\).*run is sound"):
        run.train()


def test_constant_features_are_dropped_loudly(images, tmp_path, capsys):
    constant = lambda x: {"constant": torch.ones(len(x), 1, 3), "pixels": x.flatten(1)[:, None]}
    run = trainer(images, tmp_path / "run", objective=DriftingObjective(constant), max_steps=1)
    run.train()
    assert "left out of the loss: ['constant']" in capsys.readouterr().out
    assert run.objective.ignored == {"constant"}


@pytest.mark.parametrize(
    ("generator", "changes", "message"),
    [
        ({"num_classes": 2}, {}, "labels must lie in"),
        ({"num_classes": 5}, {}, r"classes \[3, 4\] have no image"),
        ({"guidance_embedding": False}, {}, "unconditional_per_label=2.*guidance_embedding=False"),
        ({}, {"unconditional_per_label": 0}, "unconditional_per_label=0.*guidance_embedding=True"),
        ({}, {"image_column": "photo"}, "no column 'photo'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(images, tmp_path, generator, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(images, tmp_path / "run", generator=tiny_generator(**generator), **changes)
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder_is_refused(images, tmp_path):
    trainer(images, tmp_path / "run", max_steps=1).train()
    with pytest.raises(ValueError, match="holds another run: learning_rate"):
        trainer(images, tmp_path / "run", max_steps=1, learning_rate=5e-4)


def test_another_generator_objective_or_dataset_in_the_folder_is_refused(images, tmp_path):
    trainer(images, tmp_path / "run", max_steps=1).train()
    for changes in ({"generator": tiny_generator(num_layers=2)}, {"objective": DriftingObjective(Pixels(), DriftingField((0.1,)))}):
        with pytest.raises(ValueError, match=r"holds another run: (generator|field)="):
            trainer(images, tmp_path / "run", max_steps=1, **changes)
    with pytest.raises(ValueError, match=r"holds another run: images=33 \(there: 36\)"):
        trainer(images.select(range(33)), tmp_path / "run", max_steps=1)


def test_too_few_images_to_evaluate_with_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match=r"classes \[1, 2\] have fewer than 4"):
        trainer(images.select(range(10)), tmp_path / "run")


def test_halves_split_every_class():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    reference, control = _halves(labels)
    assert labels[reference].tolist() == [0, 0, 1, 2, 2] == labels[control].tolist()
    assert not (reference & control).any()


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DriftingConfig("x").seed = 3  # pyright: ignore[reportAttributeAccessIssue]
