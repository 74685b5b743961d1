"""The released weights in one line, end to end: a loopback Hub serves artefacts in the release's layout."""

import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
import torch
from loopback_hub import LoopbackHub, Repository, environment_of, run_script
from release_files import GENERATOR, to_release, tree_of, write_artefact
from test_convert import random_generator

from drifting_diffusers.hub import CARD_MARK

pytestmark = pytest.mark.hub

# Which recorded artefact stands for which released one.
SERVED = {
    "gen/jax/latent_B_sota": "gen/release_like",
    "gen/jax/pixel_L_sota": "gen/pixel_like",
    "mae/jax/mae_latent_640": "mae/latent",
    "mae/jax/mae_pixel_640": "mae/pixel",
}

PREAMBLE = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from torch.testing import assert_close
from drifting_diffusers import DriftingGenerator, DriftingPipeline

HOME = Path(sys.argv[1])
def recorded(shared, name):
    return {k: torch.from_numpy(v) for k, v in np.load(Path(shared, "fixtures", name, "io.npz")).items()}
def check(generator, io):
    nchw = lambda x: x.permute(0, 3, 1, 2)
    got = generator(nchw(io["noise_x"]), io["labels"].long(), io["cfg_vec"], io["noise_labels"].long()).sample
    assert float((got - nchw(io["samples_vec"])).abs().max() / io["samples_vec"].abs().max()) < 1e-5
"""


def tiny_vae(folder: Path) -> dict[str, bytes]:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    ).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def hub(shared, tmp_path_factory):
    with LoopbackHub() as server:
        files = {}
        for name, fixture in SERVED.items():
            for path in (shared / "fixtures" / fixture / "params_ema").iterdir():
                data = path.read_bytes()
                files[f"models/{name}/{path.name.removesuffix('.xz')}"] = lzma.decompress(data) if path.suffix == ".xz" else data
        config = GENERATOR | {"in_channels": 4, "out_channels": 4, "num_classes": 1000}
        for path in write_artefact(
            tmp_path_factory.mktemp("imagenet"), to_release(random_generator(**config)), model_config=config
        ).iterdir():
            files[f"models/gen/jax/latent_L_sota/{path.name}"] = path.read_bytes()
        files["models/gen/jax/latent_B_sota/checkpoints/state.bin"] = b"not for us"
        server.repositories["Goodeat/drifting"] = Repository()
        server.repositories["Goodeat/drifting"].commit(files)
        server.repositories["stabilityai/sd-vae-ft-mse"] = Repository()
        server.repositories["stabilityai/sd-vae-ft-mse"].commit(tiny_vae(tmp_path_factory.mktemp("vae")))
        yield server


def test_a_pipeline_in_one_line_and_again_without_the_network(hub, shared, tmp_path):
    script = f"""
pipe = DriftingPipeline.from_release("latent_B_sota")
check(pipe.transformer, recorded({str(shared)!r}, "gen/release_like"))
assert (pipe.config.guidance_scale, pipe.vae.config.scaling_factor) == (1.1, 0.18215)
images = pipe([3, 5], generator=torch.Generator().manual_seed(0), output_type="pt").images
latents = pipe([3, 5], generator=torch.Generator().manual_seed(0), output_type="latent").images
assert_close(images, (pipe.vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1))
"""
    run_script(PREAMBLE + script, tmp_path, hub.url)
    fetched = {path for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert {path.rsplit("/", 1)[-1] for path in fetched if "Goodeat" in path} == {"metadata.json", "ema_params.msgpack"}
    again = """
from drifting_diffusers import convert
def never(*args, **kwargs): raise AssertionError("converted again")
convert.convert = never
"""
    run_script(PREAMBLE + again + script, tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    run_script(PREAMBLE + again + script, tmp_path, hub.url)


def test_the_block_of_its_page(hub, tmp_path):
    page = (Path(__file__).parents[1] / "docs/released.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "from_release" in block]
    checks = """
assert pipe.labels[88] == "macaw" and pipe.config.guidance_scale == 1.0
alone = pipe(88, generator=torch.Generator().manual_seed(0)).images
assert len(images) == 2 and list(images[0].getdata()) == list(alone[0].getdata())
"""
    run_script(block + checks, tmp_path, hub.url)


def test_pixels_need_no_decoder_and_an_encoder_is_one_line_too(hub, shared, tmp_path):
    run_script(
        PREAMBLE
        + f"""
