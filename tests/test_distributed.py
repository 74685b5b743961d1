"""Several processes are one: the same global batch gives the same update, whoever computes it; and a process that is killed loses nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from train_worker import generator

from drifting_diffusers.loop import PREEMPTED

WORKER = Path(__file__).with_name("train_worker.py")
UPDATE = {"ema_decay": 0.0}  # what is compared are the weights themselves


def start(folder, *, processes=1, launch=(), **options):
    """The worker's exit code and output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *(launch or torchrun), str(WORKER), str(folder), json.dumps(options)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=WORKER.parent)
    return done.returncode, done.stdout + done.stderr


def update_of(folder):
    """How far training moved every weight."""
    before = generator().state_dict()
    return {name: value - before[name] for name, value in load_file(folder / "weights.safetensors").items()}


def distance(ours, theirs):
    """Largest difference of two updates, over the size of each weight's update."""
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-12)) for n in theirs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    code, text = start(folder, config=UPDATE)
    assert code == 0, text
    return folder


def test_two_processes_make_the_update_of_one(alone, tmp_path):
    """After 5 steps; the evaluation agrees too, and with means of their own the processes would go elsewhere."""
    code, text = start(tmp_path / "two", processes=2, config=UPDATE)
    assert code == 0, text
    assert "kind DistributedDataParallel processes 2" in text
    assert distance(update_of(tmp_path / "two"), update_of(alone)) < 1e-4
    ours, theirs = (json.loads((folder / "found.json").read_text()) for folder in (tmp_path / "two", alone))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len((tmp_path / "two/log.jsonl").read_text().splitlines()) == 6  # one process writes

    code, text = start(tmp_path / "local", processes=2, config=UPDATE, local_means=True)
    assert code == 0, text
    assert distance(update_of(tmp_path / "local"), update_of(alone)) > 1e-2


@pytest.mark.slow
def test_two_processes_in_two_passes_over_single_labels_make_it_too(alone, tmp_path):
    code, text = start(tmp_path / "two", processes=2, config=UPDATE | {"labels_per_microbatch": 1})
    assert code == 0, text
    assert distance(update_of(tmp_path / "two"), update_of(alone)) < 1e-4


@pytest.mark.slow
def test_two_processes_that_share_the_weights_make_it_too(alone, tmp_path):
    """FSDP2, killed and resumed from shards: averaged weights and saved ones are whole."""
    code, text = start(tmp_path / "run", processes=2, config=UPDATE, fsdp=True, signal=(3, "SIGKILL"))
    assert code != 0
    assert (tmp_path / "run/checkpoint-2").is_dir()
    code, text = start(tmp_path / "run", processes=2, config=UPDATE, fsdp=True)
    assert code == 0, text
    assert "kind FSDPDriftingGenerator processes 2" in text
    assert "Resuming from" in text
    assert "UserWarning: FSDP2" not in text
    assert distance(update_of(tmp_path / "run"), update_of(alone)) < 1e-4


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_as_if_they_had_not_been(tmp_path):
    """SIGKILL of one takes the other along; the next start goes on from the checkpoint of step 2."""
    code, text = start(tmp_path / "whole", processes=2)
    assert code == 0, text
    code, text = start(tmp_path / "killed", processes=2, signal=(3, "SIGKILL"))
    assert code != 0
    assert not (tmp_path / "killed/weights.safetensors").exists()
    code, text = start(tmp_path / "killed", processes=2)
    assert code == 0, text
    assert "Resuming from" in text
    ours, theirs = (load_file(tmp_path / name / "weights.safetensors") for name in ("killed", "whole"))
    assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_a_code_of_its_own(tmp_path):
    code, text = start(tmp_path / "whole")
    assert code == 0, text
    code, text = start(tmp_path / "run", signal=(3, "SIGTERM"))
    assert code == PREEMPTED, text
    assert "step 3 is saved" in text
    assert (tmp_path / "run/checkpoint-3/trainer_state.json").exists()
    code, text = start(tmp_path / "run")
    assert code == 0, text
    ours, theirs = (load_file(tmp_path / name / "weights.safetensors") for name in ("run", "whole"))
    assert_close(ours, theirs, rtol=0, atol=0)


def test_labels_that_do_not_divide_are_refused(tmp_path):
    code, text = start(tmp_path / "run", processes=2, config={"labels_per_step": 3})
    assert code != 0
    assert "labels_per_step must be a multiple of the number of processes, got 3 and 2" in text
    assert not (tmp_path / "run").exists()


def test_weights_of_the_worker_are_not_where_all_samples_are_alike():
    assert torch.stack([p.abs().max() for p in generator().parameters()]).min() > 0
