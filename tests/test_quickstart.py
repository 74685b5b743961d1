"""The quickstart at a thousandth of its length: it runs, and leaves what it promises."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from drifting_diffusers import DriftingPipeline
from drifting_diffusers.hub import model_card

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    arguments = ["--output_dir", str(folder), "--max_steps", "2", "--judge_epochs", "1", "--encoder_epochs", "1"]
    return load_example("quickstart").main(arguments), folder, arguments


def test_the_results_stand_beside_those_of_real_images(run):
    results, folder, _ = run
    assert json.loads((folder / "results.json").read_text()) == results
    assert set(results["metrics"]) == set(results["real"]) == {"accuracy", "neighbours", "energy", "spread"}
    assert min(results["real"].values()) > 0
    assert results["metrics"]["energy"] > results["real"]["energy"]  # after two steps
    assert {"seeds", "command", "versions", "training_seconds", "steps", "device"} <= set(results)


def test_the_pictures_are_pictures(run):
    for name in ("samples.png", "curves.png"):
        with Image.open(run[1] / name) as image:
            assert min(image.size) > 400
            assert len(image.convert("L").getcolors(256)) > 20


def test_the_pipeline_knows_the_classes(run):
    pipe = DriftingPipeline.from_pretrained(run[1] / "pipeline")
    assert pipe(["sneaker", 8, "T-shirt/top"]).images[0].size == (28, 28)
    card = model_card(pipe, json.loads((run[1] / "pipeline/results.json").read_text()))
    assert f"| accuracy | {run[0]['metrics']['accuracy']:.4g} | {run[0]['real']['accuracy']:.4g} |" in card


@pytest.mark.slow
def test_the_same_command_finds_the_finished_run(run):
    results, _, arguments = run
    again = load_example("quickstart").main(arguments)
    assert again["metrics"] == results["metrics"]


def test_the_embedded_images_are_the_promised_ones():
    from datasets import Dataset

    train, test = (Dataset.from_parquet(str(EXAMPLES / f"data/fashion_mnist/{split}.parquet")) for split in ("train", "test"))
    assert len(train) + len(test) == 10_000
    assert train.features["label"].names[0] == "T-shirt/top"
    for split, each in ((train, 800), (test, 200)):
        labels = split["label"]
        assert [labels.count(k) for k in range(10)] == [each] * 10
    size = sum(p.stat().st_size for p in (EXAMPLES / "data").rglob("*") if p.is_file())
    assert size < 6e6
    assert "MIT" in (EXAMPLES / "data/fashion_mnist/LICENSE").read_text()
