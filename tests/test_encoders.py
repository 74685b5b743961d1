"""The feature encoder: recorded numbers of the reference, laws of its features and of masking, and what diffusers promises of its models."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recordings import assert_recorded, bounds_of, recorded
from release_files import gradients_to_release, to_release
from torch import Tensor
from torch.testing import assert_close

from drifting_diffusers.artefacts import find_artefact, read_tensors
from drifting_diffusers.encoders import MaskedAutoencoder
from drifting_diffusers.features import FeatureMap
from drifting_diffusers.layouts import KINDS, autoencoder_config, autoencoder_layout
from drifting_diffusers.objective import DriftingObjective

SMALL = {"in_channels": 2, "base_channels": 32, "layers_per_stage": (1, 2, 1, 1), "num_classes": 5}
MODEL_CONFIG = {
    "base_channels": 32, "patch_size": 2, "dropout_prob": 0.1, "layers": [1, 2, 1, 1], "in_channels": 2, "use_bf16": True, "input_patch_size": 1,
}  # fmt: skip


def small(**changes) -> MaskedAutoencoder:
    """An encoder whose every weight is in play: norms start at 1 and 0."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(**(SMALL | changes))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return model.eval()


def images(n: int = 3, c: int = 2, h: int = 16, w: int = 16) -> Tensor:
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(1))


def half_mask(model: MaskedAutoencoder, n: int = 3, grid: tuple[int, int] = (16, 16)) -> Tensor:
    return model.draw_mask(n, grid, generator=torch.Generator().manual_seed(2))


# -- goldens


