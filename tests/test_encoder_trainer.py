"""Training an encoder: every random number belongs to an image, so a step is the same however it is cut; a resumed run is the run that never stopped.

As a program it is one such run, for tests of several processes: python test_encoder_trainer.py OUTPUT_DIR '{"max_steps": 3, ...}'
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from drifting_diffusers import DriftingObjective, MaskedAutoencoder
from drifting_diffusers.config import EncoderConfig
from drifting_diffusers.data import LabelledImages, RealSamples
from drifting_diffusers.encoder_draws import BLOCK, in_blocks
from drifting_diffusers.encoder_trainer import MaskedAutoencoderTrainer, classification_weight_at
from drifting_diffusers.latents import cache_latents
from drifting_diffusers.loop import TIMING

ROOT = Path(__file__).parents[1]
SMALL = {
    "max_steps": 5,
    "batch_size": 6,
    "warmup_steps": 1,
    "learning_rate": 1e-3,
    "ema_decay": 0.5,
    "classification_steps": 3,
    "classification_warmup_steps": 2,
    "eval_steps": 0,
    "eval_samples": 5,
    "save_steps": 2,
    "logging_steps": 1,
}


def make_images(n=20, side=18):
    """Three classes of coloured images larger than what the encoder is given: a bright bar at one of three heights, with noise."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (n, side, side, 3), dtype=np.uint8)
    for i in range(n):
        pixels[i, 6 * (i % 3) : 6 * (i % 3) + 5] += np.uint8(190)
    features = Features({"image": Image(), "label": ClassLabel(names=["top", "middle", "bottom"])})
    return Dataset.from_dict({"image": [PILImage.fromarray(one) for one in pixels], "label": [i % 3 for i in range(n)]}, features=features)


def make_encoder(**changes):
    torch.manual_seed(0)
    return MaskedAutoencoder(**({"in_channels": 3, "base_channels": 32, "layers_per_stage": (1, 1, 1, 1), "num_classes": 3} | changes))


def make_vae(**changes):
    torch.manual_seed(0)
    choices = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    return AutoencoderKL(
        **(choices | {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)} | changes)
    ).eval()


IMAGES = make_images()


