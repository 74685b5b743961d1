"""What the README says: its blocks run, its numbers have a file, its links exist."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from drifting_diffusers import DriftingGenerator, DriftingPipeline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder as `make quickstart` leaves it, with a tiny untrained model."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names = Dataset.from_parquet(str(ROOT / "examples/data/fashion_mnist/test.parquet")).features["label"].names
    small = {"sample_size": 28, "patch_size": 7, "in_channels": 1, "num_classes": 10, "num_layers": 1, "num_attention_heads": 1}
    DriftingPipeline(DriftingGenerator(**small, guidance_embedding=False), labels=names).save_pretrained("outputs/quickstart/pipeline")
    return tmp_path


def test_there_are_four_blocks():
    assert len(BLOCKS) == 4


# test_release_hub.py runs the one that downloads.
@pytest.mark.parametrize("block", [block for block in BLOCKS if "from_release" not in block], ids=["draw", "train", "field"])
def test_every_block_runs(block, newcomer):
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    if "images[0].save" in block:
        assert (newcomer / "sneaker.png").exists()
    if "trainer" in names:
        assert (newcomer / "outputs/mine/pipeline/model_index.json").exists()
    if "field" in names:
        assert (names["x"].mean(0) - names["data"].mean(0)).abs().max() < 0.3


def test_every_number_of_the_results_has_a_file():
    results = json.loads((ROOT / "docs/results/quickstart.json").read_text())
    rows = re.findall(r"^\| (accuracy|neighbours|energy|spread)[^|]*\| ([\d.]+) \| ([\d.]+) \|", README, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == ["accuracy", "neighbours", "energy", "spread"]
    for name, generated, real in rows:
        assert (generated, real) == (f"{results['metrics'][name]:.3f}", f"{results['real'][name]:.3f}")
    assert f"{results['steps']:,} steps" in README
    assert f"{results['training_seconds'] / 60:.1f} minutes" in README


def test_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