def recorded_with_index(shared: Path, name: str, io: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
    """What the file holds, by the index; its numbers; and their bounds."""
    index = json.loads((shared / "fixtures/mae/index.json").read_text())[name]["io"][io]
    return index, recorded(shared, f"mae/{name}/{io}"), bounds_of(shared, f"mae/{name}/{io}")


def assert_activations(got: dict[str, Tensor], io: dict[str, Any], bounds: dict[str, float], *, all_of: bool = True) -> None:
    keys = io["keys"]
    assert set(keys) == set(got) if all_of else set(keys) < set(got)
    for key, shape, (total, squares) in zip(keys, io["shapes"].tolist(), io["stats"].tolist(), strict=True):
        value = got[key].double()
        assert list(value.shape) == shape, key
        assert abs(float(value.square().sum()) - squares) <= bounds["stats"] * squares, key
        assert abs(float(value.sum()) - total) <= bounds["stats"] * (value.numel() * squares) ** 0.5, key
    parts = {"act": lambda value: value, "act0": lambda value: value[0], "sub": lambda value: value[:, ::14]}
    stored = {tuple(name.split("__")): tensor for name, tensor in io.items() if "__" in name}
    assert {key for _, key in stored} >= {key for key in keys if key.endswith(("_mean", "_std"))}
    for (part, key), tensor in stored.items():
        assert_recorded(parts[part](got[key]), tensor, bounds["activations"], key)


@pytest.mark.parametrize(("name", "io_name"), [("latent", "io_16"), ("latent", "io_32"), ("pixel", "io_64"), ("latent", "io_16_bf16")])
@torch.no_grad()
def test_recorded_activations(shared, name, io_name):
    index, io, bounds = recorded_with_index(shared, name, io_name)
    model = MaskedAutoencoder.from_release(shared / f"fixtures/mae/{name}", dtype=torch.bfloat16 if index["use_bf16"] else None)
    got = model.activations(io["x"].permute(0, 3, 1, 2), whole_image=False)
    assert {value.dtype for value in got.values()} == {torch.float32}
    assert_activations(got, io, bounds, all_of=not index["use_bf16"])


@torch.no_grad()
def test_recorded_activations_with_other_arguments(shared):
    index, io, bounds = recorded_with_index(shared, "latent", "io_16_kwargs")
    model = MaskedAutoencoder.from_release(shared / "fixtures/mae/latent")
    ours = {
        "every_k_block": "every_block",
        "use_mean": "mean",
        "use_std": "std",
        "patch_mean_size": "mean_windows",
        "patch_std_size": "std_windows",
    }
    for k, arguments in enumerate(index["kwargs"]):
        given = {ours[name]: value for name, value in arguments.items()}
        if given.get("every_block") == "inf":
            given["every_block"] = None
        given |= {name: given[name] or () for name in ("mean_windows", "std_windows") if name in given}
        got = model.activations(io["x"].permute(0, 3, 1, 2), whole_image=False, **given)
        prefix = f"k{k}__"
        assert_activations(got, {key.removeprefix(prefix): value for key, value in io.items() if key.startswith(prefix)}, bounds)


@pytest.mark.parametrize(("name", "io_name"), [("latent", "forward_16"), ("pixel", "forward_32")])
def test_recorded_training_pass(shared, name, io_name):
    index, io, bounds = recorded_with_index(shared, name, io_name)
    model = MaskedAutoencoder.from_release(shared / f"fixtures/mae/{name}")
    mask, labels = io["mask"].permute(0, 3, 1, 2), io["labels"].long()
    out = model(io["x"].permute(0, 3, 1, 2), mask, labels, classification_weight=float(io["lambda_cls"]))
    out.loss.mean().backward()
    gradients = gradients_to_release(model, "mae")
    assert gradients.keys() == set(index["grad_norm_names"])
    got = {
        "loss": out.loss,
        "loss_mean": out.loss.mean(),
        "recon": model.patchify(out.reconstruction).permute(0, 2, 3, 1),
        "logits": out.logits,
        "metric__accuracy": (out.logits.argmax(1) == labels).float(),
        "metric__cls_loss": out.classification_loss,
        "metric__mask_ratio": mask.mean((1, 2, 3)),
        "metric__recon_loss": out.reconstruction_loss,
        "grad_norms": torch.stack([gradients[path].norm() for path in index["grad_norm_names"]]),
    }
    got |= {key: gradients[key.removeprefix("grad__").replace(".", "/")] for key in io if key.startswith("grad__")}
    assert got.keys() == bounds.keys()
    for key, value in got.items():
        assert_recorded(value.detach(), io[key], bounds[key], key)


# -- conversion


@pytest.mark.parametrize("name", ["latent", "pixel", "step"])
def test_recorded_artefacts_there_and_back(shared, name):
    index = json.loads((shared / "fixtures/mae/index.json").read_text())[name]
    metadata, file = find_artefact(shared / f"fixtures/mae/{name}")
    tensors = read_tensors(file, most_bytes=10**9)
    assert metadata["model_config"] == index["model_config"]
    assert {path: list(tensor.shape) for path, tensor in tensors.items()} == index["params"]
    model = MaskedAutoencoder.from_release(shared / f"fixtures/mae/{name}")
    assert not model.training
    back = to_release(model, "mae")
    assert back.keys() == tensors.keys()
    for path, tensor in back.items():
        assert_close(tensor, tensors[path], rtol=0, atol=0)


def test_every_tensor_of_the_released_sizes_has_a_place():
    with torch.device("meta"):  # shapes without memory
        model = MaskedAutoencoder()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not list(model.buffers())
    assert round(model.num_parameters() / 1e8) == 27
    rows = autoencoder_layout(model.config)
    names = [name for names, _ in rows for name in names]
    assert sorted(names) == sorted(model.state_dict())
    assert len({path for _, paths in rows for path in paths}) == len(names)


def test_arguments_of_the_release():
    assert KINDS["mae"] == (autoencoder_config, autoencoder_layout)
    ours = autoencoder_config(MODEL_CONFIG)
    assert ours == {
        "in_channels": 2, "base_channels": 32, "layers_per_stage": [1, 2, 1, 1], "input_patch_size": 1, "mask_patch_size": 2, "num_classes": 1000,
    }  # fmt: skip
    assert MaskedAutoencoder(**ours).config.num_classes == 1000
    assert autoencoder_config(MODEL_CONFIG | {"num_classes": 7})["num_classes"] == 7
    config = {"depths" if key == "layers" else key: value for key, value in MODEL_CONFIG.items()}
    with pytest.raises(ValueError, match=r"missing \['layers'\], unknown \['depths'\]"):
        autoencoder_config(config)


# -- features


def test_the_86_features_of_the_released_depth():
    model = small(layers_per_stage=(3, 4, 6, 3), in_channels=4)
    with torch.no_grad():
        found = model.activations(images(1, 4, 32, 32))
    maps = ["conv1", "layer1", "layer1_blk2", "layer2", "layer2_blk2", "layer2_blk4", "layer3", "layer3_blk2", "layer3_blk4", "layer3_blk6"]
    maps += ["layer4", "layer4_blk2"]
    statistics = ["", "_mean", "_std", "_mean_2", "_std_2", "_mean_4", "_std_4"]
    assert set(found) == {name + statistic for name in maps for statistic in statistics} | {"norm_x", "global"}
    assert len(found) == 86
    assert found["layer3_blk4"].shape == (1, 64, 128)
    assert found["layer4_std_4"].shape == (1, 1, 256)


def test_the_image_itself_is_a_feature():
    x = images()
    found = small(input_patch_size=2).activations(x, every_block=None)
    assert_close(found["global"][:, 0].unflatten(1, (16, 16, 2)), x.permute(0, 2, 3, 1))  # row, column, channel
    corner = x[:, 1, 1::2, 0::2]  # row 1, column 0, channel 1 of every patch
    assert_close(found["norm_x"][:, 0, 5], (corner.square().mean((1, 2)) + 1e-6).sqrt())
    assert found["norm_x"].shape == (3, 1, 8)
    assert not any("blk" in name for name in found)


def test_features_are_a_feature_map_of_an_objective():
    model = small(base_channels=64)
    assert isinstance(model.activations, FeatureMap)
    objective = DriftingObjective(model.activations)
    objective.freeze(torch.device("cpu"))
    assert not any(p.requires_grad for p in model.parameters())
    generated = images(4, h=32, w=32).unflatten(0, (2, 2)).requires_grad_()
    loss, measured = objective(generated, images(6, h=32, w=32).unflatten(0, (2, 3)))
    loss.backward()
    assert measured.keys() == model.activations(images(1, h=32, w=32)).keys()
    assert generated.grad.isfinite().all()
    assert generated.grad.any()


@pytest.mark.parametrize(("base_channels", "constant"), [(32, {"layer1_mean", "layer1_std"}), (64, set())])
def test_groups_of_one_channel_make_constant_features(base_channels, constant):
    objective = DriftingObjective(small(base_channels=base_channels).activations)
    assert set(objective.ignore_constant(images())) == constant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "shifted norms"])
