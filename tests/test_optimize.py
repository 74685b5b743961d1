"""Fast paths: each gives what the plain formulas give, steps back where it would not, and says what it did."""

import copy
import importlib.util
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from test_generator import RELEASED, inputs, small
from test_pipeline import autoencoder, seed
from test_pipeline import generator as coloured
from torch import Tensor, nn
from torch.testing import assert_close

from drifting_diffusers import blocks
from drifting_diffusers.generator import DriftingGenerator
from drifting_diffusers.pipeline import DriftingPipeline
from drifting_diffusers.sampling import PipelineSamples

VARIANTS = [
    {},
    {"num_classes": 0},
    {"guidance_embedding": False},
    {"num_style_tokens": 0},
    {"num_class_tokens": 0},
    {"activation": "gelu"},
    {"norm_type": "layer_norm"},
    {"qk_norm": False},
    {"rope": False},
    {"condition_dim": 12},
    {"out_channels": 3, "sample_size": (4, 6)},
]


def draw(model: DriftingGenerator, *, grad: bool, b: int = 3) -> Tensor:
    """With gradients the plain formulas are taken, without them the fast ones."""
    given = inputs(model, b)
    with torch.set_grad_enabled(grad):
        return model(**given | {"noise": given["noise"].to(model.device, model.dtype)}).sample.detach()


def assert_same(model: DriftingGenerator, b: int = 3) -> None:
    plain = draw(model, grad=True, b=b)
    bound = 1e-12 if model.dtype == torch.float64 else 1e-5
    assert_close(draw(model, grad=False, b=b), plain, rtol=0, atol=bound * float(plain.abs().max()))


def in_float64(model: DriftingGenerator, monkeypatch) -> DriftingGenerator:
    """Diffusers rotates in float32 at most; with tables and rotation in float64, what is left of a difference is a mistake."""
    exact = lambda x, tables, **_: x * tables[0][:, None] + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * tables[1][:, None]
    monkeypatch.setattr(blocks, "apply_rotary", exact)
    return model.double()


# -- the generator


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_drawing_is_the_plain_formulas(variant, fused, monkeypatch):
    model = in_float64(small(**variant), monkeypatch)
    if fused:
        model.fuse_modulation()
        assert model.fused_modulation
    for b in (1, 3):
        assert_same(model, b)


def test_what_drawing_is_compared_with_is_another_path(monkeypatch):
    """Else the tests above would compare a thing with itself."""
    model, seen = small(), []
    monkeypatch.setattr(blocks, "drawing", lambda: seen.append(1) or False)
    draw(model, grad=False)
    assert len(seen) >= 4 * len(model.transformer_blocks)


@pytest.mark.parametrize("name", RELEASED)
def test_released_weights_draw_the_same(shared, name):
    model = DriftingGenerator.from_release(shared / f"fixtures/gen/{name}").eval()
    plain = draw(model, grad=True)
    model.fuse_modulation()
    assert_close(draw(model, grad=False), plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_the_plain_formulas(dtype):
    model = small()
    exact = draw(model, grad=True)
    model.to(dtype)
    model.fuse_modulation()
    plain, fast = ((draw(model, grad=grad).float() - exact).norm() / exact.norm() for grad in (True, False))
    assert fast <= 1.2 * plain, (float(fast), float(plain))


def test_nothing_a_hook_has_seen_is_written_to():
    model, seen = small(), []
    for module in model.modules():
        module.register_forward_hook(lambda _, given, out: seen.extend((t, t.clone()) for t in (*given, out) if isinstance(t, Tensor)))
    draw(model, grad=False)
    assert len(seen) > 50
    for kept, then in seen:
        assert_close(kept, then, rtol=0, atol=0)


def test_tables_of_inference_mode_serve_training():
    blocks._kept_tables.cache_clear()
    model = small()
    with torch.inference_mode():
        model(**inputs(model))
    first = blocks._kept_tables.cache_info()
    draw(model, grad=False)
    assert blocks._kept_tables.cache_info().hits == first.hits + 1
    tables = model.rotary(torch.zeros(1, model.config.num_class_tokens + 16, 1))
    assert not any(table.is_inference() for table in tables)
    model(**inputs(model)).sample.sum().backward()


# -- one projection


@pytest.fixture
def fused() -> DriftingGenerator:
    model = small()
    model.fuse_modulation()
    assert model.fused_modulation
    return model


def products(model: DriftingGenerator, monkeypatch) -> int:
    """How many times a condition is projected by layers of their own in one call; the layers themselves stay without hooks."""
    count, plain = [], nn.functional.linear
    own = {id(layer.weight) for layer in model._projections()}
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: (count.append(1) if id(w) in own else None, plain(x, w, b))[1])
    draw(model, grad=False)
    monkeypatch.setattr(nn.functional, "linear", plain)
    return len(count)


