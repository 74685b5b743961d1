"""The loop of every training run: devices, precision, order, checkpoints, logs, callbacks, pushes. What a step computes is its subclass's.

A run is a function of its config: everything random in step k is a function of (seed, k), every checkpoint holds all state, and one that was killed
goes on as the run that never stopped.
"""

import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers.trainer_callback import TrainerCallback

from .averaging import AveragedWeights
from .callbacks import Events
from .config import RunConfig, learning_rate_at
from .draws import random_stream
from .fields import Mean, batch_mean
from .losses import NonFinite
from .pushing import SNAPSHOT, Pusher
from .runs import RunFolder
from .services import Termination, check_services, repository_of, trackers

PREEMPTED = 75
"""The exit code of a run that was told to go away (SIGTERM) and left a checkpoint: EX_TEMPFAIL, try again."""
TIMING = ("samples_per_second", "waiting_share", "hours_left")
"""Entries of a log that depend on the machine, not on the run."""

COUNTS = ("skipped_steps", "overflows")
"""Entries of a log since steps were skipped, or left out by the scaler of float16."""


class TrainingLoop:
    """What is the same for every network that is trained here.

    Subclasses call `__init__`, make their `run`, call `_prepare`, and give `samples_per_step`, `training_step` and what is looked at.

    Args:
        config: the choices of the run.
        callbacks: of transformers, instances or classes.
    """

    samples_per_step: int
    run: RunFolder

    def __init__(self, config: RunConfig, callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = ()):
        self.config: Any = config
        folder = Path(config.output_dir)
        check_services(config)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=list(config.report_to) or None,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers")),
        )
        if config.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":  # Accelerate would take float32 and say nothing
            raise ValueError("mixed_precision='fp16' needs a GPU, and this process has none: take 'bf16' or 'no'")
        if config.allow_tf32:
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
        # over all problems of a step, whoever holds them
        self._mean: Mean = batch_mean if self.accelerator.num_processes == 1 else self._mean_of_processes
        self.events = Events(config, callbacks, main=self.accelerator.is_main_process)
        self.step = self.skipped = self.overflows = 0
        self.seconds = 0.0  # of training, evaluations and checkpoints included, before and after every resume
        self.log_history: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}  # what else cards should say: dataset, license, base_model; see `cards.ABOUT`
        self._waited = 0.0  # seconds since the last log in which a step waited for real samples
        self._logged = (0, time.monotonic())
        self._pusher: Pusher | None = None
        self._begun = False  # whether what step 0 needs is there
        self._torn = False  # whether an update was begun and not ended

    def _prepare(self, model: Any, parts: Sequence[Any]) -> None:
        """Wrap the network and build what trains it.

        Args:
            model: in float32.
            parts: further state of checkpoints, objects with a `state_dict`.
        """
        config = self.config
        self.ema = AveragedWeights(model, config.ema_decays)
        for averaged in self.ema.models.values():
            averaged.to(self.accelerator.device)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.torch_compile:
            model.compile_repeated_blocks()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,  # one pass over the parameters
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        # FSDP2 warns of views at every call; nothing is written into what a network returns here.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
        # Not prepared: Accelerate would step it once per process.
        self.schedule = LambdaLR(optimizer, lambda step: learning_rate_at(step, config) / config.learning_rate)
        self.accelerator.register_for_checkpointing(self.schedule, self.ema, *parts)
        self.events.of(self.model, self.optimizer, self.schedule)

    def _averaged(self, decay: float | None = None) -> Any:
        """The network with averaged weights, of this decay or of the first."""
        decays = self.config.ema_decays
        if decay is not None and decay not in decays:
            raise ValueError(f"ema_decay must be one of {decays}, got {decay}: set more_ema_decays before training")
        return self.ema.models[decays[0] if decay is None else decay]

    # -- what a subclass gives

    def training_step(self) -> dict[str, Any]:
        """One update, by way of `_update`, and what was measured. Raises NonFinite for a step that must be skipped."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Before step 0 of a run that starts."""

    def _look(self, bar: tqdm | None = None) -> None:
        """After a step, and once more before a run goes on: what is due of evaluations and pictures. On every process."""

    def _end(self) -> dict[str, float]:
        """After the last step: the last evaluation."""
        return {}

    def _close(self) -> None:
        """Whatever happens, at the end of `train`."""

    def _save_model(self, folder: Path) -> Any:
        """Write what is published of this run into an empty folder, and return the model that a card is of."""
        raise NotImplementedError

    # -- the loop

    def train(self, resume_from_checkpoint: str | Path | None = None) -> dict[str, float]:
        """Train to `config.max_steps`, from the newest checkpoint in the output folder if there is one, and return the last evaluation.

        Told to go away (SIGTERM) it writes a checkpoint and leaves with the exit code `PREEMPTED`; the same command goes on.

        Args:
            resume_from_checkpoint: a checkpoint folder to start from; one of the output folder must be its newest. Where the output folder has a newer one
                than that of another folder, the run goes on from its own: so the same command resumes. "latest" is as if not given.
        """
        if self._torn:
            raise RuntimeError(
                f"this trainer was stopped in the middle of an update of step {self.step}: build it again, and it goes on from the newest "
                f"checkpoint in {self.run.path}"
            )
        self._restore(resume_from_checkpoint or self.config.resume_from_checkpoint)
        self._on_main(lambda: self.run.forget_after(self.step))  # what a killed run did beyond its last checkpoint
        if self.step == 0 and not self._begun:
            self._begin()
            self._begun = True
        with trackers(self.accelerator, self.config), Termination() as termination:
            patience = 10.0  # seconds for what is being pushed when a run is stopped; there may be no more
            try:
                self._run(termination)
                found = self._end()
                self._on_main(self._push)
                patience = 600.0
            finally:
                self._close()
                self._finish_pushing(patience)
            self.events("on_train_end", self.step)
        return found

    def _run(self, termination: "Termination") -> None:
        started = time.monotonic() - self.seconds
        self._logged = (self.step, time.monotonic())
        self.optimizer.zero_grad()  # of a step that was left in its middle
        stopped = self.events("on_train_begin", self.step).should_training_stop
        self.events("on_epoch_begin", self.step)
        if self.step:
            self._restored()
        shown = {"total": self.config.max_steps, "initial": self.step, "desc": "training", "unit": "step", "dynamic_ncols": True}
        with tqdm(**shown, disable=not self.accelerator.is_main_process) as bar:
            while self.step < self.config.max_steps and not self.events.control.should_training_stop:
                self.events("on_step_begin", self.step)
                outcome = self._attempt()
                self.seconds = time.monotonic() - started
                bar.update()
                self._after_step(outcome, bar)
                if self._any(termination.asked):
                    self._leave()
        if (
            self.events.control.should_training_stop != stopped or self.step not in self.run.checkpoints()
        ):  # that one asked for the end is kept
            self._save_checkpoint()
        self.events("on_epoch_end", self.step)

    def _attempt(self) -> dict[str, Any]:
        try:
            return self.training_step()
        except NonFinite as error:
            self._skip(error)
            return {}

    def _skip(self, error: NonFinite) -> None:
        """Leave this step out; its random numbers are spent and the schedule goes on, so what follows is a function of the step as ever."""
        self.skipped += 1
        if self.skipped > self.config.max_skipped_steps:
            raise FloatingPointError(
                f"step {self.step} is not finite, and {self.skipped - 1} were skipped before (max_skipped_steps={self.config.max_skipped_steps}): "
                f"{error}. Sound checkpoints of steps {list(self.run.checkpoints())} are in {self.run.path}; a lower learning rate is another "
                "run: choose a new output_dir"
            ) from error
        warnings.warn(f"step {self.step} is skipped ({self.skipped} so far): {error}", RuntimeWarning, stacklevel=3)
        self.optimizer.zero_grad()
        self._advance()

    def _update(self, blame: Callable[[], str]) -> dict[str, Any]:
        """Clip, update, average; the gradient is there.

        Args:
            blame: says where a gradient that is not finite comes from.
        """
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        scaler = self.accelerator.scaler
        overflown = not bool(torch.isfinite(norm))
        if overflown and (scaler is None or scaler.get_scale() <= 1):
            raise NonFinite(f"the norm of the gradient is {float(norm)}: {blame()}")
        learning_rate = self.schedule.get_last_lr()[0]
        self.events("on_pre_optimizer_step", self.step)
        self._torn = True
        self.optimizer.step()  # in float16 the scaler leaves an overflown one out and scales less from then on
        self.optimizer.zero_grad()
        if overflown:
            self.overflows += 1
        else:
            self.ema.update(self.accelerator.unwrap_model(self.model))
        self._advance()
        self._torn = False
        self.events("on_optimizer_step", self.step - 1)
        return {"learning_rate": learning_rate, "grad_norm": norm}

    def _advance(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # the first step may be one that is skipped
            self.schedule.step()
        self.step += 1

    def _after_step(self, outcome: dict[str, Any], bar: tqdm) -> None:
        self.events("on_step_end", self.step)
        last = self.step == self.config.max_steps
        if outcome and (self.step % self.config.logging_steps == 0 or last or self.events.control.should_log):
            self._log(self._scalars(outcome) | self._timing())
        if self.step % self.config.save_steps == 0 or last or self.events.control.should_save:  # before what a user's code may break
            self._save_checkpoint()
        self._look(bar)
        if self.events.control.should_save:
            self._save_checkpoint()

    def _scalars(self, outcome: dict[str, Any]) -> dict[str, float]:
        """A step's outcome as flat numbers."""
        raise NotImplementedError

    def _timing(self) -> dict[str, float]:
        """Of the steps since the last log: what a machine is bought by."""
        (step, then), now = self._logged, time.monotonic()
        self._logged, waited, self._waited = (self.step, now), self._waited, 0.0
        per_step = (now - then) / max(1, self.step - step)
        left = per_step * (self.config.max_steps - self.step) / 3600
        values = (self.samples_per_step / max(per_step, 1e-9), waited / max(now - then, 1e-9), left)
        return dict(zip(TIMING, values, strict=True))

    def _log(self, entry: dict[str, float], event: str = "on_log") -> None:
        counted = {name: count for name, count in zip(COUNTS, (self.skipped, self.overflows), strict=True) if count}
        entry = {"step": self.step, **entry, **counted}
        self.log_history.append(entry)
        self._on_main(lambda: self.run.log(entry))
        self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=self.step)
        self.events.state.log_history = self.log_history
        self.events(event, self.step, logs=dict(entry))

    # -- the Hub

    def _push(self, *, every: bool = False) -> None:
        """Have the model uploaded while training goes on, and the checkpoint where `hub_strategy` says so; nothing that fails there stops it."""
        strategy = self.config.hub_strategy
        if not self.config.push_to_hub or (every and strategy == "end"):
            return
        if self._pusher is None:
            for left in (*self.run.path.glob(".model-*"), *self.run.path.glob(f"{SNAPSHOT}*")):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            self._pusher = Pusher(repository_of(self.config), private=self.config.hub_private_repo)
        with tempfile.TemporaryDirectory(dir=self.run.path, prefix=".model-") as folder:
            model = self._save_model(Path(folder))
            self._pusher.push(folder, message=f"Step {self.step}", model=model)
        newest = self.run.checkpoints().get(self.step)
        if newest is not None and strategy in ("checkpoint", "all_checkpoints"):
            there = "last-checkpoint" if strategy == "checkpoint" else newest.name
            self._pusher.push(newest, message=f"Checkpoint of step {self.step}", path_in_repo=there, ignore=())

    def _finish_pushing(self, patience: float) -> None:
        """Wait for what is on its way, and tell what did not arrive."""
        if self._pusher is not None:
            for failure in self._pusher.finish(patience):
                self.accelerator.print(failure)
            self._pusher = None

    # -- processes

    def _share(self, name: str) -> range:
        """This process's places among those of a step, whose number the config has under this name."""
        count, processes = getattr(self.config, name), self.accelerator.num_processes
        each, rest = divmod(count, processes)
        if rest:
            raise ValueError(
                f"{name} must be a multiple of the number of processes, got {count} and {processes}: all must have equal shares"
            )
        return range(each * self.accelerator.process_index, each * (self.accelerator.process_index + 1))

    def _on_main(self, write: Callable[[], object]) -> None:
        """Have one process write; the others wait."""
        if self.accelerator.is_main_process:
            write()
        self.accelerator.wait_for_everyone()

    def _from_main(self, look: Callable[[], Any]) -> Any:
        """What one process found, on all of them."""
        box = [look() if self.accelerator.is_main_process else None]
        return broadcast_object_list(box)[0]

    def _together(self, compute: Callable[[], Any]) -> Any:
        """What this computes, unless it is not finite on some process: then no process takes the step."""
        try:
            found, error = compute(), None
        except NonFinite as raised:
            found, error = None, raised
        if self._any(error is not None):
            raise error or NonFinite("it was not finite on another process")
        return found

    def _any(self, flag: bool) -> bool:
        """Whether it is so on any process: all must do the same."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return bool(flags > 0)  # pyright: ignore[reportOperatorIssue]

    def _mean_of_processes(self, totals: Tensor, weights: Tensor) -> Tensor:
        """In one message."""
        sums = torch.cat([totals.sum(-1).reshape(-1), weights.sum().reshape(1)])
        sums = self.accelerator.reduce(sums, "sum")
        return (sums[:-1] / sums[-1]).reshape(totals.shape[:-1])

    def _rng(self, *name: int) -> torch.Generator:
        return random_stream(self.config.seed, *name)

    # -- checkpoints

    def _save_checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            self.run.open_checkpoint(self.step)
        self.accelerator.wait_for_everyone()
        self._save_state(self.run.aside(self.step))
        self.accelerator.wait_for_everyone()
        self._on_main(lambda: self.run.close_checkpoint(self.step))
        self.events("on_save", self.step)
        if self.step < self.config.max_steps and not self.events.control.should_training_stop:  # the last one goes with the end
            self._on_main(lambda: self._push(every=True))

    def _save_state(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))  # on every process: each has random numbers of its own
        counts = {"step": self.step, "seconds": self.seconds, "skipped": self.skipped, "overflows": self.overflows}
        if self.accelerator.is_main_process:
            (folder / "trainer_state.json").write_text(json.dumps(counts | self.events.state_dict()))

    def _restore(self, wanted: str | Path | None = None) -> None:
        """Claim the folder, and load its newest checkpoint if that is ahead of what this trainer holds."""
        self._on_main(self.run.claim)
        if wanted is None and not self.run.checkpoints():
            wanted = self.config.resume_from_checkpoint
        newest, folder = self.run.newest(None if wanted in (None, "latest") else Path(wanted))
        if newest <= self.step:
            return
        try:
            self.accelerator.load_state(str(folder))
            counts = json.loads((folder / "trainer_state.json").read_text())
        except Exception as error:
            way_out = "remove this folder to go on from the one before" if folder.parent == self.run.path else "give another checkpoint"
            raise RuntimeError(f"the checkpoint {folder} cannot be read ({error}); {way_out}") from error
        self.step, self.seconds, self.skipped, self.overflows = newest, counts["seconds"], counts["skipped"], counts["overflows"]
        self.events.load_state_dict(counts)
        self.log_history = [entry for entry in self.run.history() if entry["step"] <= self.step]
        self.events.state.log_history = self.log_history
        self.accelerator.print(f"Resuming from {folder}")

    def _restored(self) -> None:
        """Before the first step of a run that goes on: what was due after the last one, should it be missing."""

    def _leave(self) -> None:
        """Make way for whoever sent SIGTERM."""
        if self.step not in self.run.checkpoints():
            self._save_checkpoint()
        self.accelerator.print(f"Told to stop: step {self.step} is saved in {self.run.path}, the same command goes on from there")
        raise SystemExit(PREEMPTED)
