"""The pipeline: one seed is one image whatever stands beside it, labels are found by name, and what is saved is what is loaded."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from drifting_diffusers.generator import DriftingGenerator
from drifting_diffusers.hub import CARD_MARK, model_card
from drifting_diffusers.pipeline import DriftingPipeline

LABELS = ["cat", "Dog", "tench, Tinca tinca", "crane", "crane"]


def generator(**changes) -> DriftingGenerator:
    torch.manual_seed(0)
    size = {"sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_class_tokens": 2}
    rest = {"in_channels": 3, "num_classes": 5, "num_style_tokens": 3, "style_codebook_size": 4}
    model = DriftingGenerator(**(size | rest | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def autoencoder(**changes) -> AutoencoderKL:
    torch.manual_seed(1)
    one = {"block_out_channels": (8,), "norm_num_groups": 4, "sample_size": 8, "latent_channels": 4}
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), **(one | changes)).eval()


def seed(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


@pytest.fixture
def pipe() -> DriftingPipeline:
    pipe = DriftingPipeline(generator(), labels=LABELS, guidance_scale=1.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: DriftingPipeline, *args, **kwargs) -> Tensor:
    return pipe(*args, output_type="latent", **kwargs).images


# -- seeds


def test_the_first_image_does_not_know_its_neighbours(pipe):
    alone = latents(pipe, 3, generator=seed())
    assert_close(latents(pipe, [3, 0, 1, 2, 4], generator=seed())[:1], alone)
    assert_close(latents(pipe, [3, 1], num_images_per_label=3, generator=seed())[:1], alone)


def test_a_list_of_generators_is_single_runs(pipe):
    batch = latents(pipe, [0, 1, 2], generator=[seed(n) for n in (7, 8, 9)])
    single = [latents(pipe, i, generator=seed(n)) for i, n in enumerate((7, 8, 9))]
    assert_close(batch, torch.cat(single))


def test_one_generator_is_drawn_from_in_turn(pipe):
    rng = seed()
    single = [latents(pipe, i, generator=rng) for i in (0, 1, 2)]
    assert_close(latents(pipe, [0, 1, 2], generator=seed()), torch.cat(single))


def test_noise_comes_before_style_and_in_float32(pipe):
    rng = seed()
    noise = torch.randn(1, 3, 8, 8, generator=rng)
    style = torch.randint(4, (1, 3), generator=rng)
    with torch.no_grad():
        want = pipe.transformer(noise, torch.tensor([2]), 1.5, style).sample
    assert_close(latents(pipe, 2, generator=seed()), want)
    assert_close(latents(pipe, 2, latents=noise, style_labels=style), want)
    pipe.to(torch.bfloat16)  # the same seed is the same noise in every precision
    assert_close(latents(pipe, 2, generator=seed()), latents(pipe, 2, latents=noise, style_labels=style))


def test_what_is_given_does_not_shift_what_is_drawn(pipe):
    rng = seed()
    noise, style = torch.randn(1, 3, 8, 8, generator=rng), torch.randint(4, (1, 3), generator=rng)
    want = latents(pipe, 0, generator=seed())
    assert_close(latents(pipe, 0, generator=seed(), latents=noise), want)
    assert_close(latents(pipe, 0, generator=seed(), style_labels=style), want)
    assert not torch.allclose(latents(pipe, 0, generator=seed(), latents=noise + 0.1), want, atol=1e-3)


def test_without_a_generator_torch_seeds(pipe):
    torch.manual_seed(5)
    first = latents(pipe, [0, 1])
    second = latents(pipe, [0, 1])
    torch.manual_seed(5)
    assert_close(latents(pipe, [0, 1]), first)
    assert not torch.allclose(second, first, atol=1e-3)


# -- labels


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (2, [2]),
        ("cat", [0]),
        ("dog", [1]),
        ("CAT", [0]),
        (["Dog", 0, "tench"], [1, 0, 2]),
        ("tinca TINCA", [2]),
        ("tench, Tinca tinca", [2]),
        (torch.tensor([4, 3]), [4, 3]),
        (torch.tensor(1), [1]),
        ((0, 1), [0, 1]),
        (range(2), [0, 1]),
        ([np.int64(3)], [3]),
        (np.int64(3), [3]),
        (np.array([3, 1]), [3, 1]),
    ],
    ids=str,
)
def test_labels_are_ids_or_names(pipe, given, ids):
    assert pipe.get_label_ids(given) == ids


def test_an_exact_name_goes_first():
    pipe = DriftingPipeline(generator(num_classes=2), labels=["Turkey", "turkey"])
    assert pipe.get_label_ids(["turkey", "Turkey"]) == [1, 0]
    with pytest.raises(ValueError, match=r"'TURKEY' is the name of the classes \[0, 1\]: give the id"):
        pipe.get_label_ids("TURKEY")


def test_a_whole_name_goes_before_a_part():
    pipe = DriftingPipeline(generator(num_classes=4), labels=["a, b", "b", "maillot, tank suit, X", "Maillot"])
    assert pipe.get_label_ids(["b", "B", "a", "A, B"]) == [1, 1, 0, 0]
    assert pipe.get_label_ids(["Maillot", "maillot", "tank suit", "TANK suit", "x"]) == [3, 3, 2, 2, 2]


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("labels", [{0: "a", 1: "b"}, {1: "b", 0: "a"}, {"1": "b", "0": "a"}, ("a", "b"), ["a", "b"]], ids=str)
def test_labels_come_as_a_list_or_by_id(tmp_path, labels):
    pipe = DriftingPipeline(generator(num_classes=2), labels=labels)
    assert pipe.labels == ["a", "b"]
    pipe.save_pretrained(tmp_path)
    assert DriftingPipeline.from_pretrained(tmp_path).labels == ["a", "b"]


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ("abcde", TypeError, "labels must be a list with a name for every class, got 'abcde'"),
        (5, TypeError, "labels must be a list .* got 5"),
        (["a", "b", 3, "d", "e"], TypeError, r"labels must be names, got 3 for class 2: take str\(\)"),
        (["a", None, "c", "d", "e"], TypeError, "got None for class 1"),
        ({i: i for i in range(5)}, TypeError, "got 0 for class 0"),
        ({1: "a", 2: "b", 3: "c", 4: "d", 5: "e"}, ValueError, r"labels must have the ids 0 to 4, each once, got \[1, 2, 3, 4, 5\]"),
        ({0: "a", "0": "b"}, ValueError, "ids 0 to 1, each once"),
        ({0: "a", 1: "b"}, ValueError, "2 labels for a generator of 5 classes: give one name per class"),
    ],
    ids=str,
)
def test_labels_that_are_no_names(labels, kind, message):
    with pytest.raises(kind, match=message):
        DriftingPipeline(generator(), labels=labels)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tensch", r"no class is named 'tensch'; did you mean 'tench, Tinca tinca'\?"),
        ("xylophone", r"no class is named 'xylophone'; `pipe.labels` lists them all"),
        ("crane", r"'crane' is the name of the classes \[3, 4\]: give the id"),
        (5, "class ids must lie from 0 to 4, got 5"),
        (-1, "class ids must lie from 0 to 4, got -1"),
        ([], "class_labels are empty"),
        (None, "class_labels are needed: ids from 0 to 4 or names"),
    ],
)
def test_labels_that_are_none(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe(given)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    "given", [torch.tensor([1.0]), torch.tensor([[0, 1]]), [b"cat"], [None], [True], torch.tensor([True, False])], ids=str
)
def test_what_is_neither_id_nor_name(pipe, given):
    with pytest.raises(TypeError, match="a class label is an id or a name"):
        pipe(given)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("given", [1.0, np.float32(1), torch.tensor(1.0), b"cat"], ids=str)
def test_labels_of_another_kind(pipe, given):
    with pytest.raises(TypeError, match=r"class_labels must be ids, names, or one of them, got (1.0|b'cat')"):
        pipe(given)


def test_names_need_labels():
    pipe = DriftingPipeline(generator())
    assert pipe.labels == []
    with pytest.raises(ValueError, match="no names for its classes"):
        pipe("cat")
    with pytest.raises(ValueError, match="2 labels for a generator of 5 classes"):
        DriftingPipeline(generator(), labels=["cat", "dog"])


# -- guidance, shapes, output


def test_guidance_is_the_pipelines_own_or_given(pipe):
    own = latents(pipe, [0, 1], generator=seed())
    assert_close(latents(pipe, [0, 1], guidance_scale=1.5, generator=seed()), own)
    assert_close(latents(pipe, [0, 1], guidance_scale=[1.5, 1.5], generator=seed()), own)
    mixed = latents(pipe, [0, 1], guidance_scale=torch.tensor([1.5, 4.0]), num_images_per_label=2, generator=[seed(n) for n in range(4)])
    for scale, rows in ((1.5, slice(2)), (4.0, slice(2, 4))):
        same = latents(pipe, [0, 1], guidance_scale=scale, num_images_per_label=2, generator=[seed(n) for n in range(4)])
        assert_close(mixed[rows], same[rows])
    assert not torch.allclose(mixed[2:], own[1:], atol=1e-3)


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf, [1.0, 0.0]])
def test_guidance_must_be_finite_and_positive(pipe, scale):
    with pytest.raises(ValueError, match="guidance_scale must be finite and above 0"):
        pipe([0, 1], guidance_scale=scale)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("scale", ["1.5", ["1.5", "2"], [[1.0], [1.0, 2.0]]], ids=str)
def test_guidance_is_numbers(pipe, scale):
    with pytest.raises(TypeError, match=r"guidance_scale must be one number or one per label \(2\), got"):
        pipe([0, 1], guidance_scale=scale)
    with pytest.raises(TypeError, match="guidance_scale of a pipeline must be one number, got"):
        DriftingPipeline(generator(), guidance_scale=scale)


def test_guidance_is_one_per_label(pipe):
    with pytest.raises(ValueError, match=r"one number or one per label \(2\), got shape \[3\]"):
        pipe([0, 1], guidance_scale=[1.0, 2.0, 3.0])


def test_a_generator_that_is_not_told_the_scale():
    pipe = DriftingPipeline(generator(guidance_embedding=False))
    assert latents(pipe, [0, 1], guidance_scale=1).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="without guidance_embedding"):
        pipe([0, 1], guidance_scale=2.0)
    with pytest.raises(ValueError, match="without guidance_embedding"):
        DriftingPipeline(generator(guidance_embedding=False), guidance_scale=2.0)


def test_images_of_a_label_stand_side_by_side(pipe):
    rngs = [seed(n) for n in range(6)]
    images = latents(pipe, [4, 0], num_images_per_label=3, generator=rngs)
    assert_close(images[3:4], latents(pipe, 0, generator=seed(3)))


def test_unconditional():
    pipe = DriftingPipeline(generator(num_classes=0, num_style_tokens=0))
    images = latents(pipe, num_images_per_label=3, generator=seed())
    assert images.shape == (3, 3, 8, 8)
    assert_close(images[:1], latents(pipe, generator=seed()))
    with pytest.raises(ValueError, match="knows no classes"):
        pipe(0)
    with pytest.raises(ValueError, match="takes no style_labels"):
        pipe(style_labels=torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"generator": [torch.Generator()]}, "1 generators for 2 images"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents must be \[2, 3, 8, 8\], got \[1, 3, 8, 8\]"),
        ({"latents": torch.zeros(2, 3, 8, 9)}, "latents must be"),
        ({"style_labels": torch.zeros(2, 2, dtype=torch.long)}, r"style_labels must be \[2, 3\], got \[2, 2\]"),
        ({"style_labels": torch.full((2, 3), 4)}, r"style_labels must lie in \[0, 4\), got values from 4 to 4"),
        ({"style_labels": torch.full((2, 3), -1)}, "got values from -1 to -1"),
        ({"style_labels": torch.zeros(2, 3)}, r"style_labels must be integers, got torch.float32: take style_labels.long\(\)"),
        ({"latents": torch.full((2, 3, 8, 8), math.nan)}, "latents must be finite, got 384 NaN or infinite values of 384"),
        ({"latents": torch.zeros(2, 3, 8, 8).index_fill(0, torch.tensor([1]), math.inf)}, "latents must be finite, got 192 NaN"),
        ({"num_images_per_label": 0}, "num_images_per_label must be at least 1, got 0"),
        ({"output_type": "jpeg"}, r"output_type must be one of \('pil', 'np', 'pt', 'latent'\), got 'jpeg'"),
    ],
)
@pytest.mark.usefixtures("as_users_see_it")
def test_inputs_that_do_not_fit(pipe, inputs, message):
    with pytest.raises(ValueError, match=message):
        pipe([0, 1], **inputs)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"generator": 3}, r"a generator must be a torch.Generator, got 3: take torch.Generator\(\).manual_seed\(3\)"),
        ({"generator": [3, 4]}, r"got 3: take torch.Generator\(\).manual_seed\(3\)"),
        ({"num_images_per_label": 2.0}, "num_images_per_label must be an integer of at least 1, got 2.0"),
        ({"num_images_per_label": True}, "num_images_per_label must be an integer of at least 1, got True"),
        ({"latents": "noise"}, "latents must be a tensor or numbers that make one, got 'noise'"),
        ({"style_labels": [[0, 1], [0]]}, "style_labels must be a tensor or numbers that make one"),
    ],
)
def test_inputs_of_another_kind(pipe, inputs, message):
    with pytest.raises(TypeError, match=message):
        pipe([0, 1], **inputs)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_lists_and_arrays_are_tensors_too(pipe, kind):
    noise, style = torch.randn(2, 3, 8, 8, generator=seed()), [[0, 1, 2], [3, 0, 1]]
    want = latents(pipe, [0, 1], latents=noise, style_labels=torch.tensor(style))
    assert_close(latents(pipe, [0, 1], latents=kind(noise.tolist()), style_labels=kind(style)), want)


@pytest.mark.usefixtures("as_users_see_it")
def test_tuples_of_generators_and_counts_of_numpy(pipe):
    want = latents(pipe, 0, num_images_per_label=2, generator=[seed(1), seed(2)])
    assert_close(latents(pipe, 0, num_images_per_label=np.int64(2), generator=(seed(1), seed(2))), want)


def test_every_output_is_the_same_picture(pipe):
    raw = latents(pipe, [0, 1], generator=seed())
    pt, array, pil = (pipe([0, 1], generator=seed(), output_type=kind).images for kind in ("pt", "np", "pil"))
    assert_close(pt, (raw / 2 + 0.5).clamp(0, 1))
    assert_close(torch.from_numpy(array), pt.permute(0, 2, 3, 1))
    assert [image.mode for image in pil] == ["RGB", "RGB"]
    assert_close(torch.from_numpy(np.stack([np.array(image) for image in pil])), torch.from_numpy((array * 255).round().astype("uint8")))
    (images,) = pipe([0, 1], generator=seed(), output_type="pt", return_dict=False)
    assert_close(images, pt)


def test_grey_images():
    pipe = DriftingPipeline(generator(in_channels=1))
    array = pipe([0, 1], generator=seed(), output_type="np").images
    pil = pipe([0, 1], generator=seed()).images
    assert array.shape == (2, 8, 8, 1)
    assert all(isinstance(image, Image.Image) and image.mode == "L" and image.size == (8, 8) for image in pil)
    assert_close(torch.from_numpy(np.array(pil[1])), torch.from_numpy((array[1, ..., 0] * 255).round().astype("uint8")))


def test_latents_are_no_picture():
    pipe = DriftingPipeline(generator(in_channels=4))
    with pytest.raises(ValueError, match=r"samples of 4 channels are no picture: load the pipeline with its vae"):
        pipe(0)


# -- the autoencoder


@pytest.mark.parametrize("shift", [None, 0.1])
def test_samples_go_through_the_autoencoder(shift):
    vae = autoencoder(scaling_factor=0.5, shift_factor=shift)
    pipe = DriftingPipeline(generator(in_channels=4), vae=vae)
    raw = latents(pipe, [0, 1], generator=seed())
    with torch.no_grad():
        decoded = vae.decode(raw / 0.5 + (shift or 0)).sample
    assert_close(pipe([0, 1], generator=seed(), output_type="pt").images, (decoded / 2 + 0.5).clamp(0, 1))
    assert pipe(0).images[0].mode == "RGB"


def test_an_autoencoder_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="the vae decodes 4 channels, the generator makes 3"):
        DriftingPipeline(generator(), vae=autoencoder())


def test_precisions_of_generator_and_autoencoder_may_differ():
    pipe = DriftingPipeline(generator(in_channels=4).to(torch.bfloat16), vae=autoencoder())
    image = pipe(0, generator=seed(), output_type="pt").images
    assert image.dtype == torch.float32
    assert latents(pipe, 0, generator=seed()).dtype == torch.bfloat16


# -- folders


def test_the_index_on_disk_is_pinned(tmp_path):
    """Published files: every pipeline ever pushed is read through these names."""
    pipe = DriftingPipeline(generator(in_channels=4), vae=autoencoder(), labels=LABELS, guidance_scale=1.5)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index.pop("_diffusers_version")
    assert index == {
        "_class_name": ["pipeline", "DriftingPipeline"],
        "guidance_scale": 1.5,
        "labels": {"0": "cat", "1": "Dog", "2": "tench, Tinca tinca", "3": "crane", "4": "crane"},
        "transformer": ["modeling_drifting", "DriftingGenerator"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "model_index.json",
        "pipeline.py",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/modeling_drifting.py",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert (tmp_path / "pipeline.py").read_text() == "from drifting_diffusers import DriftingPipeline as DriftingPipeline\n"
    shim = (tmp_path / "transformer/modeling_drifting.py").read_text()
    assert shim == "from drifting_diffusers import DriftingGenerator as DriftingGenerator\n"
    config = json.loads((tmp_path / "transformer/config.json").read_text())
    config.pop("_diffusers_version")
    assert config == {
        "_class_name": "DriftingGenerator", "activation": "swiglu", "attention_head_dim": 8, "condition_dim": None, "guidance_embedding": True,
        "in_channels": 4, "mlp_ratio": 4.0, "norm_type": "rms_norm", "num_attention_heads": 2, "num_class_tokens": 2, "num_classes": 5, "num_layers": 1,
        "num_style_tokens": 3, "out_channels": None, "patch_size": 2, "qk_norm": True, "rope": True, "sample_size": 8, "style_codebook_size": 4,
    }  # fmt: skip


@pytest.mark.parametrize("vae", [False, True])
@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"max_shard_size": "10KB"}], ids=str)
def test_save_and_load(tmp_path, vae, options):
    pipe = DriftingPipeline(generator(in_channels=4), vae=autoencoder() if vae else None, labels=LABELS, guidance_scale=1.5)
    pipe.save_pretrained(tmp_path, **options)
    back = DriftingPipeline.from_pretrained(tmp_path, variant=options.get("variant"))
    assert back.labels == LABELS
    assert back.config.guidance_scale == 1.5
    assert (back.vae is not None) == vae
    kind = "pt" if vae else "latent"
    assert_close(back("cat", generator=seed(), output_type=kind).images, pipe("cat", generator=seed(), output_type=kind).images)
    again = tmp_path / "again"  # what was loaded can be saved and loaded
    back.save_pretrained(again)
    assert (again / "model_index.json").read_text() == (tmp_path / "model_index.json").read_text()


def test_components_may_be_passed(tmp_path):
    DriftingPipeline(generator(in_channels=4), labels=LABELS).save_pretrained(tmp_path)
    vae, other = autoencoder(), generator(in_channels=4)
    pipe = DriftingPipeline.from_pretrained(tmp_path, vae=vae, transformer=other, guidance_scale=2.0)
    assert pipe.vae is vae
    assert pipe.transformer is other
    assert pipe.config.guidance_scale == 2.0
    pipe.save_pretrained(tmp_path / "with")
    assert DriftingPipeline.from_pretrained(tmp_path / "with", vae=None).vae is None


def test_precision_on_loading(tmp_path):
    DriftingPipeline(generator(in_channels=4), vae=autoencoder()).save_pretrained(tmp_path)
    pipe = DriftingPipeline.from_pretrained(tmp_path, dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)


def test_the_stock_layout_is_read_as_well(tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").unlink()
    (tmp_path / "transformer/modeling_drifting.py").unlink()
    (tmp_path / "model_index.json").write_text(pipe.to_json_string())
    stock = json.loads((tmp_path / "model_index.json").read_text())
    assert stock["_class_name"] == "DriftingPipeline"
    assert stock["transformer"] == ["drifting_diffusers.generator", "DriftingGenerator"]
    assert stock["labels"] == LABELS
    back = DriftingPipeline.from_pretrained(tmp_path)
    assert_close(latents(back, "dog", generator=seed()), latents(pipe, "dog", generator=seed()))


def test_a_compiled_generator_is_saved_as_itself(tmp_path, pipe):
    want = latents(pipe, 0, generator=seed())
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe.save_pretrained(tmp_path)
    assert_close(latents(DriftingPipeline.from_pretrained(tmp_path), 0, generator=seed()), want)


def test_the_index_alone_is_not_pushed(tmp_path, pipe):
    with pytest.raises(ValueError, match="call push_to_hub"):
        pipe.save_config(tmp_path, push_to_hub=True)


# -- offloading


def test_offloading_changes_nothing():
    pipe = DriftingPipeline(generator(in_channels=4), vae=autoencoder())
    want = pipe(0, generator=seed(), output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the hooks are back in place after a call
        assert_close(pipe(0, generator=seed(), output_type="pt").images, want)


# -- the card


def test_a_card_without_results_has_no_numbers(pipe):
    text = model_card(pipe, repo_id="user/fish")
    assert CARD_MARK in text
    assert "library_name: drifting-diffusers" in text
    assert "- diffusers" in text
    assert "model-index" not in text
    assert "Results" not in text


def test_a_card_shows_what_was_measured_and_how(pipe):
    results = {
        "metrics": {"fid": 12.5, "energy": 0.03},
        "dataset": "user/data",
        "license": "mit",
        "seeds": [0, 1, 2],
        "command": "evaluate",
    }
    text = model_card(pipe, results, repo_id="user/fish")
    for part in (
        "| fid | 12.5 |",
        "| energy | 0.03 |",
        "- seeds: [0, 1, 2]",
        "- command: evaluate",
        "license: mit",
        "model-index",
        "- user/data",
    ):
        assert part in text
    assert results["metrics"] == {"fid": 12.5, "energy": 0.03}


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "12"])
def test_a_card_refuses_what_was_not_measured(pipe, value):
    with pytest.raises(ValueError, match="metrics must be finite numbers"):
        model_card(pipe, {"metrics": {"fid": value}})


@pytest.mark.parametrize(
    "build",
    [
        lambda: DriftingPipeline(generator(num_classes=2), labels=['the "best" cat', "dog"]),
        lambda: DriftingPipeline(generator(), labels=LABELS),
        lambda: DriftingPipeline(generator(num_classes=0)),
        lambda: DriftingPipeline(generator(num_classes=1, in_channels=4)),
    ],
)
def test_the_snippet_of_the_card_runs(tmp_path, build):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    snippet = model_card(pipe, repo_id=str(tmp_path)).split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(snippet, scope)
    assert len(scope["images"]) == min(2, pipe.transformer.config.num_classes or 2)


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_images_that_are_nan_are_no_black_pictures(pipe, output_type):
    with torch.no_grad():
        pipe.transformer.class_embedding.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinite \(generator in float32.*bfloat16 or float32"):
        pipe(0, output_type=output_type)
