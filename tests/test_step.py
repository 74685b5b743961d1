"""Whole training steps against the reference's: generator, encoder, field and loss together; then clipping, optimiser and averaged weights."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from recordings import assert_recorded, bounds_of, recorded
from release_files import gradients_to_release
from torch import Tensor
from torch.testing import assert_close

from drifting_diffusers import DriftingConfig, DriftingField, DriftingGenerator, DriftingObjective, DriftingTrainer, Pixels
from drifting_diffusers.config import learning_rate_at
from drifting_diffusers.encoders import MaskedAutoencoder
from drifting_diffusers.guidance import guidance_quantile, unconditional_weight

# -- one step of the generator


@pytest.fixture(scope="module")
def step(shared) -> dict[str, Any]:
    """The recorded step and ours on its draws, by the names of the recording."""
    io, about = recorded(shared, "step/latent"), json.loads((shared / "fixtures/step/latent.json").read_text())
    generator = DriftingGenerator.from_release(shared / "fixtures" / about["generator"])
    encoder = MaskedAutoencoder.from_release(shared / "fixtures" / about["feature_encoder"])
    objective = DriftingObjective(encoder.activations, DriftingField(tuple(about["R_list"])))
    objective.freeze(torch.device("cpu"))

    labels, each = io["labels"].long(), about["gen_per_label"]
    law = guidance_quantile(io["cfg_frac"], low=about["cfg_min"], high=about["cfg_max"], power=about["neg_cfg_pw"])
    guidance = torch.where(io["no_cfg_draw"] < about["no_cfg_frac"], 1.0, law)
    masses, repeated = unconditional_weight(guidance, each, about["n_neg"]), guidance.repeat_interleave(each)
    noise, styles = io["noise_x"].permute(0, 3, 1, 2), io["noise_labels"].long()
    generated = generator(noise, labels.repeat_interleave(each), repeated, styles).sample
    positives, negatives = (io[name].permute(0, 1, 4, 2, 3) for name in ("positives", "negatives"))
    loss, measured = objective(generated.unflatten(0, (len(labels), each)), positives, negatives, masses)
    loss.backward()

    gradients = gradients_to_release(generator)
    in_order = [measured[name] for name in about["features"]]
    plan = about["optimizer"]
    config = DriftingConfig("unused", learning_rate=plan["learning_rate"], warmup_steps=plan["warmup_steps"], max_steps=plan["total_steps"])
    ours = {
        "cfg": guidance,
        "cfg_rep": repeated,
        "uncond_weight": masses,
        "gen_samples": generated.detach().permute(0, 2, 3, 1),
        "loss": loss.detach(),
        "feature_loss": torch.stack([m.loss for m in in_order]),
        "feature_scale": torch.stack([m.distance for m in in_order]),
        "feature_loss_R": torch.stack([m.strength for m in in_order]),
        "grad_norms": torch.stack([gradients[path].norm() for path in about["grad_norm_names"]]),
        "g_norm": torch.nn.utils.clip_grad_norm_(generator.parameters(), about["max_grad_norm"]),
        "lr": torch.tensor(learning_rate_at(about["state_step"], config)),
    }
    ours |= {key: gradients[key.removeprefix("grad__").replace(".", "/")] for key in io if key.startswith("grad__")}
    return {
        "io": io,
        "about": about,
        "ours": ours,
        "measured": measured,
        "gradients": gradients,
        "bounds": bounds_of(shared, "step/latent"),
    }


def test_everything_recorded_of_the_step_is_compared(step):
    assert step["ours"].keys() == step["bounds"].keys()
    assert step["measured"].keys() == set(step["about"]["features"])
    assert step["gradients"].keys() == set(step["about"]["grad_norm_names"])


@pytest.mark.parametrize(
    "name",
    [
        *(
            "cfg",
            "cfg_rep",
            "uncond_weight",
            "gen_samples",
            "loss",
            "feature_loss",
            "feature_scale",
            "feature_loss_R",
            "grad_norms",
            "g_norm",
        ),
        *("lr", "grad__noise_embeds_0.embedding", "grad__LightningDiT_0.blocks_1.Attention_0.q_norm.weight"),
        "grad__LightningDiT_0.FinalLayer_0.TorchLinear_1.Dense_0.kernel",
    ],
)
def test_recorded_step(step, name):
    assert_recorded(step["ours"][name], step["io"][name], step["bounds"][name], name)


def test_the_loss_of_the_step_is_the_sum_over_features(step):
    assert_close(step["ours"]["feature_loss"].sum(), step["ours"]["loss"])


# -- clipping, optimiser, averaged weights


class TwoParameters(DriftingGenerator):
    """A generator with the two parameters of the recording beside its own."""

    def __init__(self, b: Tensor, w: Tensor):
        super().__init__(
            sample_size=4, in_channels=1, num_classes=1, num_layers=1, num_attention_heads=1, attention_head_dim=4, num_class_tokens=0,
            num_style_tokens=0, guidance_embedding=False,
        )  # fmt: skip
        self.b, self.w = torch.nn.Parameter(b.clone()), torch.nn.Parameter(w.clone())


class Prescribed(DriftingObjective):
    """A loss whose gradients in b and w are the given ones, one after the other; all other parameters have none."""

    def __init__(self, model: TwoParameters, gradients: list[tuple[Tensor, Tensor]]):
        super().__init__(Pixels())
        self.model, self.gradients = model, iter(gradients)

    def describe(self) -> dict[str, Any]:
        return {}

    def __call__(self, *_: Any, **__: Any) -> Any:
        b, w = next(self.gradients)
        return (self.model.b * b).sum() + (self.model.w * w).sum(), {}


def noise_dataset() -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 4, 4), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["one"])})
    return Dataset.from_dict({"image": [PILImage.fromarray(p) for p in pixels], "label": [0] * 8}, features=features)


@pytest.fixture
def trajectory(shared, tmp_path):
    """What the trainer's own step does with the recorded gradients, step by step, by the names of the recording."""
    io = recorded(shared, "misc/optim")
    model = TwoParameters(io["p0_b"], io["p0_w"])
    config = DriftingConfig(
        str(tmp_path / "run"), labels_per_step=1, generated_per_label=2, positives_per_label=1, unconditional_per_label=0, bank_size=4, push_per_step=1,
        learning_rate=float(io["learning_rate"]), warmup_steps=int(io["warmup_steps"]), max_steps=int(io["total_steps"]),
        lr_scheduler_type={"const": "constant"}[io["lr_schedule"]], weight_decay=float(io["weight_decay"]), adam_beta1=float(io["b1"]),
        adam_beta2=float(io["b2"]), max_grad_norm=float(io["max_grad_norm"]), ema_decay=float(io["ema_decay"]),
    )  # fmt: skip
    trainer = DriftingTrainer(model, Prescribed(model, list(zip(io["grad_b"], io["grad_w"], strict=True))), noise_dataset(), config)
    trainer._begin()
    ours: dict[str, list[Tensor]] = {}
    for _ in io["traj_lr"]:
        outcome = trainer.training_step()
        after = {"lr": outcome["learning_rate"], "g_norm": outcome["grad_norm"]}
        for name in "bw":
            parameter = getattr(model, name)
            state = trainer.optimizer.state[parameter]
            after |= {name: parameter, f"ema_{name}": getattr(trainer.ema.models[config.ema_decay], name)}
            after |= {f"mu_{name}": state["exp_avg"], f"nu_{name}": state["exp_avg_sq"]}
        for name, value in after.items():
            ours.setdefault(f"traj_{name}", []).append(torch.as_tensor(value).detach().clone())
    yield io, {name: torch.stack(values) for name, values in ours.items()}
    AcceleratorState._reset_state(reset_partial_state=True)


def test_recorded_updates_of_the_optimiser(shared, trajectory):
    io, ours = trajectory
    bound = bounds_of(shared, "misc/optim")["all"]
    assert ours.keys() == {name for name in io if name.startswith("traj_")}
    for name, values in ours.items():
        assert_recorded(values, io[name], bound, name)
