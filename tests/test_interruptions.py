"""Whatever stops a run, at whatever moment: what is on the disk is whole, and what goes on is the run that never stopped."""

import dataclasses
import gc
import json
import multiprocessing
import shutil
import threading
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from test_callbacks import SMALL
from test_callbacks import trainer as quick_trainer
from test_distributed import start
from test_trainer import history, images, one_accelerator_per_test, stop_at, tiny_generator, weights
from torch.testing import assert_close
from train_worker import main

from drifting_diffusers import DriftingConfig, DriftingObjective, DriftingTrainer, Pixels

__all__ = ["images", "one_accelerator_per_test"]

OPTIONS = {"save_steps": 2, "logging_steps": 1, "random_flip": True, "save_total_limit": 9}


def trainer(images, folder, *callbacks, **changes):
    return quick_trainer(images, folder, *callbacks, **(OPTIONS | changes))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The run that nothing stops: its weights and its log."""
    run = trainer(images, tmp_path_factory.mktemp("whole") / "run")
    run.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return weights(run), history(run)


def is_whole(run, whole):
    assert run.step == 6
    assert_close(weights(run), whole[0], rtol=0, atol=0)


def once(run, owner, name, step):
    """The next call of this method after so many steps is interrupted."""
    method = getattr(owner, name)

    def interrupted(*arguments, **named):
        if run.step == step:
            setattr(owner, name, method)
            raise KeyboardInterrupt
        return method(*arguments, **named)

    setattr(owner, name, interrupted)


# Ctrl-C, and train() once more in the same process


@pytest.mark.parametrize(
    "moment",
    [
        lambda run: (run.real, "of_step"),
        lambda run: (run.accelerator, "backward"),
        lambda run: (run, "_update"),  # the gradient is there
        lambda run: (run, "_save_state"),
        lambda run: (run.run, "close_checkpoint"),
        lambda run: (run, "_look"),
    ],
    ids=["drawing", "backward", "update", "checkpoint", "end of a checkpoint", "looking"],
)
@pytest.mark.parametrize("step", [0, 4])
def test_train_goes_on_from_the_moment_of_an_interruption(moment, step, images, tmp_path, whole):
    run = trainer(images, tmp_path / "run")
    owner, name = moment(run)
    if step == 0 and name in ("_save_state", "close_checkpoint", "_look"):
        pytest.skip("not before step 0")
    once(run, owner, name, step)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    is_whole(run, whole)
    assert run.run.newest()[0] == 6


def test_an_update_that_was_begun_and_not_ended_is_not_trained_on(images, tmp_path, whole):
    run = trainer(images, tmp_path / "run")
    once(run, run.optimizer, "zero_grad", 3)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.raises(
        RuntimeError, match=r"in the middle of an update of step 3: build it again, and it goes on from the newest checkpoint"
    ):
        run.train()
    again = trainer(images, tmp_path / "run")
    again.train()
    is_whole(again, whole)
    assert history(again) == whole[1]


def test_a_new_trainer_goes_on_from_the_last_whole_checkpoint(images, tmp_path, whole):
    run = trainer(images, tmp_path / "run")
    once(run, run, "_save_state", 4)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4.partial"]
    again = trainer(images, tmp_path / "run", dataloader_num_workers=1, bank_device="accelerator")  # other workers, other place
    again.train()
    is_whole(again, whole)
    assert history(again) == whole[1]


def test_train_called_twice_has_nothing_to_do(images, tmp_path):
    run = trainer(images, tmp_path / "run", max_steps=2)
    found = run.train()
    lines = (tmp_path / "run/log.jsonl").read_text()
    assert run.train() == found
    assert (tmp_path / "run/log.jsonl").read_text() == lines


def test_nothing_is_left_behind(images, tmp_path):
    """Neither threads of ours nor worker processes, after an interruption as after the end; and workers leave in peace."""
    left = lambda: [*multiprocessing.active_children(), *(t for t in threading.enumerate() if t.name in ("real-samples", "pusher"))]
    run = trainer(images, tmp_path / "run", dataloader_num_workers=1)
    run._after_step = stop_at(run, 3)
    workers = []
    advance = run.real.feed.advance
    run.real.feed.advance = lambda step: (advance(step), workers.extend(run.real.feed._stream._workers))[0]
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert left() == []
    run.train()
    assert left() == []
    assert {worker.exitcode for worker in workers} == {0}


def test_an_exception_in_the_drawing_thread_reaches_train(images, tmp_path, whole):
    run = trainer(images, tmp_path / "run")
    advance = run.real.feed.advance

    def broken(step):
        if step == 5:
            raise OSError("the disk is gone")
        return advance(step)

    run.real.feed.advance = broken
    with pytest.raises(OSError, match="the disk is gone"):
        run.train()
    assert run.run.newest()[0] == 4
    again = trainer(images, tmp_path / "run")
    again.train()
    is_whole(again, whole)


# The folder


def test_a_folder_that_is_deleted_while_training_is_made_again_and_can_be_resumed(images, tmp_path, whole):
    run = trainer(images, tmp_path / "run")
    after = run._after_step

    def delete(outcome, bar):
        if run.step == 3:
            shutil.rmtree(tmp_path / "run")
        after(outcome, bar)
        if run.step == 4:
            raise KeyboardInterrupt

    run._after_step = delete
    with pytest.warns(RuntimeWarning, match="was deleted while training; it is made again"), pytest.raises(KeyboardInterrupt):
        run.train()
    again = trainer(images, tmp_path / "run")
    again.train()
    is_whole(again, whole)


def test_looking_from_elsewhere_leaves_a_run_as_it_is(images, tmp_path):
    """As from a notebook while the run goes on: neither its log nor its best weights beyond the newest checkpoint are taken away."""
    run = trainer(images, tmp_path / "run", eval_steps=1)
    run.watcher.curves = lambda history: None  # a second each
    run._after_step = stop_at(run, 3)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    log, best = (tmp_path / "run/log.jsonl").read_text(), run.watcher.best()
    other = trainer(images, tmp_path / "run", eval_steps=1)
    other.watcher.curves = lambda history: None
    other.sample(["left"])
    other.save_model(tmp_path / "model")
    assert other.step == 2
    assert (tmp_path / "run/log.jsonl").read_text() == log
    assert other.watcher.best() == best
    other.train()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps.count(3) == 2  # a log and an evaluation, once


def test_evaluating_before_training_is_of_step_0(images, tmp_path, whole):
    run = trainer(images, tmp_path / "run")
    found = run.evaluate()
    assert run.log_history == [{"step": 0, **found}]
    run.train()
    is_whole(run, whole)


# resume_from_checkpoint


def test_a_run_resumes_from_where_it_is_told_to(images, tmp_path, whole):
    first = trainer(images, tmp_path / "first")
    first._after_step = stop_at(first, 4)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    there = tmp_path / "first/checkpoint-4"
    started = []
    for name, wanted in (("first", "latest"), ("first", str(there)), ("other", there)):
        folder = tmp_path / f"{name} {len(started)}"
        if name == "first":
            shutil.copytree(tmp_path / "first", folder)
            wanted = wanted if wanted == "latest" else str(folder / "checkpoint-4")
        run = trainer(images, folder)
        step, take = [], run.training_step
        run.training_step = lambda run=run, step=step, take=take: (step.append(run.step), take())[1]
        run.train(resume_from_checkpoint=wanted)
        is_whole(run, whole)
        started.append(step[0])
    assert started == [4, 4, 4]

    run = trainer(images, tmp_path / "config", resume_from_checkpoint=str(there))
    run.sample(["left"])
    assert run.step == 4  # without training too
    run.train()
    is_whole(run, whole)
    again = trainer(images, tmp_path / "config", resume_from_checkpoint=str(there))  # the same command finds what it did itself
    again.train()
    is_whole(again, whole)


def test_checkpoints_that_cannot_be_resumed_from_are_refused(images, tmp_path):
    run = trainer(images, tmp_path / "run", max_steps=4)
    run.train()
    fresh = lambda **changes: trainer(images, tmp_path / "new", **changes)
    with pytest.raises(ValueError, match=r"is of step 2 and .* holds one of step 4.*remove the newer ones, or choose a new output_dir"):
        trainer(images, tmp_path / "run", max_steps=4).train(tmp_path / "run/checkpoint-2")
    for name in ("checkpoint-9", "nowhere", ""):
        with pytest.raises(FileNotFoundError, match="must be a folder checkpoint-STEP of a run"):
            fresh(max_steps=4).train(tmp_path / "run" / name)
    (tmp_path / "run/checkpoint-4").rename(tmp_path / "run/checkpoint-4.partial")
    with pytest.raises(FileNotFoundError, match=r"got '.*checkpoint-4.partial'"):
        fresh(max_steps=4).train(tmp_path / "run/checkpoint-4.partial")
    config = dataclasses.replace(run.config, output_dir=str(tmp_path / "wider"))
    wider = DriftingTrainer(tiny_generator(num_layers=2), DriftingObjective(Pixels()), images, config, eval_dataset=images)
    with pytest.raises(ValueError, match=r"is of a run that trains something else, see .*training_setup.json: give one of this run"):
        wider.train(tmp_path / "run/checkpoint-2")
    (tmp_path / "run/checkpoint-2/optimizer.bin").write_bytes(b"half")
    with pytest.raises(RuntimeError, match=r"checkpoint-2 cannot be read .*; give another checkpoint"):
        fresh(max_steps=4).train(tmp_path / "run/checkpoint-2")


# SIGKILL


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(tmp_path):
    """Once in the middle of the files, once between a checkpoint and its evaluation."""
    options = {"config": {"eval_steps": 2, "save_steps": 2}}
    main(str(tmp_path / "whole"), options)
    code, text = start(tmp_path / "run", **options, kill=("_save_state", 4))
    assert code == -9, text
    found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-4.partial"]
    assert list((tmp_path / "run/checkpoint-4.partial").iterdir())  # half of it
    code, text = start(tmp_path / "run", **options, kill=("_look", 4))
    assert code == -9, text
    assert "checkpoint-2" in text
    code, text = start(tmp_path / "run", **options)
    assert code == 0, text
    assert "checkpoint-4" in text
    assert_close(*(load_file(tmp_path / name / "weights.safetensors") for name in ("run", "whole")), rtol=1e-6, atol=1e-7)
    logs = [[json.loads(line) for line in Path(tmp_path, name, "log.jsonl").read_text().splitlines()] for name in ("run", "whole")]
    ours, theirs = (sorted((entry["step"], "energy" in entry) for entry in log) for log in logs)
    assert ours == theirs


# Odd set-ups


def test_two_trainers_in_one_process_do_not_meet(images, tmp_path, whole):
    ours, other = trainer(images, tmp_path / "a"), trainer(images, tmp_path / "b", seed=1, max_steps=3)
    ours._after_step = stop_at(ours, 3)
    with pytest.raises(KeyboardInterrupt):
        ours.train()
    other.train()
    ours.train()
    is_whole(ours, whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"push_per_step": 100},  # more than there are
        {"labels_per_step": 7},  # more than classes, and no multiple
        {"labels_from": "data", "push_per_step": 1, "labels_per_step": 5},
        {"bank_size": 2, "unconditional_bank_size": 1},
        {"positives_from": "dataset", "positives_per_label": 3, "bank_size": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_few_images_train_and_resume(changes, images, tmp_path):
    """One of a class, two of another."""
    few = Dataset.from_dict({name: [images[i][name] for i in (0, 3, 1, 2, 5)] for name in ("image", "label")}, features=images.features)
    build = lambda name: DriftingTrainer(
        tiny_generator(),
        DriftingObjective(Pixels()),
        few,
        DriftingConfig(str(tmp_path / name), **(SMALL | OPTIONS | {"max_steps": 4} | changes)),
        eval_dataset=images,
    )
    straight, killed = build("straight"), build("killed")
    straight.train()
    killed._after_step = stop_at(killed, 3)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = build("killed")
    again.train()
    assert_close(weights(again), weights(straight), rtol=0, atol=0)
    assert all(torch.isfinite(value).all() for value in weights(again).values())


@pytest.mark.slow
def test_memory_does_not_grow(images, tmp_path):
    """Tensors that are alive after 60 steps are those after 20."""
    counts = {}

    class Count:
        def __init__(self, run):
            self.run, self.after = run, run._after_step

        def __call__(self, outcome, bar):
            self.after(outcome, bar)
            gc.collect()
            if self.run.step in (20, 60):
                counts[self.run.step] = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    run = trainer(images, tmp_path / "run", max_steps=61, save_steps=10, logging_steps=5)
    run._after_step = Count(run)
    run.train()
    assert abs(counts[60] - counts[20]) <= 20  # what is drawn ahead or not yet
