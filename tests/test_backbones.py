"""Feature maps of vision backbones: tiny real models, each compared with its own outputs taken apart by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ConvNextV2Model,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from drifting_diffusers import DriftingObjective
from drifting_diffusers.backbones import IMAGENET_MEAN, IMAGENET_STD, BackboneFeatures, ConvNextV2Features, standardised
from drifting_diffusers.features import FeatureMap

IMAGENET = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
DINO = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
VIT = DINO | {"intermediate_size": 24}
CONV = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1]}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
MODELS = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**DINO)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)),
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT, num_register_tokens=2)),
    "vit": lambda: ViTModel(ViTConfig(**VIT)),
    "vit_mae": lambda: ViTMAEModel(ViTMAEConfig(**VIT)),
    "siglip_vision": lambda: SiglipVisionModel(SiglipVisionConfig(**VIT)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VIT)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(**CONV, image_size=64)),
    "convnextv2": lambda: ConvNextV2Model(ConvNextV2Config(**CONV, image_size=64)),
    "dinov3_convnext": lambda: DINOv3ConvNextModel(DINOv3ConvNextConfig(**CONV, image_size=64)),
    "resnet": lambda: ResNetModel(ResNetConfig(**CONV, embedding_size=8, layer_type="basic")),
}
FRONT = {"dinov2": 1, "dinov2_with_registers": 4, "dinov3_vit": 3, "vit": 1, "vit_mae": 1, "siglip_vision": 0, "siglip": 0}  # tokens
TRANSFORMERS, CONVNETS = tuple(FRONT), ("convnext", "convnextv2", "dinov3_convnext", "resnet")
every_family = pytest.mark.parametrize("family", MODELS)


def tiny(family):
    """A model whose every weight counts: some start at 0, or at 1e-6, as class tokens and layer scales do."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = MODELS[family]()
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def features(family, **options):
    default_size = {"size": 64} if family == "resnet" else {}
    return BackboneFeatures(tiny(family), **(IMAGENET | default_size | options))


def images(n=2, c=3, h=32, w=32, seed=0):
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def total(found):
    """A smooth number in which every feature has its say."""
    return sum((values.double() * torch.linspace(-1, 1, values.numel()).reshape(values.shape)).sum() for values in found.values())


@every_family
def test_names_and_shapes(family):
    feature_map = features(family)
    found = feature_map(images())
    assert isinstance(feature_map, FeatureMap)
    assert all(values.dtype == torch.float32 and values.isfinite().all() for values in found.values())
    sides = (4, 4, 4, 4) if family in TRANSFORMERS else (16, 8, 4, 2)
    expected = {}
    for index, side in enumerate(sides, start=1):
        channels = 16 if family in TRANSFORMERS else CONV["hidden_sizes"][index - 1]
        expected |= {f"layer{index}": (2, side**2, channels)}
        expected |= {f"layer{index}_{kind}": (2, 1, channels) for kind in ("mean", "std")}
        for window in (2, 4):
            if side % window == 0:
                expected |= {f"layer{index}_{kind}_{window}": (2, (side // window) ** 2, channels) for kind in ("mean", "std")}
        if FRONT.get(family):
            expected[f"layer{index}_class"] = (2, 1, 16)
    if family != "vit_mae":
        expected["pooled"] = (2, 1, channels)
    assert {name: tuple(values.shape) for name, values in found.items()} == expected


def outputs_by_hand(family, x):
    """A model's own output for images of the size that it sees."""
    model, options = tiny(family).eval(), {}
    if family in ("vit", "vit_mae", "siglip", "siglip_vision") and x.shape[2:] != (32, 32):
        options["interpolate_pos_encoding"] = True
    if family == "vit_mae":
        model.config.mask_ratio = 0.0
        options["noise"] = torch.arange(x.shape[2] * x.shape[3] / 64).repeat(len(x), 1)
    seen = (x * 0.5 + 0.5 - torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1)) / torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
    return getattr(model, "vision_model", model)(seen, output_hidden_states=True, **options)


def places_by_hand(family, state, size):
    """A hidden state as [n, rows, columns, c], token by token."""
    if family in CONVNETS:
        return state.permute(0, 2, 3, 1)
    rows, columns = size[0] // 8, size[1] // 8
    assert state.shape[1] == FRONT[family] + rows * columns
    return torch.stack([torch.stack([state[:, FRONT[family] + r * columns + c] for c in range(columns)], 1) for r in range(rows)], 1)


@every_family
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (32, 64)])
def test_features_are_the_models_own_hidden_states(family, size):
    """At the size of pretraining, and at others, where positions are interpolated; unequal sides tell rows from columns."""
    x = images(h=size[0], w=size[1])
    found, outputs = features(family, size=size, layers=(0, 2, -1))(x), outputs_by_hand(family, x)
    assert len(outputs.hidden_states) == 5
    for index in (0, 2, 4):
        state = outputs.hidden_states[index]
        places = places_by_hand(family, state, size)
        assert_close(found[f"layer{index}"], places.flatten(1, 2))
        assert_close(found[f"layer{index}_mean"][:, 0], places.mean((1, 2)))
        assert_close(found[f"layer{index}_std"][:, 0], (places.flatten(1, 2).var(1, correction=0) + 1e-6).sqrt())
        if places.shape[1] % 2 == 0:
            assert_close(found[f"layer{index}_mean_2"][:, 0], places[:, :2, :2].mean((1, 2)))
        if FRONT.get(family) and index:
            assert_close(found[f"layer{index}_class"][:, 0], state[:, 0])
    assert "layer0_class" not in found
    if family != "vit_mae":
        assert_close(found["pooled"][:, 0], outputs.pooler_output.flatten(1))


