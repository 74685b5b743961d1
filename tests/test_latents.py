"""Latents on disk: what is read is what the VAE says, whoever asks, in whatever company, after whatever interruption."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from scipy import stats
from torch.testing import assert_close
from torch.utils.data import DataLoader

from drifting_diffusers.data import LabelledImages
from drifting_diffusers.latents import LatentCache, cache_latents

ROOT = Path(__file__).parents[1]
N = 11


def make_images(n=N, size=16):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [PILImage.fromarray(one) for one in pixels], "label": [i % 3 for i in range(n)]}
    return LabelledImages(
        Dataset.from_dict(rows, features=features), size=(size, size), channels=3, num_classes=3, image_column="image", label_column="label"
    )


def make_vae(seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        choices = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 32}
        return AutoencoderKL(**(choices | changes)).eval()


IMAGES, VAE = make_images(), make_vae()


def write(folder, images=IMAGES, vae=VAE, **changes):
    return cache_latents(images, vae, folder, **({"names": ["a", "b", "c"], "batch_size": 3, "shard_size": 4, "device": "cpu"} | changes))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write(tmp_path_factory.mktemp("latents") / "cache")


@torch.no_grad()
def by_hand(rows, flip=False):
    """Mean and standard deviation, straight from the VAE."""
    images = IMAGES.gather(rows)[0]
    found = VAE.encode(images.flip(3) if flip else images).latent_dist
    return found.mean, found.std


def seeds(rows, step=0):
    return [[7, step, i, row] for i, row in enumerate(rows)]


def files(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


# -- what is in it


def test_a_latent_is_mean_plus_noise_shifted_and_scaled(cache):
    rows = [3, 0, 10, 3]
    z, labels = cache.gather(rows)
    mean, std = by_hand(rows)
    eps = torch.from_numpy(np.stack([np.random.default_rng((0, row, 0)).standard_normal(mean.shape[1:], np.float32) for row in rows]))
    assert z.dtype == torch.float32
    assert_close(z, (mean + std * eps) * 0.18215, rtol=0, atol=2e-3 * 0.18215)
    assert labels.tolist() == [0, 0, 1, 0]
    assert (cache.channels, cache.size, len(cache), cache.names) == (4, (16, 16), N, ["a", "b", "c"])
    assert cache.labels.dtype == np.int64


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8), (torch.float32, 1e-6)])
def test_moments_are_stored_to_half_a_unit_in_the_last_place(tmp_path, dtype, bound):
    write(tmp_path / "cache", dtype=dtype, shard_size=N)
    stored = load_file(tmp_path / "cache/00000-of-00001.safetensors")
    parts = [range(0, 3), range(3, 6), range(6, 9), range(9, 11)]
    for flip in (False, True):
        for name, exact in zip(("mean", "std"), map(torch.cat, zip(*(by_hand(part, flip) for part in parts), strict=True)), strict=True):
            assert stored[name].dtype == dtype
            assert_close(stored[name][:, int(flip)].float(), exact, rtol=bound * 1.01, atol=1e-7)
    assert stored["labels"].tolist() == IMAGES.labels.tolist()


def test_draws_of_an_image_have_its_mean_and_deviation(cache):
    n = 4000
    z = cache.varied([5] * n, [[i] for i in range(n)], flip=False) / 0.18215
    mean, std = by_hand([5])
    assert_close(z.mean(0), mean[0], rtol=0, atol=5 * float(std.max()) / n**0.5)
    assert_close(z.std(0) / std[0], torch.ones_like(std[0]), rtol=0, atol=5 / (2 * n) ** 0.5)


def test_half_are_mirror_images_as_the_vae_sees_them(tmp_path):
    cache = write(tmp_path / "cache", vae=make_vae(), shard_size=N)
    for file in cache.folder.glob("*.safetensors"):  # without noise a draw shows which of both means it has
        stored = load_file(file)
        save_file(stored | {"std": torch.zeros_like(stored["std"])}, file)
    cache, n = LatentCache(cache.folder), 400
    z = cache.varied([2] * n, [[1, i] for i in range(n)], flip=True) / 0.18215
    plain, mirrored = (by_hand([2], flip)[0] for flip in (False, True))
    assert not torch.allclose(mirrored, plain.flip(3), atol=1e-2)  # which is why both are stored
    is_plain, is_mirrored = (torch.isclose(z, mean, rtol=1e-3, atol=1e-4).flatten(1).all(1) for mean in (plain, mirrored))
    assert (is_plain ^ is_mirrored).all()
    assert stats.binomtest(int(is_mirrored.sum()), n).pvalue > 1e-3
    assert_close(cache.varied([2] * n, [[1, i] for i in range(n)], flip=False) / 0.18215, plain.expand(n, -1, -1, -1), rtol=1e-3, atol=1e-4)


def test_the_shift_is_subtracted_before_scaling(tmp_path):
    plain = write(tmp_path / "plain", dtype=torch.float32).gather(range(N))[0]
    shifted = write(tmp_path / "shifted", vae=make_vae(shift_factor=0.5, scaling_factor=2.0), dtype=torch.float32).gather(range(N))[0]
    assert_close(shifted, (plain / 0.18215 - 0.5) * 2)


# -- one sample per image, as the release does


def test_one_sample_is_what_the_moments_give_every_time(cache, tmp_path):
    one = write(tmp_path / "one", moments=False)
    assert_close(one.gather(range(N))[0], cache.gather(range(N))[0], rtol=1e-3, atol=1e-3)
    assert sorted(load_file(one.folder / "00000-of-00003.safetensors")) == ["labels", "latents"]
    drawn = one.varied([4] * 50, [[i] for i in range(50)], flip=True)
    assert len(drawn.unique(dim=0)) == 2  # nothing but the mirror is left to chance
    assert_close(one.varied([4], [[3]], flip=False), one.gather([4])[0], rtol=0, atol=0)
    assert one.fingerprint()["stored"] != cache.fingerprint()["stored"]


def test_one_sample_has_other_noise_for_the_mirror_image(tmp_path):
    one = load_file(write(tmp_path / "one", moments=False, dtype=torch.float32, shard_size=N).folder / "00000-of-00001.safetensors")[
        "latents"
    ]
    eps = [(one[:, flip] / 0.18215 - mean) / std for flip in (0, 1) for mean, std in [by_hand(range(N), bool(flip))]]
    assert abs(float(torch.corrcoef(torch.stack([e.flatten() for e in eps]))[0, 1])) < 0.05


# -- chance


def test_a_draw_depends_on_its_seed_and_on_nothing_beside_it(cache):
    rows = [9, 1, 1, 4, 0, 10, 6]
    whole = cache.varied(rows, seeds(rows), flip=True)
    for i in (0, 2, 6):
        assert_close(cache.varied(rows[i : i + 1], seeds(rows)[i : i + 1], flip=True)[0], whole[i], rtol=0, atol=0)
    assert_close(LatentCache(cache.folder).varied(rows, seeds(rows), flip=True), whole, rtol=0, atol=0)
    assert not torch.equal(cache.varied(rows, seeds(rows, step=1), flip=True), whole)
    many = (np.arange(300) * 7 % N).tolist()  # more than one chunk
    z, _ = cache.gather(many)
    assert_close(z[137], cache.gather([many[137]])[0][0], rtol=0, atol=0)
    assert cache.gather([])[0].shape == (0, 4, 16, 16)


def test_nothing_global_is_drawn_or_changed(tmp_path):
    before = torch.random.get_rng_state()
    cache = write(tmp_path / "cache")
    cache.varied([0, 1], [[0], [1]], flip=True)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- who reads it


class Rows:
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(self.cache)

    def __getitem__(self, i):
        return self.cache.gather([i])[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same(cache, context):
    loader = DataLoader(Rows(cache), batch_size=4, num_workers=2, multiprocessing_context=context)
    assert_close(torch.cat(list(loader)), cache.gather(range(N))[0], rtol=0, atol=0)


def test_a_pickle_holds_a_path_and_no_latents(cache):
    stored = pickle.dumps(cache)
    assert len(stored) < 1000
    assert_close(pickle.loads(stored).gather([2])[0], cache.gather([2])[0], rtol=0, atol=0)


def test_threads_read_the_same(cache):
    rows = [(np.arange(40) * k % N).tolist() for k in range(1, 9)]
    with ThreadPoolExecutor(4) as pool:
        for found, asked in zip(pool.map(lambda r: cache.varied(r, seeds(r), flip=True), rows), rows, strict=True):
            assert_close(found, cache.varied(asked, seeds(asked), flip=True), rtol=0, atol=0)


def test_it_serves_as_images_do(cache):
    assert sorted(cache.labels[cache.starters(2, seed=0)].tolist()) == [0, 0, 1, 1, 2, 2]
    assert cache.per_class(2)[1].tolist() == [0, 0, 1, 1, 2, 2]
    fingerprint = cache.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint == LatentCache(cache.folder).fingerprint()
    assert fingerprint["vae"] == cache.description["vae"]["digest"]


@pytest.mark.parametrize("rows", [[-1], [0, N]])
def test_rows_that_are_not_there_are_refused(cache, rows):
    with pytest.raises(IndexError, match=rf"rows must lie in \[0, {N}\), got values from"):
        cache.gather(rows)


# -- interruptions, several processes


def test_what_was_interrupted_goes_on_to_the_same_bits(tmp_path):
    whole = files(write(tmp_path / "whole").folder)
    cut = write(tmp_path / "cut").folder
    (cut / "latent_cache.json").rename(cut / "unfinished.json")
    (cut / "00001-of-00003.safetensors").unlink()
    kept = cut / "00000-of-00003.safetensors"
    before = kept.stat().st_mtime_ns
    with pytest.raises(FileNotFoundError, match=r"is unfinished: run cache_latents .* with the same arguments again"):
        LatentCache(cut)
    write(cut)
    assert files(cut) == whole
    assert kept.stat().st_mtime_ns == before
    (cut / "00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 00002-of-00003\.safetensors: copy it .* or run cache_latents"):
        LatentCache(cut)
    write(cut, batch_size=3, num_workers=2)
    assert files(cut) == whole


def test_an_error_within_leaves_what_was_whole(tmp_path):
    class Failing(LabelledImages):
        def gather(self, rows):
            if 5 in rows:
                raise OSError("a cut cable")
            return super().gather(rows)

    images = make_images()
    images.__class__ = Failing
    with pytest.raises(OSError, match="a cut cable"):
        write(tmp_path / "cache", images=images)
    assert sorted(files(tmp_path / "cache")) == ["00000-of-00003.safetensors", "unfinished.json"]
    assert files(write(tmp_path / "cache").folder) == files(write(tmp_path / "whole").folder)


# -- the example, alone and shared


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """What to run and the arguments without the folder: eleven images, in shards of four."""
    folder = tmp_path_factory.mktemp("example")
    VAE.save_pretrained(folder / "vae")
    IMAGES.dataset.to_parquet(folder / "train.parquet")
    arguments = ["--dataset_name", str(folder / "train.parquet"), "--vae", str(folder / "vae"), "--resolution", "16", "--batch_size", "3",
                 "--shard_size", "4", "--dataloader_num_workers", "1", "--output_dir"]  # fmt: skip
    return load_example("cache_latents").main, arguments


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where HfArgumentParser looks for the types of its fields
    spec.loader.exec_module(module)
    return module


def test_the_example_writes_what_the_function_writes(example, cache, tmp_path, capsys):
    main, arguments = example
    written = main([*arguments, str(tmp_path / "out")])
    assert_close(written.gather(range(N))[0], cache.gather(range(N))[0], rtol=0, atol=0)
    different = {key for key in cache.description if cache.description[key] != written.description[key]}
    assert different == {"vae_name", "source"}
    assert written.description["source"]["split"] == "train"
    assert "11 images in" in capsys.readouterr().out
    with PILImage.open(tmp_path / "out/reconstructions.png") as picture:
        assert picture.width > 8 * 64
        assert len(picture.convert("L").getcolors(256)) > 20
    main([*arguments, str(tmp_path / "out")])  # again: all is there


def test_the_example_takes_a_part_as_the_release_would(example, tmp_path):
    main, arguments = example
    written = main([*arguments, str(tmp_path / "out"), "--max_samples", "2", "--one_sample", "--no_flips", "--dtype", "float32"])
    assert load_file(tmp_path / "out/00000-of-00001.safetensors")["latents"].shape == (2, 1, 4, 16, 16)
    assert (written.labels.tolist(), written.names, written.description["dtype"]) == ([0, 1], ["a", "b", "c"], "float32")


@pytest.mark.slow
def test_two_processes_write_what_one_writes(example, cache, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "examples/cache_latents.py"),
         *example[1], str(tmp_path / "two")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("11 images in") == 1
    two = LatentCache(tmp_path / "two")
    assert len(two.description["shards"]) == 3
    assert_close(two.gather(range(N))[0], cache.gather(range(N))[0])  # threads differ, and with them last digits


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vae": make_vae(1)}, r"asked for \{'vae': \{'digest': .*there is \{'vae': "),
        ({"images": make_images(size=32)}, r"'image_size': \[32, 32\].*there is .*'image_size': \[16, 16\]"),
        ({"images": make_images(n=8)}, r"asked for \{'dataset': .*'images': 8.*there is \{'dataset': .*'images': 11"),
        ({"moments": False}, r"'stored': 'sample'\}, there is \{'stored': 'moments'\}; choose another folder, or delete this one"),
        ({"flips": False}, "'flips': False"),
        ({"dtype": torch.float32}, "'dtype': 'float32'"),
        ({"shard_size": 6}, "'2 of up to 6 images'.*'3 of up to 4 images'"),
        ({"names": ["x", "y", "z"]}, "'names'"),
    ],
)
@pytest.mark.parametrize("unfinished", [False, True])
def test_a_folder_of_something_else_is_refused(cache, tmp_path, changes, said, unfinished):
    folder = Path(shutil.copytree(cache.folder, tmp_path / "cache"))
    if unfinished:
        (folder / "latent_cache.json").rename(folder / "unfinished.json")
    before = files(folder)
    with pytest.raises(ValueError, match=f"holds latents of something else: .*{said}"):
        write(folder, **changes)
    assert files(folder) == before


def test_the_same_weights_and_images_may_have_other_names(cache, tmp_path):
    VAE.save_pretrained(tmp_path / "vae")
    renamed = {"vae": AutoencoderKL.from_pretrained(tmp_path / "vae"), "source": {"dataset": "elsewhere"}}
    folder = shutil.copytree(cache.folder, tmp_path / "cache")
    assert write(folder, **renamed).description == cache.description
    fresh = write(tmp_path / "named", **renamed).description
    assert (fresh["vae_name"], fresh["source"]) == (str(tmp_path / "vae"), {"dataset": "elsewhere"})


def test_folders_that_are_no_cache(tmp_path, cache):
    with pytest.raises(FileNotFoundError, match=r"nowhere is no latent cache, it has no latent_cache\.json: give a folder"):
        LatentCache(tmp_path / "nowhere")
    folder = Path(shutil.copytree(cache.folder, tmp_path / "cache"))
    file = folder / "00001-of-00003.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00001-of-00003\.safetensors is damaged .*: delete it and run cache_latents"):
        LatentCache(folder)
    shutil.copy(folder / "00002-of-00003.safetensors", file)
    with pytest.raises(ValueError, match=r"must be \[4, 2, 4, 16, 16\] in float16, got \[\(\[3, 2, 4, 16, 16\], 'float16'\)"):
        LatentCache(folder)
    description = folder / "latent_cache.json"
    description.write_text(json.dumps(cache.description | {"version": 2}))
    with pytest.raises(ValueError, match="must have version 1, got 2: update drifting_diffusers"):
        LatentCache(folder)
    description.write_text("{")
    with pytest.raises(ValueError, match=r"latent_cache\.json cannot be read .*: delete it and run"):
        LatentCache(folder)


def test_mirror_images_that_were_not_stored(tmp_path):
    cache = write(tmp_path / "cache", flips=False)
    assert cache.varied([1], [[0]], flip=False).shape == (1, 4, 16, 16)
    with pytest.raises(ValueError, match="holds no mirrored images: train with random_flip=False, or write another cache with flips=True"):
        cache.varied([1], [[0]], flip=True)


def test_images_that_do_not_fit(tmp_path, as_users_see_it):
    odd = make_images(size=15)
    with pytest.raises(ValueError, match=r"multiples of 2, the vae's factor, got \(15, 15\)"):
        write(tmp_path / "a", images=odd, vae=make_vae(**TWO_BLOCKS))
    with pytest.raises(ValueError, match="reads images of 1 channels, got 3: open the images with channels=1"):
        write(tmp_path / "b", vae=make_vae(in_channels=1, out_channels=1))
    with pytest.raises(TypeError, match=r"`encode\(images\)\.latent_dist`, as AutoencoderKL does; got AutoencoderTiny"):
        write(tmp_path / "c", vae=AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                                                   num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)))  # fmt: skip
    with pytest.raises(ValueError, match=r"stored in torch\.float16, .*, got torch\.float64"):
        write(tmp_path / "d", dtype=torch.float64)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 4"):
        write(tmp_path / "e", batch_size=0)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), as there are names; got values from 0 to 2"):
        write(tmp_path / "f", names=["a", "b"])
    assert not any(tmp_path.iterdir())


TWO_BLOCKS = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def test_latents_that_overflow_are_refused(tmp_path):
    loud = make_vae()
    with torch.no_grad():
        loud.quant_conv.bias.fill_(1e5)
    with pytest.raises(
        ValueError, match=r"images 0 to 2 are not finite, encoded in torch\.float32 and stored in float16: take a vae in float32"
    ):
        write(tmp_path / "cache", vae=loud)
    write(tmp_path / "other", vae=loud, moments=False, dtype=torch.float32, flips=False)
