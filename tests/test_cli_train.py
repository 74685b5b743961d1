"""`drifting-diffusers train`: one process, several through a launcher, and what the launchers are told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_imagenet import TINY, folder
from test_trainer import one_accelerator_per_test
from torch.testing import assert_close

from drifting_diffusers.cli import launching, main
from drifting_diffusers.cli.launching import STARTED, Launch, launch, with_accelerate, with_torchrun

__all__ = ["folder", "one_accelerator_per_test"]

MODEL = json.dumps(TINY | {"sample_size": 8, "in_channels": 1, "num_classes": 3})


def flags(folder, output, *more):
    given = ["--config", str(folder / "run.yaml"), "--output_dir", str(output), "--model_config", MODEL, "--features", "pixels"]
    return ["train", "--dataset_name", str(folder), "--eval-split", "validation", *given, *more]


def weights(run):
    return load_file(run / "pipeline/transformer/diffusion_pytorch_model.safetensors")


def test_a_run_is_trained_and_found_finished(folder, tmp_path, capsys):
    assert main(flags(folder, tmp_path / "run", "--max_steps", "2")) == 0
    said = capsys.readouterr().out
    assert "1 process on cpu" in said
    assert f"{tmp_path / 'run/pipeline'}: draw from it with drifting-diffusers sample" in said
    before = weights(tmp_path / "run")
    assert main(flags(folder, tmp_path / "run", "--max_steps", "2", "--num_processes", "1")) == 0
    assert_close(weights(tmp_path / "run"), before, rtol=0, atol=0)
    assert main(["sample", str(tmp_path / "run/pipeline"), "--labels", "b", "--output", str(tmp_path / "b.png")]) == 0
    assert main(flags(folder, tmp_path / "run", "--max_steps", "2", "--seed", "1")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("drifting-diffusers: error: output_dir")
    assert "choose a new folder" in error


@pytest.mark.slow
@pytest.mark.parametrize("how", ["own", "torchrun"])
def test_two_processes_make_the_update_of_one(folder, tmp_path, how):
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", STARTED)}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if how == "torchrun" else []
    more = ["--num_processes", "2"] if how == "own" else []
    command = [sys.executable, *launcher, "-m", "drifting_diffusers.cli", *flags(folder, tmp_path / "two", "--ema_decay", "0", *more)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu" in done.stdout
    assert main(flags(folder, tmp_path / "one", "--ema_decay", "0")) == 0
    assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_an_error_on_several_processes_is_told_and_ends_them(folder, tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = flags(folder, tmp_path / "run", "--labels_per_step", "3", "--num_processes", "2")
    done = subprocess.run(
        [sys.executable, "-m", "drifting_diffusers.cli", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "drifting-diffusers: error: labels_per_step must be a multiple of the number of processes, got 3 and 2" in done.stderr


@pytest.fixture
def executed(monkeypatch):
    """The commands that would have taken this process's place."""
    commands = []
    monkeypatch.setattr(launching.os, "execve", lambda path, command, environment: commands.append((command, environment)))
    for name in ("WORLD_SIZE", STARTED, "ACCELERATE_USE_CPU", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return commands


def test_on_cpus_it_is_torchrun(executed, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    launch(Launch(num_processes=2), ["train", "--seed", "1"])
    ((command, environment),) = executed
    assert command == [sys.executable, *with_torchrun(Launch(2)), "-m", "drifting_diffusers.cli", "train", "--seed", "1"]
    assert command[1:4] == ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    assert (environment["ACCELERATE_USE_CPU"], environment[STARTED]) == ("true", "1")


def test_on_accelerators_it_is_accelerate(executed, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    launch(Launch(num_processes=4), ["train"])
    ((command, environment),) = executed
    assert command == [sys.executable, *with_accelerate(Launch(4)), "-m", "drifting_diffusers.cli", "train"]
    assert "ACCELERATE_USE_CPU" not in environment
    with pytest.raises(ValueError, match="asks for 8 processes on this machine, which has 4 accelerators"):
        launch(Launch(num_processes=8), ["train"])


@pytest.mark.parametrize("choice", [Launch(), Launch(num_processes=1)])
def test_one_process_needs_no_launcher(executed, choice):
    launch(choice, ["train"])
    assert not executed


def test_what_a_launcher_started_starts_nothing(executed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch(Launch(num_processes=2), ["train"])
    launch(Launch(), ["train"])
    assert not executed
    with pytest.raises(ValueError, match="num_processes is 4, and the launcher started 2: leave it out"):
        launch(Launch(num_processes=4), ["train"])
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv(STARTED, "1")  # as where accelerate's launcher makes one of several
    with pytest.raises(ValueError, match="num_processes is 2, and the launcher started 1"):
        launch(Launch(num_processes=2), ["train"])


def test_accelerates_launcher_understands_what_it_is_told():
    from accelerate.commands.launch import launch_command_parser

    config = str(Path(__file__).parents[1] / "examples/accelerate_configs/multi_node.yaml")
    choice = Launch(
        num_processes=16, num_machines=2, machine_rank=1, main_process_ip="10.0.0.1", main_process_port=1234, accelerate_config=config
    )
    read = launch_command_parser().parse_args([*with_accelerate(choice)[3:], *launching.PROGRAM, "train", "--seed", "1"])
    told = (read.num_processes, read.num_machines, read.machine_rank, read.main_process_ip, read.main_process_port, read.config_file)
    assert told == (16, 2, 1, "10.0.0.1", 1234, config)
    assert read.module
    assert (read.training_script, read.training_script_args) == ("drifting_diffusers.cli", ["train", "--seed", "1"])
    assert launch_command_parser().parse_args([*with_accelerate(Launch(4))[3:], "x"]).num_processes == 4


def test_torchrun_understands_several_machines():
    from torch.distributed.run import get_args_parser

    choice = Launch(num_processes=4, num_machines=2, machine_rank=1, main_process_ip="10.0.0.1")
    read = get_args_parser().parse_args([*with_torchrun(choice)[2:], "x"])
    assert (read.nproc_per_node, read.nnodes, read.node_rank, read.master_addr, read.master_port) == ("2", "2", 1, "10.0.0.1", 29500)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_processes", "0"], "num_processes must be at least 1, got 0"),
        (["--num_processes", "3", "--num_machines", "2"], "num_processes must be a multiple of num_machines, got 3 and 2"),
        (["--num_processes", "4", "--num_machines", "2"], "several machines need num_processes (of all), machine_rank and main_process_ip"),
        (["--num_processes", "2", "--machine_rank", "1"], "machine_rank must lie from 0 to 0, got 1: is num_machines missing?"),
        (["--lerning_rate", "1"], "there is no --lerning_rate; did you mean --learning_rate?"),
        (["--num_train_epochs", "1"], "runs are counted in steps"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["stray"], "'stray' belongs to no option"),
        (["--latents", "x"], "as --latents or as --dataset_name, one of them"),
    ],
)
def test_mistakes_of_train_are_one_line(tmp_path, capsys, as_users_see_it, words, message):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--dataset_name", "x", "--output_dir", str(tmp_path / "run"), *words])
    error = capsys.readouterr().err
    assert error.startswith("drifting-diffusers train: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
