"""Triton's compiler needs no GPU: what the interpreter takes may still be no program for one. And what is said where nothing of this can run."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MISSING = importlib.util.find_spec("triton") is None
needs_triton = pytest.mark.skipif(MISSING, reason="Triton is not installed: pip install --no-deps triton==3.9.0")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")


def test_without_triton_or_a_gpu_it_says_so(monkeypatch):
    from drifting_diffusers.fields import triton_plan
    from drifting_diffusers.fields.triton_engine import TritonEngine

    x = torch.zeros(1, 16, 16)
    if not MISSING:
        assert not triton_plan.available("cpu")
        with pytest.raises(ValueError, match="got cpu; take another engine"):
            TritonEngine(x, (x,), 16, 16, None, (0.2,), 0.0, 100.0)
    monkeypatch.setattr(triton_plan.util, "find_spec", lambda name: None)
    assert not triton_plan.available("cuda")
    with pytest.raises(ImportError, match="pip install triton"):
        TritonEngine(x, (x,), 16, 16, None, (0.2,), 0.0, 100.0)


def benchmark(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmarks/field_gpu.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=800)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_the_benchmark_says_that_it_needs_a_gpu(tmp_path):
    done = benchmark("--small", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 2
    assert done.stderr.strip().endswith("here is none.")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@needs_triton
def test_the_benchmark_runs(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    done = benchmark("--small", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert sum("floor" in row["row"] for row in rows) == 2


COMPILED = {
    "triton_kernels": ("whole_measure", "whole_forces", "whole_velocity"),
    "triton_tiles": ("tile_distances", "tile_sums", "tile_forces", "tile_velocity"),
}
SIZES = {"N": 64, "T0": 64, "T1": 16, "T2": 64, "T": 64, "D": 32, "R": 3}


def compiled(function, products: str, keep: bool, capability: int):
    """A kernel as machine code for a GPU of this compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    samples = "*bf16" if products == "bf16" else "*fp32"
    choices = SIZES | {"PRODUCTS": products, "KEEP": keep, "WEIGHTED": keep}

    def kind(name: str) -> str:
        if name in choices:
            return "constexpr"
        if name in ("x", "y", "y0", "y1", "y2"):
            return samples
        if name in ("floor", "self_mask"):
            return "fp32"
        return "i32" if name in ("own", "problems", "first", "count", "targets", "tile0", "tiles") or len(name) <= 2 else "*fp32"

    kinds = {name: kind(name) for name in function.arg_names}
    strides = lambda name: name == "d" or (kinds[name] == "i32" and len(name) == 2)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if kinds[name][0] == "*" or strides(name)}
    constants = {(i,): choices[name] for i, name in enumerate(function.arg_names) if name in choices}
    options = {"num_warps": 8, "enable_fp_fusion": True}
    return triton.compile(ASTSource(function, kinds, constants, aligned), target=GPUTarget("cuda", capability, 32), options=options)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("products", ["ieee", "tf32x3", "bf16"])
@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in COMPILED.items() for name in names])
def test_kernels_compile_for_gpus(module, name, products, tmp_path, monkeypatch):
    from drifting_diffusers.fields.triton_plan import SHARED

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(importlib.import_module(f"drifting_diffusers.fields.{module}"), name)
    for capability, keep in ((80, False), (90, True)):
        found = compiled(function, products, keep, capability)
        assert found.asm["cubin"]
        assert found.metadata.shared <= SHARED
        if products == "bf16" and "sums" not in name:
            assert ("wgmma" if capability == 90 else "mma.sync") in found.asm["ptx"]  # tensor cores
