"""Runs what needs a GPU, tests and benchmarks, and writes one JSON: `make gpu-check`, below ten minutes on one CUDA device.

Each step runs in a process of its own with a time limit. One that fails or takes too long is recorded with the last lines that it printed, and the rest goes on; the file
is written anew after every step, so that what was found stays. It exits with 0 if every step passed, 1 if one did not, and 2 where there is no CUDA device.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from performance_page import uniform

ROOT = Path(__file__).resolve().parents[1]
TAIL = 25  # lines that are kept of a step that failed


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: of it.
        command: of Python, what follows the interpreter.
        limit: seconds that it may take.
        rows: whether it writes rows to the file that is given as `--json FILE`.
        code: with which it exits where all is well.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    rows: bool = True
    code: int = 0


TESTS = ("-m", "pytest", "-m", "gpu", "--quiet", "--no-header", "-p", "no:cacheprovider")
STEP = ("benchmarks/train_step.py", "--only", "step", "--device", "cuda", "--mixed-precision", "bf16", "--rounds", "3", "--labels", "4")
DRAWING = ("benchmarks/inference.py", "--device", "cuda", "--only", "pipeline", "generator", "--batches", "1", "16", "--rounds", "3")
GPU = (
    Step("tests", TESTS, 100, rows=False),
    Step("field", ("benchmarks/field_gpu.py",), 170),
    Step("training step", ("benchmarks/train_step.py", "--device", "cuda"), 90),
    Step("training step, ablation", (*STEP, "--preset", "ablation"), 50),
    Step("training step, SOTA-B", (*STEP, "--preset", "latent-b"), 50),
    Step("inference", DRAWING, 130),
)
"""Their limits are 590 seconds together. Steps of the recipes have four labels, which fit, and are scaled up to all. What was found before a limit stays."""
SMOKE = (
    Step("tests", (*TESTS, "tests/test_optimize.py"), 240, rows=False),
    Step(
        "field", ("benchmarks/field_gpu.py", "--small"), 240, rows=False, code=0 if torch.cuda.is_available() else 2
    ),  # it says that it needs a GPU
    Step("training step", ("benchmarks/train_step.py", "--small", "--device", "cpu"), 240),
    Step("inference", ("benchmarks/inference.py", "--small", "--device", "cpu"), 240),
)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/performance/gpu.json", help="the file to write")
    parser.add_argument(
        "--cpu-smoke", action="store_true", help="the same steps at small size without a GPU: whether they run, no numbers of a GPU"
    )
    arguments = parser.parse_args(words)
    if not arguments.cpu_smoke and not torch.cuda.is_available():
        print(
            "gpu-check measures a CUDA device, and torch sees none here: run it where there is one, or try its steps with --cpu-smoke",
            file=sys.stderr,
        )
        return 2
    found = about(arguments.cpu_smoke)
    for step in SMOKE if arguments.cpu_smoke else GPU:
        record, rows, tables = run(step)
        found["steps"].append(record)
        found["rows"] += [row | {"step": step.name} for row in rows]
        found["tables"] += tables
        write(arguments.json, found)
        print(f"{step.name}: {record['state']} after {record['seconds']:.0f} s, {len(rows)} rows", flush=True)
    failed = [step for step in found["steps"] if step["state"] != "passed"]
    for step in failed:
        print(f"\n{step['name']}: {step['state']}; {step['command']}", *step["tail"], sep="\n  ")
    print(
        f"\nwrote {arguments.json}"
        + ("" if arguments.cpu_smoke else "; python benchmarks/performance_page.py puts it into docs/performance.md")
    )
    return 1 if failed else 0


def about(smoke: bool) -> dict[str, Any]:
    """What was measured where."""
    return {
        "command": "python benchmarks/gpu_check.py --cpu-smoke" if smoke else "make gpu-check",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        **({"gpu": None, "driver": None} if smoke else device()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": commit(),
        "steps": [],
        "rows": [],
        "tables": [],
    }


def device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    asked = said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])
    return {
        "gpu": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
        "capability": f"{properties.major}.{properties.minor}",
        "driver": asked,
        "cuda": torch.version.cuda,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the checkout, with a word where files differ from it."""
    head, changed = said(["git", "rev-parse", "HEAD"]), said(["git", "status", "--porcelain", "--untracked-files=no"])
    return f"{head}, with changes" if head and changed else head


def said(command: list[str]) -> str | None:
    """What a command prints; None where it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def run(step: Step) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """What is to be said of a step, its rows and its tables."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "rows.json"), Path(folder, "log")
        command = [sys.executable, *step.command, *(["--json", str(file)] if step.rows else [])]
        started = time.monotonic()
        with log.open("wb") as output:
            code = ended(command, output.fileno(), step.limit)
        seconds = time.monotonic() - started
        state = "took too long" if code is None else "passed" if code == step.code else "failed"
        found, missing = read(file) if step.rows else ({}, None)
        if state == "passed" and missing:
            state = f"passed, but {missing}"
        lines = log.read_text(errors="replace").splitlines()
    record = {"name": step.name, "command": " ".join(("python", *step.command)), "state": state, "exit": code, "seconds": round(seconds, 1)}
    record |= {"limit": step.limit, "tail": [] if state == "passed" and step.rows else lines[-TAIL:]}
    return record, uniform(found), found.get("tables", [])


def ended(command: list[str], output: int, limit: float) -> int | None:
    """The exit code of a command; None if it had to be ended, with all that it had started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=output,
        stderr=output,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read(file: Path) -> tuple[Mapping[str, Any], str | None]:
    """What a benchmark wrote, and what is wrong with it."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return {}, "it wrote no numbers"
    except ValueError as error:
        return {}, f"its numbers cannot be read ({error})"
    return (found, None) if found.get("rows") else (found, "it wrote no rows")


def write(file: Path, found: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(found, indent=1) + "\n")
    beside.replace(file)


if __name__ == "__main__":
    sys.exit(main())