@pytest.mark.parametrize("value", [0.0, 1e-4, 0.7])
def test_flat_images_have_finite_gradients(fresh, value, dtype):
    torch.manual_seed(0)
    model = (MaskedAutoencoder(**SMALL) if fresh else small()).to(dtype)
    x = torch.full((2, 2, 16, 16), value, requires_grad=True)
    found = model.activations(x)
    assert all(values.isfinite().all() for values in found.values())
    sum(values.sum() for values in found.values()).backward()
    assert x.grad.isfinite().all()
    if not fresh and value == 0:  # why float16 will not do
        assert x.grad.abs().max() > torch.finfo(torch.float16).max


def test_rectangles_and_odd_maps():
    found = small().activations(images(1, h=18, w=10))
    assert [found[f"layer{i}"].shape[1] for i in (1, 2, 3, 4)] == [18 * 10, 9 * 5, 5 * 3, 3 * 2]
    assert "layer1_mean_2" in found
    assert not {"layer1_mean_4", "layer2_mean_2", "layer4_std_2"} & found.keys()
    assert small()(images(1, h=18, w=10), torch.zeros(1, 1, 18, 10)).reconstruction.shape == (1, 2, 18, 10)


@torch.no_grad()
def test_a_batch_is_its_samples():
    model, x = small(), images()
    parts = [model.activations(x[i : i + 1]) for i in range(3)]
    for name, values in model.activations(x).items():
        assert_close(torch.cat([part[name] for part in parts]), values, rtol=1e-4, atol=1e-5)
    mask, labels = half_mask(model), torch.tensor([0, 4, 2])
    whole = model(x, mask, labels, classification_weight=0.3)
    singles = [model(x[i : i + 1], mask[i : i + 1], labels[i : i + 1], classification_weight=0.3) for i in range(3)]
    for key, value in whole.items():
        assert_close(torch.cat([single[key] for single in singles]), value, rtol=1e-4, atol=1e-5)


# -- masks


