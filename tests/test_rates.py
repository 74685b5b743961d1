"""How fast fields bring distributions together: rates of Fourier modes (laws T10, T12), annealing (law T11), and the schedules themselves.

Linearised about a level target, a mode cos(xi x) of q - p fades as exp(-L(xi) t). All in float64.
"""

import itertools
import math

import pytest
import torch
from scipy.special import exp1
from torch import Tensor

from drifting_diffusers.kernels import Gaussian, Laplace, Matern
from drifting_diffusers.schedules import SCHEDULES, Schedule, annealing_rate, constant, cosine, exponential, linear

F64 = torch.float64
GRID, WIDTH, MODES = 4096, 0.15, (1, 4, 8, 16, 32)
PLACES = torch.arange(GRID, dtype=F64) * (2 * math.pi / GRID)
DISTANCE = torch.minimum(PLACES, 2 * math.pi - PLACES)
TOWARDS = torch.where(math.pi > PLACES, -PLACES, 2 * math.pi - PLACES)  # from a query to a target, by the shorter way round


def convolve(f: Tensor, g: Tensor) -> Tensor:
    return torch.fft.ifft(torch.fft.fft(f) * torch.fft.fft(g)).real


def rate(numerator: Tensor, normaliser: Tensor, k: int, gap: float = 1e-6) -> float:
    """The rate of mode k on a torus: p level, q = 1 + gap cos(k x), dq/dt = -(q V)', V the difference of pulls through tables of kernels."""
    pull = lambda density: convolve(numerator * TOWARDS, density) / convolve(normaliser, density)
    mode = (k * PLACES).cos()
    p, q = torch.ones(GRID, dtype=F64), 1 + gap * mode
    flux = torch.fft.fft(q * (pull(p) - pull(q)))
    change = -torch.fft.ifft(1j * torch.fft.fftfreq(GRID, 1 / GRID, dtype=F64) * flux).real
    return -2 * float((change * mode).mean()) / gap


def tables(kernel, form: str, width: float = WIDTH) -> tuple[Tensor, Tensor]:
    """What multiplies y - x, and what it is divided by."""
    apart = DISTANCE.clamp(min=1e-9)
    value = kernel.value(apart, width)
    pull = (-kernel.derivative(apart, width) / apart).where(DISTANCE > 0, 0.0)
    return {"mean_shift": (value, value), "sharp": (value, kernel.sharp(apart, width)), "gradient": (pull, value)}[form]


# --- fixed widths ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "rates"),
    [
        (Gaussian(), (2.225e-2, 0.3007, 0.7009, 0.3233, 2.288e-4)),
        (Laplace(), (4.304e-2, 0.3893, 0.4837, 0.2521, 7.973e-2)),
    ],
    ids=["gaussian", "laplace"],
)
def test_t10_rates_of_modes_on_a_torus(kernel, rates):
    for k, expected in zip(MODES, rates, strict=True):
        assert rate(*tables(kernel, "mean_shift"), k) == pytest.approx(expected, rel=1e-3)


CLOSED = {
    ("gaussian", "mean_shift"): lambda u: u * math.exp(-u / 2),
    ("gaussian", "sharp"): lambda u: u * math.exp(-u / 2) / WIDTH**2,
    ("gaussian", "gradient"): lambda u: u * math.exp(-u / 2) / WIDTH**2,
    ("laplace", "mean_shift"): lambda u: 2 * u / (1 + u) ** 2,
    ("laplace", "sharp"): lambda u: u / (1 + u) ** 2 / WIDTH**2,
    ("laplace", "gradient"): lambda u: u / (1 + u) / WIDTH**2,
    ("matern", "mean_shift"): lambda u: (4 / 3) * u / (1 + u / 3) ** 3,
    ("matern", "sharp"): lambda u: u / (1 + u / 3) ** 3 / WIDTH**2,
}