from drifting_diffusers import MaskedAutoencoder
pipe = DriftingPipeline.from_release("pixel_L_sota", dtype=torch.bfloat16)
assert (pipe.vae, pipe.transformer.dtype, pipe.config.guidance_scale) == (None, torch.bfloat16, 1.0)
assert pipe(2).images[0].size == (16, 16)
check(DriftingGenerator.from_release("pixel_L_sota"), recorded({str(shared)!r}, "gen/pixel_like"))
for dtype in (None, torch.bfloat16):  # made, then kept
    encoder = MaskedAutoencoder.from_release("mae_latent_640", dtype=dtype)
    io = np.load({str(shared / "fixtures/mae/latent/io_16.npz")!r})
    found = encoder.activations(torch.from_numpy(io["x"]).permute(0, 3, 1, 2))
    stored = torch.from_numpy(io["act__layer4"])
    assert float((found["layer4"] - stored).abs().max() / stored.abs().max()) < (1e-4 if dtype is None else 0.1)
""",
        tmp_path,
        hub.url,
    )


def test_a_download_that_was_cut_off_goes_on_where_it_stopped(hub, shared, tmp_path):
    path = "models/gen/jax/latent_B_sota/ema_params.msgpack"
    size = len(hub.repositories["Goodeat/drifting"].files()[path])
    hub.cuts[path], hub.ranges[:] = size // 2, []
    script = f"""
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 2**16  # this file is smaller than one chunk of a real download
check(DriftingGenerator.from_release("latent_B_sota"), recorded({str(shared)!r}, "gen/release_like"))
"""
    run_script(PREAMBLE + script, tmp_path, hub.url)
    assert not hub.cuts  # it did break off
    assert len(hub.ranges) == 1
    assert hub.ranges[0][0] == path
    assert 0 < hub.ranges[0][1] <= size // 2


def test_another_revision_is_another_conversion(hub, tmp_path):
    repository = hub.repositories["Goodeat/drifting"]
    files = dict(repository.files())
    files["models/gen/jax/latent_B_sota/ema_params.msgpack"] = files["models/gen/jax/latent_B_sota/ema_params.msgpack"][:-1]
    repository.commit(files, "broken")
    run_script(
        PREAMBLE
        + """
DriftingGenerator.from_release("latent_B_sota")
try:
    DriftingGenerator.from_release("latent_B_sota", revision="broken")
except ValueError as error:
    assert "cut off" in str(error), error
else:
    raise AssertionError
try:
    DriftingGenerator.from_release("ablation")
except FileNotFoundError as error:
    assert "has no models/gen/jax/ablation" in str(error), error
else:
    raise AssertionError
""",
        tmp_path,
        hub.url,
    )


@pytest.mark.slow
def test_kept_conversions(hub, tmp_path):
    """Offline, with part of what was downloaded or none of it; in a folder that is read-only; damaged; of values that a type cannot hold."""
    run_script(PREAMBLE + 'DriftingGenerator.from_release("latent_B_sota")', tmp_path, hub.url)
    (weights,) = tmp_path.rglob("assets/**/*.safetensors")
    assert weights.stat().st_mode & 0o777 == weights.parent.stat().st_mode & 0o666
    script = """
import os, shutil
from safetensors.torch import load_file, save_file
from drifting_diffusers import MaskedAutoencoder, convert
def refused(kind, text, **options):
    try:
        DriftingGenerator.from_release("latent_B_sota", **options)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)
def never(*args, **kwargs): raise AssertionError("locked or converted")
convert.convert = convert.WeakFileLock = never
refused(TypeError, "dtype must be", dtype=torch.int8)
DriftingGenerator.from_release("latent_B_sota")
(snapshot,) = HOME.rglob("models--Goodeat--drifting/snapshots/*")
(folder,) = [path.parent for path in HOME.rglob("assets/**/*.safetensors")]
next(snapshot.rglob("*.msgpack")).unlink()
DriftingGenerator.from_release("latent_B_sota")  # of the download the metadata alone
shutil.rmtree(snapshot.parents[0])
DriftingGenerator.from_release("latent_B_sota")  # nothing of it
try:
    DriftingGenerator.from_release("pixel_L_sota")
except FileNotFoundError as error:
    assert "pixel_L_sota is not in the cache, or not whole, and the Hub cannot be asked: go online once" in str(error), error
else:
    raise AssertionError