def test_masks_are_whole_squares_of_the_wanted_share():
    model = small(mask_patch_size=4)
    draw = lambda **ratio: model.draw_mask(500, (16, 24), generator=torch.Generator().manual_seed(0), **ratio)
    mask = draw(ratio=(0.2, 0.6))
    assert mask.shape == (500, 1, 16, 24)
    assert mask.unique().tolist() == [0, 1]
    cells = mask.unflatten(3, (6, 4)).unflatten(2, (4, 4)).transpose(3, 4).flatten(4)
    assert_close(cells.amin(-1), cells.amax(-1), rtol=0, atol=0)
    share = mask.mean((1, 2, 3))
    assert_close(share.mean(), torch.tensor(0.4), rtol=0, atol=0.02)
    assert_close(share.var(), torch.tensor(0.4**2 / 12 + (0.24 - 0.4**2 / 12) / 24), rtol=0, atol=0.004)  # of the ratio, and of 24 cells
    assert_close(draw().mean(), torch.tensor(0.5), rtol=0, atol=0.02)
    assert not draw(ratio=(0.0, 0.0)).any()
    assert draw(ratio=(1.0, 1.0)).all()
    assert_close(draw(), draw(), rtol=0, atol=0)


@torch.no_grad()
def test_what_is_masked_is_not_seen():
    model, x = small(input_patch_size=2), images()
    mask = half_mask(model, grid=(8, 8))
    pixels = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)
    first, second = (model(torch.where(pixels > 0, hidden, x), mask) for hidden in (x, 100 * images(h=16, w=16).flip(0)))
    assert_close(second.reconstruction, first.reconstruction, rtol=0, atol=0)
    assert_close(second.logits, first.logits, rtol=0, atol=0)
    assert (second.loss > first.loss).all()


@torch.no_grad()
def test_the_loss_is_the_squared_error_of_what_is_masked():
    model, x = small(input_patch_size=2), images()
    mask = half_mask(model, grid=(8, 8))
    out = model(x, mask)
    pixels = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(out.loss, ((out.reconstruction - x).square() * pixels).sum((1, 2, 3)) / mask.sum((1, 2, 3)))
    assert_close(model(x, torch.zeros_like(mask)).loss, torch.zeros(3), rtol=0, atol=0)


@torch.no_grad()
def test_losses_are_weighed():
    model, x, labels = small(), images(), torch.tensor([0, 4, 2])
    mask = half_mask(model)
    without, at = model(x, mask), lambda weight: model(x, mask, labels, classification_weight=weight)
    assert without.classification_loss is None
    assert len(model(x, mask, return_dict=False)) == 4
    assert_close(at(0.0).loss, without.reconstruction_loss, rtol=0, atol=0)
    assert_close(at(1.0).loss, at(0.0).classification_loss, rtol=0, atol=0)
    assert_close(at(0.25).loss, 0.25 * at(1.0).loss + 0.75 * without.loss)
    assert_close(at(1.0).loss, -at(1.0).logits.log_softmax(1)[torch.arange(3), labels])


