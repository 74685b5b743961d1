"""Artefacts in the release's format, written by the same tables that read them."""

import json
from collections.abc import Mapping
from pathlib import Path

import msgpack
import torch
from torch import Tensor, nn

from drifting_diffusers.layouts import KINDS

GENERATOR = {
    "cond_dim": 6, "num_classes": 3, "noise_classes": 5, "noise_coords": 2, "input_size": 4, "in_channels": 2, "out_channels": 3, "n_cls_tokens": 1,
    "patch_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "use_qknorm": True, "use_swiglu": True, "use_rope": True,
    "use_rmsnorm": True, "use_bf16": False, "attn_fp32": True, "use_remat": False,
}  # fmt: skip


def to_release(model: nn.Module, kind: str = "gen", ours: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The inverse of the converter, by the same table: the model's tensors, or others of the same names, by the release's paths."""
    ours, theirs = model.state_dict() if ours is None else ours, {}
    for names, paths in KINDS[kind][1](model.config):
        for path, part in zip(paths, torch.cat([ours[name] for name in names]).chunk(len(paths)), strict=True):
            turned = part.permute(*range(2, part.ndim), 1, 0) if path.endswith("/kernel") else part
            theirs[path] = turned.contiguous()
    return theirs


def gradients_to_release(model: nn.Module, kind: str = "gen") -> dict[str, Tensor]:
    """The gradients of a model by the release's paths and in its orientation."""
    return to_release(model, kind, {name: parameter.grad for name, parameter in model.named_parameters()})


def packed(tensor: Tensor, dtype: str = "float32") -> msgpack.ExtType:
    data = tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(1, msgpack.packb((list(tensor.shape), dtype, data)))


def tree_of(tensors: Mapping[str, Tensor | msgpack.ExtType | int]) -> dict:
    tree: dict = {}
    for path, leaf in tensors.items():
        *branches, name = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[name] = packed(leaf) if isinstance(leaf, Tensor) else leaf
    return tree


def write_metadata(folder: Path, **metadata) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": "flax.msgpack", "kind": "gen", "model_config": GENERATOR} | metadata
    (folder / "metadata.json").write_text(json.dumps(content))
    return folder


def write_artefact(folder: Path, tensors: Mapping[str, Tensor | msgpack.ExtType | int], **metadata) -> Path:
    write_metadata(folder, **metadata)
    (folder / "ema_params.msgpack").write_bytes(msgpack.packb(tree_of(tensors)))
    return folder
