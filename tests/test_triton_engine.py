"""The drifting field in Triton against float64, stage by stage. On a GPU as they stand (`-m gpu`); elsewhere these same tests run in Triton's interpreter, in
a process of their own, because `TRITON_INTERPRET` must be set before Triton is imported and holds for the whole process.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from triton_reference import Reference, relative, samples, some_masses

from drifting_diffusers.fields import DriftingField

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MISSING = importlib.util.find_spec("triton") is None
PAPER = (0.02, 0.05, 0.2)
TEMPERATURES = (PAPER, (0.3,), (0.07, 0.11))
FIELD_TOLERANCE = {"ieee": 1e-5, "bf16": 1e-4}
"""Relative norms, of the same samples in float64. In bfloat16 storing the samples has cost 4e-3 already."""

on_device = [] if INTERPRETED else [pytest.mark.gpu]
in_process = pytest.mark.skipif(INTERPRETED, reason="this is the process that was started")
needs_triton = pytest.mark.skipif(MISSING, reason="Triton is not installed: pip install --no-deps triton==3.9.0")


# -- the interpreter's process


def interpreter_trouble() -> str:
    """Triton's interpreter before 3.7 takes numbers out of arrays of one entry, which NumPy forbids from 2.4 on; its compiler does not care."""
    versions = [tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy")]
    return "the interpreter of Triton 3.6 needs numpy<2.4" if versions[0] < (3, 7) and versions[1] >= (2, 4) else ""


def interpret(marks: str, timeout: int) -> None:
    """These tests again, interpreted, in a process that knows nothing of the plugins of this one."""
    if trouble := interpreter_trouble():
        pytest.skip(trouble)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-m", marks]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, cwd=Path(__file__).parents[1])
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@in_process
@needs_triton
def test_the_engine_in_the_interpreter():
    interpret("not slow and not gpu", 850)


@in_process
@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_engine_in_the_interpreter_at_size():
    interpret("slow and not gpu", 3500)


# -- the engine, where it runs


@pytest.fixture
def device() -> torch.device:
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


def tiles(rows: int, columns: int, dimensions: int):
    from drifting_diffusers.fields.triton_engine import Plan

    return Plan(whole=False, keep=True, shares=1, rows=rows, columns=columns, dimensions=dimensions)


def big_tiles():
    """In the interpreter it is programs that cost time, more than their size."""
    return tiles(256, 512, 128) if INTERPRETED else None


def compare(device, x, targets, own, masses, temperatures, floor, tolerance, self_mask=100.0, **choices) -> None:
    """All stages of the engine against the reference, at the length that it measures and at one per problem."""
    from drifting_diffusers.fields.triton_engine import TritonEngine

    negatives = sum(t.shape[1] for t in targets) - targets[-1].shape[1]
    law = (own, negatives, masses, temperatures, floor, self_mask)
    right = Reference(x, targets, *law)
    there = [t.to(device) for t in targets]
    queries = there[0] if targets[0] is x else x.to(device)
    engine = TritonEngine(queries, tuple(there), own, negatives, None if masses is None else masses.to(device), *law[3:], **choices)
    totals, weights = engine.measure()
    for found, expected in zip((totals, weights), right.measure(), strict=True):
        assert_close(found.cpu().double(), expected, rtol=2e-6, atol=0)
    per_problem = (right.measure()[0] / right.measure()[1]).float()
    for length in (per_problem.mean(), per_problem * 1.1):
        forces = right.forces(length)
        squares = forces.square().sum((2, 3))
        assert_close(engine.forces(length.to(device)).cpu().double(), squares, rtol=4 * tolerance, atol=1e-30)
        factors = squares.mean(1).clamp(min=1e-20).rsqrt() if length.ndim == 0 else squares.clamp(min=1e-20).rsqrt()
        weighed = factors.reshape(len(temperatures), -1, 1, 1) * forces
        assert relative(engine.velocity(factors.float().to(device)), weighed.sum(0)) <= tolerance


SHAPES = {
    "own, others and positives": (2, 8, 3, 6, 20, 8),
    "odd": (2, 17, 5, 19, 37, 17),
    "own alone": (1, 16, 0, 16, 16, 16),
    "no own": (2, 9, 12, 7, 33, 0),
    "some own": (1, 20, 4, 11, 18, 13),
    "one of each": (2, 1, 0, 1, 3, 1),
}


@needs_triton
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", SHAPES)
class TestStages:
    pytestmark = on_device

    def test_equal_the_reference(self, name, whole, device):
        from drifting_diffusers.fields.triton_engine import Plan

        which = list(SHAPES).index(name)
        b, n, m, p, d, own = SHAPES[name]
        x, targets = samples(b, n, m, p, d, own)
        masses = some_masses(targets) if which % 2 else None
        plan = Plan(whole=True, keep=which % 3 == 0, shares=2 if which % 3 == 0 else 1, dimensions=16)
        plan = plan if whole else tiles(16, 16, 32)
        compare(device, x, targets, own, masses, TEMPERATURES[which % 3], (0.0, 1e-3)[which // 3], 1e-5, plan=plan)


@needs_triton
class TestEngine:
    pytestmark = on_device

    @pytest.mark.parametrize("whole", [True, False])
    @pytest.mark.parametrize("offset", [0.3, 30.0])
    def test_bfloat16_is_exact_to_its_sums(self, whole, offset, device):
        """Samples in bfloat16 are what they are: the engine's error is far below that of storing them."""
        _, targets = samples(1, 24, 8, 20, 40, 24, offset)
        stored = tuple(t.bfloat16() for t in targets)
        plan = None if whole else tiles(16, 32, 64)
        masses = some_masses(targets)
        compare(device, stored[0], stored, 24, masses, PAPER, 1e-3, FIELD_TOLERANCE["bf16"], plan=plan)
        if whole and offset == 30.0:
            compare(device, stored[0], stored, 24, masses, PAPER, 1e-3, 1e-5, plan=plan, products="ieee")

    def test_bfloat16_that_cannot_be_shifted_exactly_stays_where_it_is(self, device):
        """One sample at the origin among others 30 away: no centre has exact differences, and sums of float32 lose what they lose."""
        x, targets = samples(1, 16, 0, 16, 32, 16, 30.0)
        x[:, 3] -= 30
        stored = tuple(t.bfloat16() for t in targets)
        compare(device, stored[0], stored, 16, None, (0.3,), 0.0, 1e-3)

    @pytest.mark.parametrize("whole", [True, False])
    def test_means_of_30_standard_deviations_cost_no_digits(self, whole, device):
        x, targets = samples(1, 30, 9, 33, 48, 30, 30.0)
        compare(device, x, targets, 30, some_masses(targets), PAPER, 1e-3, 5e-6, plan=None if whole else tiles(32, 32, 32))

    def test_float16_and_mixed_samples_are_computed_in_float32(self, device):
        x, targets = samples(1, 16, 0, 16, 16, 16)
        half = x.half()
        compare(device, half, (half, targets[1].half()), 16, None, PAPER, 1e-3, 1e-5)
        compare(device, half, (half, targets[1].bfloat16()), 16, None, PAPER, 1e-3, 1e-5)

    def test_targets_may_be_cut_anywhere(self, device):
        """Five tensors, one of which holds negatives and positives, and slices whose rows are not next to each other."""
        from drifting_diffusers.fields.triton_engine import TritonEngine

        wide = torch.randn(2, 30, 24, generator=torch.Generator().manual_seed(3)).to(device)[..., 4:20]
        x, law = wide[:, :10], (10, 16, None, PAPER, 1e-3, 100.0)
        cut = TritonEngine(x, (x, wide[:, 10:13], wide[:, 13:15], wide[:, 15:20], wide[:, 20:20], wide[:, 20:]), *law)
        whole = TritonEngine(x, (wide.contiguous(),), *law)
        right = Reference(x.cpu(), (wide.cpu(),), *law)
        for engine in (cut, whole):
            totals, weights = engine.measure()
            assert_close(totals.cpu().double(), right.measure()[0], rtol=2e-6, atol=0)
            length = (totals / weights).mean()
            engine.forces(length)
            assert relative(engine.velocity(torch.ones(3, device=device)), right.forces(length.cpu()).sum(0)) <= 1e-5

    def test_the_velocity_comes_in_the_type_asked_for(self, device):
        from drifting_diffusers.fields.triton_engine import TritonEngine

        x, targets = samples(1, 16, 0, 16, 16, 16)
        engine = TritonEngine(x.to(device), tuple(t.to(device) for t in targets), 16, 16, None, (0.2,), 1e-3, 100.0)
        engine.forces(torch.tensor(5.0))
        single, half = engine.velocity(torch.ones(1)), engine.velocity(torch.ones(1), torch.bfloat16)
        assert (single.dtype, half.dtype) == (torch.float32, torch.bfloat16)
        assert_close(half.float(), single, rtol=2**-7, atol=0)

    @pytest.mark.parametrize("whole", [True, False])
    def test_one_side_alone_moves_nothing(self, whole, device):
        from drifting_diffusers.fields.triton_engine import Plan, TritonEngine

        plan = Plan(whole, True, 1, rows=16, columns=16, dimensions=16)
        x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0)).to(device)
        for negatives, own in ((12, 12), (0, 0)):
            engine = TritonEngine(x, (x,), own, negatives, None, (0.2,), 1e-3, 100.0, plan=plan)
            assert engine.forces(torch.tensor(5.0)).abs().max() == 0
            assert engine.velocity(torch.ones(1)).abs().max() == 0

    @pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # NumPy's, under the interpreter
    @pytest.mark.parametrize("whole", [True, False])
    def test_what_is_no_number_is_not_hidden(self, whole, device):
        """Triton's maximum takes the number of a number and NaN, unless told otherwise."""
        from drifting_diffusers.fields.triton_engine import Plan, TritonEngine

        x, targets = samples(2, 16, 0, 16, 16, 16)
        x[1, 2, 3] = float("nan")
        plan = Plan(whole, True, 1, rows=16, columns=16, dimensions=16)
        engine = TritonEngine(x.to(device), tuple(t.to(device) for t in targets), 16, 16, None, (0.2,), 1e-3, 100.0, plan=plan)
        totals, _ = engine.measure()
        assert totals.isfinite().tolist() == [True, False]
        engine.forces(torch.tensor(5.0))
        assert not engine.velocity(torch.ones(1))[1].isfinite().all()

    def test_what_does_not_fit_is_refused(self, device, as_users_see_it):
        from drifting_diffusers.fields.triton_engine import Plan, TritonEngine

        x, law = torch.zeros(1, 16, 16, device=device), (None, (0.2,), 0.0, 100.0)
        for change, said in (
            ((x.double(), (x,), 0, 16, *law), "float64 needs another engine"),
            ((x, (x[..., :8],), 0, 16, *law), "targets must be"),
            ((x, (x,), 17, 16, *law), "at most the one before"),
            ((x, (x,), 16, 16, torch.ones(1, 5, device=device), *law[1:]), "one per target"),
        ):
            with pytest.raises(ValueError, match=said):
                TritonEngine(*change)
        with pytest.raises(ValueError, match="exact for bfloat16 samples alone"):
            TritonEngine(x, (x,), 16, 16, *law, products="bf16")
        with pytest.raises(ValueError, match="products must be one of"):
            TritonEngine(x, (x,), 16, 16, *law, products="tf32")
        with pytest.raises(ValueError, match="power of 2"):
            Plan(whole=False, keep=True, shares=1, rows=24)
        with pytest.raises(ValueError, match="with keep=True"):
            Plan(whole=True, keep=False, shares=2)
        with pytest.raises(RuntimeError, match="forces"):
            TritonEngine(x, (x,), 16, 16, *law).velocity(torch.ones(1))

    def test_equals_the_field_of_the_library(self, device):
        """Velocity and what is measured, put together from the stages as a field does it."""
        x, targets = samples(2, 20, 6, 18, 24, 20)
        masses = some_masses(targets)
        velocity, measured = by_engine(device, x, targets, masses)
        drift = DriftingField()(
            x.double(),
            positives=targets[-1].double(),
            negatives=torch.cat(targets[:-1], 1).double(),
            positive_weights=masses[:, 26:].double(),
            negative_weights=masses[:, :26].double(),
            own=20,
        )
        assert_close(measured.cpu().double(), drift.distance, rtol=2e-6, atol=0)
        assert relative(velocity, drift.velocity) <= 1e-5


def by_engine(device, x, targets, masses, plan=None) -> tuple[Tensor, Tensor]:
    """V and the mean distance of a whole step: all problems share a length and a strength per temperature."""
    from drifting_diffusers.fields.triton_engine import TritonEngine

    there, negatives = [t.to(device) for t in targets], sum(t.shape[1] for t in targets[:-1])
    own = x.shape[1]
    engine = TritonEngine(
        there[0], tuple(there), own, negatives, None if masses is None else masses.to(device), PAPER, 1e-3, 100.0, plan=plan
    )
    totals, weights = engine.measure()
    measured = totals.sum() / weights.sum()
    unit = measured / x.shape[2] ** 0.5
    strengths = engine.forces(measured).sum(1) / unit.square() / x.numel()
    return engine.velocity(strengths.rsqrt()), measured


# -- what broke kernels that were right on Gaussian data


def stress(shared: Path) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    import field_stress

    yield from field_stress.cases()


def against_plain(device, case, plan=None) -> None:
    name, x, positives, negatives, weights = case
    masses = torch.cat([torch.ones_like(x[..., 0]), weights, torch.ones_like(positives[..., 0])], dim=1) if weights.numel() else None
    drift = DriftingField()(
        x,
        positives=positives,
        negatives=torch.cat([x, negatives], 1),
        negative_weights=None if masses is None else masses[:, : x.shape[1] + negatives.shape[1]],
        own=x.shape[1],
    )
    targets = [t.float() for t in (x, negatives, positives) if t.shape[1]]
    velocity, measured = by_engine(device, x.float(), tuple(targets), None if masses is None else masses.float(), plan)
    assert_close(measured.cpu().double(), drift.distance, rtol=2e-6, atol=0)
    assert relative(velocity, drift.velocity) <= 1e-5, name


@needs_triton
class TestStress:
    pytestmark = on_device

    def test_some_problems_of_each_small_case(self, shared, device):
        """Whole problems: as many as hold what the case is about."""
        small = [case for case in stress(shared) if len(case[1]) > 1]
        assert len(small) == 6
        for name, *points in small:
            count = 2 if "among" in name else 1
            against_plain(device, (name, *(t[:count] for t in points)))

    def test_an_isolated_pair_in_tiles(self, shared, device):
        case = next(case for case in stress(shared) if case[0] == "isolated pair in one big problem")
        against_plain(device, case, big_tiles())

    @pytest.mark.slow
    def test_all_cases(self, shared, device):
        cases = list(stress(shared))
        assert len(cases) == 8
        for case in cases:
            against_plain(device, case, big_tiles() if len(case[1]) == 1 else None)

    @pytest.mark.slow
    def test_all_cases_in_tiles(self, shared, device):
        for case in stress(shared):
            against_plain(device, case, big_tiles() if len(case[1]) == 1 else tiles(64, 128, 64))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SHAPES)
    @pytest.mark.parametrize("temperatures", TEMPERATURES)
    @pytest.mark.parametrize("floor", [0.0, 1e-3])
    def test_all_choices(self, name, temperatures, floor, device):
        b, n, m, p, d, own = SHAPES[name]
        x, targets = samples(b, n, m, p, d, own)
        compare(device, x, targets, own, None, temperatures, floor, 1e-5)
        compare(device, x, targets, own, some_masses(targets), temperatures, floor, 1e-5, plan=tiles(16, 32, 32))


