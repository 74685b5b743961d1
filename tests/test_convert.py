"""The release's artefacts: every tensor finds its place, and what is broken is refused by name."""

import json
import sys
from pathlib import Path

import msgpack
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from drifting_diffusers.convert import generator_config, generator_from_release, generator_layout, read_artefact
from drifting_diffusers.generator import DriftingGenerator

RELEASED = ["release_like", "plain", "pixel_like", "qknorm_layernorm", "bf16", "small_scale_rms", "small_scale_ln"]
MODEL_CONFIG = {
    "cond_dim": 6, "num_classes": 3, "noise_classes": 5, "noise_coords": 2, "input_size": 4, "in_channels": 2, "out_channels": 3, "n_cls_tokens": 1,
    "patch_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "use_qknorm": True, "use_swiglu": True, "use_rope": True,
    "use_rmsnorm": True, "use_bf16": False, "attn_fp32": True, "use_remat": False,
}  # fmt: skip


def to_release(model: DriftingGenerator) -> dict[str, Tensor]:
    """The inverse of the converter, by the same table."""
    ours, theirs = model.state_dict(), {}
    for names, paths in generator_layout(model.config):
        for path, part in zip(paths, torch.cat([ours[name] for name in names]).chunk(len(paths)), strict=True):
            theirs[path] = part.T.contiguous() if path.endswith("/kernel") else part
    return theirs


def packed(tensor: Tensor, dtype: str = "float32") -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((list(tensor.shape), dtype, tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes())))


def write_artefact(folder: Path, tensors: dict[str, Tensor | msgpack.ExtType | int], **metadata) -> Path:
    tree: dict = {}
    for path, leaf in tensors.items():
        *branches, name = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[name] = packed(leaf) if isinstance(leaf, Tensor) else leaf
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ema_params.msgpack").write_bytes(msgpack.packb(tree))
    content = {"format": "flax.msgpack", "kind": "gen", "model_config": MODEL_CONFIG} | metadata
    (folder / "metadata.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def model() -> DriftingGenerator:
    torch.manual_seed(0)
    model = DriftingGenerator(**generator_config(MODEL_CONFIG))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", RELEASED)
def test_recorded_artefacts_are_read_whole(shared, name):
    index = json.loads((shared / "fixtures/gen/index.json").read_text())[name]
    metadata, tensors = read_artefact(shared / f"fixtures/gen/{name}")
    assert metadata["model_config"] == index["model_config"]
    assert {path: list(tensor.shape) for path, tensor in tensors.items()} == index["params"]
    model = generator_from_release(shared / f"fixtures/gen/{name}/params_ema")
    assert sum(p.numel() for p in model.parameters()) == index["n_params"]
    for path, tensor in to_release(model).items():
        assert_close(tensor, tensors[path], rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_swiglu": False, "use_rmsnorm": False},
        {"use_qknorm": False, "use_rope": False},
        {"n_cls_tokens": 0, "noise_coords": 0},
        {"noise_classes": 0},
    ],
    ids=str,
)
def test_there_and_back(tmp_path, changes):
    config = MODEL_CONFIG | changes
    torch.manual_seed(1)
    model = DriftingGenerator(**generator_config(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    back = generator_from_release(write_artefact(tmp_path, to_release(model), model_config=config))
    assert back.config == model.config
    for name, tensor in model.state_dict().items():
        assert_close(back.state_dict()[name], tensor, rtol=0, atol=0)


def test_other_dtypes_keep_their_values(tmp_path):
    values = torch.tensor([[0.5, -2.0], [3.0, 0.25]])
    leaves = {
        "bf16": packed(values.bfloat16(), "bfloat16"),
        "half": packed(values.half(), "float16"),
        "int": packed(torch.tensor([7]), "int64"),
        "none": packed(torch.empty(0, 3)),
        "scalar": packed(torch.tensor(1.5)),
    }
    _, tensors = read_artefact(write_artefact(tmp_path, leaves))
    assert_close(tensors["bf16"], values.bfloat16())
    assert_close(tensors["half"], values.half())
    assert_close(tensors["int"], torch.tensor([7]))
    assert_close(tensors["none"], torch.empty(0, 3))
    assert_close(tensors["scalar"], torch.tensor(1.5))


def test_missing_extra_and_misshapen_tensors_are_all_named(tmp_path, model):
    tensors = to_release(model)
    del tensors["RMSNorm_0/weight"], tensors["noise_embeds_1/embedding"]
    tensors["teacher/kernel"] = torch.zeros(2, 3)
    tensors["LightningDiT_0/pos_embed"] = torch.zeros(1, 9, 8)
    gate = "LightningDiT_0/blocks_0/SwiGLUFFN_0/TorchLinear_0/Dense_0/kernel"
    tensors[gate] = tensors[gate].T
    with pytest.raises(ValueError, match="does not fit its model_config") as error:
        generator_from_release(write_artefact(tmp_path, tensors))
    for part in (
        "RMSNorm_0/weight is missing",
        "noise_embeds_1/embedding is missing",
        "teacher/kernel [2, 3] has no place",
        "LightningDiT_0/pos_embed is [1, 9, 8], for [1, 4, 8] of ours",
        f"{gate} is [32, 8]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (msgpack.ExtType(1, msgpack.packb(([2, 2], "float32", b"\0" * 12))), "takes 16 bytes, the file has 12"),
        (msgpack.ExtType(1, msgpack.packb(([-1, -4], "float32", b"\0" * 16))), "cut off or not what it says"),
        (msgpack.ExtType(1, msgpack.packb(([2], "complex64", b"\0" * 16))), "dtype 'complex64'"),
        (msgpack.ExtType(1, msgpack.packb(["float32", b""])), r"no \(shape, dtype, bytes\)"),
        (msgpack.ExtType(1, msgpack.packb([["a"], "float32", b""])), r"no \(shape, dtype, bytes\)"),
        (msgpack.ExtType(2, b""), "a/b is no array"),
        (7, "a/b is no array"),
        (torch.tensor([1.0, float("nan")]), "a/b holds values that are not finite"),
    ],
)
def test_broken_leaves_are_refused(tmp_path, leaf, message):
    with pytest.raises(ValueError, match=message):
        read_artefact(write_artefact(tmp_path, {"a/b": leaf}))


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_cut_off_files_are_refused(tmp_path, model, keep):
    file = write_artefact(tmp_path, to_release(model)) / "ema_params.msgpack"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut off|is no array"):
        read_artefact(tmp_path)


def test_what_is_no_generator_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="holds a 'mae'"):
        generator_from_release(write_artefact(tmp_path, to_release(model), kind="mae"))
    with pytest.raises(ValueError, match=r"only \"flax.msgpack\""):
        read_artefact(write_artefact(tmp_path, {}, format="pickle"))
    config = {"layers" if key == "depth" else key: value for key, value in MODEL_CONFIG.items()}
    with pytest.raises(ValueError, match=r"missing \['depth'\], unknown \['layers'\]"):
        generator_from_release(write_artefact(tmp_path, {}, model_config=config))
    with pytest.raises(FileNotFoundError, match=r"no metadata.json and no ema_params.msgpack"):
        read_artefact(tmp_path / "nowhere")


def test_without_msgpack_the_error_says_what_to_install(tmp_path, monkeypatch):
    write_artefact(tmp_path, {})
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ImportError, match=r"drifting-diffusers\[convert\]"):
        read_artefact(tmp_path)
