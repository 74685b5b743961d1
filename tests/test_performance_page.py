"""docs/performance.md says what its results say, with what was missed and what was not measured; the check of a GPU keeps what it finds, whatever fails."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
import performance_page as page  # noqa: E402

PAGE = ROOT / "docs/performance.md"
HOW = {"command": "python it", "date": "2026-01-02", "machine": "a processor", "torch": "2.9"}


def row(name, value, goal, better="lower", **more):
    return {"part": "x", "row": name, "unit": "times", "value": value, "goal": goal, "better": better, "noise": 0.021, "note": ""} | more


def test_the_tables_are_those_of_the_results():
    text, made = PAGE.read_text(), page.tables(page.stored(ROOT / "docs"))
    assert sorted(re.findall(r"<!-- table: (\w+) -->", text)) == sorted(made)
    assert page.with_tables(text, made) == text


def test_the_site_and_make_know_of_it():
    assert "performance.md" in (ROOT / "mkdocs.yml").read_text()
    assert "gpu_check.py" in (ROOT / "Makefile").read_text()


def test_what_was_not_measured_is_said_with_the_command_that_would():
    made = page.tables(dict.fromkeys(page.COMMANDS))
    assert "make gpu-check" in made["gpu"]
    assert "hit" not in made["gpu"].replace("not measured", "")
    assert "| [On a GPU](#on-a-gpu) | 0 | 0 | 6 |" in made["goals"]
    shapes = [line for line in made["field"].splitlines() if line.startswith("| [")]
    assert len(shapes) == 22
    assert "| [256, 64/64/32, 1280]: ours / its matmuls alone | at most 0.95 x |  | not measured |  |" in shapes


def test_a_promised_row_that_a_benchmark_left_out_is_not_measured():
    """drift-models is timed only where it is there."""
    made = page.tables(
        dict.fromkeys(page.COMMANDS) | {"field": HOW | {"rows": [row("[64, 64/64/16, 256]: plain path / ours", 3.3, 3.0, "higher")]}}
    )
    assert "| [64, 64/64/16, 256]: plain path / ours | at least 3 x | 3.3 x | hit | 2.1% |" in made["field"]
    assert "| [64, 64/64/16, 256]: drift-models 0.1.1 / ours | at least 6 x |  | not measured |  |" in made["field"]
    assert "| [The field](#the-field) | 1 | 0 | 21 |" in made["goals"]


def test_hits_misses_and_what_has_no_goal():
    rows = [
        row("LatentCache / one .pt", 21.04, 20, "higher"),
        row("LatentCache / Array3D", 9.96, 10, "higher", note="it is slow"),
        row("aside | of it", 0.5, None, unit="share"),
    ]
    made = page.tables(dict.fromkeys(page.COMMANDS) | {"input": HOW | {"rows": rows, "tables": ["| all | of it |"]}})
    assert "| LatentCache / one .pt | at least 20 x | 21 x | hit | 2.1% |" in made["input"]
    assert "| LatentCache / Array3D | at least 10 x | 9.96 x | **missed** | 2.1% |" in made["input"]
    assert "- LatentCache / Array3D: it is slow." in made["input"]
    assert re.search(r"resuming .* at most 1\.1 x \|  \| not measured", made["input"])
    assert "| [Input](#input) | 1 | 1 | 1 |" in made["goals"]
    assert "`python it`; 2026-01-02, a processor, torch 2.9." in made["input"]
    assert "| aside &#124; of it | 50 % |" in made["input"]
    assert "| all | of it |" in made["input"]


def test_a_gpu_is_told_with_what_failed_on_it():
    rows = [row("B/2, batch 1: eager / CUDA graphs", 3.5, 3.0, "higher", step="inference")]
    steps = [{"name": "field", "state": "took too long", "seconds": 150.2}, {"name": "inference", "state": "passed", "seconds": 20}]
    found = HOW | {"gpu": "a card", "driver": "1.2", "triton": None, "commit": "abc", "rows": rows, "steps": steps, "tables": []}
    made = page.tables(dict.fromkeys(page.COMMANDS) | {"gpu": found})
    assert "| B/2, batch 1: eager / CUDA graphs | at least 3 x | 3.5 x | hit | 2.1% |" in made["gpu"]
    assert "| [On a GPU](#on-a-gpu) | 1 | 0 | 5 |" in made["goals"]
    assert "2026-01-02, a processor, a card, torch 2.9, driver 1.2, commit abc." in made["gpu"]
    assert "**field: took too long** after 150 s." in made["gpu"]
    assert "**inference" not in made["gpu"]


@pytest.mark.parametrize(
    ("command", "share", "whole"),
    [("--preset cifar10", 0.1, None), ("--device cuda --preset ablation", 0.05, 2.8), ("--preset latent-b", None, None)],
)
def test_the_tables_of_a_training_step_become_rows(command, share, whole):
    found = HOW | {
        "command": command,
        "savings": [{"saving": "encoder frozen: a", "time_ratio": 0.66, "noise": 0.98, "megabytes_with": 10, "megabytes_without": 20.4}],
        "step": {
            "parts": [{"part": "field", "share": 0.2}],
            "scale": 4.0,
            "whole_steps": {"seconds": 0.5},
            "whole_steps_again": {"seconds": 0.6},
        },
        "passes": [{"labels_per_microbatch": 0, "time_ratio": 1.0}, {"labels_per_microbatch": 2, "time_ratio": 1.5}],
        "rows": [{"saving": "encoder frozen: a"}],
    }
    frozen, field, step, pieces = page.uniform(found)
    assert (frozen["value"], frozen["goal"], frozen["note"]) == (0.66, 0.7, "10 MB with, 20 MB without")
    assert frozen["noise"] == pytest.approx(0.02)
    assert (field["value"], field["goal"]) == (0.2, share)
    assert (step["value"], step["goal"], step["noise"]) == (2.0, whole, pytest.approx(0.2))
    assert "1 / 4 of its labels" in step["row"]
    assert (pieces["value"], pieces["goal"]) == (1.5, None)


def test_a_mark_that_names_no_table_is_refused():
    with pytest.raises(LookupError, match="asks for table 'more'; there are goals"):
        page.with_tables("<!-- table: more --><!-- end -->", page.tables(dict.fromkeys(page.COMMANDS)))


# -- the check of a GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"gpu-check measures a CUDA device, and torch sees none here: .*\n", done.stderr)
    assert not any(tmp_path.iterdir())


WRITES = """
import json, sys
print("so far so good")
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps({"rows": [{"row": "a", "value": 1}], "tables": ["| t |"]}))
"""


def test_steps_that_fail_or_take_too_long_are_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    overlong = (
        "import subprocess, sys, time; print('begun', flush=True); subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    steps = (
        gpu_check.Step("breaks", ("-c", "print('first'); raise RuntimeError('no such kernel')"), 60),
        gpu_check.Step("hangs", ("-c", overlong), 4),
        gpu_check.Step("says nothing", ("-c", "pass"), 60),
        gpu_check.Step("tests", ("-c", "print('3 passed')"), 60, rows=False),
        gpu_check.Step("works", ("-c", WRITES), 60),
    )
    monkeypatch.setattr(gpu_check, "SMOKE", steps)
    file, started = tmp_path / "new/gpu.json", time.monotonic()
    assert gpu_check.main(["--cpu-smoke", "--json", str(file)]) == 1
    assert time.monotonic() - started < 200  # what hangs was ended with its child
    found = json.loads(file.read_text())
    states = {step["name"]: step["state"] for step in found["steps"]}
    assert states == {
        "breaks": "failed",
        "hangs": "took too long",
        "says nothing": "passed, but it wrote no numbers",
        "tests": "passed",
        "works": "passed",
    }
    tails = {step["name"]: "\n".join(step["tail"]) for step in found["steps"]}
    assert "no such kernel" in tails["breaks"]
    assert tails["hangs"] == "begun"
    assert tails["tests"] == "3 passed"
    assert [(row["row"], row["value"], row["step"]) for row in found["rows"]] == [("a", 1, "works")]
    assert found["tables"] == ["| t |"]
    assert {"command", "date", "machine", "torch", "triton", "driver", "commit", "gpu"} <= found.keys()
    assert "no such kernel" in capsys.readouterr().out
    assert [entry.name for entry in file.parent.iterdir()] == ["gpu.json"]


def test_it_takes_less_than_ten_minutes():
    assert sum(step.limit for step in gpu_check.GPU) < 600
    assert {step.command[0] for step in gpu_check.GPU} == {step.command[0] for step in gpu_check.SMOKE}


@pytest.mark.slow
def test_its_steps_run_at_small_size(tmp_path):
    found = tmp_path / "gpu.json"
    gpu_check.main(["--cpu-smoke", "--json", str(found)])
    steps = json.loads(found.read_text())["steps"]
    assert {step["name"]: step["state"] for step in steps} == {step.name: "passed" for step in gpu_check.SMOKE}, steps
