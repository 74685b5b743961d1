"""What a trainer looks at: numbers through an extractor, the best weights, curves."""

import json

import pytest
import torch
from diffusers import AutoencoderTiny
from test_trainer import images, one_accelerator_per_test, tiny_generator, trainer
from torch import nn
from torch.testing import assert_close

from drifting_diffusers import DriftingConfig, DriftingObjective, DriftingPipeline, DriftingTrainer, Pixels
from drifting_diffusers.evaluation import compare

__all__ = ["images", "one_accelerator_per_test"]


class Means(nn.Module):
    """An extractor of two features."""

    name, distance_name, num_features, fewest, imagenet_logits = "means", "fd_means", 2, 3, False

    def forward(self, x):
        return {"features": torch.stack([x.mean((1, 2, 3)), x[..., :4].mean((1, 2, 3))], dim=1)}

    def describe(self):
        return {"name": self.name}


def watched(data, folder, *, extractor=None, **changes):
    small = {"labels_per_step": 2, "generated_per_label": 3, "positives_per_label": 4, "unconditional_per_label": 2, "bank_size": 8,
             "unconditional_bank_size": 10, "push_per_step": 4, "warmup_steps": 1, "eval_steps": 2, "eval_samples_per_class": 3,
             "preview_steps": 0, "save_steps": 2, "max_steps": 6}  # fmt: skip
    config = DriftingConfig(output_dir=str(folder), **(small | changes))
    return DriftingTrainer(tiny_generator(), DriftingObjective(Pixels()), data, config, eval_dataset=data, extractor=extractor)


def test_an_extractor_is_looked_through_by_the_same_functions(images, tmp_path):
    run = watched(images, tmp_path / "run", extractor=Means(), max_steps=2)
    found = run.train()
    assert {"energy", "energy_real", "spread", "spread_real", "fd_means", "fd_means_real", "precision", "recall_real"} <= set(found)
    x, labels = run.eval_data.per_class(6)
    reference = torch.arange(18) % 6 < 3
    drawn = run.generate(labels[~reference], rng=run._rng(3, 0))
    see = lambda y: Means()(y)["features"]
    by_hand = compare((see(drawn), labels[~reference]), (see(x[reference]), labels[reference]), (see(x[~reference]), labels[~reference]))
    for name, value in by_hand.items():
        assert found[name] == pytest.approx(value, rel=1e-6)


def test_previews_are_no_numbers_of_an_evaluation(images, tmp_path):
    config, tiny = (
        DriftingConfig(output_dir=str(tmp_path / "run")),
        AutoencoderTiny(),
    )
    for numbers in ({"extractor": Means()}, {"compute_metrics": lambda x, y: {}}):
        with pytest.raises(ValueError, match="got an AutoencoderTiny"):
            DriftingTrainer(tiny_generator(), DriftingObjective(Pixels()), images, config, vae=tiny, **numbers)
    assert not (tmp_path / "run").exists()


def test_the_best_weights_are_those_of_the_best_evaluation(images, tmp_path):
    values = {2: 3.0, 4: 1.0, 6: 2.0}
    kept = {}
    run = watched(images, tmp_path / "run", metric_for_best_model="mine")

    def mine(x, y):
        kept[run.step] = {name: value.clone() for name, value in run.ema.models[0.999].state_dict().items()}
        return {"mine": values[run.step]}

    run.watcher.compute_metrics = mine
    run.train()
    assert run.watcher.best() == {"step": 4, "metric": "mine", "value": 1.0}
    best = run.pipeline(best=True)
    for name, value in best.transformer.state_dict().items():
        assert_close(value, kept[4][name], rtol=0, atol=0)
    assert best.labels == ["left", "middle", "right"]
    assert DriftingPipeline.from_pretrained(tmp_path / "run/best").labels == best.labels


def test_greater_can_be_better(images, tmp_path):
    run = watched(images, tmp_path / "run", metric_for_best_model="mine", greater_is_better=True)
    run.watcher.compute_metrics = lambda x, y: {"mine": float(run.step != 6)}
    run.train()
    assert run.watcher.best()["step"] == 2


def test_a_metric_that_is_not_there_is_named(images, tmp_path):
    run = watched(images, tmp_path / "run", metric_for_best_model="fid")
    with pytest.raises(ValueError, match=r"metric_for_best_model must be one of energy, .*got 'fid'"):
        run.train()


def test_without_an_evaluation_there_is_no_best(images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights yet: set eval_steps and train"):
        watched(images, tmp_path / "run").pipeline(best=True)


def test_best_weights_of_a_step_that_is_taken_again_are_forgotten(images, tmp_path):
    run = watched(images, tmp_path / "run")
    run.train()
    (tmp_path / "run/best/best.json").write_text(json.dumps({"step": 6, "metric": "energy", "value": -1.0}))
    import shutil

    shutil.rmtree(tmp_path / "run/checkpoint-6")  # as if it had been killed there
    again = watched(images, tmp_path / "run")
    again.train()
    assert again.watcher.best()["value"] > 0


def test_curves_are_drawn(images, tmp_path):
    from PIL import Image

    trainer(images, tmp_path / "run").train()
    with Image.open(tmp_path / "run/curves.png") as picture:
        assert picture.width > 1000
