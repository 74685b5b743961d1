"""The trainer: one step is the recipe, a resumed run is the run that never stopped, and wrong set-ups are refused before any work."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
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
    MultiScaleStatistics,
    Pixels,
    Windows,
)
from drifting_diffusers.classifiers import SmallClassifier
from drifting_diffusers.loop import TIMING
from drifting_diffusers.losses import NonFinite
from drifting_diffusers.watching import halves

SMALL = {
    "max_steps": 6,
    "labels_per_step": 2,
    "generated_per_label": 3,
    "positives_per_label": 4,
    "unconditional_per_label": 2,
    "bank_size": 8,
    "unconditional_bank_size": 10,
    "push_per_step": 4,
    "warmup_steps": 1,
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


@pytest.fixture(autouse=True)
def one_accelerator_per_test():
    """Accelerate keeps one state per process, which knows one precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny_generator(**changes):
    torch.manual_seed(0)
    small = {"sample_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 3, "num_layers": 1, "num_attention_heads": 2}
    small |= {"attention_head_dim": 8, "num_class_tokens": 1, "num_style_tokens": 2, "style_codebook_size": 4}
    return DriftingGenerator(**(small | changes))


def trainer(images, folder, *, generator=None, objective=None, **changes):
    config = DriftingConfig(output_dir=str(folder), **(SMALL | changes))
    return DriftingTrainer(generator or tiny_generator(), objective or DriftingObjective(Pixels()), images, config, eval_dataset=images)


def averaged(of):
    return of.ema.models[of.config.ema_decay]


def weights(of):
    return {name: value.clone() for name, value in averaged(of).state_dict().items()}


def history(of):
    """What a run logged, without what depends on the machine."""
    return [{name: value for name, value in entry.items() if name not in TIMING} for entry in of.log_history]


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
    for ours, theirs in zip(
        (again.real.feed.positives, again.real.feed.negatives), (whole.real.feed.positives, whole.real.feed.negatives), strict=True
    ):
        assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert again.optimizer.state_dict()["state"][0]["step"] == whole.optimizer.state_dict()["state"][0]["step"]
    assert history(again) == history(whole)


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


def test_cached_features_change_nothing_and_resume(images, tmp_path):
    objective = lambda: DriftingObjective([Pixels(), MultiScaleStatistics()])
    plain = trainer(images, tmp_path / "a", objective=objective())
    cached = trainer(images, tmp_path / "b", objective=objective(), cache_features=True)
    plain.train(), cached.train()
    assert cached.real.feed.positives.samples.shape[2:] == (64 + 4 + 16 * 4,)
    assert_close(weights(plain), weights(cached), rtol=1e-3, atol=1e-5)

    killed = trainer(images, tmp_path / "c", objective=objective(), cache_features=True)
    killed._after_step = stop_at(killed, 3)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = trainer(images, tmp_path / "c", objective=objective(), cache_features=True)
    again.train()
    assert_close(weights(again), weights(cached), rtol=0, atol=0)


def test_the_averaged_weights_are_an_exponential_average(images, tmp_path):
    run = trainer(images, tmp_path / "run", max_steps=3, ema_decay=0.5)
    seen = []
    after = run._after_step
    run._after_step = lambda outcome, bar: (seen.append(run.generator.patch_proj.weight.detach().clone()), after(outcome, bar))
    run.train()
    assert_close(averaged(run).patch_proj.weight, 0.25 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2])


def poisoned(run, step):
    """The weights become NaN after this step."""
    after = run._after_step

    def poison(outcome, bar):
        after(outcome, bar)
        if run.step == step:
            with torch.no_grad():
                run.generator.proj_out.weight.fill_(float("nan"))

    run._after_step = poison
    return run


def test_a_diverged_run_skips_a_few_steps_and_stops_with_its_checkpoints_intact(images, tmp_path):
    run = poisoned(trainer(images, tmp_path / "run", max_skipped_steps=1, max_steps=9), 2)
    with (
        pytest.warns(RuntimeWarning, match=r"step 2 is skipped \(1 so far\): feature 'pixels': generated holds"),
        pytest.raises(FloatingPointError, match=r"step 3 is not finite, and 1 were skipped before.*generated holds .*steps \[2\] are in"),
    ):
        run.train()
    assert list(run.run.checkpoints()) == [2]


def test_a_gradient_that_is_not_finite_names_its_feature(images, tmp_path):
    """At 0, where an untrained generator stands, the slope of a root is infinite, though every value is finite."""
    maps = lambda x: {"root": x.flatten(1)[:, None].abs().sqrt(), "pixels": x.flatten(1)[:, None]}
    run = trainer(images, tmp_path / "run", objective=DriftingObjective(maps), max_skipped_steps=0)
    with pytest.raises(
        FloatingPointError, match=r"step 0 is not finite.* the norm of the gradient is nan: the gradients of features \['root'\]"
    ):
        run.train()