@pytest.fixture(autouse=True)
def one_accelerator_per_test():
    """Accelerate keeps one state per process, which knows one precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer(folder, *, encoder=None, data=IMAGES, size=(8, 8), eval_dataset=IMAGES, vae=None, **changes):
    config = EncoderConfig(output_dir=str(folder), **(SMALL | changes))
    return MaskedAutoencoderTrainer(encoder or make_encoder(), data, config, size=size, eval_dataset=eval_dataset, vae=vae)


def weights(run):
    return {name: value.clone() for name, value in run.encoder().state_dict().items()}


def assert_same_update(ours, theirs, rtol=1e-4):
    """Training moved every weight as far, to the same place."""
    before = make_encoder().state_dict()
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= rtol * (expected - before[name]).norm(), name


def history(run):
    return [{name: value for name, value in entry.items() if name not in TIMING} for entry in run.log_history]


# -- what a run is


def test_a_run_leaves_what_it_promises(tmp_path):
    run = trainer(tmp_path / "run", eval_steps=2, max_steps=5)
    found = run.train()
    assert set(found) == {"reconstruction", "reconstruction_flat", "accuracy"}
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines == run.log_history
    assert [line["step"] for line in lines if "reconstruction" in line] == [0, 2, 4, 5]
    assert len({line["reconstruction_flat"] for line in lines if "reconstruction" in line}) == 1  # always the same masks
    assert {"loss", "reconstruction_loss", "classification_loss", "classification_weight", "learning_rate", "grad_norm"} <= set(lines[1])
    assert sorted(p.name for p in (tmp_path / "run/previews").iterdir()) == [f"step-00000{k}.png" for k in (0, 2, 4, 5)]
    with PILImage.open(tmp_path / "run/previews/step-000005.png") as page:
        assert page.width > 5 * 64
        assert page.height > 3 * 64
    loaded = MaskedAutoencoder.from_pretrained(run.save_model())
    assert_close(loaded.state_dict(), run.encoder().state_dict(), rtol=0, atol=0)
    assert (tmp_path / "run/encoder/config.json").exists()
    again = trainer(tmp_path / "run", eval_steps=2, max_steps=5)
    assert again.evaluate() == found
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == len(lines)


def test_it_learns_to_fill_in_and_then_to_classify(tmp_path):
    run = trainer(
        tmp_path / "run",
        max_steps=40,
        batch_size=12,
        eval_steps=20,
        eval_samples=20,
        classification_steps=20,
        classification_warmup_steps=5,
        classification_weight=0.5,
        crop_area_min=0.8,
        save_steps=100,
    )
    run.train()
    first, middle, last = [entry for entry in run.log_history if "reconstruction" in entry]
    assert middle["reconstruction"] < 0.3 * first["reconstruction"]
    assert middle["reconstruction"] < middle["reconstruction_flat"]
    assert last["accuracy"] > 0.9


def test_the_seed_decides_everything(tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        encoder = make_encoder()
        torch.manual_seed(hash(name) % 1000)  # the global generator plays no part
        run = trainer(tmp_path / name, encoder=encoder, seed=seed, max_steps=3)
        run.train()
        found.append(weights(run))
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert not torch.equal(found[0]["conv_in.weight"], found[2]["conv_in.weight"])


@pytest.mark.parametrize("killed_after", [1, 3])
def test_resuming_is_never_having_stopped(killed_after, tmp_path):
    """Bit for bit, across the step 2, where classes begin to be learned: killed before the first checkpoint, or after the one of step 2."""
    whole = trainer(tmp_path / "whole", eval_steps=2)
    whole.train()
    killed = trainer(tmp_path / "killed", eval_steps=2)
    after = killed._after_step

    def stop(outcome, bar):
        after(outcome, bar)
        if killed.step == killed_after:
            raise KeyboardInterrupt

    killed._after_step = stop
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = trainer(tmp_path / "killed", eval_steps=2)
    if killed_after == 3:
        with torch.no_grad():
            again.model.conv_in.weight.fill_(7.0)  # whatever it starts from, the checkpoint counts
    again.train()
    assert_close(weights(again), weights(whole), rtol=0, atol=0)
    assert again.optimizer.state_dict()["state"][0]["step"] == whole.optimizer.state_dict()["state"][0]["step"]
    assert history(again) == history(whole)
    assert len((tmp_path / "killed/log.jsonl").read_text().splitlines()) == len(whole.log_history)


# -- however a step is cut


@pytest.fixture
def smooth(monkeypatch):
    """Without kinks: of 700,000 units some are so near 0 that rounding switches them on or off."""
    monkeypatch.setattr(torch.nn.functional, "relu", torch.nn.functional.silu)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The weights themselves after 3 steps in one piece, of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "relu", torch.nn.functional.silu)
        run = trainer(tmp_path_factory.mktemp("reference") / "run", **PIECES)
        run.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return weights(run)


PIECES = {"max_steps": 3, "classification_steps": 2, "classification_warmup_steps": 1, "ema_decay": 0.0, "save_steps": 9}
PIECES |= {
    "max_grad_norm": 1e-6,
    "learning_rate": 2e-2,
}  # far below AdamW's epsilon updates are gradients: else it divides rounding by rounding


@pytest.mark.parametrize(
    "option",
    [{"microbatch_size": 1}, {"microbatch_size": 4}, {"gradient_checkpointing": True}, {"dataloader_num_workers": 2}],
    ids=lambda option: next(iter(option)),
)
@pytest.mark.usefixtures("smooth")
def test_what_should_change_nothing_changes_nothing(option, tmp_path, reference):
    run = trainer(tmp_path / "run", **(PIECES | option))
    run.train()
    assert_same_update(weights(run), reference)


@pytest.mark.slow
@pytest.mark.usefixtures("smooth")
def test_two_processes_make_the_update_of_one(tmp_path, reference):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path / "two")]
    options = json.dumps(PIECES | {"microbatch_size": 2, "eval_steps": 3})
    done = subprocess.run([*command, options], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout
    assert_same_update(load_file(tmp_path / "two/weights.safetensors"), reference)

    alone = trainer(tmp_path / "one", **(PIECES | {"eval_steps": 3}))
    alone.train()
    theirs = [json.loads(line) for line in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    for ours, other in zip(history(alone), theirs, strict=True):
        assert ours == pytest.approx({name: value for name, value in other.items() if name not in TIMING}, rel=1e-3)


def test_chance_belongs_to_images_not_to_batches(tmp_path):
    """Ticket 7 is the same image, crop, mask and noise whether it is in the second batch of 6 or the fourth of 2."""
    batches = {}
    for size in (2, 6):
        draws = trainer(tmp_path / str(size), batch_size=size, vae=make_vae(), encoder=make_encoder(in_channels=4)).draws
        parts = [draws.of_step(step) for step in range(12 // size - (size == 2))]
        draws.close()
        batches[size] = [torch.cat([getattr(part, name) for part in parts])[:10] for name in ("samples", "labels", "masks", "noise")]
    for ours, theirs in zip(batches[2], batches[6], strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)
    samples, _, masks, noise = batches[6]
    assert len(samples.unique(dim=0)) == len(masks.unique(dim=0)) == len(noise.unique(dim=0)) == 10
    plain = LabelledImages(IMAGES, size=(8, 8), channels=3, num_classes=3, image_column="image", label_column="label").gather(range(20))[0]
    assert not any(torch.equal(sample, one) for sample in samples for one in plain)  # they are crops


def test_blocks_do_not_show():
    draw = lambda block: torch.arange(BLOCK * block, BLOCK * (block + 1))
    for tickets in (range(0, 3), range(BLOCK - 2, BLOCK + 1), range(5, 3 * BLOCK + 7)):
        assert in_blocks(tickets, draw).tolist() == list(tickets)


def test_masks_are_of_the_shares_asked_for(tmp_path):
    draws = trainer(tmp_path / "run", batch_size=200, size=(32, 32), mask_ratio_min=0.2, mask_ratio_max=0.8, max_steps=3).draws
    shares = draws.of_step(0).masks.mean((1, 2, 3))
    draws.close()
    assert 0.1 < shares.min() < 0.3
    assert 0.7 < shares.max() < 0.9
    assert 0.46 < shares.mean() < 0.54


# -- classes


def test_the_weight_of_the_classification_rises_at_the_end():
    config = EncoderConfig(
        "x", max_steps=100, warmup_steps=1, classification_steps=30, classification_warmup_steps=10, classification_weight=0.2
    )
    found = [classification_weight_at(step, config) for step in range(100)]
    assert found[:71] == [0.0] * 71
    assert found[71:80] == pytest.approx([0.02 * k for k in range(1, 10)])
    assert found[80:] == [0.2] * 20
    at_once = EncoderConfig("x", max_steps=9, warmup_steps=1, classification_steps=3, classification_warmup_steps=0)
    assert [classification_weight_at(step, at_once) for step in range(9)] == [0.0] * 6 + [0.1] * 3
    assert classification_weight_at(8, EncoderConfig("x", max_steps=9, warmup_steps=1)) == 0


def test_without_classes_labels_are_not_looked_at(tmp_path):
    run = trainer(
        tmp_path / "run",
        data=IMAGES.remove_columns("label"),
        eval_dataset=IMAGES.remove_columns("label"),
        classification_steps=0,
        max_steps=2,
        weight_decay=0.0,
    )
    found = run.train()
    assert set(found) == {"reconstruction", "reconstruction_flat"}
    assert "classification_loss" not in run.log_history[0]
    assert_close(run.encoder().classifier.weight, make_encoder().classifier.weight, rtol=0, atol=0)


def test_images_of_every_class_need_not_be_there(tmp_path):
    """Of the held-out ones above all."""
    run = trainer(tmp_path / "run", eval_dataset=IMAGES.select([0, 3]), encoder=make_encoder(num_classes=5), max_steps=3)
    assert 0 <= run.train()["accuracy"] <= 1


# -- latents


def test_images_become_latents_after_they_were_cropped(tmp_path):
    vae = make_vae(scaling_factor=0.5, shift_factor=0.25)
    run = trainer(tmp_path / "run", encoder=make_encoder(in_channels=4), vae=vae, eval_steps=3, max_steps=3, microbatch_size=4)
    batch = run.draws.of_step(0)
    run.draws.close()
    moments = vae.encode(batch.samples).latent_dist
    assert_close(run.draws.seen(batch), (moments.mean + moments.std * batch.noise - 0.25) * 0.5)
    assert_close(
        run.draws.pictured(run.draws.seen(batch)), vae.decode(run.draws.seen(batch) / 0.5 + 0.25).sample.clamp(-1, 1), rtol=1e-3, atol=1e-4
    )
    assert_close(run.draws.seen(run.draws.held_out(range(2, 4))), run.draws.seen(run.draws.held_out(range(5)))[2:4], rtol=1e-4, atol=1e-5)
    assert run.train()["reconstruction"] > 0
    assert not any(p.requires_grad for p in vae.parameters())
    assert len(list((tmp_path / "run/previews").iterdir())) == 2
    with pytest.raises(ValueError, match="holds another run: vae="):
        trainer(tmp_path / "run", encoder=make_encoder(in_channels=4), vae=make_vae(latent_channels=4, layers_per_block=2), max_steps=3)


def test_latents_on_disk(tmp_path):
    images = LabelledImages(IMAGES, size=(8, 8), channels=3, num_classes=3, image_column="image", label_column="label")
    cache = cache_latents(images, make_vae(), tmp_path / "latents", device="cpu")
    choices = {
        "data": cache,
        "eval_dataset": cache,
        "size": None,
        "encoder": make_encoder(in_channels=4),
        "crop_area_min": 1.0,
        "max_steps": 3,
    }
    run = trainer(tmp_path / "run", **choices, vae=make_vae())
    first = run.draws.of_step(0)
    run.draws.close()
    assert first.noise is None
    rows, seeds = run.draws._tickets.rows(range(6)), [(0, ticket) for ticket in range(6)]
    assert_close(first.samples, cache.varied(rows, seeds, flip=True), rtol=0, atol=0)
    run.train()
    assert [p.name for p in (tmp_path / "run/previews").iterdir()] == ["step-000003.png"]
    AcceleratorState._reset_state(reset_partial_state=True)
    blind = trainer(tmp_path / "blind", **(choices | {"encoder": make_encoder(in_channels=4)}))
    blind.train()
    assert not (tmp_path / "blind/previews").exists()  # what has four channels is no picture
    assert_close(weights(blind), weights(run), rtol=0, atol=0)


class Noise(RealSamples):
    """Anybody's own samples."""

    labels, size, channels, names = np.arange(12) % 3, (8, 8), 3, None

    def gather(self, rows):
        rngs = [torch.Generator().manual_seed(row) for row in rows]
        return torch.stack([torch.rand(3, 8, 8, generator=rng) for rng in rngs]), torch.as_tensor(self.labels[list(rows)])

    def varied(self, rows, seeds, *, flip):
        return self.gather(rows)[0]


