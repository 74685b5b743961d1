"""The release's files: read whole, or refused by name and in bounded memory."""

import json
import lzma
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import msgpack
import pytest
import torch
from release_files import packed, tree_of, write_artefact, write_metadata
from torch import Tensor
from torch.testing import assert_close

from drifting_diffusers.artefacts import MOST_METADATA, find_artefact, read_tensors


def read(folder: Path, most_bytes: int = 10**6, **kwargs) -> dict[str, Tensor]:
    return read_tensors(find_artefact(folder)[1], most_bytes=most_bytes, **kwargs)


def some() -> dict[str, Tensor]:
    return {f"block_{i}/kernel": torch.randn(20, 30, generator=torch.Generator().manual_seed(i)) for i in range(3)}


@pytest.mark.parametrize("kind", ["gen", "mae"])
def test_recorded_artefacts_are_read_whole(shared, kind):
    for name, index in json.loads((shared / f"fixtures/{kind}/index.json").read_text()).items():
        metadata, file = find_artefact(shared / f"fixtures/{kind}/{name}")
        tensors = read_tensors(file, most_bytes=8 * index["n_params"] + 10**6)
        assert (metadata["kind"], metadata["model_config"]) == (kind, index["model_config"])
        assert {path: list(tensor.shape) for path, tensor in tensors.items()} == index["params"]
        assert sum(t.numel() for t in tensors.values()) == index["n_params"]


def test_a_folder_its_parent_a_file_and_a_compressed_file_are_the_same(tmp_path):
    folder = write_artefact(tmp_path / "run/params_ema", some())
    plain = folder / "ema_params.msgpack"
    assert find_artefact(tmp_path / "run") == find_artefact(folder) == find_artefact(plain) == ({**find_artefact(plain)[0]}, plain)
    (folder / "other.msgpack.xz").write_bytes(lzma.compress(plain.read_bytes()))
    expected, compressed = read(folder), read(folder / "other.msgpack.xz")
    assert expected.keys() == compressed.keys() == some().keys()
    for path, tensor in some().items():
        assert_close(expected[path], tensor, rtol=0, atol=0)
        assert_close(compressed[path], tensor, rtol=0, atol=0)


def test_other_dtypes_keep_their_values_and_are_cast_on_request(tmp_path):
    values = torch.tensor([[0.5, -2.0], [3.0, 0.25]])
    leaves = {
        "bf16": packed(values.bfloat16(), "bfloat16"),
        "half": packed(values.half(), "float16"),
        "double": packed(values.double(), "float64"),
        "int": packed(torch.tensor([7]), "int64"),
        "none": packed(torch.empty(0, 3)),
        "scalar": packed(torch.tensor(1.5)),
    }
    expected = {
        "bf16": values.bfloat16(), "half": values.half(), "double": values.double(), "int": torch.tensor([7]), "none": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
    }  # fmt: skip
    write_artefact(tmp_path, leaves)
    found, cast = read(tmp_path), read(tmp_path, dtype=torch.bfloat16)
    for name, tensor in expected.items():
        assert_close(found[name], tensor, rtol=0, atol=0)
        assert_close(cast[name], tensor.bfloat16() if tensor.is_floating_point() else tensor, rtol=0, atol=0)


def triple(*parts) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb(parts))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (triple([2, 2], "float32", b"\0" * 12), r"a/b \[2, 2\] of torch.float32 takes 16 bytes, the file has 12"),
        (triple([-1, -4], "float32", b"\0" * 16), "a/b .*cut off or not what it says"),
        (triple([2**62, 0], "float32", b""), "a/b .*cut off or not what it says"),
        (triple([0, 2**31 - 1, 2**31 - 1, 2**31 - 1], "float32", b""), "a/b .*cut off or not what it says"),
        (triple([2], "complex64", b"\0" * 16), "a/b has dtype 'complex64'; readable are float64"),
        (triple([2], 3, b"\0" * 16), "a/b has dtype '3'"),
        (triple("float32", b""), r"a/b is no \(shape, dtype, bytes\)"),
        (triple(["a"], "float32", b""), r"a/b is no \(shape, dtype, bytes\)"),
        (triple([True], "uint8", b"\0"), r"a/b is no \(shape, dtype, bytes\)"),
        (triple([1], "uint8", "text"), r"a/b is no \(shape, dtype, bytes\)"),
        (triple([1] * 100, "uint8", b"\0"), r"a/b is no \(shape, dtype, bytes\)"),
        (triple([[1]], "uint8", b"\0"), r"a/b is no \(shape, dtype, bytes\)"),
        (msgpack.ExtType(1, b"\xc1"), r"a/b is no \(shape, dtype, bytes\)"),
        (msgpack.ExtType(2, b""), "a/b is no array but extension type 2"),
        (7, "a/b is no array but 7"),
        (torch.tensor([1.0, float("nan")]), "a/b holds values that are not finite"),
        (torch.tensor([1.0, float("inf")]), "a/b holds values that are not finite"),
    ],
)
def test_broken_leaves_are_refused_by_their_path(tmp_path, leaf, message):
    with pytest.raises(ValueError, match=message):
        read(write_artefact(tmp_path, {"a/b": leaf}))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