shutil.copytree(folder, folder.with_name("0" * 40 + "-1"))
refused(FileNotFoundError, "is not in the cache")  # which of two is meant nobody can say
shutil.rmtree(folder.with_name("0" * 40 + "-1"))
file = next(folder.glob("*.safetensors"))
tensors = load_file(file)
save_file(tensors | {"guidance_norm.weight": torch.full_like(tensors["guidance_norm.weight"], 1e6)}, file)
refused(ValueError, "guidance_norm.weight holds values too large for float16: take bfloat16", dtype=torch.float16)
file.write_bytes(file.read_bytes()[:1000])
refused(OSError, f"kept in {folder} cannot be read: delete that folder, and it is made anew")
file.unlink()
refused(OSError, "delete that folder")
"""
    run_script(PREAMBLE + script, tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_processes_that_start_together_convert_once(hub, tmp_path):
    """As `torchrun` starts them."""
    script = PREAMBLE + (
        'from drifting_diffusers import convert\nmade = convert.convert\nconvert.convert = lambda *a, **k: print("converted") or made(*a, **k)\n'
        'DriftingGenerator.from_release("latent_B_sota")'
    )
    start = lambda: subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment_of(tmp_path, hub.url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    processes = [start(), start()]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(out for out, _ in outputs) == ["", "converted\n"]


def command(*arguments: object, home: Path, endpoint: str, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from drifting_diffusers.cli import main; sys.exit(main())", *map(str, arguments)],
        env=environment_of(home, endpoint),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.slow
def test_the_command_converts_by_name_and_pushes_with_the_card(hub, shared, tmp_path):
    target = tmp_path / "models/drifting-B"
    done = command("convert", "latent_B_sota", target, "--push-to-hub", "tester/drifting-B", "--private", home=tmp_path, endpoint=hub.url)
    assert "200,592 weights in float32" in done.stdout
    files = hub.repositories["tester/drifting-B"].files()
    assert hub.repositories["tester/drifting-B"].private
    assert {"README.md", "model_index.json", "transformer/diffusion_pytorch_model.safetensors", "vae/config.json"} <= files.keys()
    card = files["README.md"].decode()
    assert 'DriftingPipeline.from_pretrained("tester/drifting-B")' in card
    assert "| 1.1 | 1.74 | 263.4 | the release |" in card
    run_script(
        PREAMBLE
        + f"""
for source in ("tester/drifting-B", {str(target)!r}):
    pipe = DriftingPipeline.from_pretrained(source)
    check(pipe.transformer, recorded({str(shared)!r}, "gen/release_like"))
    assert pipe.config.guidance_scale == 1.1 and pipe.vae is not None
""",
        tmp_path,
        hub.url,
    )
    own = card.replace(CARD_MARK, "") + "My words."
    hub.repositories["tester/drifting-B"].commit(files | {"README.md": own.encode()})
    arguments = ("--no-vae", "--guidance-scale", "3", "--dtype", "bfloat16", "--push-to-hub", "tester/drifting-B")
    command("convert", "latent_B_sota", tmp_path / "again", *arguments, home=tmp_path, endpoint=hub.url)
    assert hub.repositories["tester/drifting-B"].files()["README.md"].decode() == own  # what its owner wrote stays
    command("convert", "latent_B_sota", tmp_path / "other", *arguments[:-1], "tester/latents", home=tmp_path, endpoint=hub.url)
    card = hub.repositories["tester/latents"].files()["README.md"].decode()
    assert "3.0 is taken if none is given" in card
    assert "convert latent_B_sota --dtype bfloat16 --guidance-scale 3.0 --no-vae`" in card
    done = command("convert", "latent_B_sota", target, home=tmp_path, endpoint=hub.url, status=1)
    assert "not an empty folder: nothing is overwritten" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_command_converts_encoders(hub, tmp_path):
    done = command("convert", "mae_pixel_640", tmp_path / "mae", "--dtype", "bfloat16", "--push-to-hub", "tester/mae", home=tmp_path,
                   endpoint=hub.url)  # fmt: skip
    assert "MaskedAutoencoder, " in done.stdout
    files = hub.repositories["tester/mae"].files()
    assert set(files) - {".gitattributes"} == {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
    assert 'MaskedAutoencoder.from_pretrained("tester/mae")' in files["README.md"].decode()
    script = """
