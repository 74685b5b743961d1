"""Callbacks of transformers (`TrainerCallback`: early stopping, trackers, anybody's own) on our training loop.

They see what they see in transformers' `Trainer`: arguments in its vocabulary, a `TrainerState`, and a `TrainerControl` with which they ask for a log, a
checkpoint, an evaluation or the end. Metrics of an evaluation carry the prefix `eval_`. A run is one epoch. A step's checkpoint comes before its
evaluation, where transformers has it behind: what a user's code breaks there costs no checkpoint.
"""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import IntervalStrategy

from .config import RunConfig

ANSWERED = {
    "on_step_begin": ("should_log", "should_evaluate", "should_save"),
    "on_log": ("should_log",),
    "on_evaluate": ("should_evaluate",),
    "on_save": ("should_save",),
}
"""Which wishes an event fulfils; until then they stand, as in transformers' `Trainer`."""


class OurFlow(DefaultFlowCallback):
    """Our loop decides itself when it logs, saves and evaluates; what callbacks wish comes on top."""

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **told: Any) -> TrainerControl:
        return control


class Events:
    """What happened in a run, told to its callbacks.

    Args:
        config: of the run.
        callbacks: instances or classes.
        main: whether this process is the one that logs.
    """

    def __init__(self, config: RunConfig, callbacks: Sequence[TrainerCallback | type[TrainerCallback]], *, main: bool):
        steps = IntervalStrategy.STEPS
        strategies = {"eval_strategy": steps, "logging_strategy": steps, "save_strategy": steps, "load_best_model_at_end": True}
        counts = {"num_train_epochs": 1, "logging_first_step": False, "eval_delay": 0, "world_size": 1, "process_index": 0 if main else 1}
        metric = {"metric_for_best_model": None, "greater_is_better": False}  # of an encoder's run
        self.arguments = SimpleNamespace(**metric | dataclasses.asdict(config) | strategies | counts)
        self.handler = CallbackHandler([OurFlow(), *callbacks], None, None, None, None)
        self.handler.train_dataloader = self.handler.eval_dataloader = None
        self.state = TrainerState(is_world_process_zero=main, is_local_process_zero=main, max_steps=config.max_steps)
        self.control = TrainerControl()
        self.evaluated = -1  # the step whose evaluation was told last

    def of(self, model: Any, optimizer: Any, schedule: Any) -> None:
        """What callbacks are given to look at."""
        self.handler.model, self.handler.optimizer, self.handler.lr_scheduler = model, optimizer, schedule
        self("on_init_end", 0)

    def __call__(self, event: str, step: int, **told: Any) -> TrainerControl:
        """Tell all callbacks, and return what they ask for."""
        self.state.global_step = step
        self.state.epoch = step / self.state.max_steps
        for wish in ANSWERED.get(event, ()):
            setattr(self.control, wish, False)
        self.control = self.handler.call_event(event, self.arguments, self.state, self.control, **told)
        return self.control

    def tell_evaluation(self, step: int, found: dict[str, float]) -> None:
        """Once per step: a run that was killed between a checkpoint and what callbacks made of its evaluation tells them when it is resumed."""
        if self.evaluated == step:
            return
        self.evaluated = step
        self("on_evaluate", step, metrics={f"eval_{name}": value for name, value in found.items()} | {"epoch": step / self.state.max_steps})
        best, value = self.state.best_metric, found.get(self.arguments.metric_for_best_model)
        if value is not None and (best is None or (value > best if self.arguments.greater_is_better else value < best)):
            self.state.best_metric, self.state.best_global_step = value, step

    def state_dict(self) -> dict[str, Any]:
        """What callbacks remember, by their class names; the best metric and whether one asked for the end."""
        kept = {type(c).__name__: c.state()["attributes"] for c in self.handler.callbacks if isinstance(c, ExportableState)}
        told = {"evaluated": self.evaluated, "best_metric": self.state.best_metric, "stop": self.control.should_training_stop}
        return {"callbacks": kept} | told

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for callback in self.handler.callbacks:
            for name, value in state["callbacks"].get(type(callback).__name__, {}).items():
                setattr(callback, name, value)
        self.evaluated = state.get("evaluated", -1)
        self.state.best_metric, self.control.should_training_stop = state["best_metric"], state["stop"]
