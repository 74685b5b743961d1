"""What a run asks of the world around it: trackers, a repository on the Hub, and to be told when it has to go."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL.Image import Image

from .config import RunConfig


def check_services(config: RunConfig) -> None:
    """Trackers that are not installed, which Accelerate passes over in silence, and a repository's name that the Hub would refuse at the first push."""
    installed = {str(name) for name in get_available_trackers()}
    missing = [name for name in config.report_to if name in {str(kind) for kind in LoggerType} - {"all"} - installed]
    if missing:
        raise ImportError(f"report_to={config.report_to} asks for {missing[0]}: pip install {missing[0]}, or leave it out")
    if config.push_to_hub:
        try:
            validate_repo_id(repository_of(config))
        except HFValidationError as error:
            raise ValueError(f"hub_model_id must be a repository's name, USER/NAME: {error}") from error


def repository_of(config: RunConfig) -> str:
    """Where to push to."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


class Termination:
    """Within it SIGTERM is remembered in `asked` in place of ending the process; outside the main thread signals are not ours to catch."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Termination":
        self._mine = threading.current_thread() is threading.main_thread()
        if self._mine:
            self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def _remember(self, *_: Any) -> None:
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        if self._mine:
            signal.signal(signal.SIGTERM, self._before)


@contextlib.contextmanager
def trackers(accelerator: Accelerator, config: RunConfig) -> Iterator[None]:
    """The trackers of a run, while it trains; none without `report_to`."""
    if not config.report_to:
        yield
        return
    flat = {name: value if isinstance(value, int | float | str) else str(value) for name, value in dataclasses.asdict(config).items()}
    name = config.run_name or Path(config.output_dir).name
    accelerator.init_trackers(config.project, config=flat, init_kwargs={"wandb": {"name": name}, "trackio": {"name": name}})
    try:
        yield
    finally:
        accelerator.end_training()


def track_images(accelerator: Accelerator, images: Sequence[Image], step: int) -> None:
    """A preview, to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            shown = np.stack([np.asarray(image.convert("RGB")) for image in images])
            cast(Any, tracker).log_images({"preview": shown}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            cast(Any, tracker).log_images({"preview": list(images)}, step=step)
