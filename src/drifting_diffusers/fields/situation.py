"""What a step tells its field beside the samples: the moment, for schedules, and what is compared, for fields that remember.

A field with a schedule or a memory in it is a recipe; `situated` makes the field of one step and feature of it. Fields stay values.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..schedules import Schedule


@dataclass(frozen=True)
class Situation:
    """Where in a run a field is called.

    Attributes:
        step: update, counted from 0; None where no run is, and schedules stay as they are.
        steps: length of the run, for schedules that last as long as it; None where nobody knows.
        feature: name of what is compared.
        labels: [l], the class of each label of the step; problems are (label, location) with labels first. None without classes.
    """

    step: int | None = None
    steps: int | None = None
    feature: str = ""
    labels: Tensor | None = None


@runtime_checkable
class Memory(Protocol):
    """What a field remembers between steps. It is an attribute of the field, and part of a checkpoint.

    A field that has one also has a method `within(situation)`, which returns the field that looks at the right part of it.
    """

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Observer(Memory, Protocol):
    """A memory of the real samples, shown all of them, some at a time, before the first step."""

    def observe(self, feature: str, values: Tensor, labels: Tensor | None) -> None:
        """Features [n, l, d] of n real samples and their classes [n]."""
        ...


def situated(field: Any, situation: Situation) -> Any:
    """The field of this situation: numbers in place of schedules, in fields within fields too, and memories at the right place."""
    if isinstance(field, Schedule):
        return field if situation.step is None else field.at(situation.step, situation.steps)
    if isinstance(field, tuple | list):
        items = tuple(situated(item, situation) for item in field)
        return field if all(new is old for new, old in zip(items, field, strict=True)) else items
    if not dataclasses.is_dataclass(field) or isinstance(field, type):
        return field
    now = {entry.name: getattr(field, entry.name) for entry in dataclasses.fields(field) if entry.init}
    then = {name: situated(value, situation) for name, value in now.items()}
    if any(then[name] is not value for name, value in now.items()):
        field = dataclasses.replace(field, **then)
    within = getattr(field, "within", None)
    return field if within is None else within(situation)


def walk(field: Any) -> Iterator[Any]:
    """Everything that a field is made of, itself first: its choices, schedules and memories, and all of the fields within it, always in the same order."""
    yield field
    within: Iterable[Any] = ()
    if isinstance(field, tuple | list):
        within = field
    elif dataclasses.is_dataclass(field) and not isinstance(field, type | Memory):
        within = [getattr(field, entry.name) for entry in dataclasses.fields(field)]
    for value in within:
        yield from walk(value)


def memories(field: Any) -> Iterator[Memory]:
    """Every memory of a field and of the fields within it, always in the same order."""
    return (value for value in walk(field) if isinstance(value, Memory) and not isinstance(value, type))