def test_the_condition_is_projected_once(fused, monkeypatch):
    assert products(fused, monkeypatch) == 0
    fused.unfuse_modulation()
    assert products(fused, monkeypatch) == 3
    assert not fused.fused_modulation


def test_weights_stay_what_they_were(fused, tmp_path):
    plain = small()
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert_close(fused.state_dict()[name], tensor, rtol=0, atol=0)
    for serialised in (True, False):
        folder = tmp_path / str(serialised)
        fused.save_pretrained(folder, safe_serialization=serialised)
        plain.save_pretrained(folder / "plain", safe_serialization=serialised)
        sizes = [sum(f.stat().st_size for f in where.glob("diffusion*")) for where in (folder, folder / "plain")]
        assert abs(sizes[0] - sizes[1]) < 2000
        again = DriftingGenerator.from_pretrained(folder, use_safetensors=serialised)
        assert_close(draw(again, grad=False), draw(plain, grad=False))
        assert again.fused_modulation != serialised  # pickled weights lie behind each other again
    assert sum(t.untyped_storage().nbytes() for t in {t.untyped_storage().data_ptr(): t for t in fused.parameters()}.values()) == sum(
        t.nbytes for t in fused.parameters()
    ), "something is held twice"


def test_changed_weights_are_the_ones_that_count(fused):
    before = draw(fused, grad=False)
    with torch.no_grad():
        fused.transformer_blocks[1].modulation.weight.mul_(2)
    assert fused.fused_modulation
    assert_same(fused)
    assert not torch.allclose(draw(fused, grad=False), before, atol=1e-3)
    other = small()
    with torch.no_grad():
        other.modulation_out.bias.add_(1)
    fused.load_state_dict(other.state_dict())
    assert fused.fused_modulation
    assert_close(draw(fused, grad=False), draw(other, grad=True))
    optimiser = torch.optim.SGD(fused.parameters(), lr=0.1)
    fused(**inputs(fused)).sample.square().mean().backward()
    optimiser.step()
    assert fused.fused_modulation
    assert_same(fused)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double().float(),
        copy.deepcopy,
        lambda model: setattr(model.transformer_blocks[0], "modulation", nn.Linear(16, 96)),
        lambda model: setattr(model.transformer_blocks[1].modulation, "weight", nn.Parameter(torch.ones(96, 16))),
        lambda model: setattr(model.modulation_out.bias, "data", torch.ones(32)),
        lambda model: model.load_state_dict(small().state_dict(), assign=True),
        lambda model: nn.utils.parametrizations.weight_norm(model.transformer_blocks[0].modulation),
        lambda model: model.transformer_blocks[0].modulation.register_forward_hook(lambda _, __, out: out + 1),
        lambda model: apply_layerwise_casting(model, torch.float16, torch.float32, skip_modules_pattern=["norm", "embed"]),
        lambda model: apply_group_offloading(model, torch.device("cpu"), offload_type="leaf_level"),
    ],
    ids=["cast", "copied", "replaced", "another weight", "another bias", "assigned", "parametrised", "hooked", "layerwise", "offloaded"],
)
@pytest.mark.filterwarnings("ignore:.*group offloading.*")
def test_it_steps_back_where_it_would_not_hold(fused, change):
    changed = change(fused)
    model = changed if isinstance(changed, DriftingGenerator) else fused
    assert not model.fused_modulation
    assert_same(model)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="LoRA needs peft")
