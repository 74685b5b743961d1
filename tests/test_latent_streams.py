"""Latents of a stream: one pass, and the same bits as of the same images on a disk, after whatever interruption."""

import json
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset
from PIL import Image as PILImage
from test_latents import IMAGES, ROOT, VAE, N, files, load_example, make_images, make_vae
from test_latents import write as write_map
from torch.testing import assert_close

from drifting_diffusers.latent_streams import cache_stream
from drifting_diffusers.latents import LatentCache

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    file = tmp_path_factory.mktemp("stream") / "train.parquet"
    IMAGES.dataset.to_parquet(file)
    return file


@pytest.fixture
def stream(parquet):
    return opened(parquet)


def opened(file):
    return load_dataset("parquet", data_files=str(file), split="train", streaming=True)


def write(folder, stream, **changes):
    choices = {"size": (16, 16), "names": NAMES, "batch_size": 3, "shard_size": 4, "device": "cpu"}
    return cache_stream(stream, changes.pop("vae", VAE), folder, **(choices | changes))


def shards(folder):
    return {name: content for name, content in files(folder).items() if name.endswith(".safetensors")}


def said(cache):
    """The description, without how the images came."""
    return {name: value for name, value in cache.description.items() if name != "stream"}


@pytest.mark.parametrize("changes", [{}, {"moments": False, "flips": False}, {"batch_size": 4, "num_workers": 3}, {"shard_size": 11}])
def test_a_stream_gives_the_bits_of_the_dataset(changes, stream, tmp_path):
    ours = write(tmp_path / "stream", stream, **changes)
    theirs = write_map(tmp_path / "map", **({name: value for name, value in changes.items() if name != "num_workers"}))
    assert shards(ours.folder) == shards(theirs.folder)
    assert said(ours) == theirs.description
    assert ours.fingerprint() == theirs.fingerprint()
    assert not (ours.folder / "unfinished.json").exists()
    write_map(ours.folder, **({name: value for name, value in changes.items() if name != "num_workers"}))  # it is the same cache


def test_streams_that_do_not_say_what_they_hold(stream, tmp_path):
    """Those are decoded as they come."""
    unknown = stream.map(lambda row: row | {"label": row["label"]})
    assert unknown.features is None
    ours = write(tmp_path / "unknown", unknown)
    assert shards(ours.folder) == shards(write(tmp_path / "known", stream.with_format("numpy")).folder)


class Cut(Exception):
    pass


def cut_at(stream, place):
    """The stream, until its cable is cut."""

    def rows():
        for i, row in enumerate(stream):
            if i == place:
                raise Cut
            yield row

    return IterableDataset.from_generator(rows, features=stream.features)


def test_what_was_cut_goes_on_to_the_same_bits(stream, tmp_path):
    whole = write(tmp_path / "whole", stream)
    with pytest.raises(Cut):
        write(tmp_path / "cut", cut_at(stream, 9))
    kept = shards(tmp_path / "cut")
    assert sorted(kept) == ["00000-of-unknown.safetensors", "00001-of-unknown.safetensors"]
    with pytest.raises(FileNotFoundError, match="is unfinished"):
        LatentCache(tmp_path / "cut")
    written = (tmp_path / "cut/00000-of-unknown.safetensors").stat().st_mtime_ns
    again = write(tmp_path / "cut", stream, batch_size=3)
    assert files(again.folder) == files(whole.folder)
    assert (again.folder / "00000-of-00003.safetensors").stat().st_mtime_ns == written


def test_what_was_whole_and_lost_a_shard_is_whole_again(stream, tmp_path):
    cache = write(tmp_path / "cache", stream)
    before = files(cache.folder)
    (cache.folder / "00001-of-00003.safetensors").unlink()
    write(cache.folder, stream)
    assert files(cache.folder) == before


def test_what_was_killed_while_shards_were_named_goes_on(stream, tmp_path):
    cache = write(tmp_path / "cache", stream)
    before = files(cache.folder)
    (cache.folder / "latent_cache.json").rename(cache.folder / "unfinished.json")
    (cache.folder / "00002-of-00003.safetensors").rename(cache.folder / "00002-of-unknown.safetensors")
    write(cache.folder, stream)
    assert files(cache.folder) == before


