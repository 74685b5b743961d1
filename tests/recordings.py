"""Numbers of the reference implementation, as they were recorded, and how far ours may be from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def recorded(shared: Path, name: str) -> dict[str, Any]:
    """The arrays of a file: tensors; words as they are, alone or in a list."""
    arrays = np.load(shared / f"fixtures/{name}.npz").items()
    return {key: value.tolist() if value.dtype.kind == "U" else torch.from_numpy(value) for key, value in arrays}


def bounds_of(shared: Path, name: str) -> dict[str, float]:
    """The bound of every number of a recording."""
    return {key: bound["tol"] for key, bound in json.loads((shared / "fixtures/tolerances.json").read_text())[name].items()}


def assert_recorded(value: Tensor, stored: Tensor, bound: float, name: str) -> None:
    """The largest difference is measured by the largest number: single ones can be arbitrarily close to 0."""
    assert value.shape == stored.shape, name
    assert (value.double() - stored.double()).abs().max() <= bound * stored.double().abs().max(), name
