"""Names of classes: given in any of the forms that Python and JSON have, found whole or in part."""

import difflib
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, cast


def names_of(labels: Any) -> list[str]:
    """The names in the order of the ids."""
    if isinstance(labels, str | bytes) or not isinstance(labels, Iterable | None):
        raise TypeError(f"labels must be a list with a name for every class, got {labels!r}")
    if isinstance(labels, Mapping):
        by_id = {str(key): name for key, name in labels.items()}  # JSON makes strings of ids
        ids = list(map(str, range(len(labels))))
        if by_id.keys() != set(ids):
            raise ValueError(
                f"labels must have the ids 0 to {len(labels) - 1}, each once, got {list(labels)}: name every class, or give a list"
            )
        labels = [by_id[i] for i in ids]
    names: list[Any] = list(labels or ())
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"labels must be names, got {name!r} for class {i}: take str() of it, or leave labels out to draw by id")
    return names


def finder(names: list[str]) -> Callable[[str], int]:
    """From a name to its id: whole before a part between commas, as written before without regard to case."""
    if not names:
        raise ValueError("this pipeline has no names for its classes: give ids, or build it with `labels`")
    whole, folded_whole, part, folded_part = tables = [defaultdict[str, set[int]](set) for _ in range(4)]
    for i, name in enumerate(names):
        whole[name].add(i)
        folded_whole[name.strip().casefold()].add(i)
        for piece in filter(None, map(str.strip, name.split(","))):
            part[piece].add(i)
            folded_part[piece.casefold()].add(i)

    def find(name: str) -> int:
        folded = name.strip().casefold()
        keys = (name, folded, name.strip(), folded)
        ids = next((table[key] for table, key in zip(tables, keys, strict=True) if key in table), None)
        if ids is None:
            known = folded_part | folded_whole
            near = [names[min(known[key])] for key in difflib.get_close_matches(folded, known)]
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else "`pipe.labels` lists them all"
            raise ValueError(f"no class is named {name!r}; {hint}")
        if len(ids) > 1:
            raise ValueError(f"{name!r} is the name of the classes {sorted(ids)}: give the id")
        return min(ids)

    return find


def checked_id(label: Any, classes: int) -> int:
    try:
        index = operator.index(cast(Any, None if isinstance(label, bool) else label))  # a mask is no list of ids
    except TypeError:
        raise TypeError(f"a class label is an id or a name, got {label!r}") from None
    if not 0 <= index < classes:
        raise ValueError(f"class ids must lie from 0 to {classes - 1}, got {index}")
    return index


@cache
def imagenet_labels() -> tuple[str, ...]:
    """The 1000 classes of ImageNet-1k by their ids, in WordNet's words; two pairs of namesakes carry their WordNet id."""
    return tuple(files("drifting_diffusers").joinpath("imagenet_labels.txt").read_text(encoding="utf-8").splitlines())
