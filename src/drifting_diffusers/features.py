"""What samples are compared in: a feature map turns images into named sets of vectors, one per location."""

import contextlib
import inspect
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .encoded import Reading
from .shapes import Float


@runtime_checkable
class FeatureMap(Protocol):
    """Images [n, c, h, w] in [-1, 1] to `{name: [n, l, d]}`: l locations of d channels. Differentiable in the images; nothing in it is trained here."""

    def __call__(self, images: Tensor) -> dict[str, Tensor]: ...


class Pixels(nn.Module):
    """The image itself as one vector: the "vanilla" term of arXiv 2602.04770, A.5."""

    def forward(self, images: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n 1 d"]]:
        return {"pixels": images.flatten(1)[:, None]}


class Windows(nn.Module):
    """Overlapping square windows of pixels, one location each: what is near must agree, wherever patches of the generator meet.

    Args:
        side: of a window, in pixels.
        stride: from one window to the next, in pixels; it must divide what the image has beyond one window, in both directions.
    """

    def __init__(self, side: int = 8, stride: int = 4):
        super().__init__()
        self.side, self.stride = side, stride

    def extra_repr(self) -> str:
        return f"side={self.side}, stride={self.stride}"

    def forward(self, images: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n l d"]]:
        for length in images.shape[2:]:
            if length < self.side or (length - self.side) % self.stride:
                raise ValueError(
                    f"windows of {self.side} pixels at a stride of {self.stride} do not reach the border of images of {tuple(images.shape[2:])}; "
                    f"choose a stride that divides {length} - {self.side}"
                )
        return {f"windows_{self.side}": F.unfold(images, self.side, stride=self.stride).mT}


class MultiScaleStatistics(nn.Module):
    r"""Fixed statistics of windows: what is seen without a trained encoder. They are ours, not of a paper.

    For every scale s, over windows of s x s pixels side by side, each as one vector of all windows and channels:

        mean_s     mean of the pixels
        edges_s    mean of sqrt(r^2 + eps) of the responses r of oriented edge and line filters, the derivatives of Gaussians of several widths

    Means hold shape and shade; edges hold outline and texture wherever exactly they lie in the window, which pixels, compared one by one, cannot.

    Args:
        mean_scales: sides of the windows of the means, in pixels.
        edge_scales: sides of the windows of the edges.
        widths: standard deviations of the filters, in pixels.
        orientations: directions of the filters, evenly over half a turn.
    """

    filters: Tensor

    def __init__(
        self,
        mean_scales: tuple[int, ...] = (4,),
        edge_scales: tuple[int, ...] = (4,),
        widths: tuple[float, ...] = (1.0, 1.8),
        orientations: int = 4,
    ):
        super().__init__()
        self.mean_scales, self.edge_scales, self.widths, self.orientations = mean_scales, edge_scales, widths, orientations
        self.register_buffer("filters", oriented_filters(widths, orientations), persistent=False)

    def extra_repr(self) -> str:
        return f"mean_scales={self.mean_scales}, edge_scales={self.edge_scales}, widths={self.widths}, orientations={self.orientations}"

    def forward(self, images: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n 1 _"]]:
        for scale in (*self.mean_scales, *self.edge_scales):
            if images.shape[2] % scale or images.shape[3] % scale:
                raise ValueError(
                    f"windows of {scale} pixels do not tile images of {tuple(images.shape[2:])}; choose scales that divide both sides"
                )
        found = {f"mean_{s}": F.avg_pool2d(images, s) for s in self.mean_scales}
        if self.edge_scales:
            channels = images.shape[1]
            filters = self.filters.to(images).repeat(channels, 1, 1, 1)  # every channel by every filter
            responses = F.conv2d(images, filters, padding=filters.shape[-1] // 2, groups=channels)
            magnitudes = (responses.square() + 1e-4).sqrt()  # at 0 a bare magnitude has no gradient
            found |= {f"edges_{s}": F.avg_pool2d(magnitudes, s) for s in self.edge_scales}
        return {name: values.flatten(1)[:, None] for name, values in found.items()}


def oriented_filters(widths: tuple[float, ...], orientations: int) -> Float[Tensor, "k 1 side side"]:
    """First and second derivatives of Gaussians along each direction, without response to a constant, of unit absolute sum."""
    radius = math.ceil(1.5 * max(widths))
    axis = torch.arange(-radius, radius + 1, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    filters = []
    for width in widths:
        bell = torch.exp(-(x**2 + y**2) / (2 * width**2))
        for k in range(orientations):
            along = x * math.cos(math.pi * k / orientations) + y * math.sin(math.pi * k / orientations)
            for derivative in (along * bell, (along**2 / width**2 - 1) * bell):
                centred = derivative - derivative.mean()
                filters.append(centred / centred.abs().sum())
    return torch.stack(filters)[:, None]


def map_statistics(
    name: str,
    maps: Float[Tensor, "n c h w"],
    *,
    locations: bool = True,
    mean: bool = True,
    std: bool = True,
    mean_windows: Sequence[int] = (2, 4),
    std_windows: Sequence[int] = (2, 4),
) -> dict[str, Float[Tensor, "n l c"]]:
    """An activation map seen at several scales, in float32 (arXiv 2602.04770, A.5): `name`, `name_mean`, `name_std`, `name_mean_2` and so on.

    A standard deviation is sqrt(population variance + 1e-6): at 0 the bare root has no gradient.

    Args:
        name: of the map.
        maps: one per image.
        locations: whether every place is a location of its own, in row-major order.
        mean: whether to take the mean over all places, one location.
        std: the same for the standard deviation.
        mean_windows: sides of square windows side by side, one location each; a side that does not divide the map's is left out.
        std_windows: the same for standard deviations.

    Raises:
        ValueError: for windows without a side.
    """
    reads = map_readings(name, maps, locations=locations, mean=mean, std=std, mean_windows=mean_windows, std_windows=std_windows)
    maps = maps.float()
    return {key: read(maps) for key, read in reads.items()}


def map_readings(
    name: str,
    maps: Float[Tensor, "n c h w"],
    *,
    locations: bool = True,
    mean: bool = True,
    std: bool = True,
    mean_windows: Sequence[int] = (2, 4),
    std_windows: Sequence[int] = (2, 4),
) -> dict[str, Reading]:
    """`map_statistics`, each still to be taken of maps of this size; see there."""
    check_windows(mean_windows, std_windows)
    fits = lambda side: maps.shape[2] % side == maps.shape[3] % side == 0
    found: dict[str, Reading] = {name: _places} if locations else {}
    if mean:
        found[f"{name}_mean"] = lambda maps: maps.float().mean((2, 3)).unsqueeze(1)
    if std:
        found[f"{name}_std"] = lambda maps: (maps.float().var((2, 3), correction=0).unsqueeze(1) + 1e-6).sqrt()
    found |= {f"{name}_mean_{side}": partial(_window_means, side) for side in mean_windows if fits(side)}
    found |= {f"{name}_std_{side}": partial(_window_stds, side) for side in std_windows if fits(side)}
    return found


def _places(maps: Tensor) -> Tensor:
    return maps.float().flatten(2).mT


def _windows(side: int, maps: Tensor) -> Tensor:
    return maps.float().unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (n, c, rows, side, columns, side)


def _window_means(side: int, maps: Tensor) -> Tensor:
    return _places(_windows(side, maps).mean((3, 5)))


def _window_stds(side: int, maps: Tensor) -> Tensor:
    return _places((_windows(side, maps).var((3, 5), correction=0) + 1e-6).sqrt())


RECOMPILATIONS = 64  # of one block
HOPS = 6  # from a feature map to a network that it holds; an attribute, an entry, a name in a function is one


def networks_of(feature_map: Any) -> list[nn.Module]:
    """The networks that a feature map holds: itself, the owner of a method, what a function names, attributes, entries of containers, a few hops deep."""
    found: dict[int, nn.Module] = {}
    seen: dict[int, Any] = {}  # kept, so that no number is of two objects
    here = [feature_map]
    for _ in range(HOPS):
        here = [value for value in here if id(value) not in seen]
        seen |= {id(value): value for value in here}
        found |= {key: value for key, value in seen.items() if isinstance(value, nn.Module)}
        here = [held for value in here if not isinstance(value, nn.Module) for held in _held_by(value)]
    inner = {id(part) for network in found.values() for part in network.modules() if part is not network}
    return [network for key, network in found.items() if key not in inner]


def compile_networks(feature_map: Any) -> bool:
    """Compile the networks of a feature map in place, their repeated blocks where they have such; whether there was any with weights."""
    found = [network for network in networks_of(feature_map) if any(True for _ in network.parameters())]
    limits = (
        torch._dynamo.config
    )  # blocks of four widths, with a graph and without: beyond the 8 of torch the rest would run as if not compiled
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILATIONS)
    for network in found:
        if getattr(network, "_repeated_blocks", None):
            cast(Any, network).compile_repeated_blocks()
        elif inspect.ismethod(feature_map):  # it calls parts of its owner, never the owner
            for part in _called(network):
                part.compile()
        else:
            network.compile()
    return bool(found)


def _called(network: nn.Module) -> list[nn.Module]:
    """Children, and those of containers that cannot be called themselves."""
    containers = (nn.ModuleList, nn.ModuleDict)
    return [part for child in network.children() for part in (_called(child) if isinstance(child, containers) else [child])]


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if inspect.isfunction(value):
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        return [
            *named,
            *_contents(value.__closure__ or ()),
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
            *vars(value).values(),
        ]
    plain = inspect.isclass(value) or inspect.ismodule(value) or isinstance(value, str | bytes | Tensor)
    return [] if plain else list(getattr(value, "__dict__", {}).values())


def _contents(cells: Iterable[Any]) -> list[Any]:
    """What a function closes over, without what is not there yet."""
    found = []
    for cell in cells:
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    return found


def check_windows(mean_windows: Sequence[int], std_windows: Sequence[int]) -> None:
    """Refuse sides of windows that are none."""
    for windows in (mean_windows, std_windows):
        if not isinstance(windows, Sequence) or not all(type(side) is int and side >= 1 for side in windows):
            raise ValueError(f"windows must have sides of at least 1, in integers, got {mean_windows} and {std_windows}; () is none")