@contextmanager
def no_tf32() -> Iterator[None]:
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(allowed)


@pytest.mark.gpu
@needs_triton
class TestGoalShapes:
    """The shapes of the goals, against the plain path in float64 where it fits."""

    @pytest.mark.parametrize(
        "shape", [(64, 64, 16, 64, 256), (512, 64, 16, 64, 64), (1, 1024, 0, 1024, 1024), (1, 8192, 0, 8192, 128), (16, 64, 32, 64, 1280)]
    )
    @pytest.mark.parametrize("products", ["auto", "tf32x3", "bf16"])
    def test_equal_the_reference(self, shape, products, device):
        if INTERPRETED:
            pytest.skip("for a GPU")
        b, n, m, p, d = shape
        x, targets = samples(b, n, m, p, d, n)
        if products == "bf16":
            x, *rest = (t.bfloat16() for t in targets)
            targets = (x, *rest)
        compare_on(device, x, targets, products, 1e-4 if products == "bf16" else 1e-5)


def compare_on(device: torch.device, x: Tensor, targets: tuple[Tensor, ...], products: str, tolerance: float) -> None:
    """As `compare`, with the reference on the GPU too."""
    from drifting_diffusers.fields.triton_engine import TritonEngine

    own, there = x.shape[1], tuple(t.to(device) for t in targets)
    negatives = sum(t.shape[1] for t in targets[:-1])
    engine = TritonEngine(there[0], there, own, negatives, None, PAPER, 1e-3, 100.0, products=products)
    with no_tf32():
        right = Reference(there[0], there, own, negatives, None, PAPER, 1e-3, 100.0)
        totals, weights = engine.measure()
        assert_close(totals.double(), right.measure()[0], rtol=2e-6, atol=0)
        length = totals.sum() / weights.sum()
        squares, velocity = engine.forces(length), 0
        for k, tau in enumerate(PAPER):
            force = right.force(length, tau)
            assert_close(squares[k].double(), force.square().sum((1, 2)), rtol=4 * tolerance, atol=0)
            velocity = velocity + force * squares[k].double().mean().rsqrt()
        assert relative(engine.velocity(squares.mean(1).rsqrt()), velocity) <= tolerance
