r"""From the reference release's artefacts to our models, every tensor accounted for.

An artefact is a folder of `metadata.json` and `ema_params.msgpack`: nested maps of strings whose leaves are extension type 1, the packed triple
(shape, dtype, little-endian bytes in C order). Dense kernels are [in, out] there and [out, in] here.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .generator import DriftingGenerator

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")}

# The release's constructor arguments. Those without a name of ours say how it computes, not what: they leave no trace in the weights.
CONFIG = {
    "cond_dim": "condition_dim",
    "num_classes": "num_classes",
    "noise_classes": "style_codebook_size",
    "noise_coords": "num_style_tokens",
    "input_size": "sample_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "n_cls_tokens": "num_class_tokens",
    "patch_size": "patch_size",
    "hidden_size": "attention_head_dim",
    "depth": "num_layers",
    "num_heads": "num_attention_heads",
    "mlp_ratio": "mlp_ratio",
    "use_qknorm": "qk_norm",
    "use_swiglu": "activation",
    "use_rope": "rope",
    "use_rmsnorm": "norm_type",
    "use_bf16": None,
    "attn_fp32": None,
    "use_remat": None,
}

Row = tuple[tuple[str, ...], tuple[str, ...]]
"""Our names and the release's paths: the tensors of the paths, joined along the first axis, are our tensors, joined along the first axis."""


