"""Features by name: every kind of them, from tiny models on this disk, and names that are none."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch.testing import assert_close
from transformers import ConvNextV2Config, ConvNextV2Model

from drifting_diffusers import MaskedAutoencoder, MultiScaleStatistics, Pixels, Windows, feature_loading
from drifting_diffusers.backbones import BackboneFeatures, ConvNextV2Features
from drifting_diffusers.data import LabelledImages
from drifting_diffusers.feature_loading import load_features
from drifting_diffusers.objective import DriftingObjective


@pytest.fixture(scope="module")
def data():
    """Four grey 32 x 32 images of each of two classes."""
    rng = torch.Generator().manual_seed(0)
    pictures = [PILImage.fromarray((torch.rand(32, 32, generator=rng) * 127 + 120 * (i % 2)).byte().numpy()) for i in range(8)]
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "bright"])})
    rows = Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(8)]}, features=features)
    return LabelledImages(rows, size=(32, 32), channels=3, num_classes=2, image_column="image", label_column="label")


@pytest.fixture
def load(data, tmp_path):
    return lambda names, **changes: load_features(names, **{"data": data, "num_classes": 2, "folder": tmp_path / "kept"} | changes)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    model = MaskedAutoencoder(in_channels=3, base_channels=32, layers_per_stage=(1, 1, 1, 1), input_patch_size=4)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    ConvNextV2Model(ConvNextV2Config(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1])).save_pretrained(folder)
    form = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(form))
    return folder


def test_features_without_weights(load):
    assert [type(found) for found in load("pixels + statistics+windows")] == [Pixels, MultiScaleStatistics, Windows]


def test_a_classifier_is_trained_once_and_kept(load, data, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_loading, "CLASSIFIER_STEPS", 3)
    images = data.gather([0, 1])[0]
    first, other = (load("classifier")[0](images) for _ in range(2))
    assert_close(first, other, rtol=0, atol=0)
    assert len(list((tmp_path / "kept").glob("encoder-*.safetensors"))) == 1
    load("classifier", seed=1)
    assert len(list((tmp_path / "kept").glob("encoder-*.safetensors"))) == 2
    with pytest.raises(ValueError, match="at least 2 classes to tell apart, got 1: take statistics"):
        load("classifier", num_classes=1)


def test_a_folder_of_an_encoder_and_of_a_vision_model(load, data, encoder, backbone):
    found = load(f"pixels + {encoder[0]} + {backbone}")
    assert isinstance(found[1].__self__, MaskedAutoencoder)
    assert isinstance(found[2], BackboneFeatures)
    images = data.gather([0, 1])[0]
    for one in found[1:]:
        objective = DriftingObjective([found[0], one])
        objective.freeze(torch.device("cpu"))
        values = objective.features(images)
        assert {"pixels", "layer1_mean"} <= values.keys()
        assert all(value.dtype == torch.float32 for value in values.values())
    assert_close(found[1](images), encoder[1].eval().activations(images))


def test_weights_are_in_the_dtype_that_is_asked_for(load, encoder):
    (found,) = load(str(encoder[0]), dtype=torch.bfloat16)
    assert found.__self__.dtype == torch.bfloat16


def test_names_of_the_release_and_of_the_recipe_reach_their_loaders(load, monkeypatch, encoder):
    asked = []
    monkeypatch.setattr(MaskedAutoencoder, "from_release", lambda name, **named: asked.append((name, named)) or encoder[1])
    monkeypatch.setattr(ConvNextV2Features, "from_pretrained", lambda **named: asked.append(("convnextv2", named)) or Pixels())
    load("mae_latent_256 + convnextv2", dtype=torch.float16)
    assert asked == [("mae_latent_256", {"dtype": torch.float16}), ("convnextv2", {"dtype": torch.float16})]


@pytest.mark.parametrize("names", ["", "pixels + ", "pixels pixels", "pixels + pixels", "+"])
def test_names_that_are_none_are_refused(names, load):
    with pytest.raises((ValueError, OSError), match=r"features must be|'pixels pixels'"):
        load(names)


@pytest.mark.parametrize("name", ["pixel", "nobody/nothing", "no such folder/at all/here"])
def test_an_unknown_name_is_told_what_there_is(name, load):
    with pytest.raises(
        OSError, match=r"are neither one of pixels, statistics, windows, classifier, convnextv2, .*mae_latent_256"
    ) as caught:
        load(f"statistics + {name}")
    assert repr(name) in str(caught.value)


def test_a_folder_that_holds_no_model_is_named(load, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match="empty"):
        load(str(tmp_path / "empty"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken/config.json cannot be read"):
        load(str(tmp_path / "broken"))
