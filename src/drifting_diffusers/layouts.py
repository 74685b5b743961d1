r"""Where every tensor of the reference release stands in our models, and what its constructor arguments are called here.

The release's paths are joined by slashes. Its dense kernels are [in, out], ours [out, in].
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_NAMED = 20  # mistakes in one error

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


# What an argument may be: its type, the least and the most; the release's are far inside. They keep every tensor countable, so that a network of
# shapes alone can be built and weighed before a file is opened.
SIZES: dict[str, tuple[type, int, int]] = {
    "cond_dim": (int, 1, 2**16),
    "num_classes": (int, 0, 2**20),
    "noise_classes": (int, 0, 2**12),
    "noise_coords": (int, 0, 2**12),
    "input_size": (int, 1, 2**14),
    "in_channels": (int, 1, 2**12),
    "out_channels": (int, 1, 2**12),
    "n_cls_tokens": (int, 0, 2**12),
    "patch_size": (int, 1, 2**10),
    "hidden_size": (int, 1, 2**16),
    "depth": (int, 0, 1000),
    "num_heads": (int, 1, 2**10),
    "mlp_ratio": (float, 0, 2**10),
    "base_channels": (int, 1, 2**14),
    "layers": (list, 1, 200),
    "input_patch_size": (int, 1, 2**10),
    "dropout_prob": (float, 0, 1),
    **dict.fromkeys(("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "use_bf16", "attn_fp32", "use_remat"), (bool, 0, 1)),
}
MOST_WEIGHTS = 4_000_000_000  # of a network; the release's largest encoder has 2.7e9


def check_sizes(release: Mapping[str, Any]) -> None:
    """Refuse a model_config that no network of its kind has, before one is built: a file from elsewhere may ask for a million layers."""
    allowed = {bool: "true or false", int: "an integer", float: "a number", list: "4 integers"}
    for name, value in release.items():
        kind, least, most = SIZES[name]
        if not _fits(value, kind, least, most):
            limits = "" if kind is bool else f" from {least} to {most}"
            raise ValueError(
                f"{name} of the model_config must be {allowed[kind]}{limits}, got {str(value)[:80]!r}: the metadata is no release's"
            )


def _fits(value: Any, kind: type, least: int, most: int) -> bool:
    if kind is list:
        return isinstance(value, list) and len(value) == 4 and all(_fits(n, int, least, most) for n in value)
    return type(value) in ((int, float) if kind is float else (kind,)) and least <= value <= most


def check_weights(count: int) -> None:
    """Refuse a network that no machine of a reader has to hold: what a file may unpack to grows with it."""
    if count > MOST_WEIGHTS:
        raise ValueError(
            f"the model_config makes {count:,} weights, more than the {MOST_WEIGHTS:,} that are read (the release's largest network has "
            "2.7 billion): the metadata is no release's"
        )


def generator_config(release: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments from the release's.

    Raises:
        ValueError: for arguments that are missing, unknown or of no network.
    """
    missing = sorted({theirs for theirs, ours in CONFIG.items() if ours} - release.keys())
    unknown = sorted(release.keys() - CONFIG.keys())
    if missing or unknown:
        raise ValueError(f"model_config does not fit this converter: missing {missing}, unknown {str(unknown)[:1000]}")
    check_sizes(release)
    if release["hidden_size"] % release["num_heads"]:
        raise ValueError(f"num_heads of the model_config must divide hidden_size, got {release['num_heads']} for {release['hidden_size']}")
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