def test_cut_off_files_are_refused(tmp_path, share, compressed):
    file = write_artefact(tmp_path, some()) / "ema_params.msgpack"
    data = lzma.compress(file.read_bytes()) if compressed else file.read_bytes()
    file.unlink()
    (tmp_path / f"ema_params.msgpack{'.xz' * compressed}").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="cut off or no msgpack"):
        read(tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_what_is_larger_than_the_model_is_refused(tmp_path, compressed):
    file = write_artefact(tmp_path, some()) / "ema_params.msgpack"
    if compressed:
        (tmp_path / "ema_params.msgpack.xz").write_bytes(lzma.compress(file.read_bytes()))
        file.unlink()
    with pytest.raises(ValueError, match="model_config asks for 5000 at most"):
        read(tmp_path, most_bytes=5000)
    with pytest.raises(ValueError, match="far more than the 10 arrays"):
        read(write_artefact(tmp_path / "many", {str(i): torch.zeros(1) for i in range(300)}), most_tensors=10)


def test_only_arrays_of_sizes_that_are_expected_are_read_beyond_a_megabyte(tmp_path):
    """A file that declares no more than its model has may still be none of its tensors; a small mistake is kept, to be named later."""
    write_artefact(tmp_path, {"a": torch.zeros(600, 600), "b": torch.zeros(7)})
    assert read(tmp_path, most_bytes=10**8, sizes={360_000}).keys() == {"a", "b"}
    with pytest.raises(ValueError, match=r"an array \[600, 600\], and model_config asks for none of 360000 numbers"):
        read(tmp_path, most_bytes=10**8, sizes={7, 400_000})
    with pytest.raises(
        ValueError, match=r"1440\d\d\d exceeds max_ext_len\(\d+\): it declares more than anything that its model_config asks for"
    ):
        read(tmp_path, most_bytes=10**8, sizes={7})


def test_keys_are_counted_before_the_map_is_done_with_its_parent(tmp_path):
    """Thousands of maps of ten thousand numbers, in a file of a few kB: the first one is one too many."""
    inner = {f"{i:04}": 1 for i in range(10_000)}
    packed_maps = msgpack.packb(inner)
    with (write_metadata(tmp_path) / "ema_params.msgpack").open("wb") as file:
        file.write(b"\x82" + msgpack.packb("first") + packed_maps + msgpack.packb("second") + b"\xc1")  # the second would be another error
    with pytest.raises(ValueError, match="far more than the 700 arrays"):
        read(tmp_path, most_tensors=700)


def test_compressed_files_end_where_they_end(tmp_path):
    """Also where what is read ends with a block of the reader's: 2^20 bytes are asked for at a time."""
    of_length = lambda n: msgpack.packb(tree_of({"a": packed(torch.zeros(n, dtype=torch.uint8), "uint8")}))
    raw = of_length(2**21 - len(of_length(2**20)))
    assert len(raw) == 2**20
    file = write_metadata(tmp_path) / "ema_params.msgpack.xz"
    data = lzma.compress(raw)
    for cut in (1, 8, 30):
        file.write_bytes(data[:-cut])
        with pytest.raises(ValueError, match="cut off or no msgpack"):
            read(tmp_path, most_bytes=10**8)
    file.write_bytes(data + b"garbage!")
    with pytest.raises(ValueError, match="cut off or no msgpack"):
        read(tmp_path, most_bytes=10**8)
    whole = [data, data + b"\0" * 4, lzma.compress(raw[:1000]) + b"\0" * 8 + lzma.compress(raw[1000:])]  # padded; in two streams
    for content in whole:
        file.write_bytes(content)
        assert "a" in read(tmp_path, most_bytes=10**8)


def test_a_dictionary_beyond_all_memory_is_refused(tmp_path):
    data = bytearray(lzma.compress(msgpack.packb(tree_of(some()))))
    data[12:24] = _block_header(2**29)
    (write_metadata(tmp_path) / "ema_params.msgpack.xz").write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"cut off or no msgpack .*Memory usage limit"):
        read(tmp_path)


