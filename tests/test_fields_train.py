"""Every field trains: by name from a config, resumed as if it had never stopped, over processes as on one, and in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_field_names import EXAMPLES
from test_options import generator
from test_trainer import SMALL, images, one_accelerator_per_test, stop_at, tiny_generator, trainer, weights
from torch.testing import assert_close

from drifting_diffusers import DriftingObjective, MultiScaleStatistics, Pixels
from drifting_diffusers.arguments import parse_arguments
from drifting_diffusers.config import DriftingConfig
from drifting_diffusers.fields import FIELDS, MeanShiftField, read_field, spell
from drifting_diffusers.hub import model_card

__all__ = ["images", "one_accelerator_per_test"]

REMEMBERING = {
    "nystrom of the dataset": "nystrom(temperatures=(0.2,), landmarks=3, sums='dataset')",
    "frechet, queue": "frechet(moments='queue', window=20)",
}
TRAINED = EXAMPLES | REMEMBERING
CHANGING = ("score", "friction", "frechet", *REMEMBERING)
EVEN = {"generated_per_label": 4, "eval_steps": 0, "preview_steps": 0}  # a Sinkhorn field takes halves of the generated


def run(images, folder, name, **more):
    """The generator's output layer does not start at 0, where a symmetrised field has no direction."""
    return trainer(images, folder, generator=generator(), field=TRAINED[name], **(EVEN | more))


@pytest.mark.parametrize("name", TRAINED)
def test_every_field_trains_and_is_written_down(name, images, tmp_path):
    short = run(images, tmp_path / "run", name, max_steps=2)
    before = weights(short)
    short.train()
    after = weights(short)
    assert all(torch.isfinite(w).all() for w in after.values())
    assert any(not torch.equal(before[n], w) for n, w in after.items())
    assert short.skipped == 0
    assert (
        json.loads((tmp_path / "run/training_config.json").read_text())["field"] == short.config.field == spell(read_field(TRAINED[name]))
    )
    pipeline = short._save_model(tmp_path / "pushed")
    results = json.loads((tmp_path / "pushed/results.json").read_text())
    assert f"- field: {short.config.field}" in model_card(pipeline, results)


@pytest.mark.parametrize("name", CHANGING)
def test_a_field_that_changes_over_a_run_or_remembers_resumes(name, images, tmp_path):
    """Bit for bit: killed after step 5 of 6, and gone on from step 4 by another trainer."""
    whole = run(images, tmp_path / "whole", name)
    whole.train()
    killed = run(images, tmp_path / "parts", name)
    killed._after_step = stop_at(killed, 5)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = run(images, tmp_path / "parts", name)
    again.train()
    for key, value in weights(again).items():
        assert_close(value, weights(whole)[key], rtol=0, atol=0, msg=key)


def test_every_field_is_trained_here():
    assert {name.split("(")[0] for name in EXAMPLES} == set(FIELDS)


def test_a_run_with_another_field_is_another_run(images, tmp_path):
    trainer(images, tmp_path / "run", field="mean_shift", max_steps=1).train()
    with pytest.raises(ValueError, match="holds another run: field="):
        trainer(images, tmp_path / "run", field="sharp", max_steps=1)
    again = trainer(images, tmp_path / "run", objective=DriftingObjective(Pixels(), MeanShiftField()), max_steps=1)
    assert again.config.field == "mean_shift"


def test_a_field_comes_from_flags_and_from_yaml(tmp_path):
    (config,) = parse_arguments((DriftingConfig,), ["--output_dir", "run", "--field", "sinkhorn(temperatures=(0.1,))"])
    assert config.field == "sinkhorn(temperatures=(0.1,))"
    (tmp_path / "run.yaml").write_text("output_dir: run\nfield: lookahead(drifting, terms=2)\n")
    (config,) = parse_arguments((DriftingConfig,), ["--config", str(tmp_path / "run.yaml")])
    assert config.field == "lookahead(drifting, terms=2)"
    (config,) = parse_arguments((DriftingConfig,), ["--config", str(tmp_path / "run.yaml"), "--field", "sharp"])
    assert config.field == "sharp"


def test_a_memory_of_the_dataset_cannot_be_of_a_stream(images, tmp_path):
    from drifting_diffusers import DriftingTrainer

    config = DriftingConfig(str(tmp_path / "run"), field=REMEMBERING["nystrom of the dataset"], **SMALL)
    with pytest.raises(ValueError, match="looks at all real samples once, and a stream cannot be read twice"):
        DriftingTrainer(tiny_generator(), DriftingObjective(Pixels()), images.to_iterable_dataset(), config, eval_dataset=images)


def test_looking_for_the_guilty_feature_is_not_remembered(images, tmp_path):
    objective = DriftingObjective([Pixels(), MultiScaleStatistics()], "frechet(moments='average')")
    x, y = torch.randn(2, 2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    objective(x, y)
    before = json.dumps(str(objective.state_dict()))
    assert objective.steep(x, y) == []
    assert json.dumps(str(objective.state_dict())) == before


def test_two_processes_are_one_for_every_field(tmp_path):
    """And with means of each process alone they are not, for every field that measures the batch."""
    texts = [spell(read_field(text)) for text in EXAMPLES.values()] + ["frechet(moments='queue', window=20)", "drifting"]
    worker = str(Path(__file__).with_name("field_worker.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker, json.dumps(texts)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT")).removeprefix("RESULT"))
    for text in texts:
        for errors in ranks:
            assert errors[text][0] < 1e-9, (text, errors[text])
        assert max(errors[text][1] for errors in ranks) > 1e-3, (text, "a mean of each process makes no difference")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_one_huge_problem_stays_below_a_gigabyte_and_a_half(name):
    """8,192 queries among as many positives and as many own negatives in 128 dimensions."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from field_cost import measure

    assert measure(EXAMPLES[name], 8192)["megabytes"] < 1500
