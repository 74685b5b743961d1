"""Callbacks of transformers on our loop: what they are told and when, what they ask for, and what they remember across a kill."""

import pytest
import torch
from test_trainer import images, one_accelerator_per_test, stop_at, tiny_generator, weights
from torch.testing import assert_close
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback

from drifting_diffusers import DriftingConfig, DriftingObjective, DriftingTrainer, Pixels

__all__ = ["images", "one_accelerator_per_test"]

SMALL = {
    "max_steps": 6,
    "labels_per_step": 2,
    "generated_per_label": 2,
    "positives_per_label": 2,
    "unconditional_per_label": 1,
    "bank_size": 3,
    "unconditional_bank_size": 3,
    "push_per_step": 2,
    "warmup_steps": 1,
    "learning_rate": 1e-3,
    "eval_steps": 0,
    "eval_samples_per_class": 2,
    "preview_steps": 0,
    "save_steps": 9,
    "logging_steps": 9,
}


def trainer(images, folder, *callbacks, **changes):
    config = DriftingConfig(str(folder), **(SMALL | changes))
    return DriftingTrainer(tiny_generator(), DriftingObjective(Pixels()), images, config, eval_dataset=images, callbacks=callbacks)


class Diary(TrainerCallback):
    """Writes down what it is told."""

    def __init__(self):
        self.entries = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda args, state, control, **told: self.entries.append((name, state.global_step, told))

    def events(self):
        return [(name, step) for name, step, _ in self.entries]


def test_events_come_in_the_order_of_transformers(images, tmp_path):
    """But for a checkpoint, which comes before the evaluation of its step."""
    diary = Diary()
    trainer(images, tmp_path / "run", diary, max_steps=2, logging_steps=1, eval_steps=2, save_steps=2).train()
    update = lambda step: [("on_step_begin", step), ("on_pre_optimizer_step", step), ("on_optimizer_step", step), ("on_step_end", step + 1)]
    assert diary.events() == [
        ("on_init_end", 0),
        ("on_train_begin", 0),
        ("on_epoch_begin", 0),
        *update(0),
        ("on_log", 1),
        *update(1),
        ("on_log", 2),
        ("on_save", 2),
        ("on_log", 2),
        ("on_evaluate", 2),
        ("on_epoch_end", 2),
        ("on_train_end", 2),
    ]


def test_callbacks_are_shown_the_run(images, tmp_path):
    seen = {}

    class Curious(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, model, optimizer, lr_scheduler, **kwargs):
            seen.update(metrics=metrics, model=model, optimizer=optimizer, schedule=lr_scheduler, state=state, args=args)

        def on_log(self, args, state, control, logs, **kwargs):
            logs["energy"] = "of no effect"

    run = trainer(images, tmp_path / "run", Curious, max_steps=2, logging_steps=1)  # a class will do
    found = run.train()
    assert {name for name in found if f"eval_{name}" in seen["metrics"]} == {*found}
    assert seen["metrics"]["eval_energy"] == found["energy"]
    assert (seen["model"], seen["optimizer"], seen["schedule"]) == (run.model, run.optimizer, run.schedule)
    assert seen["args"].learning_rate == 1e-3
    assert (seen["state"].max_steps, seen["state"].epoch, seen["state"].is_world_process_zero) == (2, 1.0, True)
    assert run.log_history[-1]["energy"] == found["energy"]
    assert seen["state"].log_history == run.log_history


def test_callbacks_get_what_they_ask_for(images, tmp_path):
    """At any event: a wish stands until it is fulfilled, whatever else the step does."""

    class Wishes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = state.global_step == 1
            control.should_evaluate = state.global_step in (2, 3)
            control.should_save = state.global_step == 4
            control.should_training_stop = state.global_step == 5
            return control

        def on_log(self, args, state, control, logs, **kwargs):
            control.should_save |= state.global_step == 1

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            control.should_save |= state.global_step == 3

    diary = Diary()
    run = trainer(images, tmp_path / "run", Wishes(), diary, max_steps=9, logging_steps=3, save_total_limit=9)
    run.train()
    assert run.step == 5
    told = [event for event in diary.events() if event[0] in ("on_log", "on_evaluate", "on_save")]
    assert told == [
        *[("on_log", 1), ("on_save", 1)],
        *[("on_log", 2), ("on_evaluate", 2)],  # evaluations are logged
        *[("on_log", 3), ("on_log", 3), ("on_evaluate", 3), ("on_save", 3)],
        ("on_save", 4),
        *[("on_save", 5), ("on_log", 5), ("on_evaluate", 5)],  # the end leaves a checkpoint and an evaluation
    ]
    assert list(run.run.checkpoints()) == [1, 3, 4, 5]