@pytest.mark.parametrize("which", CLOSED, ids="-".join)
def test_t10_rates_are_the_closed_forms(which):
    """L = xi^2 hat g(xi) / normaliser: exp(-u / 2) for the Gaussian, powers of 1 / (1 + u) for Laplace and Matern, u = (width xi)^2.

    The polynomial tails are what makes fine detail cheap; the kernel gradient of Laplace does not even fade.
    """
    name, form = which
    kernel = {"gaussian": Gaussian(), "laplace": Laplace(), "matern": Matern(1.5)}[name]
    for k in MODES:
        assert rate(*tables(kernel, form), k) == pytest.approx(CLOSED[which]((WIDTH * k) ** 2), rel=1e-3)


def fastest(d: int) -> float:
    """The largest rate of the Laplace mean shift in d dimensions."""
    return 2 * (1 + 2 / (d + 1)) ** (-(d + 3) / 2)


def test_t10_the_laplace_rate_in_three_dimensions():
    """(d + 1) u / (1 + u)^((d + 3) / 2), from the library's kernel and its k# by radial Fourier integrals."""
    r = torch.linspace(1e-6, 60, 400_001, dtype=F64)
    integral = lambda f: float(torch.trapezoid(f, r))
    total = integral(r**2 * Laplace().value(r, 1.0))
    found = {xi: xi**2 * integral(r * (xi * r).sin() / xi * Laplace().sharp(r, 1.0)) / total for xi in (0.3, 1.0, 2.0, 5.0)}
    for xi, value in found.items():
        assert value == pytest.approx(4 * xi**2 / (1 + xi**2) ** 3, rel=1e-6)
    peak = math.sqrt(2 / (3 + 1))
    assert peak**2 * integral(r * (peak * r).sin() / peak * Laplace().sharp(r, 1.0)) / total == pytest.approx(fastest(3), rel=1e-6)


@pytest.mark.parametrize(
    ("kernel", "width", "largest"),
    [(Gaussian(), math.sqrt(2) / 9, 2 / math.e), (Laplace(), 1 / 9, fastest(1))],
    ids=["gaussian", "laplace"],
)
def test_t12_a_whole_step_contracts_every_mode_and_one_beyond_2_over_the_largest_rate_diverges(kernel, width, largest):
    """Of all modes, here the ninth has the largest rate: 2 / e (Gaussian), 2 (1 + 2 / (d + 1))^(-(d + 3) / 2) (Laplace). Euler: a <- (1 - eta L) a."""
    rates = torch.tensor([rate(*tables(kernel, "mean_shift", width), k) for k in range(1, 60)], dtype=F64)
    assert int(rates.argmax()) + 1 == 9
    assert float(rates.max()) == pytest.approx(largest, rel=2e-4)
    assert (rates > -1e-9).all()
    assert ((1 - rates[:40]).abs() < 1).all()
    amplitude = lambda eta: (1 - eta * rates.max()).abs() ** 1000
    assert amplitude(0.99 * 2 / largest) < 1e-6
    assert amplitude(1.01 * 2 / largest) > 1e6


def test_t12_particles_rest_at_steps_below_the_bound_and_not_beyond_it():
    """The linear bound on the nonlinear flow: a level density on the torus with a small wave at the fastest mode, moved with its own V."""
    k, n = round(math.sqrt(2) / WIDTH), 512
    places = 2 * math.pi * torch.arange(n, dtype=F64) / n
    wave = lambda x: float((x - places - (x - places).mean()).square().mean().sqrt())

    def shift(x: Tensor, y: Tensor) -> Tensor:
        towards = torch.remainder(y - x[:, None] + math.pi, 2 * math.pi) - math.pi
        weights = Gaussian().value(towards.abs(), WIDTH)
        return (weights * towards).sum(1) / weights.sum(1)

    for eta, contracts in ((1.0, True), (0.9 * math.e, True), (1.2 * math.e, False)):
        x = places + 1e-4 / k * (k * places).sin()
        start = wave(x)
        for _ in range(12):
            x = x + eta * (shift(x, places) - shift(x, x))
        assert (wave(x) < start / 10) is contracts
        assert (wave(x) > start * 10) is not contracts


