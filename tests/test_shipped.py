"""The model that comes with the package: small, whole, found by name, and as good as its card says."""

import json
import re

import pytest
import torch
from datasets import Dataset
from test_readme import ROOT

from drifting_diffusers import DriftingPipeline, shipped_model
from drifting_diffusers.data import LabelledImages
from drifting_diffusers.neighbours import nearest
from drifting_diffusers.shipped import SHIPPED, find_pipeline

CARD = (shipped_model() / "README.md").read_text()


def test_it_is_small_and_has_all_that_belongs_to_it():
    for name in SHIPPED:
        files = {
            str(file.relative_to(shipped_model(name))): file.stat().st_size for file in shipped_model(name).rglob("*") if file.is_file()
        }
        assert {"README.md", "results.json", "samples.png", "curves.png", "model_index.json"} <= files.keys()
        assert sum(files.values()) < 12e6


def test_a_name_stands_for_its_folder_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_pipeline("fashion-mnist") == str(shipped_model("fashion-mnist"))
    assert find_pipeline("user/fashion-mnist") == "user/fashion-mnist"
    (tmp_path / "fashion-mnist").mkdir()
    assert find_pipeline("fashion-mnist") == "fashion-mnist"
    with pytest.raises(ValueError, match="no model 'mnist' comes with the package, only fashion-mnist"):
        shipped_model("mnist")


def test_the_snippet_of_its_card_draws():
    (block,) = re.findall(r"```python\n(.*?)```", CARD, flags=re.DOTALL)
    names: dict = {}
    exec(compile(block, "card", "exec"), names)
    assert [image.size for image in names["images"]] == [(28, 28)] * 2


def test_its_card_says_what_was_measured_and_how():
    results = json.loads((shipped_model() / "results.json").read_text())
    for name, value in results["metrics"].items():
        assert f"| {name} | {value:.4g} | {results['real'][name]:.4g} |" in CARD
    assert results["training"]["command"] in CARD
    assert results["training"]["command"].removeprefix("python ") in (ROOT / "Makefile").read_text()
    assert results["guidance_scale"] == DriftingPipeline.from_pretrained(shipped_model()).config.guidance_scale


def test_its_samples_are_of_their_classes():
    """By the nearest training image in pixels; by five of them it is 0.84 of 1,000 samples, as docs/results/shipped.json says."""
    rows = Dataset.from_parquet(str(ROOT / "examples/data/fashion_mnist/train.parquet"))
    view = LabelledImages(rows, size=(28, 28), channels=1, num_classes=10, image_column="image", label_column="label")
    real, labels = view.gather(list(range(2000)))
    generators = [torch.Generator().manual_seed(i) for i in range(200)]
    drawn = DriftingPipeline.from_pretrained(shipped_model())(
        list(range(10)), guidance_scale=1.0, num_images_per_label=20, generator=generators, output_type="latent"
    ).images
    found = labels[nearest(drawn.flatten(1), real.flatten(1))[1]]
    assert (found == torch.arange(10).repeat_interleave(20)).float().mean() > 0.7