def _block_header(dictionary: int) -> bytes:
    """Of an .xz: length, flags, filter LZMA2 with this dictionary, padding, checksum."""
    bits = next(b for b in range(41) if (2 | (b & 1)) << (b // 2 + 11) == dictionary)
    header = bytes([2, 0, 0x21, 1, bits, 0, 0, 0])
    return header + zlib.crc32(header).to_bytes(4, "little")


def test_values_that_a_type_cannot_hold_are_refused(tmp_path):
    write_artefact(tmp_path, {"a/b": torch.tensor([1e6])})
    with pytest.raises(ValueError, match="a/b holds values too large for float16: take bfloat16"):
        read(tmp_path, dtype=torch.float16)
    assert read(tmp_path, dtype=torch.bfloat16)["a/b"].isfinite()
    write_artefact(tmp_path, {"a/b": packed(torch.tensor([1e300], dtype=torch.float64), "float64")})
    with pytest.raises(ValueError, match="a/b holds values too large for float32: take float64"):
        read(tmp_path, dtype=torch.float32)


def test_names_in_errors_have_no_control_characters(tmp_path):
    assert read(write_artefact(tmp_path, {"\x1b[2Jevil\n": torch.zeros(1)})).keys() == {r"\x1b[2Jevil\n"}
    with pytest.raises(ValueError, match=r"\\x1b\[2Jevil is no array but 7"):
        read(write_artefact(tmp_path, {"\x1b[2Jevil": 7}))
    with pytest.raises(ValueError, match=r"^x{200}\.\.\. is no array"):
        read(write_artefact(tmp_path, {"x" * 900: 7}))


def test_trailing_bytes_and_repeated_keys_are_refused(tmp_path):
    file = write_artefact(tmp_path, some()) / "ema_params.msgpack"
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0" * 3)
    with pytest.raises(ValueError, match="goes on after its end"):
        read(tmp_path)
    pair = msgpack.packb("a") + msgpack.packb(packed(torch.zeros(1)))
    file.write_bytes(b"\x82" + pair + pair)
    with pytest.raises(ValueError, match="a key stands twice"):
        read(tmp_path)
    tree = {"a/b": packed(torch.zeros(1)), "a": {"b": packed(torch.zeros(1))}}
    file.write_bytes(msgpack.packb(tree))
    with pytest.raises(ValueError, match="a/b stands twice"):
        read(tmp_path)


HOSTILE = {
    "an array of 4 GB in 20 bytes": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01" + b"\0" * 8,
    "an array of 1 GB in 20 bytes": b"\x81\xa1a\xc9\x40\x00\x00\x00\x01" + b"\0" * 8,
    "a map of 4 billion keys": b"\xdf\xff\xff\xff\xff\xa1a",
    "a list of 4 billion items": b"\x81\xa1a\xdd\xff\xff\xff\xff\x01",
    "a text of 4 GB": b"\x81\xdb\xff\xff\xff\xff" + b"a" * 8,
    "bytes of 4 GB": b"\x81\xa1a\xc6\xff\xff\xff\xff\x01",
    "a list for a root": b"\x93\x01\x02\x03",
    "a million maps within maps": b"\x81\xa1a" * 1_000_000 + b"\x01",
    "a hundred maps within maps": b"\x81\xa1a" * 100 + b"\x01",
    "a number for a key": b"\x81\x01\x01",
    "no text for a key": b"\x81\xa1\xff\x01",
    "a hole": b"\xc1",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_get_an_error_and_little_memory(tmp_path, name):
    (write_metadata(tmp_path) / "ema_params.msgpack").write_bytes(HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"msgpack|deeper|no array|limit|exceeds|twice|str"):
        read(tmp_path, most_bytes=10**8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_compressed_bomb_is_refused_in_bounded_memory(tmp_path):
    """A quarter of a gigabyte of zeros in 40 kB, declared as a whole one, asked for by a model of a megabyte; in a process of its own, whose peak is nothing but this."""
    head = b"\x81\xa1a\xc9\x40\x00\x00\x00\x01"
    compressor = lzma.LZMACompressor(preset=0)
    with (write_metadata(tmp_path) / "ema_params.msgpack.xz").open("wb") as file:
        file.write(compressor.compress(head))
        for _ in range(16):
            file.write(compressor.compress(b"\0" * 2**24))
        file.write(compressor.flush())
    code = (
        "import resource, sys; from drifting_diffusers.artefacts import read_tensors\n"
        "import msgpack, torch; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: read_tensors({str(tmp_path / 'ema_params.msgpack.xz')!r}, most_bytes=10**6)\n"
        "except ValueError as error: print(error, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout
    assert "model_config asks for 1000000 at most" in out
    assert int(out.split()[-1]) < 100_000  # kB


def test_metadata_that_is_not_an_artefacts_is_refused(tmp_path):
    write_artefact(tmp_path, some(), format="pickle")
    with pytest.raises(ValueError, match=r"only \"flax.msgpack\""):
        find_artefact(tmp_path)
    for text, message in [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "format"),
        ('{"format": "flax.msgpack"}', "no model_config"),
        (" " * (MOST_METADATA + 1), "more than the"),
    ]:
        (tmp_path / "metadata.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_artefact(tmp_path)
    (tmp_path / "metadata.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="no JSON"):
        find_artefact(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metadata.json and no ema_params.msgpack or ema_params.msgpack.xz"):
        find_artefact(tmp_path)
    write_metadata(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no ema_params.msgpack or ema_params.msgpack.xz: give the folder"):
        find_artefact(tmp_path)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/x.msgpack").write_bytes(msgpack.packb(tree_of(some())))
    with pytest.raises(FileNotFoundError, match=r"no metadata.json: .*with metadata.json beside it"):
        find_artefact(tmp_path / "alone/x.msgpack")
