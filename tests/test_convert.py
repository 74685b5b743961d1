"""From the release's artefacts to our models: every tensor finds its place, and what does not fit is refused by name."""

import json
import resource

import pytest
import torch
from release_files import GENERATOR, packed, to_release, write_artefact, write_metadata
from torch.testing import assert_close

from drifting_diffusers import DriftingPipeline
from drifting_diffusers.artefacts import find_artefact, read_tensors
from drifting_diffusers.encoders import MaskedAutoencoder
from drifting_diffusers.generator import DriftingGenerator
from drifting_diffusers.labels import imagenet_labels
from drifting_diffusers.layouts import AUTOENCODER_CONFIG, SIZES, generator_config, generator_layout, rename

RELEASED = ["release_like", "plain", "pixel_like", "qknorm_layernorm", "bf16", "small_scale_rms", "small_scale_ln"]


def random_generator(**changes) -> DriftingGenerator:
    torch.manual_seed(0)
    model = DriftingGenerator(**generator_config(GENERATOR | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", RELEASED)
def test_recorded_generators_are_converted_whole(shared, name):
    index = json.loads((shared / "fixtures/gen/index.json").read_text())[name]
    _, file = find_artefact(shared / f"fixtures/gen/{name}")
    model = DriftingGenerator.from_release(shared / f"fixtures/gen/{name}/params_ema")
    assert sum(p.numel() for p in model.parameters()) == index["n_params"]
    assert not model.training
    back = to_release(model)
    tensors = read_tensors(file, most_bytes=10**8)
    assert back.keys() == tensors.keys()
    for path, tensor in tensors.items():
        assert_close(back[path], tensor, rtol=0, atol=0)


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
    model = random_generator(**changes)
    back = DriftingGenerator.from_release(write_artefact(tmp_path, to_release(model), model_config=GENERATOR | changes))
    assert back.config == model.config
    for name, tensor in model.state_dict().items():
        assert_close(back.state_dict()[name], tensor, rtol=0, atol=0)


def test_the_converted_model_trains_and_is_saved(tmp_path):
    model = DriftingGenerator.from_release(write_artefact(tmp_path / "release", to_release(random_generator())))
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in model.parameters())
    model.save_pretrained(tmp_path / "ours")
    again = DriftingGenerator.from_pretrained(tmp_path / "ours")
    for name, tensor in model.state_dict().items():
        assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_on_request(tmp_path, dtype):
    model = random_generator()
    cast = DriftingGenerator.from_release(write_artefact(tmp_path, to_release(model)), dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert_close(cast.state_dict()[name], tensor.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_a_dtype_that_is_none_for_weights_is_refused(tmp_path, dtype, as_users_see_it):
    for source in (write_artefact(tmp_path, {}), "latent_L_sota"):  # a name before anything is looked for
        with pytest.raises(TypeError, match=r"dtype must be torch.float32, .*got"):
            DriftingGenerator.from_release(source, dtype=dtype)


def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path):
    tensors = to_release(random_generator())
    path = "RMSNorm_0/weight"
    folder = write_artefact(tmp_path, tensors | {path: torch.full_like(tensors[path], 1e6)})
    with pytest.raises(ValueError, match=f"{path} holds values too large for float16: take bfloat16"):
        DriftingGenerator.from_release(folder, dtype=torch.float16)
    assert DriftingGenerator.from_release(folder, dtype=torch.bfloat16).guidance_norm.weight.isfinite().all()


def test_a_file_of_several_types_becomes_a_network_of_one(tmp_path):
    model = random_generator()
    tensors = to_release(model)
    mixed = {path: packed(t.double(), "float64") if i % 2 else t for i, (path, t) in enumerate(tensors.items())}
    back = DriftingGenerator.from_release(write_artefact(tmp_path / "mixed", mixed))
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert_close(back.state_dict()[name], tensor, rtol=0, atol=0)
    alike = {path: packed(t.half(), "float16") for path, t in tensors.items()}
    assert DriftingGenerator.from_release(write_artefact(tmp_path / "alike", alike)).dtype == torch.float16
    huge = packed(torch.full((6,), 1e300, dtype=torch.float64), "float64")
    with pytest.raises(ValueError, match="RMSNorm_0/weight holds values too large for float32: take float64"):
        DriftingGenerator.from_release(write_artefact(tmp_path / "huge", tensors | {"RMSNorm_0/weight": huge}))


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match=r"revision 'v1' is of the release's repository, .* is a folder or file: leave it out"):
        DriftingGenerator.from_release(write_artefact(tmp_path, {}), revision="v1")


def test_of_many_mistakes_the_first_are_named(tmp_path):
    config = GENERATOR | {"noise_coords": 1000}
    with pytest.raises(ValueError, match=r"and 1014 more$") as error:
        DriftingGenerator.from_release(write_artefact(tmp_path, {"\x1b[2J": torch.zeros(1)}, model_config=config))
    assert len(str(error.value)) < 3000
    tensors = to_release(random_generator())
    with pytest.raises(ValueError, match=r"model_config: \\x1b\[2Jevil \[1\] has no place$"):
        DriftingGenerator.from_release(write_artefact(tmp_path, tensors | {"\x1b[2Jevil": torch.zeros(1)}))


def test_a_small_file_for_a_huge_network_takes_little_memory(tmp_path):
    """However large: arrays that it has no place for end the reading, and what no released network comes near is not built."""
    large = GENERATOR | {"hidden_size": 4096, "depth": 2}
    with pytest.raises(ValueError, match=r"an array \[1500, 1500\], and model_config asks for none of 2250000 numbers"):
        DriftingGenerator.from_release(write_artefact(tmp_path, {"a": torch.zeros(1500, 1500)}, model_config=large))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"makes 103,\d{3},\d{3},\d{3} weights, more than the 4,000,000,000 that are read"):
        DriftingGenerator.from_release(
            write_metadata(tmp_path, model_config=GENERATOR | {"hidden_size": 2**16, "num_heads": 1, "depth": 3})
        )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_missing_extra_and_misshapen_tensors_are_all_named(tmp_path):
    tensors = to_release(random_generator())
    del tensors["RMSNorm_0/weight"], tensors["noise_embeds_1/embedding"]
    tensors["teacher/kernel"] = torch.zeros(2, 3)
    tensors["LightningDiT_0/pos_embed"] = torch.zeros(1, 9, 8)
    gate = "LightningDiT_0/blocks_0/SwiGLUFFN_0/TorchLinear_0/Dense_0/kernel"
    tensors[gate] = tensors[gate].T
    with pytest.raises(ValueError, match="does not fit its model_config") as error:
        DriftingGenerator.from_release(write_artefact(tmp_path, tensors))
    for part in (
        "RMSNorm_0/weight is missing",
        "noise_embeds_1/embedding is missing",
        "teacher/kernel [2, 3] has no place",
        "LightningDiT_0/pos_embed is [1, 9, 8]",
        f"{gate} is [32, 8]",
    ):
        assert part in str(error.value)
    assert str(error.value).count(";") == 4  # and nothing else