def read_artefact(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors, by their paths with slashes.

    Args:
        folder: the one with `metadata.json`, `params_ema` in the release, or its parent.

    Raises:
        FileNotFoundError: if a file is missing.
        ImportError: without the package msgpack.
        ValueError: for what is not such an artefact, broken or cut off.
    """
    folder = Path(folder)
    if not (folder / "metadata.json").exists():
        folder = folder / "params_ema"
    missing = [name for name in ("metadata.json", "ema_params.msgpack") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}: give the folder that the release's export wrote")
    try:
        import msgpack
    except ImportError as error:
        raise ImportError("reading the release's artefacts needs msgpack: pip install drifting-diffusers[convert]") from error

    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    if metadata.get("format") != "flax.msgpack":
        raise ValueError(f'the format of {folder} is {metadata.get("format")!r}, only "flax.msgpack" can be read')
    try:
        tree = msgpack.unpackb((folder / "ema_params.msgpack").read_bytes())
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"{folder / 'ema_params.msgpack'} is cut off or no msgpack ({error}): fetch it again") from error
    return metadata, {path: _tensor(path, leaf, msgpack) for path, leaf in _walk(tree)}


def generator_from_release(folder: str | os.PathLike) -> DriftingGenerator:
    """The release's generator with its averaged weights, in float32.

    Raises:
        ValueError: if the artefact holds no generator, or tensors are missing, left over or of another shape; the sentence names them.
    """
    metadata, tensors = read_artefact(folder)
    if metadata.get("kind") != "gen":
        raise ValueError(f'the artefact holds a {metadata.get("kind")!r}, not a "gen"')
    model = DriftingGenerator(**generator_config(metadata["model_config"]))
    model.load_state_dict(rename(generator_layout(model.config), tensors, model.state_dict()))
    return model


def generator_config(release: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments from the release's.

    Raises:
        ValueError: for arguments that are missing or unknown.
    """
    missing = sorted({theirs for theirs, ours in CONFIG.items() if ours} - release.keys())
    unknown = sorted(release.keys() - CONFIG.keys())
    if missing or unknown:
        raise ValueError(f"model_config does not fit this converter: missing {missing}, unknown {unknown}")
    config = {ours: release[theirs] for theirs, ours in CONFIG.items() if ours}
    return config | {
        "attention_head_dim": release["hidden_size"] // release["num_heads"],
        "num_style_tokens": release["noise_coords"] if release["noise_classes"] else 0,
        "style_codebook_size": release["noise_classes"] or 1,
        "activation": "swiglu" if release["use_swiglu"] else "gelu",
        "norm_type": "rms_norm" if release["use_rmsnorm"] else "layer_norm",
    }


def generator_layout(config: Any) -> list[Row]:
    """Where every tensor of a generator stands in the release."""
    rows: list[Row] = [
        *([(("class_embedding.weight",), ("Embed_0/embedding",))] if config.num_classes else []),
        *_dense("guidance_embedder.linear_1", "TimestepEmbedder_0/TorchLinear_0"),
        *_dense("guidance_embedder.linear_2", "TimestepEmbedder_0/TorchLinear_1"),
        (("guidance_norm.weight",), ("RMSNorm_0/weight",)),
        *_dense("patch_proj", "LightningDiT_0/TorchLinear_0"),
        (("pos_embed",), ("LightningDiT_0/pos_embed",)),
    ]
    if config.num_style_tokens:
        rows.append((("style_embedding.weight",), tuple(f"noise_embeds_{i}/embedding" for i in range(config.num_style_tokens))))
    if config.num_class_tokens:
        rows += [*_dense("class_token_proj", "LightningDiT_0/TorchLinear_1"), (("class_token_embed",), ("LightningDiT_0/cls_embed",))]
    for i in range(config.num_layers):
        rows += _block(f"transformer_blocks.{i}", f"LightningDiT_0/blocks_{i}", config)
    final = "LightningDiT_0/FinalLayer_0"
    rows += [*_dense("modulation_out", f"{final}/TorchLinear_0"), *_dense("proj_out", f"{final}/TorchLinear_1")]
    return [*rows, *_token_norm("norm_out", f"{final}/RMSNorm_0", config)]


def rename(rows: Iterable[Row], tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from the release's tensors.

    Args:
        rows: where every tensor stands.
        tensors: the release's, by path.
        ours: a state dict of the shapes to be filled.

    Raises:
        ValueError: naming the tensors that are missing, left over or of another shape.
    """
    rows = list(rows)
    paths = {path for _, parts in rows for path in parts}
    wrong = [f"{path} is missing" for path in sorted(paths - tensors.keys())]
    wrong += [f"{path} {list(tensors[path].shape)} has no place" for path in sorted(tensors.keys() - paths)]
    state: dict[str, Tensor] = {}
    for names, parts in rows:
        first, *rest = ours[names[0]].shape
        shape = [len(names) * first // len(parts), *rest]  # of one part: every row is split evenly on either side
        found = [tensors[path].T if path.endswith("/kernel") else tensors[path] for path in parts if path in tensors]
        mismatched = [path for path, part in zip(parts, found, strict=False) if len(found) == len(parts) and list(part.shape) != shape]
        wrong += [f"{path} is {list(tensors[path].shape)}, for {shape} of ours" for path in mismatched]
        if len(found) == len(parts) and not mismatched:
            state |= {name: part.clone() for name, part in zip(names, torch.cat(found).chunk(len(names)), strict=True)}
    if wrong:
        raise ValueError("the artefact does not fit its model_config: " + "; ".join(wrong))
    return state


def _block(ours: str, theirs: str, config: Any) -> list[Row]:
    attention, qkv = f"{theirs}/Attention_0", tuple(f"{ours}.attn.to_{x}" for x in "qkv")
    rows = [
        *_dense(f"{ours}.modulation", f"{theirs}/TorchLinear_0"),
        *_token_norm(f"{ours}.norm1", f"{theirs}/RMSNorm_0", config),
        *_token_norm(f"{ours}.norm2", f"{theirs}/RMSNorm_1", config),
        *_dense(qkv, f"{attention}/TorchLinear_0"),
        *_dense(f"{ours}.attn.to_out.0", f"{attention}/TorchLinear_1"),
    ]
    if config.activation == "swiglu":  # diffusers multiplies (hidden, gate), the release silu(TorchLinear_0) with TorchLinear_1
        mlp = f"{theirs}/SwiGLUFFN_0/TorchLinear"
        rows += [*_dense(f"{ours}.ff.net.0.proj", f"{mlp}_1", f"{mlp}_0"), *_dense(f"{ours}.ff.net.2", f"{mlp}_2")]
    else:
        mlp = f"{theirs}/StandardMLP_0/TorchLinear"
        rows += [*_dense(f"{ours}.ff.net.0.proj", f"{mlp}_0"), *_dense(f"{ours}.ff.net.2", f"{mlp}_1")]
    if config.qk_norm:
        names = {"weight": "weight"} if config.norm_type == "rms_norm" else {"weight": "scale", "bias": "bias"}
        rows += [((f"{ours}.attn.norm_{x}.{a}",), (f"{attention}/{x}_norm/{b}",)) for x in "qk" for a, b in names.items()]
    return rows


def _dense(ours: str | tuple[str, ...], *theirs: str) -> list[Row]:
    names = (ours,) if isinstance(ours, str) else ours
    pairs = (("weight", "kernel"), ("bias", "bias"))
    return [(tuple(f"{name}.{a}" for name in names), tuple(f"{path}/Dense_0/{b}" for path in theirs)) for a, b in pairs]


def _token_norm(ours: str, theirs: str, config: Any) -> list[Row]:
    return [((f"{ours}.weight",), (f"{theirs}/weight",))] if config.norm_type == "rms_norm" else []


def _walk(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield from _walk(branch, f"{path}/{key}" if path else str(key))
    else:
        yield path, tree


def _tensor(path: str, leaf: Any, msgpack: Any) -> Tensor:
    if not isinstance(leaf, msgpack.ExtType) or leaf.code != 1:
        raise ValueError(f"{path or 'the root'} is no array but {str(leaf)[:80]}: only arrays (extension type 1) can be read")
    try:
        shape, dtype, data = msgpack.unpackb(leaf.data)
        shape, data = [int(n) for n in shape], bytearray(memoryview(data))
    except (TypeError, ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"{path} is no (shape, dtype, bytes): {error}") from error
    if dtype not in DTYPES:
        raise ValueError(f"{path} has dtype {dtype!r}; readable are {', '.join(DTYPES)}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if min(shape, default=1) < 0 or len(data) != size:
        raise ValueError(f"{path} {shape} of {dtype} takes {size} bytes, the file has {len(data)}: it is cut off or not what it says")
    tensor = torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape) if data else torch.empty(shape, dtype=DTYPES[dtype])
    if not tensor.isfinite().all():
        raise ValueError(f"{path} holds values that are not finite")
    return tensor