def test_a_step_that_is_skipped_is_counted_and_the_run_goes_on(images, tmp_path):
    """And a resumed run goes through the same: the step that is skipped is a function of the step as every other."""
    whole = sometimes(trainer(images, tmp_path / "a"), 3)
    with pytest.warns(RuntimeWarning, match="step 3 is skipped"):
        whole.train()
    assert whole.skipped == 1
    assert whole.schedule.last_epoch == whole.step == 6
    assert [entry.get("skipped_steps") for entry in whole.log_history if "loss" in entry] == [None, None, None, 1, 1]

    killed = sometimes(trainer(images, tmp_path / "b"), 3)
    killed._after_step = stop_at(killed, 5)
    with pytest.warns(RuntimeWarning, match="step 3 is skipped"), pytest.raises(KeyboardInterrupt):
        killed.train()
    again = trainer(images, tmp_path / "b")
    again.train()
    assert again.skipped == 1
    assert_close(weights(again), weights(whole), rtol=0, atol=0)


def sometimes(run, step):
    """One step's loss is not finite."""
    take = run.training_step

    def broken():
        if run.step == step:
            run.real.of_step(step)
            raise NonFinite("on purpose")
        return take()

    run.training_step = broken
    return run


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
    with pytest.raises(ValueError, match=r"holds another run: data=.*'images': 33.*there: .*'images': 36"):
        trainer(images.select(range(33)), tmp_path / "run", max_steps=1)


def test_too_few_images_to_evaluate_with_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match=r"classes \[1, 2\] have fewer than 4"):
        trainer(images.select(range(10)), tmp_path / "run")


def test_halves_split_every_class():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    reference, control = halves(labels)
    assert labels[reference].tolist() == [0, 0, 1, 2, 2] == labels[control].tolist()
    assert not (reference & control).any()


