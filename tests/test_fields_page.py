"""docs/fields.md says what its results say, names every field, and its code runs; the benchmark behind it cannot rot."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from drifting_diffusers.classifiers import SmallClassifier
from drifting_diffusers.fields import FIELDS, read_field

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
PAGE = ROOT / "docs/fields.md"


@pytest.fixture(scope="module")
def found():
    return json.loads((ROOT / "docs/results/fields.json").read_text())


def test_the_tables_are_those_of_the_results(found):
    from field_page import tables, with_tables

    text = PAGE.read_text()
    assert "PENDING" not in text
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(tables(found))
    assert with_tables(text, tables(found)) == text


def test_every_field_has_a_line_and_a_row(found):
    listed = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.M)
    assert sorted(listed) == sorted(FIELDS)
    compared = " ".join(row["field"] for part in ("planes", "images") for row in found[part].values())
    without = {"combined", "velocity_guidance", "symmetrised"}  # equal to others, or about labels and groups
    assert all(re.search(rf"\b{name}\b", compared) for name in set(FIELDS) - without)


def test_every_compared_field_is_one_and_was_run_three_times(found):
    for part in ("planes", "images"):
        for name, row in found[part].items():
            read_field(row["field"])
            assert row["runs"] == found["how"]["seeds"] >= 3 or "error" in row, name


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})


@pytest.mark.slow
def test_the_benchmark_runs_at_small_size(tmp_path, monkeypatch):
    """All parts, with classifiers that have learned nothing; the page it makes has every table filled."""
    import field_rows
    import fields

    monkeypatch.setattr(field_rows, "TEMPERATURES", (0.5,))
    monkeypatch.setattr(fields, "TEMPERATURES", (0.5,))
    out, docs = tmp_path / "out", tmp_path / "docs"
    (out / "images").mkdir(parents=True)
    for name, width in (("judge", 32), ("encoder", 16)):
        torch.manual_seed(0)
        save_file(SmallClassifier(1, 10, width).state_dict(), out / f"images/{name}.safetensors")
    for folder in ("results", "images"):
        (docs / folder).mkdir(parents=True)
    shutil.copy(PAGE, docs / "fields.md")
    small = [
        "--seeds",
        "1",
        "--steps",
        "12",
        "--tuning_steps",
        "2",
        "--image_steps",
        "2",
        "--most",
        "3",
        "--size",
        "64",
        "--targets",
        "gaussians",
    ]
    fields.main(["tune", "planes", "--output_dir", str(out), *small])
    fields.main(["images", "claims", "--output_dir", str(out), "--only", "Sinkhorn", "Nystrom", "annealing", "landmarks", "equal", *small])
    fields.main(["cost", "--output_dir", str(out), "--only", "score", "Frechet", *small])
    fields.main(["page", "--output_dir", str(out), "--docs", str(docs), *small])
    entries = [
        json.loads(line)
        for name in ("tune", "planes", "images", "claims", "cost")
        for line in (out / f"{name}.jsonl").read_text().splitlines()
    ]
    assert [entry for entry in entries if "error" in entry] == []
    assert {p.name for p in (docs / "images").iterdir()} == {"fields_planes.png", "fields_curves.png", "fields_images.png"}
    assert "| equal time" not in (docs / "fields.md").read_text()
    assert re.search(r"\| lookahead, equal time \| \d", (docs / "fields.md").read_text())
