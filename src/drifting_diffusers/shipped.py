"""Small trained models that come with the package, so that the first image needs no network."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "shipped_models"

SHIPPED = {"fashion-mnist": "28 x 28 grey clothes in ten classes, 1 million weights, trained on a CPU within an hour"}
"""What there is, by name."""


def shipped_model(name: str = "fashion-mnist") -> Path:
    """The folder of a shipped pipeline, for `DriftingPipeline.from_pretrained`.

    Raises:
        ValueError: for a name that is not shipped.
    """
    if name not in SHIPPED:
        raise ValueError(f"no model {name!r} comes with the package, only {', '.join(SHIPPED)}: give a folder or a Hub repository instead")
    return FOLDER / name


def find_pipeline(source: str | os.PathLike) -> str:
    """What `from_pretrained` takes, from a folder, a Hub repository or the name of a shipped model; a folder of that name goes before it."""
    return str(shipped_model(str(source))) if str(source) in SHIPPED and not Path(source).exists() else str(source)