@pytest.mark.parametrize("family", [*TRANSFORMERS, "convnext", "convnextv2"])
def test_a_patch_of_the_image_is_its_own_location(family):
    """The state that enters the first layer has seen one patch per place: what changes in one patch changes there and nowhere else."""
    patch, side = (8, 32) if family in TRANSFORMERS else (4, 64)
    feature_map = features(family, layers=(0,), size=side)
    before, row, column = images(1, h=side, w=side), 2, 1
    after = before.clone()
    after[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] *= -1
    moved = (feature_map(before)["layer0"] - feature_map(after)["layer0"]).abs().amax(2)[0]
    assert moved.nonzero().flatten().tolist() == [row * (side // patch) + column]


def test_a_masked_autoencoder_sees_every_patch_in_order():
    """With the same weights it is a ViT, which neither masks nor shuffles."""
    masked = tiny("vit_mae")
    assert masked.config.mask_ratio == 0.75
    plain = ViTModel(ViTConfig(**VIT, layer_norm_eps=masked.config.layer_norm_eps), add_pooling_layer=False)
    plain.load_state_dict(masked.state_dict())
    x = images(3, h=48, w=32)
    for size in (32, (32, 64)):
        found, again, expected = (BackboneFeatures(model, size=size, **IMAGENET)(x) for model in (masked, masked, plain))
        for name in expected:
            assert_close(found[name], expected[name])
            assert_close(found[name], again[name], atol=0, rtol=0)
        assert found.keys() == expected.keys()


@every_family
def test_every_image_by_itself(family):
    feature_map, x = features(family).double(), images(3, h=40, w=40).double()
    whole, ones = feature_map(x), [feature_map(x[i : i + 1]) for i in range(3)]
    for name in whole:
        assert_close(whole[name], torch.cat([one[name] for one in ones]))


@every_family
@pytest.mark.parametrize("standardise", [False, True])
def test_gradients_reach_the_images_alone(family, standardise):
    feature_map = features(family, standardise=standardise)
    for x in (images(), torch.zeros(1, 3, 32, 32), -torch.ones(1, 1, 32, 32)):
        x.requires_grad_()
        total(feature_map(x)).backward()
        assert x.grad.isfinite().all()
        assert x.grad.abs().amax() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in feature_map.parameters())


@pytest.mark.parametrize("family", ["vit", "convnextv2"])
def test_gradients_agree_with_finite_differences(family):
    """Along a direction; features are float32 though all before them is float64, which is what limits the agreement."""
    feature_map = features(family, standardise=True).double()
    x, direction = images(1, h=80, w=80).double(), images(1, h=80, w=80, seed=1).double()
    x.requires_grad_()
    total(feature_map(x)).backward()
    slope = (total(feature_map(x.detach() + 1e-3 * direction)) - total(feature_map(x.detach() - 1e-3 * direction))) / 2e-3
    assert_close((x.grad * direction).sum(), slope, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_nothing_moves_when_a_parent_is_trained(family):
    feature_map = features(family)
    weights = {name: tensor.clone() for name, tensor in feature_map.state_dict().items()}
    assert not feature_map.training
    nn.ModuleList([feature_map]).train()
    assert not any(module.training for module in feature_map.modules())
    feature_map(images())
    for name, tensor in feature_map.state_dict().items():  # running means of a ResNet among them
        assert_close(tensor, weights[name], atol=0, rtol=0)


@pytest.mark.parametrize("family", ["dinov2", "convnext"])
def test_standardised_channels_have_mean_0_and_deviation_1(family):
    raw, found = (features(family, standardise=standardise)(images()) for standardise in (False, True))
    for name in (name for name in found if name.endswith("_class") or name.removeprefix("layer").isdigit()):
        deviation = raw[name].var(2, correction=0, keepdim=True).sqrt()
        assert_close(found[name], (raw[name] - raw[name].mean(2, keepdim=True)) / (deviation + 1e-3), atol=1e-4, rtol=1e-4)
        assert_close(found[name].mean(2), torch.zeros(found[name].shape[:2]), atol=1e-5, rtol=0)
    assert_close(found["pooled"], raw["pooled"])
    assert_close(found["layer4_mean"][:, 0], found["layer4"].mean(1))


def test_standardising_is_done_in_float32():
    places = features("dinov2", standardise=True).to(torch.bfloat16)(images())["layer4"]
    assert_close(places.mean(2), torch.zeros(2, 16), atol=1e-5, rtol=0)


def test_standardising_equal_channels_has_a_gradient():
    x = torch.full((1, 4, 2, 2), 3.0, requires_grad=True)
    standardised(x).square().sum().backward()
    assert_close(standardised(x).detach(), torch.zeros(1, 4, 2, 2))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("size", [(80, 56), (20, 40), (32, 32), (24, 100)])
def test_resize_and_normalisation_are_pillows_and_numpys(size):
    """Pillow's bilinear filter has the same support where it grows and where it shrinks."""
    x, mean, std = images(1, h=size[0], w=size[1]), (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    resized = [np.asarray(Image.fromarray(channel.numpy()).resize((32, 32), Image.Resampling.BILINEAR)) for channel in x[0]]
    expected = [((values + 1) / 2 - m) / s for values, m, s in zip(resized, mean, std, strict=True)]
    seen = features("vit", image_mean=mean, image_std=std).preprocessed(x)
    assert_close(seen, torch.from_numpy(np.stack(expected))[None], atol=1e-5, rtol=1e-5)


def test_grey_images_are_repeated():
    grey = images(c=1, h=40, w=40)
    for name, values in (feature_map := features("dinov2"))(grey).items():
        assert_close(values, feature_map(grey.repeat(1, 3, 1, 1))[name])


@every_family
def test_sixteen_bits_inside_float32_outside(family):
    found, exact = features(family).to(torch.bfloat16)(images(h=40, w=40)), features(family)(images(h=40, w=40))
    for name, values in found.items():
        assert values.dtype == torch.float32
        assert (values - exact[name]).norm() < 0.1 * exact[name].norm(), name
    seen = [features("vit").to(dtype).preprocessed(images()) for dtype in (torch.bfloat16, torch.float32)]
    assert_close(*seen, atol=0, rtol=0)


def test_options_choose():
    found = features("dinov3_vit", layers=(-2,), locations=False, std=False, mean_windows=(4,), std_windows=(2,), pooled=False, prefix="a_")
    assert list(found(images())) == ["a_layer3_mean", "a_layer3_mean_4", "a_layer3_std_2"]
    for count, layers in ((1, (1,)), (3, (1, 2, 3)), (6, (2, 3, 5, 6)), (12, (3, 6, 9, 12))):
        model = ViTModel(ViTConfig(**VIT | {"num_hidden_layers": count}))
        assert BackboneFeatures(model, **IMAGENET).layers == layers


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("vit", {"layers": (5,)}, r"indices in -5\.\.\.4 .*got \[5\]"),
        ("resnet", {"layers": (-6,)}, r"indices in -5\.\.\.4 .*got \[-6\]"),
        ("vit", {"layers": (4, -1)}, r"different indices .*got \[4, -1\]"),
        ("vit", {"layers": ()}, r"at least one, got \[\]"),
        ("dinov2", {"size": (32, 30)}, r"size \(32, 30\) .*\(8, 8\) pixels .*size=\(32, 32\)"),
        ("convnext", {"size": 40}, r"size \(40, 40\) .*\(32, 32\) pixels .*size=\(32, 32\)"),
        ("dinov3_convnext", {"size": 8}, r"\(32, 32\) pixels .*size=\(32, 32\)"),
        ("vit", {"size": 0}, r"size=\(8, 8\)"),
        ("resnet", {"size": None}, r"no image_size; give size"),
        ("vit", {"image_mean": (0.5,)}, r"image_mean must be 3 numbers.*got \(0.5,\)"),
        ("vit", {"image_std": (0.5, 0.5, 0.0)}, r"image_std must be 3 positive numbers.*got \(0.5, 0.5, 0.0\)"),
    ],
)
def test_bad_options_are_refused(family, options, message, as_users_see_it):
    with pytest.raises(ValueError, match=message):
        features(family, **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 2, 32, 32), r"c in \(1, 3\), got \[1, 2, 32, 32\]; decode latents"),
        (torch.zeros(3, 32, 32), r"\[n, c, h, w\].*got \[3, 32, 32\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"got torch.uint8; convert bytes by"),
    ],
)
def test_bad_images_are_refused(x, message, as_users_see_it):
    with pytest.raises(ValueError, match=message):
        features("vit")(x)