def test_an_encoder_learns_to_fill_in(rng):
    """Stripes go on behind the mask: the loss falls far below that of any constant."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(1, 32, (1, 1, 1, 1), num_classes=2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    vertical = torch.tensor([-1.0, 1.0]).repeat_interleave(2).repeat(4).expand(1, 16, 16)
    x, labels = torch.stack([vertical, vertical.mT]).repeat(4, 1, 1, 1), torch.tensor([0, 1]).repeat(4)
    for _ in range(30):
        optimiser.zero_grad()
        out = model(x, model.draw_mask(8, (16, 16), generator=rng), labels, classification_weight=0.1)
        out.loss.mean().backward()
        optimiser.step()
    assert out.reconstruction_loss.mean() < 0.3
    assert out.classification_loss.mean() < 0.1


# -- what diffusers promises of its models


def test_gradient_checkpointing_changes_no_gradient():
    model, x = small(), images().requires_grad_()
    mask, gradients = half_mask(model), []
    for checkpointing in (False, True):
        model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
        model.zero_grad()
        x.grad = None
        sum(values.square().mean() for values in model.activations(x).values()).backward()
        model(x, mask, torch.tensor([0, 1, 2]), classification_weight=0.5).loss.mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()} | {"x": x.grad.clone()})
    assert model.is_gradient_checkpointing
    assert all(gradient.any() for gradient in gradients[0].values())
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "1MB", "variant": "ema"}], ids=str)
@torch.no_grad()
def test_save_and_load(tmp_path, options):
    model = small()
    model.save_pretrained(tmp_path, **options)
    back = MaskedAutoencoder.from_pretrained(tmp_path, variant=options.get("variant"))
    assert back.config.layers_per_stage == [1, 2, 1, 1]
    for name, values in model.activations(images()).items():
        assert_close(back.activations(images())[name], values, rtol=0, atol=0)


def test_the_config_on_disk_is_pinned(tmp_path):
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("_diffusers_version")
    assert config == {
        "_class_name": "MaskedAutoencoder", "base_channels": 32, "in_channels": 2, "input_patch_size": 1, "layers_per_stage": [1, 2, 1, 1],
        "mask_patch_size": 2, "num_classes": 5,
    }  # fmt: skip
    assert MaskedAutoencoder.from_config(config).config.layers_per_stage == [1, 2, 1, 1]


def test_fresh_weights_are_reproducible_and_keep_the_size_of_maps():
    torch.manual_seed(3)
    first = MaskedAutoencoder(**SMALL)
    torch.manual_seed(3)
    assert_close(MaskedAutoencoder(**SMALL).state_dict(), first.state_dict(), rtol=0, atol=0)
    fan_in = 9 * 64
    assert_close(first.stages[1][1].conv1.weight.std(), torch.tensor((2 / fan_in) ** 0.5), rtol=0.02, atol=0)
    assert first.stages[0][0].conv_shortcut is None


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_half_precision(tmp_path, dtype, bound):
    model = small()
    model.save_pretrained(tmp_path)
    half = MaskedAutoencoder.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    exact = model.activations(images())
    for name, values in half.activations(images()).items():
        assert values.dtype == torch.float32
        assert (values - exact[name]).abs().max() <= bound * exact[name].abs().max(), name
    assert_close(half.activations(images())["global"], exact["global"], rtol=0, atol=0)  # not rounded on the way
    out = half(images(), half_mask(model), torch.tensor([0, 1, 2]), classification_weight=0.5)
    assert out.loss.dtype == torch.float32
    assert_close(out.loss, model(images(), half_mask(model), torch.tensor([0, 1, 2]), classification_weight=0.5).loss, rtol=bound, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_take_float32_statistics_in_16_bits(dtype):
    """Sums of 16-bit numbers would overflow (float16, from 65504) or swallow what they add (bfloat16, from 256 ones)."""
    x = (200 + 20 * torch.randn(2, 64, 64, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    norm = small().norm_in
    wide = torch.nn.GroupNorm(32, 64, eps=1e-6)
    exact = wide(x.float())
    got = wide.to(dtype)(x)
    assert norm.eps == wide.eps
    assert (got.float() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()  # of the rounding of the result alone


@torch.no_grad()
def test_layerwise_casting():
    model = small()
    exact = model.activations(images())
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.conv_in.weight.dtype == torch.bfloat16
    assert model.norm_in.weight.dtype == torch.float32
    for name, values in model.activations(images()).items():
        assert (values - exact[name]).abs().max() <= 0.1 * exact[name].abs().max(), name


@pytest.mark.slow
def test_the_whole_pass_is_one_graph():
    """Labels and masks are looked at, but not while a graph is made of it. In a process without shape checks, which are no part of any graph."""
    code = (
        "import torch; from drifting_diffusers import MaskedAutoencoder\n"
        f"model = MaskedAutoencoder(**{SMALL}); x, labels = torch.randn(3, 2, 16, 16), torch.tensor([0, 1, 2])\n"
        "mask = model.draw_mask(3, (16, 16), generator=torch.Generator().manual_seed(0))\n"
        "compiled = torch.compile(model, backend='eager', fullgraph=True)\n"
        "torch.testing.assert_close(compiled(x, mask, labels, 0.5).loss, model(x, mask, labels, 0.5).loss)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- bad inputs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"base_channels": 48},
            "base_channels must be a multiple of 32, the groups of every norm, got 48; the release's encoders have 256",
        ),
        ({"base_channels": 0}, "base_channels must be a multiple of 32.* got 0"),
        (
            {"layers_per_stage": (1, 1, 1)},
            r"layers_per_stage must be 4 integers of at least 1, got \(1, 1, 1\); the paper's are \(3, 4, 6, 3\)",
        ),
        ({"layers_per_stage": (1, 0, 1, 1)}, r"got \(1, 0, 1, 1\)"),
        ({"layers_per_stage": 4}, "layers_per_stage must be 4 integers"),
        ({"in_channels": 0}, "in_channels must be an integer of at least 1, got 0"),
        ({"input_patch_size": 0}, "input_patch_size must be an integer of at least 1, got 0"),
        ({"mask_patch_size": 1.5}, "mask_patch_size must be an integer of at least 1, got 1.5"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("as_users_see_it")
def test_configurations_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoder(**SMALL | config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 3, 8, 8)}, r"images must be .* \[n, 2, h, w\], none of them 0, got torch.float32 \[3, 3, 8, 8\]"),
        ({"images": torch.zeros(0, 2, 8, 8)}, r"got torch.float32 \[0, 2, 8, 8\]"),
        ({"images": torch.zeros(2, 8, 8)}, r"got torch.float32 \[2, 8, 8\]"),
        ({"images": torch.zeros(3, 2, 8, 8, dtype=torch.uint8)}, r"got torch.uint8"),
        ({"images": torch.zeros(3, 2, 9, 8)}, r"input_patch_size must divide both sides of the images, got 2 for \[3, 2, 9, 8\]; crop"),
        ({"mask": torch.zeros(3, 1, 8, 8)}, r"mask must be .* \[3, 1, 4, 4\] for images \[3, 2, 8, 8\], got torch.float32 \[3, 1, 8, 8\]"),
        ({"mask": torch.zeros(3, 1, 4, 4, dtype=torch.bool)}, "mask must be floating point .* got torch.bool"),
        ({"mask": torch.full((3, 1, 4, 4), 2.0)}, "mask must hold 1 for removed positions and 0 for the others"),
        ({"mask": torch.full((3, 1, 4, 4), float("nan"))}, "mask must hold 1 for removed positions and 0 for the others"),
        ({"labels": torch.tensor([True, False, True])}, "labels must be integers .* got torch.bool"),
        ({"labels": None}, "labels are needed for a classification_weight of 0.5"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, r"labels must be integers \[3\] in \[0, 5\), got torch.int64 \[2\]"),
        ({"labels": torch.zeros(3)}, "labels must be integers .* got torch.float32"),
        ({"labels": torch.tensor([0, 1, 5])}, r"labels must lie in \[0, 5\), got values from 0 to 5"),
        ({"classification_weight": 1.5}, r"classification_weight must lie in \[0, 1\], got 1.5"),
    ],
)
@pytest.mark.usefixtures("as_users_see_it")
def test_inputs_that_do_not_fit(change, message):
    fitting = {"images": torch.zeros(3, 2, 8, 8), "mask": torch.zeros(3, 1, 4, 4), "labels": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        small(input_patch_size=2)(**(fitting | {"classification_weight": 0.5} | change))


@pytest.mark.usefixtures("as_users_see_it")
def test_arguments_that_do_not_fit(rng):
    model = small()
    with pytest.raises(ValueError, match="every_block must be at least 1, an integer, got 0; None leaves the blocks out"):
        model.activations(images(), every_block=0)
    for every_block in (1.5, True):
        with pytest.raises(ValueError, match=f"every_block must be at least 1, an integer, got {every_block}"):
            model.activations(images(), every_block=every_block)
    for windows in ((0,), (2.0,), 2):
        with pytest.raises(ValueError, match="windows must have sides of at least 1, in integers, got"):
            model.activations(images(), mean_windows=windows)
    with pytest.raises(ValueError, match=r"ratio must satisfy 0 <= low <= high <= 1, got 0.5; the paper's is \(0.5, 0.5\)"):
        model.draw_mask(3, (8, 8), generator=rng, ratio=0.5)
    with pytest.raises(ValueError, match=r"input_patch_size must divide .* got 4 for \[3, 2, 18, 16\]"):
        small(input_patch_size=4).activations(images(h=18))
    with pytest.raises(ValueError, match=r"mask_patch_size must divide both sides of the grid, got 2 for \(7, 8\); crop"):
        model.draw_mask(3, (7, 8), generator=rng)
    with pytest.raises(ValueError, match=r"0 <= low <= high <= 1, got \(0.6, 0.4\)"):
        model.draw_mask(3, (8, 8), generator=rng, ratio=(0.6, 0.4))
