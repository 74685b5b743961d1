"""What the README says: its blocks run, its numbers have a file, its links exist."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder with the examples in it, and no network."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_three_blocks():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS, ids=["draw", "train", "field"])
def test_every_block_runs(block, newcomer):
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    if "pipe" in names:
        assert len(names["images"]) == 8
        with Image.open(newcomer / "drawn.png") as drawn:
            assert drawn.size == (448, 224)
    if "trainer" in names:
        assert (newcomer / "outputs/mine/pipeline/model_index.json").exists()
    if "field" in names:
        assert (names["x"].mean(0) - names["data"].mean(0)).abs().max() < 0.3


def test_every_number_of_the_results_has_a_file():
    runs = [json.loads((ROOT / f"docs/results/{name}.json").read_text()) for name in ("quickstart", "shipped")]
    rows = re.findall(r"^\| (accuracy|neighbours|energy|spread)[^|]*\|(.*)\|$", README, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["accuracy", "neighbours", "energy", "spread"]
    for name, cells in rows:
        assert [cell.strip() for cell in cells.split("|")] == [f"{run[of][name]:.3f}" for run in runs for of in ("metrics", "real")]
    for run in runs:
        assert f"{run['steps']:,} steps in {run['training_seconds'] / 60:.1f} minutes" in README


def test_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