def test_integer_tensors_are_no_weights(tmp_path):
    tensors = to_release(random_generator())
    path = "RMSNorm_0/weight"
    with pytest.raises(ValueError, match=f"{path} is torch.int32"):
        rename(generator_layout(random_generator().config), tensors | {path: tensors[path].int()}, random_generator().state_dict())


def test_of_half_a_shared_matrix_nothing_is_said_twice(tmp_path):
    """Two of the release's tensors are one of ours: the one that is there cannot be placed without the other, which is the one to name."""
    tensors = to_release(random_generator())
    missing = "LightningDiT_0/blocks_0/SwiGLUFFN_0/TorchLinear_1/Dense_0/kernel"
    del tensors[missing]
    with pytest.raises(ValueError, match=f"model_config: {missing} is missing$"):
        DriftingGenerator.from_release(write_artefact(tmp_path, tensors))


def test_what_is_no_generator_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'holds a "mae", not a "gen": take MaskedAutoencoder.from_release'):
        DriftingGenerator.from_release(write_artefact(tmp_path, {}, kind="mae"))
    with pytest.raises(ValueError, match=r'holds a "head", only "gen" and "mae"'):
        DriftingGenerator.from_release(write_artefact(tmp_path, {}, kind="head"))
    for kind in (["gen"], {"gen": 1}, 7, None):
        with pytest.raises(ValueError, match=r'artefact holds a .*only "gen" and "mae"'):
            DriftingGenerator.from_release(write_artefact(tmp_path, {}, kind=kind))
    with pytest.raises(ValueError, match=r'mae_latent_640 holds a "mae", not a "gen"; those are latent_L_sota, .*ablation'):
        DriftingGenerator.from_release("mae_latent_640")
    with pytest.raises(FileNotFoundError, match=r"latent_l_sota is neither a released artefact \(latent_L_sota, .*\) nor a folder"):
        DriftingGenerator.from_release("latent_l_sota")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, r"missing \[\], unknown \['layers'\]"),
        ({"depth": 10**9}, "depth of the model_config must be an integer from 0 to 1000"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"hidden_size": "768"}, "hidden_size .*'?768"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": [1, 2]}, "num_heads"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio"),
        ({"use_rope": 1}, "use_rope of the model_config must be true or false"),
        ({"hidden_size": 10, "num_heads": 3}, "hidden_size"),
    ],
    ids=str,
)
def test_a_model_config_that_is_none_is_refused_before_a_network_is_built(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        DriftingGenerator.from_release(write_artefact(tmp_path, {}, model_config=GENERATOR | changes))
    config = {key: value for key, value in GENERATOR.items() if key != "depth"}
    with pytest.raises(ValueError, match=r"missing \['depth'\], unknown \[\]"):
        DriftingGenerator.from_release(write_artefact(tmp_path, {}, model_config=config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [100000, 1, 1, 1]}, "layers of the model_config must be 4 integers from 1 to 200"),
        ({"layers": [1, 1, 1, 1.0]}, "layers of the model_config must be 4 integers"),
        ({"layers": [1, 1, 1, True]}, "layers of the model_config must be 4 integers"),
        ({"layers": [1, 1, 1]}, "layers of the model_config must be 4 integers"),
        ({"layers": "1111"}, "layers of the model_config must be 4 integers"),
        ({"base_channels": 32 * 10**15}, "base_channels of the model_config must be an integer from 1 to 16384"),
        ({"base_channels": 32.0}, "base_channels of the model_config must be an integer"),
        ({"base_channels": 48}, "base_channels must be a multiple of 32"),
        ({"base_channels": 2**14}, "weights, more than the 4,000,000,000 that are read"),
        ({"num_classes": 10**18}, "num_classes of the model_config must be an integer"),
        ({"num_classes": None}, "num_classes of the model_config must be an integer"),
        ({"input_patch_size": 10**12}, "input_patch_size of the model_config must be an integer"),
        ({"patch_size": 0}, "patch_size of the model_config must be an integer"),
        ({"use_bf16": "bogus"}, "use_bf16 of the model_config must be true or false, got 'bogus'"),
        ({"dropout_prob": "x"}, "dropout_prob of the model_config must be a number from 0 to 1"),
    ],
    ids=str,
)
def test_a_model_config_that_is_no_encoders_is_refused_too(tmp_path, changes, message):
    config = {"base_channels": 32, "patch_size": 2, "dropout_prob": 0.0, "layers": [1, 1, 1, 1], "in_channels": 4, "use_bf16": False,
              "input_patch_size": 1}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoder.from_release(write_artefact(tmp_path, {}, kind="mae", model_config=config | changes))