def test_guidance_reaches_the_generator_and_the_weights_of_the_negatives(images, tmp_path):
    """What one step hands on: the scale of each label to all of its samples, and its negatives' mass (alpha - 1)(n - 1) / m (arXiv 2602.04770, A.7)."""
    run = trainer(images, tmp_path / "run", labels_per_step=3, unconditional_per_label=5, guidance_power=2.0)
    run._begin()
    told, given = {}, {}
    forward, objective = run.generator.forward, run.objective
    run.generator.forward = lambda **inputs: (told.update(inputs), forward(**inputs))[1]
    run.objective = lambda *arguments, mean, situation: (
        given.update(zip(("generated", "positives", "negatives", "weights"), arguments, strict=True)),
        objective(*arguments, mean=mean, situation=situation),
    )[1]
    run.training_step()
    alpha = told["guidance_scale"].unflatten(0, (3, 3))
    assert_close(alpha, alpha[:, :1].expand(3, 3))
    assert (alpha > 1).all()
    assert (alpha < 4).all()
    assert len(alpha[:, 0].unique()) == 3
    assert_close(given["weights"], (alpha[:, 0] - 1) * 2 / 5)
    assert sorted(told["class_labels"].unflatten(0, (3, 3))[:, 0].tolist()) == [0, 1, 2]
    assert given["negatives"].shape == (3, 5, 1, 8, 8)
    bright = given["positives"].mean(dim=(1, 2, 3)).reshape(3, 4, 2).mean(-1).argmax(-1)
    assert bright.tolist() == told["class_labels"].unflatten(0, (3, 3))[:, 0].tolist()  # positives are of the label's own class
    mixed = given["negatives"].mean(dim=(2, 3)).reshape(15, 4, 2).mean(-1).argmax(-1)
    assert len(mixed.unique()) > 1  # negatives are of any


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # bfloat16 tokens meet a float32 norm, as they should
@pytest.mark.parametrize(
    "option",
    [
        {"guidance_max": 2.0},
        {"guidance_power": 5.0},
        {"unguided_share": 1.0},
        {"weight_decay": 0.9},
        {"adam_beta1": 0.1},
        {"adam_beta2": 0.5},
        {"max_grad_norm": 1e-6},
        {"lr_scheduler_type": "cosine"},
        {"random_flip": False},
        {"positives_per_label": 3},
        {"unconditional_per_label": 1},
        {"bank_size": 4},
        {"unconditional_bank_size": 3},
        {"push_per_step": 9},
        {"warmup_steps": 3},
        {"ema_decay": 0.5},
        {"mixed_precision": "bf16"},
        {"seed": 1},
        {"labels_per_step": 1},
        {"generated_per_label": 4},
        {"labels_from": "data"},
        {"positives_from": "dataset"},
        {"bank_dtype": "bfloat16"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_no_option_is_accepted_and_ignored(option, images, tmp_path, reference_weights):
    run = trainer(images, tmp_path / "run", **(OPTIONS | option))
    run.train()
    assert not torch.equal(averaged(run).patch_proj.weight, reference_weights)


OPTIONS = {"max_steps": 4, "eval_steps": 0, "preview_steps": 0, "save_steps": 9}


@pytest.fixture(scope="module")
def reference_weights(images, tmp_path_factory):
    run = trainer(images, tmp_path_factory.mktemp("reference") / "run", **OPTIONS)
    run.train()
    return averaged(run).patch_proj.weight


def test_pictures_and_numbers_are_of_the_averaged_weights(images, tmp_path):
    run = trainer(images, tmp_path / "run", ema_decay=0.9, max_steps=3)
    run.train()
    noise, styles = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([[0, 1], [2, 3]])
    expected = averaged(run)(noise, torch.tensor([0, 1]), 1.0, styles).sample
    assert not torch.allclose(expected, run.generator(noise, torch.tensor([0, 1]), 1.0, styles).sample)
    drawn = run.sample([0, 1], latents=noise, style_labels=styles, output_type="latent").images
    assert_close(drawn, expected.detach())
    rng = lambda: torch.Generator().manual_seed(4)
    inputs = run._inputs(torch.tensor([0, 1]), *run._noise(2, rng()))
    assert_close(run.generate(torch.tensor([0, 1]), rng=rng()), averaged(run)(**inputs).sample.detach().clamp(-1, 1))


def test_a_new_trainer_on_a_finished_run_is_that_run(images, tmp_path):
    run = trainer(images, tmp_path / "run", max_steps=2)
    found, folder = run.train(), run.save_model()
    before = (folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    assert trainer(images, tmp_path / "run", max_steps=2).evaluate() == found
    trainer(images, tmp_path / "run", max_steps=2).save_model()
    assert (folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes() == before
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == len(run.log_history)


def test_a_run_is_recognised_in_another_process():
    """No address of this process may enter the description."""
    code = (
        "import json; from drifting_diffusers import *; from drifting_diffusers.classifiers import SmallClassifier; import torch; torch.manual_seed(0);"
        "print(json.dumps(DriftingObjective([Pixels(), Windows(), SmallClassifier(1, 2).activations]).describe()))"
    )
    theirs = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    torch.manual_seed(0)
    ours = DriftingObjective([Pixels(), Windows(), SmallClassifier(1, 2).activations]).describe()
    assert json.loads(json.dumps(ours)) == theirs
    torch.manual_seed(1)  # other weights are another objective
    assert DriftingObjective([Pixels(), Windows(), SmallClassifier(1, 2).activations]).describe() != ours


def test_metrics_that_break_cost_no_checkpoint(images, tmp_path):
    def broken(images, labels):
        raise RuntimeError("a bug of the user")

    run = trainer(images, tmp_path / "run", max_steps=4, save_steps=3)
    run.watcher.compute_metrics = broken
    with pytest.raises(RuntimeError, match="a bug of the user"):
        run.train()
    assert list(run.run.checkpoints()) == [3]
    again = trainer(images, tmp_path / "run", max_steps=4, save_steps=3)
    again.watcher.compute_metrics = lambda images, labels: {"mean": images.mean()}
    assert isinstance(again.train()["mean"], float)
    again.watcher.compute_metrics, again.log_history = (lambda images, labels: {"energy": 0.0}), []
    with pytest.raises(ValueError, match=r"returned \['energy'\]"):
        again.evaluate()


def test_a_broken_checkpoint_is_named(images, tmp_path):
    run = trainer(images, tmp_path / "run", max_steps=2)
    run.train()
    (tmp_path / "run/checkpoint-2/model.safetensors").write_bytes(b"half")
    with pytest.raises(RuntimeError, match=r"checkpoint-2 cannot be read .*remove this folder"):
        trainer(images, tmp_path / "run", max_steps=2).train()


def test_encoders_are_frozen(images, tmp_path):
    encoder = SmallClassifier(1, 3, width=2).train()
    run = trainer(images, tmp_path / "run", objective=DriftingObjective([Pixels(), encoder.activations]), max_steps=2)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    run.train()
    assert_close(encoder.state_dict(), before, rtol=0, atol=0)  # batch statistics too
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (lambda: tiny_generator(in_channels=4), r"1 or 3 channels.*got 4.*LatentCache"),
        (lambda: tiny_generator(out_channels=3), "same channels, got 1 and 3"),
        (lambda: tiny_generator().to(torch.bfloat16), "float32, got torch.bfloat16"),
        (lambda: tiny_generator().requires_grad_(False), "must be trainable"),
    ],
)
def test_generators_that_cannot_be_trained_are_refused(generator, message, images, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(images, tmp_path / "run", generator=generator())


def test_held_out_classes_must_have_the_same_names(images, tmp_path):
    other = images.cast_column("label", ClassLabel(names=["right", "left", "middle"]))
    with pytest.raises(ValueError, match=r"same classes in the same order.*'left'.*'right'"):
        DriftingTrainer(
            tiny_generator(), DriftingObjective(Pixels()), images, DriftingConfig(str(tmp_path / "run"), **SMALL), eval_dataset=other
        )


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DriftingConfig("x").seed = 3  # pyright: ignore[reportAttributeAccessIssue]
