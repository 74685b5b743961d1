"""What stands in an exported file beside its graph: all that a program needs to draw by the name of a class."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from torch.export import ExportedProgram

from . import __version__
from .pipeline import DriftingPipeline
from .shipped import FOLDER as SHIPPED

RANGES = {"signed": (-1, 1), "unit": (0, 1)}
"""What the values of images lie in, by name."""


def describe(
    pipeline: DriftingPipeline, call: Any, program: ExportedProgram, *, dtype: torch.dtype, batch_size: int | None
) -> dict[str, str]:
    """Names of classes, inputs, output and origin; values other than texts are JSON.

    Args:
        pipeline: what is exported.
        call: its `export.OneCall`.
        program: its graph.
        dtype: what the graph computes in.
        batch_size: what it takes; any if None.
    """
    config, scale = call.transformer.config, pipeline.config.guidance_scale
    batch = batch_size or "batch"
    described: dict[str, dict[str, Any]] = {
        name: {"type": type_name(value.dtype), "shape": [batch, *value.shape[1:]]} for name, value in call.random_inputs(1, seed=0).items()
    }
    laws = {
        "noise": {"law": "standard normal"},
        "class_labels": {"range": [0, config.num_classes - 1]},
        "guidance_scale": {"default": scale, "above": 0},
        "style_labels": {"range": [0, config.style_codebook_size - 1], "law": "uniform"},
    }
    returned = next(node for node in program.graph.nodes if node.op == "output").args[0][0].meta["val"]
    output = {"name": call.output, "type": "float32", "shape": [batch, *map(int, returned.shape[1:])]}
    if call.output == "images":
        output["range"] = RANGES["unit" if call.unit else "signed"]
    entries: dict[str, Any] = {
        "library": "drifting_diffusers",
        "library_version": __version__,
        "labels": list(pipeline.labels),
        "guidance_scale": scale,
        "sample_size": [call.transformer.sample_height, call.transformer.sample_width],
        "inputs": {name: entry | laws[name] for name, entry in described.items()},
        "output": output,
        "dtype": type_name(dtype),
        "decoder": type(call.vae).__name__ if call.vae is not None else None,
        **_origin(pipeline.config.get("_name_or_path")),
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in entries.items()
        if value is not None
    }


def _origin(source: str | None) -> dict[str, str]:
    """The repository that a pipeline was loaded from, or the name of a shipped one; and the licence on its card. A folder's path is nobody's business."""
    if not source:
        return {}
    origin = {}
    folder = Path(source)
    if not folder.exists():
        origin["source"] = source
    elif folder.parent == SHIPPED:
        origin["source"] = f"drifting_diffusers: {folder.name}"
    try:
        card = ModelCard.load(folder / "README.md" if folder.exists() else source, ignore_metadata_errors=True)
    except (OSError, ValueError, HfHubHTTPError):  # no card, no network: nothing to write
        return origin
    licence = card.data.get("license")
    return origin | ({"model_license": str(licence)} if licence else {})


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
