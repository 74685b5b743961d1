"""Files and folders that are there whole or not at all: written beside, under the name with ".partial" behind it, and renamed at the end.

What is killed meanwhile leaves the partial one, which the next attempt replaces. Folders on the way to a path are made.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """A file of this text, in UTF-8; one that is there is replaced."""
    aside = _aside(path)
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file; one that is there is replaced."""
    aside = _aside(path)
    aside.touch()
    mode = aside.stat().st_mode  # as the system's umask says; safetensors leaves its files to their owner alone
    save_file(dict(tensors), aside, None if metadata is None else dict(metadata))
    aside.chmod(mode)
    aside.replace(path)


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """A folder that `fill` is given empty, under another name; one that is there is removed when the new one is full."""
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    fill(aside)
    if path.exists():  # a folder with something in it cannot be replaced
        shutil.rmtree(path)
    aside.rename(path)


def _aside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + ".partial")