def test_what_cannot_be_done_is_refused(as_users_see_it):
    off = {"locations": False, "mean": False, "std": False, "mean_windows": (), "std_windows": (), "pooled": False}
    with pytest.raises(ValueError, match=r"locations=False.* leave no feature"):
        features("vit", **off)(images())
    with pytest.raises(ValueError, match=r"cannot read the hidden states of a BertModel; take one of convnext, "):
        BackboneFeatures(BertModel(BertConfig(**TEXT)), **IMAGENET)
    oblong = ViTModel(ViTConfig(**VIT | {"image_size": (32, 64)}))
    assert BackboneFeatures(oblong, **IMAGENET)(images())["layer4"].shape == (2, 32, 16)
    with pytest.raises(ValueError, match=r"positions of \(32, 64\) pixels cannot be interpolated to size \(64, 64\); give size=\(32, 64\)"):
        BackboneFeatures(oblong, size=64, **IMAGENET)
    with pytest.raises(ValueError, match=r"ConvNextV2Model of four stages, got ConvNextModel; BackboneFeatures takes"):
        ConvNextV2Features(tiny("convnext"))


HALVES = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def saved(folder, model, **preprocessor):
    model.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"size": {"shortest_edge": 48}, "do_center_crop": True, "crop_size": {"height": 24, "width": 40}}, (24, 40)),
        ({"size": {"shortest_edge": 48}, "do_center_crop": False, "crop_size": {"height": 24, "width": 40}}, (48, 48)),
        ({"size": {"height": 40, "width": 48}}, (40, 48)),
        ({"size": 64}, (64, 64)),
    ],
)
def test_from_pretrained_reads_the_preprocessor(size, expected, tmp_path):
    model = tiny("dinov2")
    loaded = BackboneFeatures.from_pretrained(saved(tmp_path, model, **HALVES, **size), layers=(1, 3), local_files_only=True)
    assert (loaded.size, loaded.image_mean, loaded.image_std) == (expected, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    by_hand = BackboneFeatures(model, size=expected, layers=(1, 3), **HALVES)(images())
    for name, values in loaded(images()).items():
        assert_close(values, by_hand[name])


@every_family
def test_from_pretrained_gives_back_every_family(family, tmp_path):
    folder = saved(tmp_path, tiny(family), size=64, **HALVES)
    found, by_hand = BackboneFeatures.from_pretrained(str(folder))(images()), features(family, size=64, **HALVES)(images())
    assert found.keys() == by_hand.keys()
    for name, values in found.items():
        assert_close(values, by_hand[name])


def test_from_pretrained_takes_options_before_the_preprocessor(tmp_path):
    loaded = BackboneFeatures.from_pretrained(saved(tmp_path, tiny("vit"), size=32, **HALVES), size=48, dtype=torch.bfloat16, **IMAGENET)
    assert (loaded.size, loaded.image_mean, loaded.model.dtype) == ((48, 48), IMAGENET_MEAN, torch.bfloat16)


def test_without_normalisation_nothing_is_normalised(tmp_path):
    loaded = BackboneFeatures.from_pretrained(saved(tmp_path, tiny("vit"), size=32, do_normalize=False, **HALVES))
    assert_close(loaded.preprocessed(images()), (images() + 1) / 2)


@pytest.mark.parametrize(
    ("preprocessor", "missing"),
    [
        ({}, "image_mean, image_std, size"),
        ({"size": 32}, "image_mean, image_std"),
        (HALVES, "size"),
        (HALVES | {"size": {"longest_edge": 32}}, "size"),
        (HALVES | {"size": 32, "rescale_factor": 1 / 127.5}, "image_mean, image_std"),
        (HALVES | {"size": 32, "do_rescale": False}, "image_mean, image_std"),
    ],
)
def test_what_no_preprocessor_says_is_not_guessed(preprocessor, missing, tmp_path, as_users_see_it):
    folder = saved(tmp_path, tiny("vit"), **preprocessor)
    with pytest.raises(ValueError, match=rf"says {missing}; take what .*image_mean=\(0.485"):
        BackboneFeatures.from_pretrained(folder)
    given = {"size": 32} | IMAGENET
    assert BackboneFeatures.from_pretrained(folder, **{name: given[name] for name in missing.split(", ")}).size == (32, 32)


def test_a_pooler_without_weights_is_left_out(tmp_path):
    """A classifier's checkpoint has none, and loading it draws one at random."""
    folder = saved(tmp_path, ViTForImageClassification(ViTConfig(**VIT)), size=32, **HALVES)
    assert "pooled" not in BackboneFeatures.from_pretrained(folder)(images())


def test_missing_weights_are_refused(tmp_path, as_users_see_it):
    folder = saved(tmp_path, tiny("vit"), size=32, **HALVES)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "patch_embeddings" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for \['embeddings.patch_embeddings.*'\] of ViTModel"):
        BackboneFeatures.from_pretrained(folder)


def test_what_concerns_the_hub_is_passed_on(tmp_path, monkeypatch):
    seen, load = [], AutoModel.from_pretrained
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda name, **options: seen.append(options) or load(name, **options))
    hub = {"revision": "main", "token": "secret", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    BackboneFeatures.from_pretrained(saved(tmp_path, tiny("vit"), size=32, **HALVES), **hub)
    ConvNextV2Features.from_pretrained(saved(tmp_path / "second", tiny("convnextv2")), size=64, **hub)
    assert all(options.items() >= hub.items() for options in seen)
    assert len(seen) == 2


def test_the_pixel_recipe(tmp_path):
    """Stage by stage, the model taken apart; the preprocessor of the repository has no say."""
    model = tiny("convnextv2").eval()
    feature_map = ConvNextV2Features.from_pretrained(saved(tmp_path, model, size=32, **HALVES), prefix="c_")
    assert feature_map.size == (224, 224)
    x = images(1, h=64, w=64)
    found = feature_map(x)
    seen = nn.functional.interpolate(x, (224, 224), mode="bilinear")
    state = model.embeddings(
        (seen * 0.5 + 0.5 - torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1)) / torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
    )
    expected = {}
    for k, stage in enumerate(model.encoder.stages, start=1):
        state = stage(state)
        places = state.flatten(2).mT
        places = (places - places.mean(2, keepdim=True)) / (places.std(2, correction=0, keepdim=True) + 1e-3)
        expected |= {f"c_layer{k}": places} if k > 1 else {}
        expected |= {f"c_layer{k}_mean": places.mean(1, keepdim=True)}
        expected |= {f"c_layer{k}_std": (places.var(1, correction=0, keepdim=True) + 1e-6).sqrt()}
    expected["c_pooled"] = model.layernorm(state.mean((2, 3)))[:, None]
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert_close(values, expected[name], atol=1e-4, rtol=1e-4)


