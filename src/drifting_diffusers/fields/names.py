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
from .choices import plain
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

LONGEST = 100_000
"""Characters of an expression, at most; a group of matrices has thousands."""

SETTINGS: dict[str, Callable[..., Any]] = {"algorithm_2": algorithm_2, "w_flow": w_flow}
"""Published settings of these fields: functions that make one."""


def read_field(text: str) -> Field:
    """The field that an expression names.

    Raises:
        TypeError: for what is no text.
        ValueError: for anything that is no expression of known names and plain values, with the place and what there is.
    """
    if not isinstance(text, str):
        raise TypeError(f"a field is named by a text such as 'mean_shift(temperatures=(0.2,))', got {text!r}")
    if len(text) > LONGEST:
        raise ValueError(f"a field is written in at most {LONGEST} characters, got {len(text)}: {_short(text)}")
    try:
        found = _value(_parsed(text))
    except (RecursionError, MemoryError):
        raise ValueError(f"a field within a field, and so on, has its limits, got {_short(text)}") from None
    if type(found) not in FIELDS.values():
        raise ValueError(f"{_short(text)} is not a field; take one of {', '.join([*FIELDS, *SETTINGS])}")
    return found


def spell(field: Any) -> str:
    """A field as `read_field` reads it: its name and what differs from its defaults.

    Raises:
        LookupError: for a field, kernel or coupling that has no name.
    """
    field = plain(field)
    if isinstance(field, Schedule):
        more = {"steps": field.steps} if field.steps is not None and field.shape != "constant" else {}
        values = [field.start] if field.shape == "constant" else [field.start, field.end]
        return f"{field.shape}({', '.join([*map(spell, values), *(f'{k}={spell(v)}' for k, v in more.items())])})"
    if isinstance(field, tuple):
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


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        why = error.msg
    except ValueError as error:  # characters that no text has: half of a pair, NUL
        why = str(error)[:100]
    raise ValueError(f"a field is written as in mean_shift(temperatures=(0.2,)), got {_short(text)}: {why}")


def _short(text: str) -> str:
    """A text in quotes, or its two ends if it is long."""
    return repr(text) if len(text) <= 200 else f"{text[:100]!r} ... {text[-50:]!r}"


def _in_few_words(message: str) -> str:
    """A message that may have a whole field in its midst."""
    return message if len(message) <= 800 else f"{message[:500]} ... {message[-200:]}"


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
        f"{_short(ast.unparse(node))} is no name, number, text or tuple of such; a field is written as in drifting(temperatures=(0.2,))"
    )


def _named(name: str, given: list[Any], named: dict[str, Any], called: bool = False) -> Any:
    tables = _tables()
    if name not in tables:
        raise ValueError(
            f"{name!r} is not known; fields are {', '.join([*FIELDS, *SETTINGS])}; there are also {', '.join([*KERNELS, *COUPLINGS, *SCHEDULES])}"
        )
    known = tables[name]
    if name in COUPLINGS:
        if called:
            raise ValueError(f"{name}: a coupling is a function of a field's own, with nothing to choose; write {name} without parentheses")
        return known
    signature, hidden = inspect.signature(known), _no_choices(known)
    choices = f"it takes {', '.join(choice for choice in signature.parameters if choice not in hidden)}"
    try:
        chosen = signature.bind(*given, **named).arguments
    except TypeError as error:
        raise ValueError(f"{name}: {error}; {choices}") from None
    if any(choice in hidden for choice in chosen):
        raise ValueError(f"{name}: {', '.join(choice for choice in chosen if choice in hidden)} is kept by the field itself; {choices}")
    try:
        return known(*given, **named)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {_in_few_words(str(error))}") from None


def _no_choices(known: Any) -> set[str]:
    """Entries that are no part of what a field is, as `spell` leaves them out: memories, reports. A backend is none either, and may be asked for."""
    entries = dataclasses.fields(known) if dataclasses.is_dataclass(known) else ()
    return {entry.name for entry in entries if not entry.compare and entry.name != "backend"}