# --- annealing ---------------------------------------------------------------------------------------------------------------------------

GAUSSIAN_RATE = {
    "mean_shift": lambda s, k: (s * k) ** 2 * math.exp(-((s * k) ** 2) / 2),
    "score": lambda s, k: k**2 * math.exp(-((s * k) ** 2) / 2),
}


def damping(schedule: Schedule, form: str, k: float, step: float) -> float:
    """-log of a mode at the end of a schedule: d log a / dt = -L, by the trapezoidal rule over the schedule's own steps of length `step`."""
    rates = [GAUSSIAN_RATE[form](schedule.at(i), k) for i in range(int(schedule.steps) + 1)]
    return step * (sum(rates) - (rates[0] + rates[-1]) / 2)


@pytest.mark.parametrize("k", [0.5, 3.0, 7.0])
def test_t11_annealing_damps_as_the_closed_forms_say(k):
    """Sigma = 2 exp(-0.2 t) over 20: both forms of the score field; the mean shift form damps a mode by exp(1 / r) at most."""
    start, r, time, steps = 2.0, 0.2, 20.0, 4000
    schedule = exponential(start, start * math.exp(-r * time), steps)
    end, step = schedule.end, time / steps
    assert schedule.rate / step == pytest.approx(r)
    fading = lambda s: math.exp(-((s * k) ** 2) / 2)
    closed = {
        "mean_shift": (fading(end) - fading(start)) / r,
        "score": k**2 / (2 * r) * float(exp1((end * k) ** 2 / 2) - exp1((start * k) ** 2 / 2)),
    }
    for form, expected in closed.items():
        assert damping(schedule, form, k, step) == pytest.approx(expected, rel=1e-3)
    assert closed["mean_shift"] <= 1 / r


@pytest.mark.parametrize(("k", "fixed", "annealed"), [(2, 8.5, 28), (4, 858, 34), (8, 5.7e12, 40), (16, 7e53, 47)])
def test_t11_steps_to_one_per_cent(k, fixed, annealed):
    """At sigma = 1 for ever against sigma from 1 to 0.1 / K at half the fastest rate: exponential in K^2 against log K."""
    rate_ = GAUSSIAN_RATE["mean_shift"](1.0, k)
    assert math.log(100) / rate_ == pytest.approx(fixed, rel=0.02)
    schedule = exponential(1.0, 0.1 / k, rate=annealing_rate() / 2)
    assert schedule.rate == pytest.approx(0.109, rel=5e-3)
    assert schedule.steps == pytest.approx(annealed, abs=0.8)
    left = math.prod(1 - GAUSSIAN_RATE["mean_shift"](schedule.at(i), k) for i in range(math.ceil(schedule.steps)))
    assert left < 0.01
    if k >= 4:
        assert math.log(100) / rate_ > 20 * schedule.steps
        assert (1 - rate_) ** math.ceil(schedule.steps) > 0.8  # fixed, in as many steps


def test_t11_twice_the_fastest_rate_leaves_modes_behind():
    """1 / r is all that a mode gets: at twice the fastest rate it keeps a tenth of itself, however long the schedule."""
    left = {}
    for factor in (0.5, 1.0, 2.0):
        schedule = exponential(10.0, 1e-3, rate=factor * annealing_rate(step=0.01))  # small steps: the flow itself
        left[factor] = math.exp(-damping(schedule, "mean_shift", 4.0, 0.01))
    assert left[0.5] == pytest.approx(1e-4, rel=0.05)
    assert left[1.0] == pytest.approx(1e-2, rel=0.05)
    assert left[2.0] == pytest.approx(1e-1, rel=0.05)


