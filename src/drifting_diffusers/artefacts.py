r"""The files of the reference release, read without trust in what they say of themselves.

An artefact is `metadata.json` beside `ema_params.msgpack`, or beside that file compressed with xz. The latter holds nested maps of strings whose
leaves are extension type 1: the packed triple (shape, dtype, little-endian bytes in C order).

Leaves become tensors while the file is read, so memory holds every tensor once, and one leaf more. Sizes that a file declares are allocated only as
far as its bytes are there. It may not hold more of them than its reader expects, no array larger than the largest that is expected, and no large one
of a size that is not.
"""

import json
import lzma
import math
import os
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

METADATA, TENSORS = "metadata.json", ("ema_params.msgpack", "ema_params.msgpack.xz")
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")}

MOST_METADATA = 1_000_000  # bytes; the release's have less than a thousandth of it
MOST_DEPTH = 32  # of maps within maps; the release has 6
MOST_KEYS = 10_000  # per map
MOST_LEAF = 2**31 - 1  # bytes; the release's writer splits arrays of more than 2^30
MODEST = 2**20  # bytes; smaller arrays that have no place are read all the same, so that they can be named
MOST_DICTIONARY = 2**28  # bytes that unpacking may take beside what it unpacks; xz -9 needs a quarter of it
READ = 2**20  # bytes at a time
WIDER = {torch.float16: "bfloat16", torch.bfloat16: "float32", torch.float32: "float64"}  # where what is too large for a type fits


def find_artefact(source: str | os.PathLike) -> tuple[dict[str, Any], Path]:
    """The metadata of an artefact and the file of its tensors.

    Args:
        source: the file, with `metadata.json` beside it; the folder of both; or the parent of such a folder `params_ema`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the metadata is not that of such an artefact.
    """
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    if source.is_dir() and not (source / METADATA).exists() and (source / "params_ema").is_dir():
        folder = source / "params_ema"
    candidates = [folder / name for name in TENSORS] if source.is_dir() or not source.exists() else [source]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None or not (folder / METADATA).is_file():
        lacking = [name for name, found in ((METADATA, (folder / METADATA).is_file()), (" or ".join(TENSORS), file)) if not found]
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(lacking)}: give the folder that the release's export wrote, or its .msgpack file with "
            f"{METADATA} beside it"
        )
    return _metadata(folder / METADATA), file


def _metadata(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MOST_METADATA:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {MOST_METADATA} of any metadata: it is something else")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch it again") from error
    if not isinstance(metadata, dict) or metadata.get("format") != "flax.msgpack":
        found = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise ValueError(f'the format of {path} is {str(found)[:80]!r}, only "flax.msgpack" can be read')
    if not isinstance(metadata.get("model_config"), dict):
        raise ValueError(f"{path} has no model_config: the network cannot be built without it")
    return metadata


