r"""From the reference release's artefacts to our models, every tensor accounted for.

A source is the name of a released artefact, which is downloaded, converted once and kept; or a folder or file of one's own.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from huggingface_hub import cached_assets_path, snapshot_download
from huggingface_hub.utils import WeakFileLock

from .artefacts import find_artefact, read_tensors
from .layouts import KINDS, rename
from .releases import RELEASES, REPOSITORY

Model = TypeVar("Model", bound=ModelMixin)

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
        dtype: what floating point weights are cast to; none leaves the release's, float32.
        revision: of the release's repository.
        token: for the Hub.
        cache_dir: where downloads and conversions are kept; the Hub's cache if not given.
        local_files_only: whether to do without the network.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: for an unknown name, an artefact of another kind, a broken one, or tensors that are missing, left over or of another shape.
    """
    where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    release = RELEASES.get(str(source))
    if release is None:
        return convert(cls, kind, find_source(source), dtype=dtype)
    if release.kind != kind:
        fitting = [name for name, other in RELEASES.items() if other.kind == kind]
        raise ValueError(f'{source} holds a "{release.kind}", not a "{kind}"; those are {", ".join(fitting)}')
    artefact = find_source(source, **where)
    commit = artefact.parents[len(Path(release.path).parts) - 1].name
    kept = cached_assets_path("drifting_diffusers", "releases", release.name, assets_dir=Path(cache_dir, "assets") if cache_dir else None)
    return _kept(cls, kind, artefact, kept / f"{commit}-{LAYOUT}", dtype)


def find_source(source: str | os.PathLike, **where: Any) -> Path:
    """Where an artefact lies: a folder or file as it is given, or, for a released name, the download of it in the Hub's cache.

    What is there already is not fetched again, and what was cut off goes on where it stopped.

    Args:
        source: as in `from_release`.
        where: revision, token, cache_dir and local_files_only, as `snapshot_download` takes them.

    Raises:
        FileNotFoundError: if there is no such folder, file or name.
    """
    release = RELEASES.get(str(source))
    if release is None:
        if not Path(source).exists():
            raise FileNotFoundError(
                f"{source} is neither a released artefact ({', '.join(RELEASES)}) nor a folder or file: check the name or the path"
            )
        return Path(source)
    wanted = [f"{release.path}/*{name}" for name in ("metadata.json", ".msgpack", ".msgpack.xz")]
    folder = Path(snapshot_download(REPOSITORY, allow_patterns=wanted, **where)) / release.path
    if not folder.is_dir():
        raise FileNotFoundError(f"{REPOSITORY} has no {release.path}: give the revision that has it, or the folder of a copy")
    return folder


def _kept(cls: type[Model], kind: str, artefact: Path, folder: Path, dtype: torch.dtype | None) -> Model:
    """The conversion in `folder`, made and put there first if need be; processes that start together wait for one of them."""
    with WeakFileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
            try:
                convert(cls, kind, artefact).save_pretrained(part)
                part.rename(folder)  # whole or not at all
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return cls.from_pretrained(folder, dtype=dtype)


def convert(cls: type[Model], kind: str, source: str | os.PathLike, *, dtype: torch.dtype | None = None) -> Model:
    """The model of a folder or file; see `from_release`."""
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"dtype must be torch.float32, torch.bfloat16, torch.float16 or torch.float64, got {dtype!r}")
    metadata, file = find_artefact(source)
    found = kind_of(metadata)
    if found != kind:
        raise ValueError(f'{source} holds a "{found}", not a "{kind}": {_HINTS[found]}')
    config, layout = KINDS[kind]
    with torch.device("meta"):  # shapes without memory: the tensors of the file become the weights
        model = cls(**config(metadata["model_config"]))
    ours = model.state_dict()
    numbers = sum(tensor.numel() for tensor in ours.values())
    rows = layout(model.config)
    paths = sum(len(parts) for _, parts in rows)
    tensors = read_tensors(file, most_bytes=8 * numbers + 1000 * paths + 1000, most_tensors=paths, dtype=dtype)  # at widest float64
    model.load_state_dict(rename(rows, tensors, ours), assign=True)
    return model.eval().requires_grad_(True)


_HINTS = {"gen": "take DriftingPipeline.from_release", "mae": "take MaskedAutoencoder.from_release"}


def kind_of(metadata: Mapping[str, Any]) -> str:
    """What an artefact holds: "gen" or "mae"."""
    kind = metadata.get("kind")
    if kind not in KINDS:
        raise ValueError(f"the artefact holds a {json.dumps(kind)[:80]}, only {' and '.join(map(json.dumps, KINDS))} can be read")
    return kind