from drifting_diffusers import MaskedAutoencoder
assert MaskedAutoencoder.from_pretrained("tester/mae", dtype=torch.bfloat16).config.num_classes == 12
"""
    run_script(PREAMBLE + script, tmp_path, hub.url)


def test_a_hub_that_is_not_there_is_one_line(tmp_path):
    done = command("convert", "latent_L_sota", tmp_path / "x", home=tmp_path, endpoint="http://127.0.0.1:9", status=1)
    assert done.stderr.startswith("drifting-diffusers: error: ")
    assert done.stderr.count("\n") == 1
    assert "latent_L_sota is not in the cache, or not whole, and the Hub cannot be asked: go online once" in done.stderr
    assert not (tmp_path / "x").exists()


# -- at full size

B2 = {
    "cond_dim": 768, "num_classes": 1000, "noise_classes": 64, "noise_coords": 32, "input_size": 32, "in_channels": 4, "out_channels": 4,
    "n_cls_tokens": 16, "patch_size": 2, "hidden_size": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0, "use_qknorm": True,
    "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "use_bf16": True, "attn_fp32": True, "use_remat": True,
}  # fmt: skip
L2 = B2 | {"cond_dim": 1024, "hidden_size": 1024, "depth": 24, "num_heads": 16}


def write_random(folder: Path, model_config: dict) -> int:
    """An artefact of this size, with random numbers, written map by map as memory allows; returns the file's size."""
    from drifting_diffusers.generator import DriftingGenerator
    from drifting_diffusers.layouts import generator_config, generator_layout

    with torch.device("meta"):
        model = DriftingGenerator(**generator_config(model_config))
    ours, tensors, rng = model.state_dict(), {}, torch.Generator().manual_seed(0)
    for names, paths in generator_layout(model.config):
        first, *rest = ours[names[0]].shape
        for path in paths:
            shape = [len(names) * first // len(paths), *rest]
            tensors[path] = 0.02 * torch.randn(shape[::-1] if path.endswith("/kernel") else shape, generator=rng)
    folder.mkdir(parents=True)
    with (folder / "ema_params.msgpack").open("wb") as file:
        msgpack.pack(tree_of(tensors), file)
    (folder / "metadata.json").write_text(json.dumps({"format": "flax.msgpack", "kind": "gen", "model_config": model_config}))
    return (folder / "ema_params.msgpack").stat().st_size


@pytest.mark.slow
def test_a_generator_of_full_size_comes_over_the_wire(hub, tmp_path):
    size = write_random(tmp_path / "artefact", B2)
    files = {f"models/gen/jax/latent_B_sota/{path.name}": path.read_bytes() for path in (tmp_path / "artefact").iterdir()}
    hub.repositories["Goodeat/drifting"].commit(files, "full")
    assert 500e6 < size < 560e6
    out = run_script(
        PREAMBLE
        + """
pipe = DriftingPipeline.from_release("latent_B_sota", revision="full")
print(sum(p.numel() for p in pipe.transformer.parameters()))
images = pipe(["macaw", "alp"], generator=[torch.Generator().manual_seed(i) for i in range(2)], output_type="pt").images
assert images.shape == (2, 3, 32, 32) and images.isfinite().all()  # the tests' decoder does not enlarge
""",
        tmp_path,
        hub.url,
    )
    assert 130_000_000 < int(out) < 136_000_000


@pytest.mark.slow
def test_463_million_weights_convert_in_bounded_memory(tmp_path, capsys):
    size = write_random(tmp_path / "artefact", L2)
    code = "import sys; from drifting_diffusers.cli import main; sys.exit(main())"
    watched = (
        "import resource, subprocess, sys, time; start = time.monotonic(); "
        f"subprocess.run([sys.executable, '-c', {code!r}, *sys.argv[1:]], check=True, stdout=sys.stderr); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, time.monotonic() - start)"
    )
    arguments = ["convert", str(tmp_path / "artefact"), str(tmp_path / "ours"), "--no-vae"]
    done = subprocess.run([sys.executable, "-c", watched, *arguments], capture_output=True, text=True, check=True)
    peak, seconds = map(float, done.stdout.split())
    with capsys.disabled():  # the log keeps how long it took: a bound of time would fail on another machine
        print(f"\n{size / 1e9:.2f} GB in {seconds:.0f} s, peak {peak / size:.2f} times its size")
    assert 1.84e9 < size < 1.9e9
    assert peak < 2.2 * size
