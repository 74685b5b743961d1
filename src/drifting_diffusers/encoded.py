r"""Real samples that are drawn more than once, and features that are kept small: what a step encodes once and reads often.

A feature map may be two halves, see `in_halves`: maps, which cost a network and are kept as that computed them, and readings of a map (its places, its
mean in windows, ...), which cost little and are made when they are asked for. Then a step holds the maps of its images, and of one feature at a time more.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .shapes import Float, Int

Reading = Callable[[Tensor], Tensor]
"""A map [n, ...] -> a feature [n, l, d] in float32."""
Readings = dict[str, tuple[str, Reading]]
"""Of every feature by name: which map is read, and how."""


@dataclass(frozen=True, eq=False)
class Repeated:
    """Samples of every label, some of them more than once: a stand-in for the tensor `dense`, with every distinct sample once.

    Attributes:
        distinct: [u, ...].
        places: [l, n], where in them each sample of each label is.
    """

    distinct: Tensor
    places: Int[Tensor, "l n"]

    @property
    def dense(self) -> Tensor:
        """All of them, [l, n, ...], repeats and all."""
        return self.distinct[self.places.to(self.distinct.device)]

    @property
    def ndim(self) -> int:
        return 1 + self.distinct.ndim

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.places.shape, *self.distinct.shape[1:]))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, labels: Any) -> Tensor:
        """The samples of these labels, [l, n, ...]."""
        return self.distinct[self.places[labels].to(self.distinct.device)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for, before there is anything to stand in for
            raise AttributeError(name)
        return getattr(self.dense, name)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        plain = lambda value: value.dense if isinstance(value, Repeated) else value
        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


Samples = Tensor | Repeated
"""Samples of every label, [l, n, ...]."""


def converted(samples: Samples, convert: Callable[[Tensor], Tensor]) -> Samples:
    """The same samples after something that is done to each by itself."""
    return Repeated(convert(samples.distinct), samples.places) if isinstance(samples, Repeated) else convert(samples)


def distinct_of(samples: Samples) -> tuple[Tensor, Int[Tensor, "l n"]]:
    """Every sample that must be encoded, [u, ...], and where in them those of each label are."""
    if isinstance(samples, Repeated):
        return samples.distinct, samples.places
    count = samples.shape[0] * samples.shape[1]
    return samples.flatten(0, 1), torch.arange(count).unflatten(0, samples.shape[:2])


def in_halves(maps: str, readings: str) -> Callable[[Any], Any]:
    """Say of a method that is a feature map which methods are its halves: images -> `{key: map}`, and (key, map) -> `{feature: reading}`.

    The method itself must give every reading of every map. An override of it in a subclass has no halves, unless it says so as well.
    """

    def mark(method: Any) -> Any:
        method.halves = (maps, readings)
        return method

    return mark


def halves_of(feature_map: Any) -> tuple[Callable[[Tensor], dict[str, Tensor]], Callable[[str, Tensor], dict[str, Reading]]]:
    """The halves of a feature map; those of one that has none are itself, and each feature as it is."""
    if not hasattr(feature_map, "halves"):
        return feature_map, lambda name, _: {name: _as_it_is}
    maps, readings = feature_map.halves
    return getattr(feature_map.__self__, maps), getattr(feature_map.__self__, readings)


def _as_it_is(values: Tensor) -> Tensor:
    return values


class Encoded(MutableMapping[str, Tensor], dict):  # pyright: ignore[reportGeneralTypeIssues]  # typeshed has dict a subclass, Python has not
    """The features of a step's samples by name, as problems [l x locations, n, d], labels first. Each is made anew whenever it is read.

    It is a `dict` for whoever empties those on the way: a map is let go with the last of its features.

    Args:
        maps: of every distinct image, [u, ...].
        readings: of every feature.
        places: [l, n], where among the distinct images those of each label are.
    """

    def __init__(self, maps: Mapping[str, Tensor], readings: Readings, places: Int[Tensor, "l n"]):
        super().__init__()
        self.maps, self.readings, self.places = dict(maps), dict(readings), places

    def __getitem__(self, name: str) -> Float[Tensor, "b n d"]:
        key, read = self.readings[name]
        return as_problems(read(self.maps[key]), self.places)

    def __setitem__(self, name: str, value: Tensor) -> None:
        raise TypeError(f"feature {name!r} cannot be set: features are read from maps; make a dict of them first")

    def __delitem__(self, name: str) -> None:
        key, _ = self.readings.pop(name)
        if all(other != key for other, _ in self.readings.values()):
            del self.maps[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.readings)

    def __len__(self) -> int:
        return len(self.readings)


def as_problems(values: Float[Tensor, "u l d"], places: Int[Tensor, "k n"]) -> Float[Tensor, "b n d"]:
    """Features of distinct images as one problem per (label, location), labels first."""
    if torch.equal(places.flatten(), torch.arange(len(values))):  # as they come: nothing to gather
        return values.unflatten(0, places.shape).transpose(1, 2).flatten(0, 1)
    locations = torch.arange(values.shape[1], device=values.device)[None, :, None]
    return values[places.to(values.device)[:, None], locations].flatten(0, 1)  # (k, l, n, d), in one copy


def in_pieces(encode: Callable[[slice], tuple[dict[str, Tensor], Readings]], count: int, size: int) -> tuple[dict[str, Tensor], Readings]:
    """The maps of so many images, or labels of equally many images, from those of so many at a time.

    Each is written where it stays, so that nothing is in memory twice.
    """
    whole: dict[str, Tensor] = {}
    readings: Readings = {}
    for first in range(0, count, size):
        maps, readings = encode(slice(first, first + size))
        if size >= count:
            return maps, readings
        for key in list(maps):
            values = maps.pop(key)
            each = len(values) // min(size, count - first)  # images of a label
            if key not in whole:
                whole[key] = values.new_empty(count * each, *values.shape[1:])
            whole[key][first * each : first * each + len(values)] = values
    return whole, readings