def test_no_size_in_its_range_is_too_large_to_be_counted(tmp_path):
    """Every argument at its most at once: a network of shapes that is weighed, and refused."""
    most = {key: True if kind is bool else most for key, (kind, _, most) in SIZES.items()} | {"depth": 1}
    config = {key: most[key] for key in GENERATOR}
    with pytest.raises(ValueError, match="weights, more than"):
        DriftingGenerator.from_release(write_artefact(tmp_path, {}, model_config=config))
    config = {key: most[key] for key in AUTOENCODER_CONFIG} | {"layers": [1, 1, 1, 1]}
    with pytest.raises(ValueError, match="weights, more than"):
        MaskedAutoencoder.from_release(write_artefact(tmp_path, {}, kind="mae", model_config=config))


# -- the pipeline


def test_a_pipeline_of_a_folder(tmp_path):
    config = GENERATOR | {"out_channels": 2, "num_classes": 1000}
    folder = write_artefact(tmp_path, to_release(random_generator(**config)), model_config=config)
    pipe = DriftingPipeline.from_release(folder)  # no latents of 4 channels: no decoder is fetched
    assert (pipe.vae, pipe.config.guidance_scale, pipe.labels) == (None, 1.0, list(imagenet_labels()))
    assert (pipe.labels[88], pipe.get_label_ids(["macaw", "alp", 3])) == ("macaw", [88, 970, 3])
    pipe = DriftingPipeline.from_release(folder, guidance_scale=1.5, labels=[str(i) for i in range(1000)], dtype=torch.bfloat16)
    assert (pipe.transformer.dtype, pipe.config.guidance_scale, pipe.labels[7]) == (torch.bfloat16, 1.5, "7")
    assert pipe("7", output_type="latent").images.shape == (1, 2, 4, 4)


def test_labels_are_for_generators_of_imagenet_only(tmp_path):
    pipe = DriftingPipeline.from_release(write_artefact(tmp_path, to_release(random_generator())))
    assert pipe.labels == []


def test_a_decoder_is_taken_as_given(tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",),
                        up_block_types=("UpDecoderBlock2D",))  # fmt: skip
    assert vae.config.scaling_factor == 0.18215
    config = GENERATOR | {"in_channels": 4, "out_channels": 4}
    folder = write_artefact(tmp_path / "release", to_release(random_generator(**config)), model_config=config)
    assert DriftingPipeline.from_release(folder, vae=None).vae is None
    vae.save_pretrained(tmp_path / "vae")
    for given in (vae, str(tmp_path / "vae")):
        pipe = DriftingPipeline.from_release(folder, vae=given)
        latents = pipe([1], generator=torch.Generator().manual_seed(0), output_type="latent").images
        images = pipe([1], generator=torch.Generator().manual_seed(0), output_type="pt").images
        assert_close(images, (vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("vae", [False, 7, ""])
def test_what_is_no_decoder_is_refused(vae, as_users_see_it):
    with pytest.raises(TypeError, match=f"vae must be a model, the name of a folder or repository, or None .* got {vae!r}"):
        DriftingPipeline.from_release("latent_L_sota", vae=vae)


def test_imagenet_labels(shared):
    from datasets import load_dataset

    names = load_dataset("parquet", data_files=str(shared / "data/imagenet_samples/train.parquet"), split="train").features["label"].names
    assert list(imagenet_labels()) == names
    assert len(set(imagenet_labels())) == 1000
