"""The folder of a training run: whose it is, its checkpoints, its log. Nothing a user made is overwritten, and no half-written checkpoint is read.

output_dir/training_config.json   every choice of the config, written before step 0
           training_setup.json    what is trained on what: generator, objective, data
           checkpoint-1000/       all state; written aside as checkpoint-1000.partial and renamed when whole
           log.jsonl              one line per log, evaluation included
           previews/              class grids while training
           best/                  the pipeline of the best evaluation so far, and best.json
           curves.png             distances and strengths over the steps
           pipeline/              the trained DriftingPipeline
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import CONFIG_NAME, DriftingConfig

SETUP_NAME = "training_setup.json"


class RunFolder:
    """The folder `config.output_dir`, for one run.

    Args:
        config: the choices of the run.
        setup: what is trained on what, as JSON; a folder that holds another setup is refused as well.
    """

    def __init__(self, config: DriftingConfig, setup: dict[str, Any]):
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

    def _config_there(self) -> DriftingConfig:
        try:
            return DriftingConfig.from_folder(self.path)
        except TypeError as error:  # a key that this version does not know
            raise ValueError(f"{self.path / CONFIG_NAME} is of another version of this library: {error}; choose a new folder") from error

    def claim(self) -> None:
        """Write down config and setup, before any work."""
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / SETUP_NAME, json.dumps(self.setup, indent=2))
        _write(self.path / CONFIG_NAME, self.config.to_json())

    def checkpoints(self) -> dict[int, Path]:
        """The whole checkpoints by step, oldest first."""
        found = {}
        for path in self.path.glob("checkpoint-*"):
            number = path.name.removeprefix("checkpoint-")
            if number.isdecimal():  # not checkpoint-1000.partial
                found[int(number)] = path
        return dict(sorted(found.items()))

    def save_checkpoint(self, step: int, write: Callable[[Path], object]) -> None:
        """Have `write` fill a folder and give it its name when it is on the disk; then drop the oldest beyond the limit."""
        final = self.path / f"checkpoint-{step}"
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        _to_disk(partial)
        if final.exists():  # the same step of the same run
            shutil.rmtree(final)
        partial.rename(final)
        _to_disk(self.path)
        for old in list(self.checkpoints().values())[: -self.config.save_total_limit]:
            shutil.rmtree(old)

    def log(self, entry: dict[str, Any]) -> None:
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
        _write(self.path / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in kept))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is missing or broken, so it cannot be told whose run this is; choose a new folder") from error


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text)
    aside.replace(path)


def _to_disk(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        if path.is_file() or path == folder:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
