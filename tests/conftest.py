"""What every test stands on: shapes are checked, no network, one fixture for the shared recordings."""

import os
import sys
from pathlib import Path

# Before huggingface_hub and transformers are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jaxtyping  # first, so that drifting_diffusers.shapes takes its types
import pytest

jaxtyping.install_import_hook("drifting_diffusers", "shape_checks.typechecker")

ROOT = Path(__file__).parents[1]


def shared_folder() -> Path | None:
    """The recordings of the reference implementation: `DRIFTING_SHARED`, or `shared` beside the checkout."""
    candidates = [Path(p) for p in (os.environ.get("DRIFTING_SHARED"), ROOT.parent / "shared") if p]
    return next((p for p in candidates if (p / "fixtures").is_dir()), None)


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if folder is None:
        pytest.skip(
            "no recordings of the reference implementation: set DRIFTING_SHARED to their folder, or put it beside the checkout as `shared`"
        )
    sys.path.insert(0, str(folder))  # field_stress.py
    return folder


@pytest.fixture
def rng():
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture
def as_users_see_it():
    """Switches the shape checks off, so that a test of bad input meets the error that a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
