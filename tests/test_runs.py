"""The folder of a run: nothing is overwritten, nothing half-written is read."""

import dataclasses

import pytest

from drifting_diffusers import DriftingConfig
from drifting_diffusers.runs import RunFolder

SETUP = {"generator": {"num_layers": 2}, "images": 5}


@pytest.fixture
def config(tmp_path):
    return DriftingConfig(str(tmp_path / "run"), save_total_limit=2)


def test_a_folder_with_other_files_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files"):
        RunFolder(config, SETUP)
    assert (tmp_path / "run/thesis.tex").read_text() == "years of work"


def test_another_run_is_refused_with_what_differs(config):
    RunFolder(config, SETUP).claim()
    with pytest.raises(ValueError, match=r"holds another run: seed=1 \(there: 0\)"):
        RunFolder(dataclasses.replace(config, seed=1), SETUP)
    with pytest.raises(ValueError, match=r"holds another run: generator=.*'num_layers': 3"):
        RunFolder(config, {**SETUP, "generator": {"num_layers": 3}})
    RunFolder(dataclasses.replace(config, logging_steps=3), SETUP)  # does not enter a gradient


def test_the_newest_checkpoints_are_kept(config):
    run = RunFolder(config, SETUP)
    run.claim()
    for step in (2, 4, 10):
        run.save_checkpoint(step, lambda folder, step=step: (folder / "state").write_text(str(step)))
    assert list(run.checkpoints()) == [4, 10]
    assert (run.checkpoints()[10] / "state").read_text() == "10"


def test_a_killed_write_leaves_the_previous_checkpoint(config):
    run = RunFolder(config, SETUP)
    run.claim()
    run.save_checkpoint(2, lambda folder: (folder / "state").write_text("whole"))

    def killed(folder):
        (folder / "state").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(4, killed)
    assert list(run.checkpoints()) == [2]
    run.save_checkpoint(4, lambda folder: (folder / "state").write_text("whole"))
    assert list(run.checkpoints()) == [2, 4]


def test_log_lines_beyond_the_checkpoint_are_dropped(config):
    run = RunFolder(config, SETUP)
    run.claim()
    for step in (1, 2, 3):
        run.log({"step": step})
    run.forget_after(2)
    assert [entry["step"] for entry in run.history()] == [1, 2]
