"""The benchmark of the field runs, at a size that takes seconds."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "field.py"


@pytest.mark.slow
def test_the_benchmark_of_the_field_runs(tmp_path):
    command = [sys.executable, SCRIPT, "--small", "--rounds", "2", "--json", tmp_path / "field.json"]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = json.loads((tmp_path / "field.json").read_text())
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in found["rows"])
    names = [row["row"] for row in found["rows"]]
    assert len(names) == len(set(names))
    assert sum("plain path / ours" in name for name in names) == 5
    assert sum("whole matrices / ours" in name for name in names) == 14
