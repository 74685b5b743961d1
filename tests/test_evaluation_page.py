"""docs/evaluation.md: its tables are those of the recorded runs, and the example that made them runs."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from datasets import Dataset

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/evaluation.md").read_text()


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("meters_example", ROOT / "examples/06_meters.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_tables_have_a_file(example, name):
    results = json.loads((ROOT / f"docs/results/meters_{name}.json").read_text())
    (shown,) = re.findall(rf"<!-- docs/results/meters_{name}.json -->\n(.*?)\n<!-- end -->", PAGE, flags=re.DOTALL)
    assert shown == example.table(results["rows"])
    assert results["dataset"] == name
    assert results["samples"] == 5000
    assert f"{results['images_per_second']} images per second" in PAGE
    assert f"{results['peak_memory_gb']} GB" in PAGE


def test_the_example_runs(example, tmp_path, monkeypatch, capsys):
    for split in ("train", "test"):
        data = Dataset.from_parquet(str(ROOT / f"examples/data/fashion_mnist/{split}.parquet"), cache_dir=str(tmp_path / "cache"))
        (tmp_path / "data").mkdir(exist_ok=True)
        data.shuffle(seed=0).select(range(400)).to_parquet(str(tmp_path / f"data/{split}.parquet"))
    arguments = [
        "06_meters.py",
        "--dataset",
        str(tmp_path / "data"),
        "--output",
        str(tmp_path / "out"),
        "--samples",
        "100",
        "--extractor",
        "pixels",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    example.main()
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    real = rows["new real images"]
    assert rows["the training images themselves"]["memorisation_ratio"] == 0
    assert rows["two images averaged"]["energy"] > real["energy"]
    assert rows["labels mixed up"]["energy_per_class"] > real["energy_per_class"]
    assert rows["every image 10 times"]["coverage"] < real["coverage"]
    assert example.table(rows) in capsys.readouterr().out
