r"""From the reference release's artefacts to our models, every tensor accounted for.

A source is the name of a released artefact, which is downloaded, converted once and kept; or a folder or file of one's own.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from huggingface_hub import cached_assets_path, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError
from torch import Tensor

from .artefacts import METADATA, TENSORS, cast, find_artefact, read_tensors, too_large_for
from .layouts import KINDS, check_weights, part_shape, rename
from .releases import RELEASES, REPOSITORY

Model = TypeVar("Model", bound=ModelMixin)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUT = 1  # goes up when conversion changes, so that what older versions kept is not taken for it


def from_release(
    cls: type[Model],
    kind: str,
    source: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Model:
    """A model with the averaged weights of the release, in evaluation mode.

    Args:
        cls: the class to build.
        kind: "gen" or "mae", what the artefact must hold.
        source: a name of `RELEASES`, which comes before a folder of the same name; or a folder, or a `.msgpack` or `.msgpack.xz` file.
        dtype: what floating point weights are cast to; none leaves the release's, float32. Of a file whose weights differ in type none is float32.
        revision: of the release's repository; a folder or file has none.
        token: for the Hub.
        cache_dir: where downloads and conversions are kept; the Hub's cache if not given.
        local_files_only: whether to do without the network.

    Raises:
        FileNotFoundError: if there is no such folder or file; if there is no network and the artefact is not in the cache.
        ValueError: for an unknown name, an artefact of another kind, a broken one, tensors that are missing, left over or of another shape, or
            weights that `dtype` cannot hold.
        TypeError: for another `dtype`.
    """
    check_dtype(dtype)
    where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    release = RELEASES.get(str(source))
    if release is None:
        path = find_source(source)
        if revision is not None:
            raise ValueError(f"revision {revision!r} is of the release's repository, {path} is a folder or file: leave it out")
        return convert(cls, kind, path, dtype=dtype)
    if release.kind != kind:
        fitting = [name for name, other in RELEASES.items() if other.kind == kind]
        raise ValueError(f'{source} holds a "{release.kind}", not a "{kind}"; those are {", ".join(fitting)}')
    kept = cached_assets_path("drifting_diffusers", "releases", release.name, assets_dir=Path(cache_dir, "assets") if cache_dir else None)
    try:
        artefact = find_source(source, **where)
    except NotCachedError:
        made = [folder for folder in kept.glob(f"[0-9a-f]*-{LAYOUT}") if folder.is_dir()]
        if revision is not None or len(made) != 1:  # of several, which one is meant stood in the download
            raise
        return _load(cls, made[0], dtype)
    commit = artefact.parents[len(Path(release.path).parts) - 1].name
    return _kept(cls, kind, artefact, kept / f"{commit}-{LAYOUT}", dtype)


class NotCachedError(FileNotFoundError):
    """An artefact that is not, or not whole, in the cache of a machine without the network."""


def find_source(source: str | os.PathLike, **where: Any) -> Path:
    """Where an artefact lies: a folder or file as it is given, or, for a released name, the download of it in the Hub's cache.

    What is there already is not fetched again, and what was cut off goes on where it stopped.

    Args:
        source: as in `from_release`.
        where: revision, token, cache_dir and local_files_only, as `snapshot_download` takes them.

    Raises:
        FileNotFoundError: if there is no such folder, file or name; `NotCachedError` if the Hub cannot be asked for it.
    """
    release = RELEASES.get(str(source))
    if release is None:
        if not Path(source).exists():
            raise FileNotFoundError(
                f"{source} is neither a released artefact ({', '.join(RELEASES)}) nor a folder or file: check the name or the path"
            )
        return Path(source)
    wanted = [f"{release.path}/*{name}" for name in ("metadata.json", ".msgpack", ".msgpack.xz")]
    lacking = f"{source} is not in the cache, or not whole, and the Hub cannot be asked: go online once, or give the folder of a copy"
    try:
        folder = Path(snapshot_download(REPOSITORY, allow_patterns=wanted, **where)) / release.path
    except LocalEntryNotFoundError as error:
        raise NotCachedError(f"{lacking} ({type(error.__cause__ or error).__name__})") from error
    if (folder / METADATA).is_file() and any((folder / name).is_file() for name in TENSORS):
        return folder
    if constants.HF_HUB_OFFLINE or where.get("local_files_only"):
        raise NotCachedError(lacking)
    raise FileNotFoundError(
        f"{REPOSITORY} has no {release.path} that is whole, or could not be reached: give the revision that has it, or the folder of a copy"
    )


def _kept(cls: type[Model], kind: str, artefact: Path, folder: Path, dtype: torch.dtype | None) -> Model:
    """The conversion in `folder`, made and put there first if need be; processes that start together wait for one of them."""
    if not folder.exists():  # a cache that others filled may be read-only, so nothing is locked in it without need
        with WeakFileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                with made_whole(folder) as part:
                    convert(cls, kind, artefact).save_pretrained(part)
    return _load(cls, folder, dtype)


def _load(cls: type[Model], folder: Path, dtype: torch.dtype | None) -> Model:
    try:
        model = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"what was converted and kept in {folder} cannot be read: delete that folder, and it is made anew ({type(error).__name__}: {error})"
        ) from error
    lost = next((name for name, values in model.state_dict().items() if dtype is not None and not values.isfinite().all()), None)
    if lost is not None:  # what was kept is finite
        raise ValueError(f"{lost} {too_large_for(dtype or torch.float32)}")
    return model


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder`, which must not exist or be empty, at the end: whole or not at all.

    What is killed meanwhile leaves `.NAME.partial-...` beside it, which can be deleted. After an error nothing is left, no parents either.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.partial-", ignore_cleanup_errors=True) as own:
            part = Path(own, folder.name)  # within the temporary one, which nobody else may read
            part.mkdir()
            yield part
            for path in part.rglob("*"):
                if path.is_file():  # safetensors writes files that nobody else may read, whatever the umask says
                    path.chmod(part.stat().st_mode & 0o666)
            part.replace(folder)
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # somebody else uses it by now
                parent.rmdir()
        raise


def check_dtype(dtype: object) -> None:
    """Refuse what weights cannot be cast to."""
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be {', '.join(map(str, DTYPES[:-1]))} or {DTYPES[-1]}, got {dtype!r}")


def convert(cls: type[Model], kind: str, source: str | os.PathLike, *, dtype: torch.dtype | None = None) -> Model:
    """The model of a folder or file; see `from_release`."""
    check_dtype(dtype)
    metadata, file = find_artefact(source)
    found = kind_of(metadata)
    if found != kind:
        raise ValueError(f'{source} holds a "{found}", not a "{kind}": {_HINTS[found]}')
    config, layout = KINDS[kind]
    with torch.device("meta"):  # shapes without memory: the tensors of the file become the weights
        model = cls(**config(metadata["model_config"]))
    ours = model.state_dict()
    numbers = sum(tensor.numel() for tensor in ours.values())
    check_weights(numbers)
    rows = layout(model.config)
    paths = sum(len(parts) for _, parts in rows)
    sizes = {math.prod(part_shape(row, ours)) for row in rows}
    most_bytes = 8 * numbers + 1000 * paths + 1000  # at widest float64
    tensors = read_tensors(file, most_bytes=most_bytes, most_tensors=paths, sizes=sizes, dtype=dtype)
    _unify(tensors)
    model.load_state_dict(rename(rows, tensors, ours), assign=True)
    return model.eval().requires_grad_(True)


def _unify(tensors: dict[str, Tensor]) -> None:
    """Float32 for all of them where they differ in type: such a network cannot run."""
    floating = {path: tensor for path, tensor in tensors.items() if tensor.is_floating_point()}
    if len({tensor.dtype for tensor in floating.values()}) < 2:
        return
    for path, tensor in floating.items():
        try:
            tensors[path] = cast(tensor, torch.float32)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error


_HINTS = {"gen": "take DriftingPipeline.from_release", "mae": "take MaskedAutoencoder.from_release"}


def kind_of(metadata: Mapping[str, Any]) -> str:
    """What an artefact holds: "gen" or "mae"."""
    kind = metadata.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"the artefact holds a {json.dumps(kind)[:80]}, only {' and '.join(map(json.dumps, KINDS))} can be read")
    return kind
