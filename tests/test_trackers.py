"""Trackers of Accelerate: what they are given, also by a run that is resumed, and those that are not there."""

import importlib.util
import sys

import accelerate.tracking
import pytest
from test_callbacks import trainer
from test_trainer import images, one_accelerator_per_test, stop_at

__all__ = ["images", "one_accelerator_per_test"]

without_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
OPTIONS = {"report_to": ["tensorboard"], "logging_steps": 1, "eval_steps": 3, "preview_steps": 3, "save_steps": 2, "project": "mine"}


@without_tensorboard
@pytest.mark.filterwarnings("ignore")  # of protobuf and numpy inside tensorboard
def test_tensorboard_gets_numbers_choices_and_pictures_also_of_a_resumed_run(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(images, tmp_path / "run", **OPTIONS)
    run._after_step = stop_at(run, 3)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    again = trainer(images, tmp_path / "run", **OPTIONS)
    again.train()

    folder = tmp_path / "run/trackers/mine"
    found = EventAccumulator(str(folder)).Reload()
    logged = {name: [entry["step"] for entry in again.log_history if name in entry] for name in ("loss", "energy", "distance/pixels")}
    assert logged["loss"] == [1, 2, 3, 4, 5, 6]
    for name, steps in logged.items():
        events = found.Scalars(name)
        assert sorted({event.step for event in events}) == steps
        values = {entry["step"]: entry[name] for entry in again.log_history if name in entry}
        assert [event.value for event in events] == pytest.approx([values[event.step] for event in events], rel=1e-5)
    assert "grad_norm" in found.Tags()["scalars"]
    pictures = found.Images("preview")
    assert {picture.step for picture in pictures} == {3, 6}
    assert pictures[0].encoded_image_string.startswith(b"\x89PNG")
    choices = [path.read_text() for path in folder.glob("*/hparams.yml")]
    assert len(choices) == 2  # one of each start
    assert "learning_rate: 0.001" in choices[0]
    assert "report_to: '[''tensorboard'']'" in choices[0]


@without_tensorboard
@pytest.mark.filterwarnings("ignore")
def test_evaluating_without_training_needs_no_tracker(images, tmp_path):
    run = trainer(images, tmp_path / "run", **OPTIONS)
    assert run.evaluate()["energy"] > 0
    assert not (tmp_path / "run/trackers/mine").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(images, tmp_path, monkeypatch):
    """Accelerate passes over it in silence."""
    monkeypatch.setattr(sys.modules["drifting_diffusers.services"], "get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match=r"report_to=\['wandb'\] asks for wandb: pip install wandb, or leave it out"):
        trainer(images, tmp_path / "run", report_to=["wandb"])
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_exist_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match=r"Unsupported logging capability: abacus. Choose between .*tensorboard"):
        trainer(images, tmp_path / "run", report_to=["abacus"])
    assert accelerate.tracking.LOGGER_TYPE_TO_CLASS["wandb"].name == "wandb"


def test_trackers_are_given_the_project_and_the_name_of_the_run(images, tmp_path):
    for name, expected in ((None, "run"), ("mine", "mine")):
        given = {}
        run = trainer(images, tmp_path / "run", max_steps=2, project="ours", run_name=name)
        object.__setattr__(run.config, "report_to", ["wandb"])
        run.accelerator.init_trackers = lambda project, given=given, **named: given.update(named, project=project)
        run.train()
        assert given["project"] == "ours"
        assert given["init_kwargs"]["wandb"] == given["init_kwargs"]["trackio"] == {"name": expected}
        assert given["config"]["max_steps"] == 2
