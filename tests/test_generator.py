"""The generator: recorded numbers of the reference, the switches one by one, and what diffusers promises of its models."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from recordings import bounds_of, recorded
from torch import Tensor
from torch.testing import assert_close

from drifting_diffusers.generator import DriftingGenerator
from drifting_diffusers.layouts import generator_config, generator_layout

RELEASED = ["release_like", "plain", "pixel_like", "qknorm_layernorm", "bf16", "small_scale_rms", "small_scale_ln"]
SMALL = {
    "sample_size": 8, "in_channels": 2, "num_classes": 5, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_class_tokens": 2,
    "num_style_tokens": 3, "style_codebook_size": 4,
}  # fmt: skip


def small(**changes) -> DriftingGenerator:
    """A generator whose every weight is in play: fresh ones return zeros."""
    torch.manual_seed(0)
    model = DriftingGenerator(**(SMALL | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(model: DriftingGenerator, b: int = 3, seed: int = 0) -> dict[str, Tensor | float | None]:
    rng, config = torch.Generator().manual_seed(seed), model.config
    return {
        "noise": torch.randn(b, config.in_channels, model.sample_height, model.sample_width, generator=rng),
        "class_labels": torch.randint(config.num_classes, (b,), generator=rng) if config.num_classes else None,
        "guidance_scale": 1 + torch.rand(b, generator=rng) if config.guidance_embedding else 1.0,
        "style_labels": torch.randint(config.style_codebook_size, (b, config.num_style_tokens), generator=rng)
        if config.num_style_tokens
        else None,
    }


@torch.no_grad()
def draw(model: DriftingGenerator, **changes) -> Tensor:
    return model(**(inputs(model) | changes)).sample


# -- goldens


@pytest.mark.parametrize("name", RELEASED)
@torch.no_grad()
def test_recorded_outputs_of_the_reference(shared, name):
    io, bounds = recorded(shared, f"gen/{name}/io"), bounds_of(shared, f"gen/{name}")
    model = DriftingGenerator.from_release(shared / f"fixtures/gen/{name}").eval()
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    model, noise = model.to(dtype), io["noise_x"].permute(0, 3, 1, 2).to(dtype)
    labels, style = io["labels"].long(), io["noise_labels"].long()
    got = {}
    for kind, scale in (("vec", io["cfg_vec"]), ("scalar", float(io["cfg_scalar"]))):
        got[f"cond_{kind}"] = model.condition(noise, labels, scale, style)
        got[f"samples_{kind}"] = model(noise, labels, scale, style).sample.permute(0, 2, 3, 1)
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda _, __, tokens, i=i: got.update({f"block{i}_sample0": tokens[0]}))
    model(noise, labels, io["cfg_vec"], style)
    assert got.keys() == bounds.keys()
    for key, value in got.items():
        assert_close(value.float(), io[key], rtol=0, atol=bounds[key] * float(io[key].abs().max()), msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.04), (torch.float16, 0.006)])  # measured 0.020 and 0.0029
@pytest.mark.parametrize("name", ["release_like", "pixel_like"])
@torch.no_grad()
def test_recorded_outputs_in_half_precision(shared, name, dtype, bound):
    io = recorded(shared, f"gen/{name}/io")
    model = DriftingGenerator.from_release(shared / f"fixtures/gen/{name}", dtype=dtype)
    got = model(io["noise_x"].permute(0, 3, 1, 2).to(dtype), io["labels"].long(), io["cfg_vec"], io["noise_labels"].long()).sample
    assert got.dtype == dtype
    expected = io["samples_vec"].permute(0, 3, 1, 2)
    assert_close(got.float(), expected, rtol=0, atol=bound * float(expected.abs().max()))


@torch.no_grad()
def test_what_stays_in_float32_in_half_precision(shared):
    """Statistics of norms and the angles of the rotation: in 16 bits a place of 272 tokens would be off by a whole radian."""
    model = DriftingGenerator.from_release(shared / "fixtures/gen/release_like", dtype=torch.bfloat16)
    cosines, sines = model.rotary(torch.zeros(1, 272, 32, dtype=torch.bfloat16))
    assert cosines.dtype == sines.dtype == torch.float32
    large = torch.full((1, 64), 3000.0, dtype=torch.float16)  # its square is beyond float16
    assert_close(torch.nn.RMSNorm(64, eps=1e-6).half()(large), torch.ones(1, 64, dtype=torch.float16))


@pytest.mark.parametrize("name", ["release_like", "plain"])
def test_fresh_weights_are_spread_as_in_the_reference(shared, name):
    metadata = json.loads((shared / f"fixtures/gen/{name}/params_ema/metadata.json").read_text())
    stats = json.loads((shared / "fixtures/misc/init_stats.json").read_text())[f"gen/{name}"]
    torch.manual_seed(0)
    model = DriftingGenerator(**generator_config(metadata["model_config"]))
    ours, fresh = model.state_dict(), {}
    for names, paths in generator_layout(model.config):
        fresh |= dict(zip(paths, torch.cat([ours[n] for n in names]).chunk(len(paths)), strict=True))
    assert fresh.keys() == stats.keys()
    for path, want in stats.items():
        tensor, error = fresh[path], 6 * want["std"] / fresh[path].numel() ** 0.5  # six standard errors
        assert_close(tensor.mean().item(), want["mean"], rtol=0, atol=max(2**0.5 * error, 1e-6), msg=f"mean of {path}")
        assert_close(tensor.std().item(), want["std"], rtol=0, atol=max(error, 1e-6), msg=f"spread of {path}")
        assert_close(tensor.abs().max().item(), want["absmax"], rtol=0.35, atol=1e-6, msg=f"largest of {path}")


@pytest.mark.parametrize("name", ["release_like", "plain"])
def test_initial_positions(shared, name):
    stored = np.load(shared / "fixtures/misc/init_pos_embed.npz")[f"pos_embed__{name}"]
    metadata = json.loads((shared / f"fixtures/gen/{name}/params_ema/metadata.json").read_text())
    model = DriftingGenerator(**generator_config(metadata["model_config"]))
    assert_close(model.pos_embed.detach(), torch.from_numpy(stored), rtol=0, atol=1e-5 * float(np.abs(stored).max()))


# -- laws


def test_a_fresh_generator_returns_zeros():
    assert_close(draw(DriftingGenerator(**SMALL)), torch.zeros(3, 2, 8, 8))


def test_patches_are_laid_back_where_they_were():
    model = small(sample_size=(4, 6))
    images = torch.arange(2 * 2 * 4 * 6.0).reshape(2, 2, 4, 6)
    tokens = model.patchify(images)
    assert_close(tokens[0, 1], torch.stack([images[0, :, r, c] for r in (0, 1) for c in (2, 3)]).flatten())  # row, column, channel
    assert_close(model.unpatchify(tokens), images)


@pytest.mark.parametrize("sample_size", [(4, 12), (12, 4), (8, 8), [6, 4]])
def test_rectangles(sample_size):
    model = small(sample_size=tuple(sample_size))
    assert draw(model).shape == (3, 2, *sample_size)


def test_rows_and_columns_are_told_apart():
    """A rectangle and its transpose hold the same position codes with the halves swapped, so height and width cannot be mixed up."""
    wide, tall = DriftingGenerator(**SMALL | {"sample_size": (4, 12)}), DriftingGenerator(**SMALL | {"sample_size": (12, 4)})
    column, row = wide.pos_embed.reshape(2, 6, 2, 8).unbind(2)
    assert_close(tall.pos_embed.reshape(6, 2, 16).transpose(0, 1), torch.cat([row, column], dim=-1))


@pytest.mark.parametrize(
    "switch",
    [
        {"num_classes": 0},
        {"num_class_tokens": 0},
        {"num_style_tokens": 0},
        {"activation": "gelu"},
        {"norm_type": "layer_norm"},
        {"qk_norm": False},
        {"rope": False},
        {"guidance_embedding": False},
        {"condition_dim": 5},
        {"out_channels": 3},
        {"patch_size": 4},
        {"num_classes": 0, "num_style_tokens": 0, "guidance_embedding": False, "num_class_tokens": 0},
    ],
    ids=str,
)
def test_every_switch_leaves_a_generator_whose_weights_all_matter(switch):
    model = small(**switch)
    sample = model(**inputs(model)).sample
    assert sample.shape == (3, model.out_channels, 8, 8)
    assert sample.std() > 0.01
    sample.square().mean().backward()
    unconditioned = not (model.config.num_classes or model.config.num_style_tokens or model.config.guidance_embedding)
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in dead if not (unconditioned and "modulation" in name and name.endswith("weight"))] == []


def test_each_input_moves_the_sample_and_only_its_own():
    model = small()
    before = draw(model)
    one = {key: value.clone() for key, value in inputs(model).items()}
    one["noise"][1] += 0.1
    one["class_labels"][1] = (one["class_labels"][1] + 1) % 5
    one["guidance_scale"][1] += 0.5
    one["style_labels"][1, 2] = (one["style_labels"][1, 2] + 1) % 4
    for key, value in one.items():
        after = draw(model, **{key: value})
        assert_close(after[[0, 2]], before[[0, 2]])
        assert not torch.allclose(after[1], before[1], rtol=1e-3, atol=1e-5), key


def test_a_batch_is_its_samples():
    model = small()
    whole = inputs(model, b=4)
    parts = [model(**{key: value[i : i + 1] for key, value in whole.items()}).sample for i in range(4)]
    assert_close(torch.cat(parts), model(**whole).sample)


def test_one_scale_for_all_is_the_same_scale_for_each():
    model = small()
    assert_close(draw(model, guidance_scale=2.5), draw(model, guidance_scale=torch.full((3,), 2.5)))
    assert_close(draw(model, guidance_scale=2.5), draw(model, guidance_scale=torch.tensor(2.5)))


def test_style_books_do_not_overlap():
    model = small()
    same = draw(model, style_labels=torch.tensor([[0, 0, 0]] * 3))
    assert not torch.allclose(same, draw(model, style_labels=torch.tensor([[1, 0, 0]] * 3)), atol=1e-4)
    assert not torch.allclose(
        draw(model, style_labels=torch.tensor([[1, 0, 0]] * 3)), draw(model, style_labels=torch.tensor([[0, 1, 0]] * 3)), atol=1e-4
    )


def test_tuple_output():
    model = small()
    with torch.no_grad():
        (sample,) = model(**inputs(model), return_dict=False)
    assert_close(sample, draw(model))


# -- what diffusers promises of its models


def test_gradient_checkpointing_changes_no_gradient():
    model = small()
    gradients = []
    for checkpointing in (False, True):
        model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
        model.zero_grad()
        model(**inputs(model)).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert model.is_gradient_checkpointing
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    "options", [{}, {"variant": "fp16"}, {"max_shard_size": "20KB"}, {"max_shard_size": "20KB", "variant": "ema"}], ids=str
)
def test_save_and_load(tmp_path, options):
    model = small(sample_size=(4, 8))
    model.save_pretrained(tmp_path, **options)
    back = DriftingGenerator.from_pretrained(tmp_path, variant=options.get("variant"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if "max_shard_size" in options else True
    assert (back.sample_height, back.sample_width) == (4, 8)
    assert_close(draw(back), draw(model), rtol=0, atol=0)


def test_the_config_on_disk_is_pinned(tmp_path):
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("_diffusers_version")
    assert config == {
        "_class_name": "DriftingGenerator", "activation": "swiglu", "attention_head_dim": 8, "condition_dim": None, "guidance_embedding": True,
        "in_channels": 2, "mlp_ratio": 4.0, "norm_type": "rms_norm", "num_attention_heads": 2, "num_class_tokens": 2, "num_classes": 5, "num_layers": 2,
        "num_style_tokens": 3, "out_channels": None, "patch_size": 2, "qk_norm": True, "rope": True, "sample_size": 8, "style_codebook_size": 4,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    model = small()
    model.save_pretrained(tmp_path)
    half = DriftingGenerator.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    sample = draw(half, noise=inputs(model)["noise"].to(dtype))
    assert sample.dtype == dtype
    exact = draw(model)
    assert_close(sample.float(), exact, rtol=0, atol=0.08 * float(exact.abs().max()))


def test_layerwise_casting():
    model = small()
    exact = draw(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.patch_proj.weight.dtype == torch.bfloat16
    assert model.class_embedding.weight.dtype == model.pos_embed.dtype == torch.float32
    assert_close(draw(model), exact, rtol=0, atol=0.08 * float(exact.abs().max()))


def test_attention_the_diffusers_way():
    model = small()
    exact = draw(model)
    assert list(model.attn_processors) == [f"transformer_blocks.{i}.attn.processor" for i in range(2)]
    model.set_attn_processor(model.attn_processors)
    model.set_attention_backend("native")
    assert_close(draw(model), exact)
    model.fuse_qkv_projections()
    assert hasattr(model.transformer_blocks[0].attn, "to_qkv")
    assert_close(draw(model), exact)
    model.unfuse_qkv_projections()
    assert_close(draw(model), exact)


def test_compiled_blocks_draw_the_same():
    model = small()
    exact = draw(model)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert_close(draw(model), exact)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="LoRA needs peft")
def test_lora(tmp_path):
    from peft import LoraConfig

    model = small()
    exact = draw(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = draw(model)
    assert not torch.allclose(adapted, exact, atol=1e-4)
    model.save_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    model.disable_adapters()
    assert_close(draw(model), exact)
    again = small()
    again.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert_close(draw(again), adapted)


# -- bad inputs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch_size": 3}, "patch_size must divide both sides"),
        ({"sample_size": (8, 9)}, "got 2 for 8 x 9"),
        ({"patch_size": 0}, "patch_size must divide"),
        ({"attention_head_dim": 7}, "attention_head_dim must be even, got 7"),
        ({"num_attention_heads": 1, "attention_head_dim": 6}, r"must be a multiple of 4, got 1 \* 6"),
        ({"activation": "relu"}, "got 'relu'"),
        ({"norm_type": "batch_norm"}, "got 'batch_norm'"),
        ({"sample_size": 0}, "sample_size must be at least 1, got 0 x 0"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1; 0 makes an unconditional"),
        ({"in_channels": 0}, "in_channels must be an integer of at least 1, got 0"),
        ({"out_channels": 0}, "out_channels must be .* at least 1, got 0; leave it out for those of the noise"),
        ({"condition_dim": 0}, "condition_dim must be .* at least 1, got 0; leave it out for the width"),
        ({"num_layers": 0}, "num_layers must be .* at least 1, got 0"),
        ({"num_layers": 1.5}, "num_layers must be an integer of at least 1, got 1.5"),
        ({"num_layers": None}, "num_layers must be an integer of at least 1, got None"),
        ({"num_attention_heads": 0}, "num_attention_heads must be .* at least 1, got 0"),
        ({"attention_head_dim": 0}, "attention_head_dim must be .* at least 2, got 0"),
        ({"num_class_tokens": -1}, "num_class_tokens must be .* at least 0, got -1; 0 switches them off"),
        ({"num_style_tokens": -1}, "num_style_tokens must be .* at least 0, got -1; 0 switches them off"),
        ({"style_codebook_size": 0}, "style_codebook_size must be .* at least 1, got 0; num_style_tokens=0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be finite and above 0, got 0.0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be finite and above 0, got nan"),
    ],
)
@pytest.mark.usefixtures("as_users_see_it")
def test_configurations_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        DriftingGenerator(**SMALL | config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": torch.zeros(3, 2, 8, 10)}, r"noise must be \[b, 2, 8, 8\], got \[3, 2, 8, 10\]"),
        ({"noise": torch.zeros(3, 4, 8, 8)}, "noise must be"),
        ({"class_labels": None}, "class_labels are needed"),
        ({"class_labels": torch.tensor([0, 1, 5])}, r"class_labels must lie in \[0, 5\), got values from 0 to 5"),
        ({"class_labels": torch.tensor([0, -1, 1])}, "got values from -1 to 1"),
        ({"style_labels": None}, "style_labels are needed"),
        ({"style_labels": torch.zeros(3, 2, dtype=torch.long)}, r"style_labels must have shape \[3, 3\], got \[3, 2\]"),
        ({"style_labels": torch.full((3, 3), 4)}, r"style_labels must lie in \[0, 4\)"),
        ({"noise": torch.zeros(0, 2, 8, 8)}, r"noise must hold at least one sample, got \[0, 2, 8, 8\]"),
        ({"guidance_scale": 0}, r"guidance_scale must be finite and above 0 \(1 is no guidance\), got 0"),
        ({"guidance_scale": -2.0}, "guidance_scale must be finite and above 0 .* got -2.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite and above 0 .* got nan"),
        ({"guidance_scale": "1.5"}, "guidance_scale must be finite and above 0 .* got '1.5'"),
        (
            {"guidance_scale": torch.tensor([1.0, torch.inf, 1.0])},
            r"guidance_scale must be finite and above 0 .* got tensor\(\[1., inf, 1.\]\)",
        ),
        ({"guidance_scale": torch.tensor([1.0, 0.0, 1.0])}, "guidance_scale must be finite and above 0"),
        ({"guidance_scale": torch.ones(2)}, r"guidance_scale must be one number or one per sample, \[3\], got \[2\]"),
    ],
)
@pytest.mark.usefixtures("as_users_see_it")
def test_inputs_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        draw(small(), **change)


def test_inputs_a_generator_was_not_built_for():
    with pytest.raises(ValueError, match="takes no class_labels"):
        draw(small(num_classes=0), class_labels=torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="takes no style_labels"):
        draw(small(num_style_tokens=0), style_labels=torch.zeros(3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"without guidance_embedding, so guidance_scale must stay 1.0, got 2.0"):
        draw(small(guidance_embedding=False), guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"without guidance_embedding"):
        draw(small(guidance_embedding=False), guidance_scale=float("nan"))


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("one", [1, np.float32(1), np.float64(1), np.int64(1)], ids=repr)
def test_a_scale_of_one_of_any_kind_is_no_guidance(one):
    for model in (small(), small(guidance_embedding=False)):
        assert_close(draw(model, guidance_scale=one), draw(model, guidance_scale=1.0))
