"""The benchmark of reading latents runs, at a size that takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/input.py"


@pytest.mark.slow
def test_it_measures_and_writes(tmp_path):
    file = tmp_path / "input.json"
    command = [sys.executable, str(SCRIPT), "--small", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["command"] == "OMP_NUM_THREADS=1 python benchmarks/input.py --small"
    assert {"date", "machine", "torch", "rows", "tables"} <= found.keys()
    assert len(found["rows"]) == 3 * 2 + 1
    assert all(row["value"] > 0 and row["noise"] >= 0 and row["better"] in ("higher", "lower") for row in found["rows"])
    kinds = ("moments, as stored", "moments, new noise", "one stored sample")
    assert all(any(table.startswith(f"| {kind}: rows/s and core |") for table in found["tables"]) for kind in kinds)
    assert all(table in done.stdout for table in found["tables"])