def test_adapters_on_the_projection(fused):
    from peft import LoraConfig

    before = draw(fused, grad=False)
    fused.add_adapter(LoraConfig(r=2, target_modules=["modulation", "to_q", "proj"], init_lora_weights=False))
    assert not fused.fused_modulation
    assert_same(fused)
    assert not torch.allclose(draw(fused, grad=False), before, atol=1e-3)
    with pytest.raises(ValueError, match="fuse adapters"):
        fused.fuse_modulation()
    fused.fuse_lora()
    fused.unload_lora()
    fused.fuse_modulation()
    assert_same(fused)


def test_gradients_are_of_every_layer(fused):
    plain = small()
    for model in (fused, plain):
        model.enable_gradient_checkpointing()
        model.train()
        model(**inputs(model)).sample.square().sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_is_the_same(fused, whole, as_users_see_it):
    exact = draw(fused, grad=False)
    if whole:
        fused.compile(backend="aot_eager", fullgraph=True)
    else:
        fused.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert_close(draw(fused, grad=False), exact)
    with torch.no_grad():
        fused.transformer_blocks[0].modulation.weight.mul_(2)
    assert not torch.allclose(draw(fused, grad=False), exact, atol=1e-3)


def test_exported_is_the_same(fused, as_users_see_it):
    given = inputs(fused, 2)
    with torch.no_grad():
        program = torch.export.export(fused, (), given | {"return_dict": False})
    assert_close(program.module()(**given, return_dict=False)[0], fused(**given).sample)


# -- decoding


def latent_pipe(vae: nn.Module) -> DriftingPipeline:
    pipe = DriftingPipeline(coloured(in_channels=4), vae=vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny() -> AutoencoderTiny:
    torch.manual_seed(2)
    four = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "num_encoder_blocks": (1,) * 4}
    return AutoencoderTiny(**four, num_decoder_blocks=(1,) * 4).eval()


@pytest.mark.parametrize("make", [autoencoder, tiny])
@pytest.mark.parametrize("how", ["whole", "slices", "tiles"])
def test_pieces_are_the_whole(make, how):
    pipe = latent_pipe(make())
    images = lambda **kwargs: pipe([0, 1, 2, 3, 4], generator=seed(), output_type="pt", **kwargs).images
    seen, plain = [], pipe.vae.decode
    whole = images()
    pipe.vae.decode = lambda latents, **kwargs: seen.append(len(latents)) or plain(latents, **kwargs)
    if how == "slices":
        pipe.vae.enable_slicing()
    if how == "tiles" and hasattr(pipe.vae, "enable_tiling"):
        pipe.vae.enable_tiling()
    assert_close(images(decode_batch_size=2), whole)
    assert seen == [2, 2, 1]
    assert_close(images(decode_batch_size=7), whole)
    assert seen == [2, 2, 1, 5]
    assert_close(pipe.decode(torch.ones(3, 4, 8, 8), 1), pipe.decode(torch.ones(3, 4, 8, 8)))


def test_many_images_are_not_decoded_at_once(monkeypatch):
    pipe = latent_pipe(autoencoder())
    seen, plain = [], pipe.vae.decode
    pipe.vae.decode = lambda latents, **kwargs: seen.append(len(latents)) or plain(latents, **kwargs)
    pipe(0, num_images_per_label=9, output_type="pt")
    per_image = 6 * 8 * 8 * 8 * 4  # six maps of eight channels in float32
    monkeypatch.setattr("drifting_diffusers.pipeline.DECODER_MEMORY", 4 * per_image)
    pipe(0, num_images_per_label=9, output_type="pt")
    assert seen == [9, 4, 4, 1]


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_sizes_that_are_none(as_users_see_it, size, error):
    pipe = latent_pipe(autoencoder())
    with pytest.raises(error, match="decode_batch_size must be"):
        pipe(0, decode_batch_size=size)