def test_what_passes_by_is_not_decoded(stream, tmp_path):
    """Rows of shards that are there, whose images are broken by now; of what is whole no more than the first row is read."""
    cache = write(tmp_path / "cache", stream)
    before = files(cache.folder)
    (cache.folder / "00002-of-00003.safetensors").unlink()

    def broken():
        for i, row in enumerate(stream.cast_column("image", Image(decode=False))):
            yield row | ({"image": {"bytes": b"no image", "path": None}} if 0 < i < 8 else {})

    write(cache.folder, IterableDataset.from_generator(broken, features=stream.features))
    assert files(cache.folder) == before
    write(cache.folder, cut_at(stream, 1))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(stream, parquet, tmp_path):
    VAE.save_pretrained(tmp_path / "vae")
    words = arguments(parquet, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "examples/cache_latents.py"),
         *words],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("11 images in") == 1
    one, two = write(tmp_path / "one", stream), LatentCache(tmp_path / "out")
    assert sorted(shards(two.folder)) == sorted(shards(one.folder))
    assert_close(two.gather(range(N))[0], one.gather(range(N))[0])  # threads differ, and with them last digits
    assert {name for name in one.description if one.description[name] != two.description[name]} == {"vae_name", "source"}


def arguments(parquet, folder):
    return ["--dataset_name", str(parquet), "--vae", str(folder / "vae"), "--resolution", "16", "--batch_size", "3", "--shard_size", "4",
            "--dataloader_num_workers", "2", "--streaming", "--output_dir", str(folder / "out")]  # fmt: skip


def test_the_example_reads_a_stream_and_a_file_of_choices(parquet, tmp_path, capsys):
    VAE.save_pretrained(tmp_path / "vae")
    (tmp_path / "choices.yaml").write_text("max_samples: 6\nno_flips: true\n")
    main = load_example("cache_latents").main
    with pytest.raises(SystemExit):
        main([*arguments(parquet, tmp_path), "--config", str(tmp_path / "choices.yaml")])
    assert "there is no no_flips; did you mean flips?" in capsys.readouterr().err
    (tmp_path / "choices.yaml").write_text("max_samples: 6\nflips: false\n")
    written = main([*arguments(parquet, tmp_path), "--config", str(tmp_path / "choices.yaml")])
    assert (len(written), written.description["flips"], written.names) == (6, False, NAMES)
    with PILImage.open(tmp_path / "out/reconstructions.png") as picture:
        assert picture.width > 6 * 64
    assert "6 images in" in capsys.readouterr().out


def test_only_so_many(stream, tmp_path):
    part = write(tmp_path / "part", stream, max_samples=6)
    assert said(part) == write_map(tmp_path / "map", images=first(6)).description
    assert len(write(tmp_path / "all", stream, max_samples=100)) == N
    with pytest.raises(ValueError, match=r"asked for \{'stream': \{'max_samples': None.*there is \{'stream': \{'max_samples': 6"):
        write(tmp_path / "part", stream)


def first(n):
    images = make_images()
    images.dataset, images.labels = images.dataset.select(range(n)), images.labels[:n]
    return images


# -- what is refused


def with_labels(stream, labels, kind="int64"):
    features = Features({"image": Image(), "label": Value(kind)})
    rows = lambda: ({"image": row["image"], "label": label} for row, label in zip(stream, labels, strict=True))
    return IterableDataset.from_generator(rows, features=features)


