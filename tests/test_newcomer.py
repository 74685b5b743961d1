"""The way of a newcomer, as the README tells it, in a folder of their own: draw, fine-tune on 200 images, push, load it back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from loopback_hub import LoopbackHub, environment_of
from PIL import Image

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "drifting_diffusers.cli")

pytestmark = [pytest.mark.hub, pytest.mark.slow]


@pytest.fixture
def home(tmp_path):
    """An empty folder but for 200 pictures of two classes, one of which the shipped model knows."""
    rows = Dataset.from_parquet(str(ROOT / "examples/data/fashion_mnist/train.parquet"))
    names = rows.features["label"].names
    for name, label in (("Sneaker", names.index("Sneaker")), ("my shirt", names.index("Shirt"))):
        folder = tmp_path / "my_images" / name
        folder.mkdir(parents=True)
        chosen = [i for i, of in enumerate(rows["label"]) if of == label][:100]
        for i in chosen:
            rows[i]["image"].save(folder / f"{i}.png")
    return tmp_path


def test_from_an_empty_folder_to_a_model_of_ones_own_on_the_hub(home):
    with LoopbackHub() as hub:

        def run(*words: str) -> str:
            done = subprocess.run(
                words, cwd=home, env=environment_of(home, hub.url) | {"MPLBACKEND": "Agg"}, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-4000:]
            return done.stdout

        run(*COMMAND, "sample", "fashion-mnist", "--labels", "all", "--output", "drawn.png")
        with Image.open(home / "drawn.png") as drawn:
            assert drawn.height > 10 * 80  # a row for every class
        run(
            *(sys.executable, str(ROOT / "examples/finetune.py"), "--pretrained_model_name_or_path", "fashion-mnist"),
            *("--dataset_name", "my_images", "--output_dir", "runs/mine", "--max_steps", "4", "--warmup_steps", "1"),
            *("--features", "pixels + statistics", "--push_to_hub", "--hub_model_id", "tester/mine"),
        )
        there = hub.repositories["tester/mine"].files()
        assert {"README.md", "results.json", "samples.png", "model_index.json"} <= there.keys()
        assert json.loads(there["results.json"])["classes"] == ["Sneaker", "my shirt"]
        told = run(*COMMAND, "info", "tester/mine")
        assert "my shirt" in told
        run(*COMMAND, "sample", "tester/mine", "--labels", "my shirt", "--num-images-per-label", "3", "--output", "mine.png")
        run(*COMMAND, "sample", "runs/mine/pipeline", "--labels", "my shirt", "--num-images-per-label", "3", "--output", "local.png")
        with Image.open(home / "mine.png") as pulled, Image.open(home / "local.png") as local:
            assert pulled.tobytes() == local.tobytes()