@pytest.mark.filterwarnings("ignore:.*load_best_model_at_end")
@pytest.mark.parametrize("save_steps", [2, 9])
def test_early_stopping_keeps_its_patience_across_a_kill(save_steps, images, tmp_path):
    """Wherever the checkpoint is taken, also where the last one is older than the last evaluation."""
    options = {"max_steps": 9, "eval_steps": 1, "save_steps": save_steps, "metric_for_best_model": "mark"}
    whole = stopping(trainer(images, tmp_path / "whole", EarlyStoppingCallback(3), **options))
    whole.train()
    assert whole.step == 5  # the best one was at step 2
    assert whole.watcher.best() == {"step": 2, "metric": "mark", "value": 1.0}

    killed = stopping(trainer(images, tmp_path / "killed", EarlyStoppingCallback(3), **options))
    killed._after_step = stop_at(killed, 4)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    stopper = EarlyStoppingCallback(3)
    again = stopping(trainer(images, tmp_path / "killed", stopper, **options))
    again.train()
    assert again.step == 5
    assert stopper.early_stopping_patience_counter == 3
    assert_close(weights(again), weights(whole), rtol=0, atol=0)

    finished = stopping(trainer(images, tmp_path / "killed", EarlyStoppingCallback(3), **options))
    finished.train()  # has nothing left to do
    assert finished.step == 5
    assert_close(weights(finished), weights(whole), rtol=0, atol=0)


def stopping(run):
    """The metric `mark` of an evaluation is 3, 1, 2, 2, ... and so best after step 2."""
    run.watcher.compute_metrics = lambda images, labels: {"mark": {1: 3.0, 2: 1.0}.get(run.step, 2.0)}
    run.watcher.curves = lambda history: None  # a second each
    return run


def test_a_kill_between_checkpoint_and_evaluation_loses_neither(images, tmp_path):
    diary = Diary()
    killed = trainer(images, tmp_path / "run", save_steps=2, eval_steps=2)
    killed._look = lambda bar: interrupt() if killed.step == 2 else None
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert list(killed.run.checkpoints()) == [2]
    again = trainer(images, tmp_path / "run", diary, save_steps=2, eval_steps=2)
    again.train()
    assert [step for name, step in diary.events() if name == "on_evaluate"] == [2, 4, 6]
    assert [entry["step"] for entry in again.log_history if "energy" in entry] == [2, 4, 6]


def interrupt(*_):
    raise KeyboardInterrupt


class Counter(TrainerCallback, ExportableState):
    def __init__(self):
        self.count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


def test_what_a_callback_exports_is_in_the_checkpoint(images, tmp_path):
    killed = trainer(images, tmp_path / "run", Counter(), save_steps=2)
    killed._after_step = stop_at(killed, 3)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    counter = Counter()
    trainer(images, tmp_path / "run", counter, save_steps=2).train()
    assert counter.count == 6


def test_those_of_transformers_run(images, tmp_path, capsys):
    trainer(images, tmp_path / "run", PrinterCallback, ProgressCallback(), max_steps=2, logging_steps=1).train()
    said = capsys.readouterr()
    assert "'learning_rate': '1e-06'" in said.out
    assert said.err.count("2/2")


def test_an_exception_of_a_callback_is_not_hidden_and_the_run_goes_on_afterwards(images, tmp_path):
    whole = trainer(images, tmp_path / "whole")
    whole.train()

    class Bug(TrainerCallback):
        broken = True

        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 3 and self.broken:
                self.broken = False
                raise ZeroDivisionError("a bug of the user")

    run = trainer(images, tmp_path / "run", Bug())
    with pytest.raises(ZeroDivisionError, match="a bug of the user"):
        run.train()
    run.train()
    assert_close(weights(run), weights(whole), rtol=0, atol=0)
    assert torch.isfinite(whole.generator.patch_proj.weight).all()
