"""The benchmark of a training step runs, at a size that takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/train_step.py"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["cifar10", "ablation"])
def test_it_measures_and_writes(preset, tmp_path):
    file = tmp_path / "step.json"
    command = [sys.executable, str(SCRIPT), "--small", "--preset", preset, "--json", str(file), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(file.read_text())
    assert {"command", "date", "machine", "torch", "rows"} <= report.keys()
    assert len(report["rows"]) == len(report["savings"]) + len(report["step"]["parts"]) + len(report["passes"])
    assert {row["part"] for row in report["step"]["parts"]} >= {
        "draw",
        "generate",
        "encode generated",
        "encode real",
        "field",
        "backward",
        "optimiser",
    }
    assert all(row["time_ratio"] > 0 for row in report["savings"])
    assert "extrapolated" in done.stdout  # two labels are not the preset's
