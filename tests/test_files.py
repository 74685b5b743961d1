"""What is written is there whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from drifting_diffusers.files import write_folder, write_tensors, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_text(tmp_path):
    file = tmp_path / "new/deep/of.json"
    for text in ("Größe\n", "another\n"):
        write_text(file, text)
        assert file.read_bytes() == text.encode()
    assert names(file.parent) == ["of.json"]


def test_tensors(tmp_path):
    file = tmp_path / "new/of.safetensors"
    write_tensors(file, {"x": torch.ones(3)})
    assert load_file(file)["x"].tolist() == [1, 1, 1]
    write_tensors(file, {"y": torch.zeros(2)}, {"made": "of nothing"})
    with safe_open(file, framework="pt") as opened:
        assert (list(opened.keys()), opened.metadata()) == (["y"], {"made": "of nothing"})
    assert names(file.parent) == ["of.safetensors"]


def test_a_folder(tmp_path):
    folder = tmp_path / "new/best"

    def fill(given: Path) -> None:
        assert given == folder.with_name("best.partial")
        assert names(given) == []
        (given / "a").write_text(str(folder.exists()))

    for there in ("False", "True"):  # the old one stays until the new one is full
        write_folder(folder, fill)
        assert (folder / "a").read_text() == there
        assert names(tmp_path / "new") == ["a", "best"]
        (folder / "old").touch()


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    def half(given: Path) -> None:
        (given / "half").touch()
        fail()

    text, tensors, folder = tmp_path / "text", tmp_path / "tensors", tmp_path / "folder"
    write_text(text, "old")
    write_tensors(tensors, {"x": torch.ones(1)})
    write_folder(folder, lambda given: (given / "old").touch())
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_text(text, "new")
    with pytest.raises(OSError, match="no space left"):
        write_tensors(tensors, {"x": torch.zeros(1)})
    with pytest.raises(OSError, match="no space left"):
        write_folder(folder, half)
    assert (text.read_text(), load_file(tensors)["x"].tolist(), names(folder)) == ("old", [1], ["old"])
    write_folder(folder, lambda given: (given / "new").touch())  # what the failure left is not in it
    assert names(folder) == ["new"]
    assert not (tmp_path / "folder.partial").exists()