def test_previews_through_a_small_decoder(tmp_path):
    pipe = latent_pipe(tiny())
    sample = pipe(1, generator=seed(), output_type="latent").images
    want = (pipe.vae.decode(sample).sample / 2 + 0.5).clamp(0, 1)
    assert_close(pipe(1, generator=seed(), output_type="pt").images, want)
    pipe.save_pretrained(tmp_path)
    assert isinstance(DriftingPipeline.from_pretrained(tmp_path).vae, AutoencoderTiny)


def test_previews_are_no_numbers():
    with pytest.raises(ValueError, match=r"got an AutoencoderTiny.*load the pipeline with the AutoencoderKL"):
        PipelineSamples(latent_pipe(tiny()), 2)
    assert PipelineSamples(latent_pipe(autoencoder()), 2).images([0, 1]).shape == (2, 3, 8, 8)


# -- optimize


def test_what_was_done_is_told():
    pipe = latent_pipe(autoencoder())
    exact = pipe([0, 1], generator=seed(), output_type="pt").images
    told = pipe.optimize()
    assert told.done == ["one projection", "fused attention", "channels_last decoder"]
    assert str(told) == repr(told)
    assert len(str(told).splitlines()) == len(told.steps) == 6
    assert "left  compiled generator     not asked for" in str(told)
    assert pipe.transformer.fused_modulation
    convolutions = [m.weight for m in pipe.vae.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    assert_close(pipe([0, 1], generator=seed(), output_type="pt").images, exact)
    assert pipe.optimize() == told


def test_what_cannot_be_done_is_told():
    pipe = DriftingPipeline(coloured())
    told = {step.name: step for step in pipe.optimize("graphs").steps}
    assert "there is no decoder" in told["channels_last decoder"].why
    assert 'take compile="blocks"' in told["compiled generator"].why
    assert not any(step.done for name, step in told.items() if name.startswith(("channels", "compiled")))
    pipe.to(torch.bfloat16)
    assert "16 bits" in pipe.optimize().done
    pipe.transformer.transformer_blocks[0].modulation.register_forward_hook(lambda *_: None)
    assert "remove hooks" in str(pipe.optimize())


def test_no_compiler_no_compiling(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    pipe = DriftingPipeline(coloured())
    assert "no-such-compiler was not found" in str(pipe.optimize("blocks"))
    assert pipe(0, generator=seed(), output_type="pt").images.isfinite().all()


def test_unknown_ways_to_compile(as_users_see_it):
    with pytest.raises(ValueError, match=r"compile must be one of \(None, 'blocks', 'graphs'\), got 'max'"):
        DriftingPipeline(coloured()).optimize("max")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_pipeline_draws_the_same(as_users_see_it, tmp_path):
    pipe = latent_pipe(autoencoder())
    exact = pipe([0, 1, 2], generator=seed(), output_type="pt").images
    told = pipe.optimize("blocks")
    assert {"compiled generator", "compiled decoder"} <= set(told.done)
    assert_close(pipe([0, 1, 2], generator=seed(), output_type="pt", decode_batch_size=2).images, exact, rtol=0, atol=1e-5)
    assert "compiled before" in str(pipe.optimize("blocks"))
    pipe.save_pretrained(tmp_path)
    again = DriftingPipeline.from_pretrained(tmp_path)
    assert_close(again([0, 1, 2], generator=seed(), output_type="pt").images, exact, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_draw_the_same(as_users_see_it):
    pipe = latent_pipe(autoencoder()).to("cuda")
    draws = lambda first, **kwargs: pipe([first, 1, 2, 3], generator=seed(first), output_type="pt", decode_batch_size=2, **kwargs).images
    exact = [draws(i) for i in range(4)]
    assert {"compiled generator", "compiled decoder"} <= set(pipe.optimize("graphs").done)
    for _ in range(3):  # warm up, record, replay
        assert_close([draws(i) for i in range(4)], exact, rtol=0, atol=1e-4)
    latents = [pipe(i, generator=seed(i), output_type="latent").images for i in range(4)]  # kept while the next ones are drawn
    again = [pipe(i, generator=seed(i), output_type="latent").images for i in range(4)]
    assert_close(latents, again)
