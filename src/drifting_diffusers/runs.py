"""The folder of a training run: whose it is, its checkpoints, its log. Nothing a user made is overwritten, and no half-written checkpoint is read.

output_dir/training_config.json   every choice of the config, written before step 0
           training_setup.json    what is trained on what: generator, objective, data
           checkpoint-1000/       all state; written aside as checkpoint-1000.partial and renamed when whole
           log.jsonl              one line per log, evaluation included
           trackers/              what trackers such as tensorboard write
           previews/              class grids while training
           best/                  the pipeline of the best evaluation so far, and best.json
           curves.png             distances and strengths over the steps
           pipeline/              the trained DriftingPipeline
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .config import CONFIG_NAME, RunConfig
from .files import write_text

SETUP_NAME = "training_setup.json"


class RunFolder:
    """The folder `config.output_dir`, for one run.

    Args:
        config: the choices of the run.
        setup: what is trained on what, as JSON; a folder that holds another setup is refused as well.
    """

    def __init__(self, config: RunConfig, setup: dict[str, Any]):
        self.path, self.config = Path(config.output_dir), config
        self.setup = json.loads(json.dumps(setup))  # tuples become lists, as they will be when read back
        self.check()

    def check(self) -> None:
        """Raises FileExistsError or ValueError if the folder belongs to something else than this run."""
        if self.path.is_file():
            raise FileExistsError(f"output_dir {str(self.path)!r} is a file; choose a new or empty folder")
        if not self.path.exists() or not any(p for p in self.path.iterdir() if p.suffix != ".partial"):
            return
        if not (self.path / CONFIG_NAME).exists():
            raise FileExistsError(f"output_dir {str(self.path)!r} holds other files and no run; choose a new or empty folder")
        there = _read(self.path / SETUP_NAME)
        differences = self.config.differences(self._config_there())
        differences |= {name: (self.setup[name], there.get(name)) for name in self.setup if self.setup[name] != there.get(name)}
        if differences:
            listed = ", ".join(f"{name}={here} (there: {there})" for name, (here, there) in differences.items())
            raise ValueError(
                f"output_dir {str(self.path)!r} holds another run: {listed}; choose a new folder, or the old values to resume it"
            )

    def _config_there(self) -> RunConfig:
        try:
            return type(self.config).from_folder(self.path)
        except TypeError as error:  # a key that this config does not know
            raise ValueError(
                f"{self.path / CONFIG_NAME} is of another kind of run, or of another version of this library: {error}; choose a new folder"
            ) from error

    def claim(self) -> None:
        """Write down config and setup, before any work."""
        self.check()
        self._introduce()

    def _introduce(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / SETUP_NAME, json.dumps(self.setup, indent=2))
        write_text(self.path / CONFIG_NAME, self.config.to_json())

    def checkpoints(self) -> dict[int, Path]:
        """The whole checkpoints by step, oldest first."""
        found = {}
        for path in self.path.glob("checkpoint-*"):
            number = path.name.removeprefix("checkpoint-")
            if number.isdecimal():  # not checkpoint-1000.partial
                found[int(number)] = path
        return dict(sorted(found.items()))

    def newest(self, wanted: Path | None = None) -> tuple[int, Path]:
        """The step and folder of the checkpoint to go on from; step 0 without one.

        Raises:
            FileNotFoundError: if the wanted one is no checkpoint.
            ValueError: if the wanted one is of this folder, which has a newer one, or of another run.
        """
        step, folder = max(self.checkpoints().items(), default=(0, self.path))
        if wanted is None:
            return step, folder
        number = wanted.name.removeprefix("checkpoint-")
        if not (wanted / "trainer_state.json").exists() or not number.isdecimal():
            raise FileNotFoundError(f"resume_from_checkpoint must be a folder checkpoint-STEP of a run, got {str(wanted)!r}")
        there = wanted.parent / SETUP_NAME
        if there.exists() and _read(there) != self.setup:
            raise ValueError(
                f"resume_from_checkpoint {str(wanted)!r} is of a run that trains something else, see {there}: give one of this run"
            )
        if step > int(number):
            if wanted.resolve().parent != self.path.resolve():
                return step, folder  # the run began there, and has gone on since
            raise ValueError(
                f"resume_from_checkpoint is of step {number} and {str(self.path)!r} holds one of step {step}, which would be trained again: "
                "remove the newer ones, or choose a new output_dir"
            )
        return int(number), wanted

    def save_checkpoint(self, step: int, write: Callable[[Path], object]) -> None:
        """Have `write` fill a folder and give it its name when it is on the disk; then drop the oldest beyond the limit."""
        write(self.open_checkpoint(step))
        self.close_checkpoint(step)

    def open_checkpoint(self, step: int) -> Path:
        """An empty folder for the state of this step, which is no checkpoint yet."""
        aside = self.aside(step)
        self._still_there()
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        return aside

    def close_checkpoint(self, step: int) -> Path:
        """Make that folder a checkpoint, once it is on the disk, and drop the oldest beyond the limit."""
        aside, final = self.aside(step), self.path / f"checkpoint-{step}"
        _to_disk([*aside.rglob("*"), aside])
        if final.exists():  # the same step of the same run
            _remove(final)
        aside.rename(final)
        _to_disk([self.path])  # not what is below: a push may be removing its snapshots
        for old in list(self.checkpoints().values())[: -self.config.save_total_limit]:
            _remove(old)
        return final

    def _still_there(self) -> None:
        """A run of days is not lost with its folder: the next checkpoint makes it again."""
        if not (self.path / CONFIG_NAME).exists():
            warnings.warn(f"output_dir {str(self.path)!r} was deleted while training; it is made again", RuntimeWarning, stacklevel=3)
            self._introduce()

    def aside(self, step: int) -> Path:
        """Where the state of a step is written before it is a checkpoint."""
        return self.path / f"checkpoint-{step}.partial"

    def log(self, entry: dict[str, Any]) -> None:
        self._still_there()
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """All log lines; a last one that a killed run left half-written is not one."""
        log = self.path / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def forget_after(self, step: int) -> None:
        """Drop log lines of steps that a killed run took beyond its last checkpoint: they are about to be taken again."""
        kept = [entry for entry in self.history() if entry["step"] <= step]
        write_text(self.path / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in kept))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is missing or broken, so it cannot be told whose run this is; choose a new folder") from error


def _remove(checkpoint: Path) -> None:
    """At once: one that is half removed is none."""
    aside = checkpoint.with_name(f"{checkpoint.name}.removed.partial")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def _to_disk(paths: Sequence[Path]) -> None:
    """These files, and what these folders list."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
