"""Fields by name, as a command line, a YAML file, a run's config and a model card have them: an expression of names and plain values.

    drifting                                                the released field
    mean_shift(temperatures=(0.2,), kernel=gaussian)        a field and what differs from its defaults
    lookahead(drifting, terms=1)                            a field within a field
    score(temperatures=(exponential(1.0, 0.05),))           a schedule in place of a number

`spell` writes what `read_field` reads. Nothing is executed but the constructors of the tables below.
"""

import ast
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from ..couplings import COUPLINGS
from ..kernels import KERNELS
from ..schedules import SCHEDULES, Schedule
from .combined import Combined
from .divergence import DivergenceField
from .drifting import DriftingField, algorithm_2
from .frechet import FrechetField
from .friction import Friction
from .kernel_gradient import KernelGradientField
from .lookahead import Lookahead
from .mean_shift import MeanShiftField
from .nystrom import NystromField
from .protocol import Field
from .score import ScoreField
from .sharp import SharpField
from .sinkhorn import SinkhornField, w_flow
from .symmetrised import Symmetrised
from .velocity_guidance import VelocityGuidance

FIELDS: dict[str, Callable[..., Any]] = {
    "drifting": DriftingField,
    "mean_shift": MeanShiftField,
    "score": ScoreField,
    "sharp": SharpField,
    "kernel_gradient": KernelGradientField,
    "divergence": DivergenceField,
    "sinkhorn": SinkhornField,
    "nystrom": NystromField,
    "frechet": FrechetField,
    "lookahead": Lookahead,
    "friction": Friction,
    "combined": Combined,
    "velocity_guidance": VelocityGuidance,
    "symmetrised": Symmetrised,
}
"""Every field by its name, one row each; a field of your own is one row more: `FIELDS["mine"] = MyField`."""

SETTINGS: dict[str, Callable[..., Any]] = {"algorithm_2": algorithm_2, "w_flow": w_flow}
"""Published settings of these fields: functions that make one."""


def read_field(text: str) -> Field:
    """The field that an expression names.

    Raises:
        ValueError: for anything that is no expression of known names and plain values, with the place and what there is.
    """
    try:
        found = _value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"a field is written as in mean_shift(temperatures=(0.2,)), got {text!r}: {error.msg}") from None
    if type(found) not in FIELDS.values():
        raise ValueError(f"{text!r} is not a field; take one of {', '.join([*FIELDS, *SETTINGS])}")
    return found


def spell(field: Any) -> str:
    """A field as `read_field` reads it: its name and what differs from its defaults.

    Raises:
        LookupError: for a field, kernel or coupling that has no name.
    """
    if isinstance(field, Schedule):
        more = {"steps": field.steps} if field.steps is not None and field.shape != "constant" else {}
        values = [field.start] if field.shape == "constant" else [field.start, field.end]
        return f"{field.shape}({', '.join([*map(repr, values), *(f'{k}={v!r}' for k, v in more.items())])})"
    if isinstance(field, tuple | list):
        return f"({', '.join(map(spell, field))}{',' if len(field) == 1 else ''})"
    if field is None or isinstance(field, bool | int | float | str):
        return repr(field)
    if dataclasses.is_dataclass(field) and not isinstance(field, type):
        return _spell_choices(field)
    return _name_of(field)


def _spell_choices(value: Any) -> str:
    parts = []
    for entry in dataclasses.fields(value):
        if not entry.init or not entry.compare:  # a memory is no choice
            continue
        chosen = getattr(value, entry.name)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            parts.append(spell(chosen))
            continue
        default = entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()  # pyright: ignore[reportCallIssue]
        if chosen != default:
            parts.append(f"{entry.name}={spell(chosen)}")
    return _name_of(type(value)) + (f"({', '.join(parts)})" if parts else "")


def _tables() -> dict[str, Any]:
    return {**FIELDS, **SETTINGS, **KERNELS, **COUPLINGS, **SCHEDULES}


def _name_of(thing: Any) -> str:
    for name, known in _tables().items():
        if known is thing:
            return name
    raise LookupError(f"{thing!r} has no name; give it one: drifting_diffusers.fields.FIELDS[NAME] = {getattr(thing, '__name__', 'IT')}")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(map(_value, items))
        case ast.Name(id=name):
            return _named(name, [], {})
        case ast.Call(func=ast.Name(id=name), args=given, keywords=named) if all(word.arg for word in named):
            return _named(name, [_value(arg) for arg in given], {str(word.arg): _value(word.value) for word in named}, called=True)
    raise ValueError(
        f"{ast.unparse(node)!r} is no name, number, text or tuple of such; a field is written as in drifting(temperatures=(0.2,))"
    )


def _named(name: str, given: list[Any], named: dict[str, Any], called: bool = False) -> Any:
    tables = _tables()
    if name not in tables:
        raise ValueError(
            f"{name!r} is not known; fields are {', '.join([*FIELDS, *SETTINGS])}; there are also {', '.join([*KERNELS, *COUPLINGS, *SCHEDULES])}"
        )
    known = tables[name]
    if name in COUPLINGS and not called:
        return known
    try:
        inspect.signature(known).bind(*given, **named)
    except TypeError as error:
        raise ValueError(f"{name}: {error}; it takes {', '.join(inspect.signature(known).parameters)}") from None
    try:
        return known(*given, **named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