def test_samples_that_are_read_by_row(tmp_path, capsys):
    run = trainer(tmp_path / "run", data=Noise(), eval_dataset=None, size=None, crop_area_min=1.0, max_steps=3)
    assert run.train()["reconstruction"] > 0
    assert "No eval_dataset" in capsys.readouterr().out


# -- every option


@pytest.mark.parametrize(
    "option",
    [
        {"seed": 1},
        {"batch_size": 4},
        {"mask_ratio_min": 0.1},
        {"mask_ratio_max": 0.9},
        {"crop_area_min": 0.9},
        {"crop_area_min": 1.0},
        {"random_flip": False},
        {"classification_steps": 2},
        {"classification_weight": 0.9},
        {"classification_warmup_steps": 1},
        {"learning_rate": 2e-3},
        {"lr_scheduler_type": "cosine"},
        {"warmup_steps": 2},
        {"adam_beta1": 0.1},
        {"adam_beta2": 0.5},
        {"weight_decay": 0.9},
        {"max_grad_norm": 1e-6},
        {"ema_decay": 0.1},
        {"mixed_precision": "bf16"},
    ],
    ids=lambda option: "_".join(map(str, *option.items())),
)
def test_no_option_is_accepted_and_ignored(option, tmp_path, plain):
    run = trainer(tmp_path / "run", **(OPTIONS | option))
    run._save_checkpoint = lambda: None
    run.train()
    assert not torch.equal(weights(run)["classifier.weight"], plain["classifier.weight"])