def test_the_objective_trains_on_it():
    objective = DriftingObjective([ConvNextV2Features(tiny("convnextv2"), size=64), features("dinov2", prefix="dino_")])
    objective.freeze(torch.device("cpu"))
    generated = images(8, h=16, w=16).unflatten(0, (2, 4)).requires_grad_()
    loss, measured = objective(generated, images(8, h=16, w=16, seed=1).unflatten(0, (2, 4)))
    loss.backward()
    assert generated.grad.isfinite().all()
    assert (generated.grad.flatten(2).norm(dim=2) > 0).all()
    assert {"layer1_mean", "layer4", "pooled", "dino_layer1", "dino_pooled"} <= measured.keys()
    assert objective.ignore_constant(images(8)) == []


def test_the_description_holds_every_option():
    choices = [{}, {"layers": (1, 2)}, {"size": 64}, {"image_mean": (0.5,) * 3}, {"image_std": (0.5,) * 3}, {"mean_windows": (2,)}]
    choices += [{"std_windows": ()}, {"standardise": True}, {"prefix": "a"}]
    choices += [{name: False} for name in ("locations", "mean", "std", "pooled")]
    told = [json.dumps(DriftingObjective(features("vit", **options)).describe()) for options in choices]
    assert len(set(told)) == len(told)
    assert json.dumps(DriftingObjective(features("vit")).describe()) == told[0]
    other = features("vit")
    nn.init.ones_(other.model.embeddings.cls_token)
    assert json.dumps(DriftingObjective(other).describe()) != told[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean_windows": (0,)}, r"windows must have sides of at least 1, in integers, got \(0,\)"),
        ({"std_windows": (-2,)}, "windows must have sides of at least 1"),
        ({"std_windows": 2}, "windows must have sides of at least 1"),
        ({"size": "56"}, "size must be an integer, the side in pixels, or two, height and width, got '56'"),
        ({"size": (32, 32, 3)}, r"size must be an integer, .* got \(32, 32, 3\)"),
        ({"size": 32.0}, r"size must be an integer, .* got 32.0"),
        ({"layers": (1.0,)}, r"layers must be a sequence of integers in -5...4, got \(1.0,\); one layer is \(4,\)"),
        ({"layers": 4}, "layers must be a sequence of integers"),
        ({"image_mean": 0.5}, "image_mean must be 3 numbers up to 1, one for each channel of the model, got 0.5"),
        ({"image_mean": (float("nan"),) * 3}, "image_mean must be 3 numbers up to 1"),
        ({"image_mean": (127,) * 3}, r"got \(127, 127, 127\); they are of images in \[0, 1\]: divide what is of bytes by 255"),
        ({"image_std": (0.0, 1.0, 1.0)}, "image_std must be 3 positive numbers up to 1"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("as_users_see_it")
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        features("dinov2", **options)


def test_models_with_a_head_are_refused_with_their_base():
    """Their output has no pooled one, so features would be missing without a word."""
    headed = ConvNextV2ForImageClassification(ConvNextV2Config(**CONV, image_size=64))
    message = "a ConvNextV2ForImageClassification has a head, .* give its model.base_model, a ConvNextV2Model"
    with pytest.raises(ValueError, match=message):
        ConvNextV2Features(headed)
    with pytest.raises(ValueError, match=message):
        BackboneFeatures(headed, **IMAGENET)
    assert "pooled" in ConvNextV2Features(headed.base_model, size=64)(images())
    with pytest.raises(ValueError, match=r"a Dinov2Backbone returns no hidden states as they are; .*AutoModel.from_pretrained"):
        BackboneFeatures(Dinov2Backbone(Dinov2Config(**DINO)), **IMAGENET)