def read_tensors(
    file: str | os.PathLike,
    *,
    most_bytes: int,
    most_tensors: int = 10_000,
    sizes: Collection[int] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors of an artefact, by their paths with slashes.

    Args:
        file: `.msgpack` or `.msgpack.xz`.
        most_bytes: how much the file may hold, unpacked; more is refused before it is read.
        most_tensors: how many.
        sizes: how many numbers the expected tensors have. A large array of another size ends the reading, one larger than all of them before it
            is read. Without it all sizes are read.
        dtype: what floating point numbers are cast to, each tensor as soon as it is read; none leaves them.

    Raises:
        ValueError: for what is broken, cut off, larger than allowed or no such file; for values that `dtype` cannot hold.
    """
    file = Path(file)
    if file.suffix != ".xz" and file.stat().st_size > most_bytes:
        raise _too_large(file.stat().st_size, most_bytes)
    most_leaf = MOST_LEAF if sizes is None else min(MOST_LEAF, 8 * max(sizes, default=0) + MODEST)  # at widest float64, and its shape
    with file.open("rb") as raw:
        stream = _Stream(_Unpacked(raw) if file.suffix == ".xz" else raw, most_bytes)
        tree = _Tree(most_tensors, sizes, dtype)
        unpacker = msgpack.Unpacker(
            stream,
            read_size=READ,
            max_buffer_size=min(MOST_LEAF, most_leaf + 2 * READ),
            max_ext_len=most_leaf,
            max_map_len=MOST_KEYS,
            max_array_len=0,
            max_bin_len=0,
            max_str_len=1000,
            ext_hook=tree.leaf,
            object_pairs_hook=tree.branch,
        )
        try:
            root = unpacker.unpack()
            left = stream.count - unpacker.tell() + len(stream.read(1))
        except (msgpack.UnpackException, lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is cut off or no msgpack ({type(error).__name__} {error}): fetch it again") from error
        except ValueError as error:
            hint = ": it declares more than anything that its model_config asks for" if "exceeds max_" in str(error) else ""
            raise ValueError(f"{file}: {error}{hint}") from error
    if left:
        raise ValueError(f"{file} goes on after its end, by {left} bytes or more: it is no artefact of the release")
    return _flat(root)


def shown(path: str) -> str:
    """A path from a file as an error may print it: on one line, without control characters, of bounded length."""
    path = path if path.isprintable() else repr(path)[1:-1]
    return path if len(path) <= 200 else f"{path[:200]}..."


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another type.

    Raises:
        ValueError: if the type cannot hold its values.
    """
    found = tensor.to(dtype)
    if not found.isfinite().all():
        raise ValueError(too_large_for(dtype))
    return found


def too_large_for(dtype: torch.dtype) -> str:
    return f"holds values too large for {str(dtype).removeprefix('torch.')}: take {WIDER[dtype]}"


def _flat(root: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for raw, leaf in _walk(root):
        path = shown(raw)  # a path that this changes is none of the release's; it only waits to be named
        if isinstance(leaf, _Broken):
            raise ValueError(f"{path} {leaf}")
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{path or 'the root'} is no array but {shown(str(leaf))[:80]}: only arrays (extension type 1) can be read")
        if path in found:
            raise ValueError(f"{path} stands twice: it is no artefact of the release")
        found[path] = leaf
    return found


class _Unpacked:
    """The content of an .xz file. Unlike `lzma.open` it refuses what stands behind its end, and a dictionary that takes all memory."""

    def __init__(self, raw: Any):
        self.raw, self.part = raw, self._decompressor()

    def _decompressor(self) -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_DICTIONARY)

    def read(self, n: int) -> bytes:
        data = b""
        while not data:
            given = b""
            if self.part.eof:  # another stream may follow, after padding with zeros
                given = self.part.unused_data.lstrip(b"\0")
                while not given:
                    if not (more := self.raw.read(READ)):
                        return b""
                    given = more.lstrip(b"\0")
                self.part = self._decompressor()
            elif self.part.needs_input and not (given := self.raw.read(READ)):
                raise EOFError("the compressed data end too early")
            data = self.part.decompress(given, n)
        return data


class _Stream:
    """A file that ends with an error after `most` bytes."""

    def __init__(self, raw: Any, most: int):
        self.raw, self.most, self.count = raw, most, 0

    def read(self, n: int) -> bytes:
        data = self.raw.read(n)
        self.count += len(data)
        if self.count > self.most:
            raise _too_large(self.count, self.most)
        return data


def _too_large(size: int, most: int) -> ValueError:
    return ValueError(f"there are {size} bytes or more, model_config asks for {most} at most: they do not belong together")


class _Broken(str):
    """What is wrong with a leaf."""


class _Tree:
    """What the parser calls back: arrays become tensors at once, entries are counted, and no map may repeat a key."""

    def __init__(self, most: int, sizes: Collection[int] | None, dtype: torch.dtype | None):
        self.unpack = partial(msgpack.unpackb, max_array_len=MOST_DEPTH, max_map_len=0, max_ext_len=0)
        self.errors = (TypeError, ValueError, msgpack.UnpackException)
        self.most, self.dtype, self.count = most, dtype, 0
        self.sizes = None if sizes is None else frozenset(sizes)

    def branch(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._count(1 + len(pairs))
        found = dict(pairs)
        if len(found) != len(pairs):
            names = ", ".join(shown(str(key)) for key in list(found)[:5])
            raise ValueError(f"a key stands twice among {names}: it is no artefact of the release")
        return found

    def leaf(self, code: int, packed: bytes) -> "Tensor | _Broken":
        """The tensor, or why there is none: which path it has is known only when its map is whole."""
        self._count(1)
        if code != 1:
            return _Broken(f"is no array but extension type {code}: only arrays (extension type 1) can be read")
        try:
            shape, dtype, data = self.unpack(packed)
        except self.errors as error:
            return _Broken(f"is no (shape, dtype, bytes): {error}")
        if not (isinstance(shape, list) and all(type(n) is int for n in shape) and isinstance(data, bytes)):
            return _Broken(f"is no (shape, dtype, bytes) but {shown(str(shape)[:80])}, {shown(str(dtype)[:40])}, {type(data).__name__}")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            return _Broken(f"has dtype {str(dtype)[:40]!r}; readable are {', '.join(DTYPES)}")
        return self._tensor(shape, DTYPES[dtype], data)

    def _tensor(self, shape: list[int], dtype: torch.dtype, data: bytes) -> "Tensor | _Broken":
        count = math.prod(shape)
        size = count * dtype.itemsize
        huge = math.prod(max(n, 1) for n in shape) >= 2**62  # of which the rest is no tensor even where one side is 0
        if min(shape, default=1) < 0 or huge or len(data) != size:
            return _Broken(f"{shape} of {dtype} takes {size} bytes, the file has {len(data)}: it is cut off or not what it says")
        if self.sizes is not None and size > MODEST and count not in self.sizes:
            raise ValueError(f"there is an array {shape}, and model_config asks for none of {count} numbers: they do not belong together")
        tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
        if not tensor.isfinite().all():
            return _Broken("holds values that are not finite")
        try:
            return cast(tensor, self.dtype) if self.dtype is not None and dtype.is_floating_point else tensor
        except ValueError as error:
            return _Broken(error)

    def _count(self, entries: int) -> None:
        """Enough for a map around every map of every array, and for a few arrays too many that can then be named."""
        self.count += entries
        if self.count > 10 * self.most + 100:
            raise ValueError(f"there are far more than the {self.most} arrays that its model_config asks for: they do not belong together")


def _walk(tree: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    if depth > MOST_DEPTH:
        raise ValueError(f"{shown(path[:80])} ... lies deeper than {MOST_DEPTH} maps: it is no artefact of the release")
    for key, branch in tree.items():
        yield from _walk(branch, f"{path}/{key}" if path else str(key), depth + 1)