OPTIONS = {"max_steps": 4, "save_steps": 9}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("plain") / "run", **OPTIONS)
    run.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return weights(run)


def test_evaluations_are_of_as_many_images_as_asked_for(tmp_path):
    found = [trainer(tmp_path / str(n), eval_samples=n).evaluate()["reconstruction_flat"] for n in (1, 5, 20, 30)]
    assert len(set(found)) == 3  # there are 20
    assert found[2] == found[3]


def test_further_averages_are_kept_and_saved(tmp_path):
    run = trainer(tmp_path / "run", more_ema_decays=[0.0], max_steps=3)
    run.train()
    current = MaskedAutoencoder.from_pretrained(run.save_model(tmp_path / "now", ema_decay=0.0))
    assert_close(current.state_dict(), run.accelerator.unwrap_model(run.model).state_dict(), rtol=0, atol=0)
    assert not torch.equal(current.conv_in.weight, run.encoder().conv_in.weight)
    with pytest.raises(ValueError, match=r"one of \[0.5, 0.0\], got 0.9: set more_ema_decays"):
        run.save_model(ema_decay=0.9)


def test_compiling_is_of_the_blocks(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **kwargs: compiled.append(type(self).__name__))
    trainer(tmp_path / "run", torch_compile=True)
    assert compiled == ["ResidualBlock"] * 4