# --- schedules ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "half"),
    [(linear, 0.505), (cosine, 0.505), (exponential, 0.1)],
    ids=["linear", "cosine", "exponential"],
)
def test_schedules_go_from_start_to_end_and_stay_there(make, half):
    for schedule, run in ((make(1.0, 0.01, 100), None), (make(1.0, 0.01, 100), 7), (make(1.0, 0.01), 100)):
        assert schedule.at(0, run) == pytest.approx(1.0)
        assert schedule.at(50, run) == pytest.approx(half)
        assert schedule.at(100, run) == schedule.at(10_000, run) == pytest.approx(0.01)
        assert schedule.at(-5, run) == pytest.approx(1.0)
        values = [schedule.at(i, run) for i in range(101)]
        assert all(b < a for a, b in itertools.pairwise(values))
    assert make(0.01, 1.0, 100).at(50) == pytest.approx(half)  # and up


def test_shapes_of_schedules():
    steps = lambda s: [s.at(i + 1) / s.at(i) for i in range(10)]
    assert max(steps(exponential(2.0, 0.5, 10))) == pytest.approx(min(steps(exponential(2.0, 0.5, 10))))
    falls = lambda s: [s.at(i) - s.at(i + 1) for i in range(10)]
    assert max(falls(linear(2.0, 0.5, 10))) == pytest.approx(min(falls(linear(2.0, 0.5, 10))))
    wave = falls(cosine(2.0, 0.5, 10))
    assert wave[0] < 0.2 * wave[5]
    assert wave == pytest.approx(wave[::-1])
    assert cosine(2.0, 0.5, 10).at(2) == pytest.approx(1.25 + 0.75 * math.cos(math.pi / 5))
    assert [constant(0.3).at(i) for i in (0, 5, 10**9)] == [0.3] * 3
    assert linear(1.0, -1.0, 2).at(1) == 0


def test_an_exponential_schedule_by_its_rate():
    schedule = exponential(1.0, 0.05, rate=0.1)
    assert schedule.rate == pytest.approx(0.1)
    assert schedule.at(7) == pytest.approx(math.exp(-0.7))
    assert schedule.steps == pytest.approx(math.log(20) / 0.1)
    assert exponential(0.05, 1.0, rate=0.1).at(7) == pytest.approx(0.05 * math.exp(0.7))
    assert exponential(0.3, 0.3, rate=0.1).at(99) == 0.3


def test_the_annealing_rate():
    assert annealing_rate() == pytest.approx(1 / math.log(100))
    assert annealing_rate(0.5, 0.1) == pytest.approx(0.5 / math.log(10))
    for step, tolerance in ((0, 0.01), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="the rate of annealing needs step > 0 and 0 < tolerance < 1"):
            annealing_rate(step, tolerance)


def test_schedules_have_names():
    assert list(SCHEDULES) == ["constant", "linear", "exponential", "cosine"]
    for name, make in SCHEDULES.items():
        assert make(*((0.5,) if name == "constant" else (0.5, 0.25, 10))).shape == name


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(1.0, 0.1, shape="step"), "shape must be one of constant, linear, exponential, cosine, got 'step'"),
        (lambda: linear(1.0, math.inf), "a schedule goes between finite numbers, got 1.0 and inf"),
        (lambda: linear("1", 0.0), "a schedule goes between finite numbers, got '1' and 0.0"),
        (lambda: exponential(1.0, 0.0), "an exponential schedule goes between numbers above 0, got 1.0 and 0.0; take shape='linear'"),
        (lambda: linear(1.0, 0.0, 0), "steps must be a finite number above 0, or None for the whole run, got 0"),
        (lambda: linear(1.0, 0.0).at(3), "lasts a whole run, but the length of the run was not given; say steps= in the schedule"),
        (lambda: exponential(1.0, 0.1).rate, "only an exponential schedule of a given length has a rate"),
        (lambda: linear(1.0, 0.1, 5).rate, "only an exponential schedule of a given length has a rate"),
        (lambda: exponential(1.0, 0.1, 5, rate=0.1), "an exponential schedule has a length or a rate, got steps=5 and rate=0.1"),
        (lambda: exponential(1.0, 0.1, rate=-0.1), "rate must be a finite number above 0, got -0.1"),
    ],
)
def test_what_is_no_schedule_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