def part_shape(row: Row, ours: Mapping[str, Tensor]) -> list[int]:
    """The shape that each of the release's tensors of a row has here: a row is split evenly on either side."""
    names, parts = row
    first, *rest = ours[names[0]].shape
    return [len(names) * first // len(parts), *rest]


def rename(rows: Iterable[Row], tensors: dict[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from the release's tensors, which are taken out of `tensors`: memory holds them once.

    Args:
        rows: where every tensor stands.
        tensors: the release's, by path.
        ours: a state dict of the shapes to be filled.

    Raises:
        ValueError: naming the tensors that are missing, left over or of another shape, the first `MOST_NAMED` of them.
    """
    rows = list(rows)
    paths = {path for _, parts in rows for path in parts}
    wrong = [f"{path} is missing" for path in sorted(paths - tensors.keys())]
    wrong += [f"{path} {list(tensors[path].shape)} has no place" for path in sorted(tensors.keys() - paths)]
    wrong += [f"{path} is {tensor.dtype}, no floating point" for path, tensor in tensors.items() if not tensor.is_floating_point()]
    state: dict[str, Tensor] = {}
    for names, parts in rows:
        shape = part_shape((names, parts), ours)
        found = {path: _turned(path, tensors.pop(path)) for path in parts if path in tensors}
        mismatched = {path: part.shape for path, part in found.items() if list(part.shape) != shape} if len(found) == len(parts) else {}
        wrong += [f"{path} is {_turned_back(path, is_)}, not {_turned_back(path, shape)}" for path, is_ in mismatched.items()]
        if len(found) == len(parts) and not mismatched:
            whole = torch.cat(list(found.values())) if len(found) > 1 else found[parts[0]]
            state |= {
                name: part.clone(memory_format=torch.contiguous_format) for name, part in zip(names, whole.chunk(len(names)), strict=True)
            }
    if wrong:
        more = [f"and {len(wrong) - MOST_NAMED} more"] if len(wrong) > MOST_NAMED else []
        raise ValueError("the artefact does not fit its model_config: " + "; ".join(wrong[:MOST_NAMED] + more))
    return state


def _turned(path: str, tensor: Tensor) -> Tensor:
    """Kernels are [..., in, out] in the release and [out, in, ...] here."""
    if not path.endswith("/kernel") or tensor.ndim < 2:
        return tensor
    return tensor.permute(-1, -2, *range(tensor.ndim - 2))


def _turned_back(path: str, shape: Sequence[int]) -> list[int]:
    return [*shape[2:], shape[1], shape[0]] if path.endswith("/kernel") and len(shape) > 1 else list(shape)


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


AUTOENCODER_CONFIG = {
    "in_channels": "in_channels",
    "base_channels": "base_channels",
    "layers": "layers_per_stage",
    "input_patch_size": "input_patch_size",
    "patch_size": "mask_patch_size",
    "num_classes": "num_classes",
    "dropout_prob": None,
    "use_bf16": None,
}


def autoencoder_config(release: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments from the release's, which leaves the number of classes out where it is 1000.

    Raises:
        ValueError: for arguments that are missing, unknown or of no network.
    """
    release = {"num_classes": 1000} | dict(release)
    missing = sorted({theirs for theirs, ours in AUTOENCODER_CONFIG.items() if ours} - release.keys())
    unknown = sorted(release.keys() - AUTOENCODER_CONFIG.keys())
    if missing or unknown:
        raise ValueError(f"model_config does not fit this converter: missing {missing}, unknown {str(unknown)[:1000]}")
    check_sizes(release)
    return {ours: release[theirs] for theirs, ours in AUTOENCODER_CONFIG.items() if ours}


def autoencoder_layout(config: Any) -> list[Row]:
    """Where every tensor of a feature encoder, with its decoder and classifier, stands in the release."""
    rows: list[Row] = [
        (("conv_in.weight",), ("encoder/conv1/kernel",)),
        *_group_norm("norm_in", "encoder/gn1"),
        *_biased("classifier", "fc"),
        *_conv_and_norm("bridge", "decoder/bridge"),
        *_biased("conv_out", "decoder/head"),
    ]
    for i, blocks in enumerate(config.layers_per_stage):
        rows += _group_norm(f"stage_norms.{i}", f"encoder/layer{i + 1}_norm")
        for j in range(blocks):
            rows += _residual_block(f"stages.{i}.{j}", f"encoder/stages_{i}/layers_{j}", projected=i > 0 and j == 0)
    for i, name in enumerate(("up43", "up32", "up21", "up10")):
        rows += _group_norm(f"up_blocks.{i}.norm", f"decoder/{name}/concat_norm_fn")
        rows += _conv_and_norm(f"up_blocks.{i}.proj", f"decoder/{name}/proj")
        rows += _conv_and_norm(f"up_blocks.{i}.refine", f"decoder/{name}/refine")
    return rows


def _residual_block(ours: str, theirs: str, *, projected: bool) -> list[Row]:
    names = {("conv1", "norm1"): ("conv1", "gn1"), ("conv2", "norm2"): ("conv2", "gn2")}
    if projected:
        names["conv_shortcut", "norm_shortcut"] = ("proj_conv", "proj_gn")
    rows: list[Row] = []
    for (our_conv, our_norm), (conv, norm) in names.items():
        rows += [((f"{ours}.{our_conv}.weight",), (f"{theirs}/{conv}/kernel",)), *_group_norm(f"{ours}.{our_norm}", f"{theirs}/{norm}")]
    return rows


def _conv_and_norm(ours: str, theirs: str) -> list[Row]:
    return [((f"{ours}.conv.weight",), (f"{theirs}/conv/kernel",)), *_group_norm(f"{ours}.norm", f"{theirs}/gn")]


def _group_norm(ours: str, theirs: str) -> list[Row]:
    return [((f"{ours}.weight",), (f"{theirs}/scale",)), ((f"{ours}.bias",), (f"{theirs}/bias",))]


def _biased(ours: str, theirs: str) -> list[Row]:
    return [((f"{ours}.weight",), (f"{theirs}/kernel",)), ((f"{ours}.bias",), (f"{theirs}/bias",))]


# What an artefact may hold: our constructor arguments from the release's, and where its tensors stand.
KINDS = {"gen": (generator_config, generator_layout), "mae": (autoencoder_config, autoencoder_layout)}
