"""What a field may be made of, checked when it is made: a mistake is met before a run begins, and what is kept can be compared, hashed and written down."""

import dataclasses
import inspect
import math
from numbers import Integral, Real
from typing import Any

import torch

from ..couplings import COUPLINGS, Coupling
from ..kernels import KERNELS, Kernel
from ..schedules import Schedule
from .protocol import Field


def settle(field: Any) -> None:
    """Make a frozen dataclass's choices plain (lists are tuples, numbers and texts are Python's own) and refuse those of a wrong kind.

    What an entry is annotated as says its kind: `bool`, `float`, `Kernel`, `Coupling` or `Field`. The first thing in a `__post_init__`.
    Counts, whose default is a whole number, are left to their field.

    Raises:
        TypeError: for a choice of another kind, with its name, what it is and what it may be.
    """
    for entry in dataclasses.fields(field):
        value = getattr(field, entry.name)
        settled = plain(value)
        if settled is not value:
            object.__setattr__(field, entry.name, settled)
        if type(entry.default) is int:  # a count, whose field says more about it
            continue
        for kind, (fits, meant) in _KINDS.items():
            if entry.type in (kind, kind.__name__) and not fits(settled):
                raise TypeError(f"{entry.name} must be {meant}, got {settled!r}{_without_quotes(settled, kind)}")


def plain(value: Any) -> Any:
    """A list as a tuple, at any depth; a number or text of another library as Python's own, in schedules and kernels too; all else as it is."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Real | str):
        return str(value) if isinstance(value, str) else int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, tuple | list):
        items = tuple(map(plain, value))
        return value if isinstance(value, tuple) and all(new is old for new, old in zip(items, value, strict=True)) else items
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and isinstance(value, Schedule | Kernel):
        now = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value) if entry.init}
        then = {name: plain(choice) for name, choice in now.items()}
        return dataclasses.replace(value, **then) if any(then[name] is not now[name] for name in now) else value
    return value


def is_field(value: Any) -> bool:
    """Whether it can be called as a `Field`: a function of x that takes `positives`."""
    return _takes(value, "positives")


def is_coupling(value: Any) -> bool:
    """Whether it can be called as a `Coupling`: a function of logits that takes `floor`."""
    return _takes(value, "floor")


def is_kernel(value: Any) -> bool:
    """Whether it has what `Kernel` asks for, and is no class of such."""
    return isinstance(value, Kernel) and not isinstance(value, type)


def is_number(value: Any) -> bool:
    """Whether it is a real number and no truth value; not whether it is finite."""
    return isinstance(value, Real) and not isinstance(value, bool)


def positive(value: Any) -> bool:
    """Whether it is a finite number above 0."""
    return isinstance(value, Real) and math.isfinite(value) and float(value) > 0


def check_field(value: Any, name: str = "field") -> None:
    """Raise a TypeError unless the value can be called as a `Field`."""
    if not is_field(value):
        raise TypeError(f"{name} must be {_KINDS[Field][1]}, got {value!r}{_without_quotes(value, Field)}")


def refuse_schedules(field: Any) -> None:
    """A field with a schedule in it is a recipe for a field of every step."""
    for entry in dataclasses.fields(field):
        value = getattr(field, entry.name)
        if any(isinstance(item, Schedule) for item in (value if isinstance(value, tuple | list) else (value,))):
            raise ValueError(
                f"{entry.name} of this {type(field).__name__} changes over a run, {value}: say the moment, situated(field, Situation(step=0, steps=1000))"
            )


def check_choice(field: Any, name: str, *allowed: str) -> None:
    """Raise a ValueError unless a choice is one of these words."""
    if getattr(field, name) not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {getattr(field, name)!r}")


def check_temperatures(temperatures: Any, largest_distance: float) -> None:
    """Numbers above 0 or schedules of such, so large that a logit of `largest_distance` is finite."""
    if not isinstance(temperatures, tuple | list):
        raise TypeError(f"temperatures must be a tuple of numbers, got {temperatures!r}; write ({temperatures!r},) for a single one")
    numbers = [number for t in temperatures for number in ((t.start, t.end) if isinstance(t, Schedule) else (t,))]
    if not numbers or not all(map(positive, numbers)):
        raise ValueError(f"temperatures must be one or more finite numbers above 0, got {temperatures}; the paper's are (0.02, 0.05, 0.2)")
    least = largest_distance / torch.finfo(torch.float32).max
    if min(numbers) <= least:
        raise ValueError(
            f"temperatures must be above {least:g}, got {temperatures}: a masked distance over a smaller one overflows float32"
        )


def _takes(value: Any, name: str) -> bool:
    if isinstance(value, type) or not callable(value):
        return False
    try:
        parameters = inspect.signature(value).parameters
    except (TypeError, ValueError):  # nobody can look into it
        return True
    return name in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def _without_quotes(value: Any, kind: Any) -> str:
    if not isinstance(value, str):
        return ""
    if kind in (Kernel, Coupling):
        return "; names are written without quotes, and in Python it is the object of that name in drifting_diffusers.kernels or couplings"
    return "; names are written without quotes, and in Python as read_field('drifting')" if kind is Field else ""


_KINDS: dict[Any, tuple[Any, str]] = {
    bool: (lambda value: isinstance(value, bool), "True or False"),
    float: (is_number, "a number"),
    Kernel: (is_kernel, f"a kernel, one of {', '.join(KERNELS)} or an object with the methods of kernels.Kernel"),
    Coupling: (is_coupling, f"a coupling, one of {', '.join(COUPLINGS)} or a function with the signature of couplings.Coupling"),
    Field: (is_field, "a field, such as DriftingField() or another object with the signature of fields.Field"),
}
"""What an entry is annotated as: what fits, and that in words."""