def test_a_step_that_is_not_finite_is_skipped(tmp_path):
    run = trainer(tmp_path / "run", max_skipped_steps=1)
    take = run.draws.of_step

    def broken(step):
        batch = take(step)
        return type(batch)(batch.samples * (float("nan") if step == 2 else 1), batch.labels, batch.masks, batch.noise)

    run.draws.of_step = broken
    with pytest.warns(RuntimeWarning, match="step 2 is skipped .*the loss is nan: reconstruction nan"):
        run.train()
    assert run.skipped == 1
    assert all(value.isfinite().all() for value in weights(run).values())


def test_what_is_pushed_is_the_averaged_encoder(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", max_steps=3, hub_model_id="tester/encoder")
    run.train()
    (tmp_path / "published").mkdir()
    assert run._save_model(tmp_path / "published") is run.encoder()  # what the loop has pushed, and what its card is of
    assert_close(MaskedAutoencoder.from_pretrained(tmp_path / "published").state_dict(), run.encoder().state_dict(), rtol=0, atol=0)
    told = []
    monkeypatch.setattr(MaskedAutoencoder, "push_to_hub", lambda self, name, **options: told.append((self, name, options)))
    run.push_to_hub(private=True)
    run.push_to_hub("tester/other")
    assert told == [(run.encoder(), "tester/encoder", {"private": True}), (run.encoder(), "tester/other", {})]


# -- what is refused


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": None}, r"size is missing.*size=\(256, 256\)"),
        ({"size": (9, 8)}, r"got 2 for 9 x 8: take another size"),
        ({"encoder": lambda: make_encoder(in_channels=4)}, "1 or 3 channels, got in_channels=4.*give the vae.*LatentCache"),
        ({"vae": make_vae}, "samples have 4 channels and the encoder reads 3: build it with in_channels=4"),
        ({"encoder": lambda: make_encoder().to(torch.bfloat16)}, "float32, got torch.bfloat16; for 16 bits set mixed_precision"),
        ({"encoder": lambda: make_encoder().requires_grad_(False)}, "must be trainable"),
        ({"encoder": lambda: make_encoder(num_classes=2)}, r"labels must lie in \[0, 2\)"),
        ({"image_column": "photo"}, "no column 'photo'"),
        ({"label_column": "kind"}, "no column 'kind'"),
        ({"data": Noise}, "crop_area_min must be 1 .*got 0.2.*so give a datasets.Dataset"),
        (
            {"data": Noise, "crop_area_min": 1.0, "size": (6, 8)},
            r"size must be that of the samples, \(8, 8\), got \(6, 8\): leave it out",
        ),
        ({"data": Noise, "crop_area_min": 1.0, "encoder": lambda: make_encoder(num_classes=2)}, r"\[0, 2\) to be classified.*from 0 to 2"),
        (
            {"eval_dataset": None, "data": Noise, "crop_area_min": 1.0, "encoder": lambda: make_encoder(in_channels=1)},
            "samples have 3 channels",
        ),
        ({"classification_warmup_steps": 4}, "at most classification_steps, got 4 and 3"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(arguments, message, tmp_path):
    made = {name: value() if callable(value) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", **({"encoder": None} | made))
    assert not (tmp_path / "run").exists()


def test_held_out_samples_must_be_of_the_same_form(tmp_path):
    cache = cache_latents(
        LabelledImages(IMAGES, size=(8, 8), channels=3, num_classes=3, image_column="image", label_column="label"),
        make_vae(), tmp_path / "latents", device="cpu",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"one form, got \(3, 8, 8\) and \(4, 8, 8\)"):
        trainer(tmp_path / "run", eval_dataset=cache, vae=make_vae(), encoder=make_encoder(in_channels=4))


def test_a_vae_without_a_posterior_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"must tell a normal posterior.*got AutoencoderTiny"):
        trainer(tmp_path / "run", vae=AutoencoderTiny(), encoder=make_encoder(in_channels=4))


def test_another_run_in_the_folder_is_refused(tmp_path):
    trainer(tmp_path / "run", max_steps=3).train()
    for changes, message in (
        ({"encoder": make_encoder(mask_patch_size=4)}, "encoder="),
        ({"data": IMAGES.select(range(9))}, "data="),
        ({"size": (12, 12)}, "data="),
        ({"max_steps": 4}, r"classification_from=1 \(there: 0\)"),  # what comes last of a longer run is not what came last
        ({"batch_size": 4}, r"batch_size=4 \(there: 6\)"),
    ):
        with pytest.raises(ValueError, match=f"holds another run: .*{message}"):
            trainer(tmp_path / "run", **({"max_steps": 3} | changes))


# -- the program


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_mae", ROOT / "examples/train_mae.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_mae"] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module


def arguments(**values):
    """As on a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))]


TINY = {"base_channels": 32, "layers_per_stage": [1, 1, 1, 1], "max_steps": 3, "warmup_steps": 1, "batch_size": 4, "eval_samples": 4}
TINY |= {"mixed_precision": "no"}


def test_the_program_trains_an_encoder_that_serves_an_objective(example, tmp_path, capsys):
    IMAGES.select(range(14)).to_parquet(tmp_path / "data/train.parquet")
    IMAGES.select(range(14, 20)).to_parquet(tmp_path / "data/test.parquet")
    data = {"dataset_name": tmp_path / "data", "eval_split": "test", "resolution": 32, "max_train_samples": 12}
    choices = {"classification_steps": 2, "classification_warmup_steps": 1, "more_ema_decays": 0.5, "output_dir": tmp_path / "run"}
    run = example.main(arguments(preset="mae-pixel-640", **data, **TINY, **choices))
    printed = capsys.readouterr().out
    assert printed.index("batch_size: 8192 -> 4") < printed.index("accuracy")
    assert len(run.draws.train_data) == 12
    encoder = MaskedAutoencoder.from_pretrained(tmp_path / "run/encoder")
    assert encoder.config.input_patch_size == 8  # the preset's
    assert encoder.config.num_classes == 3
    assert_close(encoder.state_dict(), run.encoder().state_dict(), rtol=0, atol=0)
    assert (tmp_path / "run/encoder-ema-0.5/config.json").exists()

    objective = DriftingObjective(encoder.activations)
    objective.freeze(torch.device("cpu"))
    generated = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, measured = objective(generated, run.draws.eval_data.gather(range(6))[0].unflatten(0, (2, 3)))
    loss.backward()
    assert generated.grad.abs().max() > 0
    assert {"conv1_mean", "layer4_std", "global"} <= set(measured)


def test_the_program_encodes_as_it_goes_or_reads_latents(example, tmp_path):
    IMAGES.to_parquet(tmp_path / "train.parquet")
    make_vae().save_pretrained(tmp_path / "sd/vae")
    common = {"preset": "mae-latent-256", "vae": tmp_path / "sd", "vae_subfolder": "vae", **TINY}
    going = example.main(arguments(**common, dataset_name=tmp_path / "train.parquet", resolution=8, output_dir=tmp_path / "a"))
    assert going.draws.encodes
    assert going.encoder().config.in_channels == 4
    images = LabelledImages(IMAGES, size=(8, 8), channels=3, num_classes=3, image_column="image", label_column="label")
    cache_latents(images, make_vae(), tmp_path / "latents", device="cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    classes = {"classification_steps": 1, "classification_warmup_steps": 0}
    read = example.main(arguments(**common, latents=tmp_path / "latents", crop_area_min=1, **classes, output_dir=tmp_path / "b"))
    assert not read.draws.encodes
    assert read.encoder().config.num_classes == 3
    with pytest.raises(SystemExit, match="--dataset_name or as --latents, one of them"):
        example.main(arguments(**common, output_dir=tmp_path / "c"))


def test_a_latent_preset_takes_the_vae_of_the_release(example, monkeypatch):
    asked = []
    monkeypatch.setattr(example.AutoencoderKL, "from_pretrained", lambda name, subfolder: asked.append(name))
    for changes in (
        {"preset": "mae-latent-640"},
        {"preset": "mae-pixel-640"},
        {"preset": "mae-latent-640", "latents": "x"},
        {"vae": "mine"},
    ):
        example.open_vae(example.Arguments(**changes))
    assert asked == ["stabilityai/sd-vae-ft-mse", "mine"]


if __name__ == "__main__":
    torch.nn.functional.relu = torch.nn.functional.silu
    this = trainer(sys.argv[1], **json.loads(sys.argv[2]))
    this.train()
    if this.accelerator.is_main_process:
        save_file({name: value.contiguous() for name, value in weights(this).items()}, Path(sys.argv[1]) / "weights.safetensors")
        print(this.accelerator.num_processes, "processes")
    else:
        weights(this)
