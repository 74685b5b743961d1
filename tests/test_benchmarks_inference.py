"""The benchmark of drawing still runs, at a size that takes seconds; its numbers mean nothing then."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ["dit", "generator", "decoder", "savings", "pipeline", "steps"]


@pytest.mark.slow
def test_every_part_is_measured(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/inference.py"), "--small", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["command"] == "OMP_NUM_THREADS=1 python benchmarks/inference.py --small"
    assert list(dict.fromkeys(row["part"] for row in found["rows"])) == PARTS
    assert all(math.isfinite(row["value"]) for row in found["rows"])
    assert all(f"### {part}" in done.stdout for part in PARTS)
    assert all(f"| {row['row']} |" in done.stdout for row in found["rows"])
