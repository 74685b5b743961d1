r"""A schedule is a number that changes over a run: a temperature, a step size, an entropy, a friction. It stands where a number stands, as in

    ScoreField(temperatures=(exponential(1.0, 0.05),))

and `fields.situated` puts the number of a step in its place, so that fields stay values and a resumed run needs to remember nothing.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

Shape = Literal["constant", "linear", "exponential", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """From `start` at step 0 to `end` at step `steps`, and `end` from then on.

    Attributes:
        start: the value at step 0.
        end: the value from step `steps` on.
        steps: length in optimiser steps, above 0; the whole run if None.
        shape: `linear`, `cosine` (half a wave, level at both ends), `exponential` (equal factors in equal times, both values above 0), or
            `constant`, which is `start` for ever.

    Raises:
        ValueError: for values that are not finite, or not above 0 where the shape is exponential.
    """

    start: float
    end: float
    steps: float | None = None
    shape: Shape = "exponential"

    def __post_init__(self):
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape must be one of {', '.join(get_args(Shape))}, got {self.shape!r}")
        if not all(isinstance(value, Real) and math.isfinite(value) for value in (self.start, self.end)):
            raise ValueError(f"a schedule goes between finite numbers, got {self.start!r} and {self.end!r}")
        if self.shape == "exponential" and not min(self.start, self.end) > 0:
            raise ValueError(f"an exponential schedule goes between numbers above 0, got {self.start} and {self.end}; take shape='linear'")
        if self.steps is not None and not (isinstance(self.steps, Real) and 0 < self.steps < math.inf):
            raise ValueError(f"steps must be a finite number above 0, or None for the whole run, got {self.steps!r}")

    def at(self, step: int, steps: int | None = None) -> float:
        """The value at a step of a run of `steps`.

        Raises:
            ValueError: where the schedule takes its length from the run, and the run does not say its length.
        """
        length = self.steps if self.steps is not None else steps
        if self.shape == "constant":
            return self.start
        if length is None:
            raise ValueError(f"{self} lasts a whole run, but the length of the run was not given; say steps= in the schedule")
        done = min(max(step / length, 0.0), 1.0)
        if self.shape == "exponential":
            return self.start ** (1 - done) * self.end**done
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done

    @property
    def rate(self) -> float:
        """The r of start * exp(-r t), per step, of an exponential schedule of a given length."""
        if self.shape != "exponential" or self.steps is None:
            raise ValueError(f"only an exponential schedule of a given length has a rate, got {self}")
        return math.log(self.start / self.end) / self.steps


Scheduled = float | Schedule
"""A number, or one that changes over the run."""


def constant(value: float) -> Schedule:
    """The same number for ever."""
    return Schedule(value, value, shape="constant")


def linear(start: float, end: float, steps: float | None = None) -> Schedule:
    """On a straight line; over the whole run if `steps` is not given."""
    return Schedule(start, end, steps, "linear")


def cosine(start: float, end: float, steps: float | None = None) -> Schedule:
    """On half a cosine wave; over the whole run if `steps` is not given."""
    return Schedule(start, end, steps, "cosine")


def exponential(start: float, end: float, steps: float | None = None, *, rate: float | None = None) -> Schedule:
    """From `start` as start * exp(-rate * step) down (or up) to `end`: exponential bandwidth annealing, sigma(t) = sigma_0 exp(-r t) (arXiv 2603.09936).

    Args:
        start: the value at step 0, above 0.
        end: where it stops, above 0. For modes of frequency K stop at about 0.1 / K.
        steps: until then; over the whole run if neither this nor `rate` is given.
        rate: r, per step, above 0, instead of `steps`; see `annealing_rate`.
    """
    if rate is None:
        return Schedule(start, end, steps)
    if steps is not None:
        raise ValueError(f"an exponential schedule has a length or a rate, got steps={steps} and rate={rate}")
    if not (isinstance(rate, Real) and 0 < rate < math.inf):
        raise ValueError(f"rate must be a finite number above 0, got {rate!r}")
    if start == end:
        return Schedule(start, end, shape="constant")
    return Schedule(start, end, abs(math.log(start / end)) / rate)


def annealing_rate(step: float = 1.0, tolerance: float = 0.01) -> float:
    """The fastest rate r, per step of size `step`, at which every mode is still damped to `tolerance` of itself: step / ln(1 / tolerance).

    Under sigma(t) = sigma_0 exp(-r t) a mode of any frequency meets the width that moves it fastest for a time of order 1 / r, and its log-damping
    is at most 1 / r in all (arXiv 2603.09936; the closed form is a test). Half of this rate leaves room for the ends of the window.

    Raises:
        ValueError: unless step > 0 and 0 < tolerance < 1.
    """
    if not (step > 0 and 0 < tolerance < 1):
        raise ValueError(f"the rate of annealing needs step > 0 and 0 < tolerance < 1, got {step} and {tolerance}")
    return step / math.log(1 / tolerance)


SCHEDULES: dict[str, Any] = {s.__name__: s for s in (constant, linear, exponential, cosine)}