@pytest.mark.parametrize(
    ("label", "kind", "names", "allowed"),
    [
        (None, "int64", NAMES, r"None in column 'label', and labels must be integers in \[0, 3\): set label_column"),
        (-1, "int64", None, r"-1 in column 'label', and labels must be integers in \[0, number of classes\)"),
        (3, "int64", NAMES, r"3 in column 'label'"),
        ("b", "string", None, r"'[a0]' in column|'b' in column"),
    ],
)
def test_labels_that_are_none(label, kind, names, allowed, stream, tmp_path):
    labels = [0, 1, 2, 0, 1, label, 2, 0, 1, 2, 0]
    spoilt = with_labels(stream, labels if kind == "int64" else ["b"] * N, kind)
    number = 5 if kind == "int64" else 0
    with pytest.raises(ValueError, match=f"row {number} of the stream has the label {allowed}"):
        write(tmp_path / "cache", spoilt, names=names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": make_vae(1)}, r"asked for \{'vae': \{'digest': .*there is \{'vae': "),
        ({"size": (32, 32)}, r"'image_size': \[32, 32\]"),
        ({"flips": False}, "'flips': False"),
        ({"shard_size": 6}, "'shard_size': 6"),
        ({"names": ["x", "y", "z"]}, "'names'"),
        ({"stream": make_images(n=3).dataset.select([2, 0]).to_iterable_dataset()}, "'first_image'"),
    ],
)
@pytest.mark.parametrize("cut", [False, True])
def test_a_folder_of_something_else_is_refused(changes, message, cut, stream, tmp_path):
    if cut:
        with pytest.raises(Cut):
            write(tmp_path / "cache", cut_at(stream, 6))
    else:
        write(tmp_path / "cache", stream)
    before = files(tmp_path / "cache")
    with pytest.raises(ValueError, match=f"holds latents of something else: .*{message}"):
        write(tmp_path / "cache", **({"stream": stream} | changes))
    assert files(tmp_path / "cache") == before


def test_a_stream_that_comes_in_another_order_is_refused(stream, tmp_path):
    with pytest.raises(Cut):
        write(tmp_path / "cache", cut_at(stream, 6))
    with pytest.raises(
        ValueError, match=r"00000-of-unknown\.safetensors holds 4 images with other labels than the stream has from row 0 on"
    ):
        write(tmp_path / "cache", with_labels(stream, [0, 2, 1, 0, 1, 2, 0, 1, 2, 0, 1]))


def test_a_stream_that_ends_too_early_is_refused(stream, tmp_path):
    with pytest.raises(Cut):
        write(tmp_path / "cache", cut_at(stream, 10))
    with pytest.raises(
        ValueError, match=r"ended after 4 images, and .* holds \['00001-of-unknown\.safetensors'\] of later ones: run again"
    ):
        write(tmp_path / "cache", stream.take(4))
    assert len(write(tmp_path / "cache", stream)) == N


def test_images_that_cannot_be_read_are_named(stream, tmp_path):
    rows = list(stream.cast_column("image", Image(decode=False)))
    rows[5]["image"]["bytes"] = rows[5]["image"]["bytes"][:40]
    spoilt = Dataset.from_list(rows, features=stream.features).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"row 5 of column 'image' cannot be read: .*; leave it out with dataset.filter"):
        write(tmp_path / "cache", spoilt)
    assert json.loads((tmp_path / "cache/unfinished.json").read_text())["stream"]["shard_size"] == 4


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"stream": IMAGES.dataset}, TypeError, "must be a datasets.IterableDataset, got Dataset: load it with streaming=True"),
        ({"label_column": "kind"}, ValueError, r"no column 'kind'; its columns are \['image', 'label'\]: set label_column"),
        ({"max_samples": 0}, ValueError, "max_samples must be at least 1, got 0"),
        ({"num_workers": 0}, ValueError, "num_workers must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size and shard_size must be at least 1, got 0 and 4"),
        ({"dtype": torch.float64}, ValueError, "latents are stored in .*got torch.float64"),
        ({"stream": IMAGES.dataset.to_iterable_dataset().take(0)}, ValueError, "the stream is empty"),
        ({"size": (15, 15), "vae": make_vae(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                                           up_block_types=("UpDecoderBlock2D",) * 2)}, ValueError, r"multiples of 2.*got \(15, 15\)"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("as_users_see_it")
def test_what_does_not_fit_is_refused_before_any_work(changes, error, message, stream, tmp_path):
    with pytest.raises(error, match=message):
        write(tmp_path / "cache", **({"stream": stream} | changes))
    assert not (tmp_path / "cache").exists()
