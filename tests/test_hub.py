"""The Hub, spoken with over HTTP: push, load, revisions, variants, cards, and a cache that needs no Hub.

The library reads its endpoint when it is imported, so what talks to the loopback Hub runs in processes of its own.
"""

import json
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError
from loopback_hub import LoopbackHub, Repository, run_script

from drifting_diffusers import DriftingGenerator, DriftingPipeline, hub

pytestmark = pytest.mark.hub

PREAMBLE = """
import json, shutil, sys, warnings
from pathlib import Path
import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import HfApi

FOLDER = Path(sys.argv[1])
def draw(pipe, label="cat"):
    return pipe(label, generator=torch.Generator().manual_seed(0), output_type="np").images
def same(a, b):
    return np.abs(a - b).max() < 1e-6
def weights(cache):
    return sorted(str(p.relative_to(p.parents[1])) for p in Path(cache).rglob("*.safetensors"))
def raises(kind, text, call, **kwargs):
    try:
        call(**kwargs)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}: {text}")
"""

BUILD = """
from drifting_diffusers import DriftingGenerator, DriftingPipeline

def generator(seed=0):
    torch.manual_seed(seed)
    model = DriftingGenerator(sample_size=8, in_channels=4, num_classes=2, num_layers=1, num_attention_heads=2, attention_head_dim=8,
                              num_class_tokens=1, num_style_tokens=2, style_codebook_size=3)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model
def autoencoder(seed=1):
    torch.manual_seed(seed)
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,), norm_num_groups=4,
                         sample_size=8)
def build(seed=0):
    return DriftingPipeline(generator(seed), vae=autoencoder(), labels=["cat", "dog"], guidance_scale=1.5)
"""


@pytest.fixture(scope="module")
def server():
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


def run(script: str, home: Path, endpoint: str, **environment: str) -> None:
    run_script(PREAMBLE + textwrap.dedent(script), home, endpoint, **environment)


@pytest.fixture(scope="module")
def pushed(server, home) -> dict[str, Repository]:
    """One process that pushes everything the tests look at."""
    run(
        BUILD
        + """
pipe = build()
np.save(FOLDER / "first.npy", draw(pipe))
commit = pipe.push_to_hub("tester/fish", commit_message="first")
(FOLDER / "first.sha").write_text(commit.oid)
HfApi().create_branch("tester/fish", branch="v1")
build(5).push_to_hub("tester/fish")
np.save(FOLDER / "second.npy", draw(build(5)))
build(7).push_to_hub("tester/fish", variant="fp16")
np.save(FOLDER / "variant.npy", draw(build(7)))

# networks alone
from drifting_diffusers import MaskedAutoencoder
generator().push_to_hub("tester/network", private=True)
encoder = MaskedAutoencoder(base_channels=32, layers_per_stage=[1, 1, 1, 1], num_classes=2)
encoder.push_to_hub("tester/encoder", max_shard_size="1MB")
encoder.save_pretrained(FOLDER / "saved", push_to_hub=True, repo_id="tester/saved-encoder", private=True)
generator().save_pretrained(FOLDER / "saved-network", push_to_hub=True)

# a variant of the generator alone
build(7).save_pretrained(FOLDER / "mixed", variant="fp16")
(FOLDER / "mixed/vae/diffusion_pytorch_model.fp16.safetensors").rename(FOLDER / "mixed/vae/diffusion_pytorch_model.safetensors")
build().save_pretrained(FOLDER / "mixed", push_to_hub=True, repo_id="tester/mixed")

# a stock layout, a checkpoint of a trainer and code that must never run
build().save_pretrained(FOLDER / "odd")
index = json.loads((FOLDER / "odd/model_index.json").read_text())
(FOLDER / "odd/model_index.json").write_text(json.dumps(index | {
    "_class_name": "DriftingPipeline", "transformer": ["drifting_diffusers.generator", "DriftingGenerator"], "labels": ["cat", "dog"]}))
(FOLDER / "odd/transformer/modeling_drifting.py").unlink()
(FOLDER / "odd/pipeline.py").write_text("raise SystemExit('code of the repository ran')")
(FOLDER / "odd/checkpoint-5/transformer").mkdir(parents=True)
shutil.copy(FOLDER / "odd/transformer/diffusion_pytorch_model.safetensors", FOLDER / "odd/checkpoint-5/transformer")
HfApi().create_repo("tester/odd")
HfApi().upload_folder(repo_id="tester/odd", folder_path=FOLDER / "odd")

# cards: the user's in the repository, the user's in the folder, ours with numbers
HfApi().create_repo("tester/kept")
HfApi().upload_file(repo_id="tester/kept", path_in_repo="README.md", path_or_fileobj=b"---\\nlibrary_name: mine\\n---\\nMy words.")
pipe.push_to_hub("tester/kept")
(FOLDER / "own").mkdir()
(FOLDER / "own/README.md").write_text("My own words.")
pipe.save_pretrained(FOLDER / "own", push_to_hub=True)
(FOLDER / "measured").mkdir()
(FOLDER / "measured/results.json").write_text(json.dumps({"metrics": {"fid": 42.5}, "dataset": "tester/data", "seeds": [0]}))
pipe.save_pretrained(FOLDER / "measured", push_to_hub=True, repo_id="tester/measured", private=True)
pipe.push_to_hub("tester/remeasured")
pipe.save_pretrained(FOLDER / "remeasured")
(FOLDER / "remeasured/results.json").write_text(json.dumps({"metrics": {"fid": 17.25}}))
pipe.save_pretrained(FOLDER / "remeasured", push_to_hub=True, repo_id="tester/remeasured")
""",
        home,
        server.url,
    )
    return server.repositories


def test_a_push_holds_the_folder_and_our_card(pushed, home):
    files = pushed["tester/fish"].files((home / "first.sha").read_text())
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "model_index.json",
        "pipeline.py",
        "samples.png",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/modeling_drifting.py",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    card = files["README.md"].decode()
    assert "library_name: drifting-diffusers" in card
    assert 'DriftingPipeline.from_pretrained("tester/fish")' in card
    assert str(home) not in card
    assert json.loads(files["model_index.json"])["_class_name"] == ["pipeline", "DriftingPipeline"]


def test_cards(pushed):
    cards = {name: repository.files()["README.md"].decode() for name, repository in pushed.items() if name != "tester/odd"}
    assert cards["tester/kept"].endswith("My words.")
    assert cards["tester/own"] == "My own words."
    assert "| fid | 42.5 |" in cards["tester/measured"]
    assert "- seeds: [0]" in cards["tester/measured"]
    assert "| fid | 17.25 |" in cards["tester/remeasured"]  # our own card of the first push gives way to the new one
    assert hub.CARD_MARK in cards["tester/remeasured"]


@pytest.fixture(scope="module")
def fetched(pushed, server, home) -> set[str]:
    """One process that loads everything with our class, and fills the cache; the paths that it fetched."""
    server.requests.clear()
    run(
        """
from drifting_diffusers import DriftingGenerator, DriftingPipeline
load = DriftingPipeline.from_pretrained
first, second, variant = (np.load(FOLDER / f"{name}.npy") for name in ("first", "second", "variant"))
pipe = load("tester/fish")
assert pipe.labels == ["cat", "dog"] and pipe.config.guidance_scale == 1.5
assert same(draw(pipe), second)
assert same(draw(load("tester/fish", revision="v1")), first)
assert same(draw(load("tester/fish", revision=(FOLDER / "first.sha").read_text())), first)
assert same(draw(load("tester/fish", variant="fp16", cache_dir=FOLDER / "c1")), variant)
assert weights(FOLDER / "c1") == [f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in ("transformer", "vae")]
assert same(draw(load("tester/fish", variant="fp16")), variant)  # beside the plain weights in one cache
assert same(draw(load("tester/mixed", variant="fp16", cache_dir=FOLDER / "c2")), variant)
assert weights(FOLDER / "c2") == ["transformer/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"]
raises(ValueError, "no safetensors weights of variant 'bf16'", lambda: load("tester/fish", variant="bf16"))

plain = load("tester/fish", vae=None, cache_dir=FOLDER / "c3")
assert plain.vae is None and weights(FOLDER / "c3") == ["transformer/diffusion_pytorch_model.safetensors"]
other = load("tester/fish", transformer=plain.transformer, cache_dir=FOLDER / "c4")
assert same(draw(other), second) and weights(FOLDER / "c4") == ["vae/diffusion_pytorch_model.safetensors"]

assert same(draw(load("tester/odd", cache_dir=FOLDER / "c5")), first)
assert weights(FOLDER / "c5") == [f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae")]
assert DriftingGenerator.from_pretrained("tester/fish", subfolder="transformer").config.num_classes == 2

assert same(draw(load("tester/measured")), first)
raises(OSError, "tester/measured", lambda: load("tester/measured", token=False, cache_dir=FOLDER / "c6"))
raises(OSError, "tester/nothing", lambda: load("tester/nothing"))
raises(OSError, "v9", lambda: load("tester/fish", revision="v9"))
""",
        home,
        server.url,
    )
    return {path for method, path in server.requests if method == "GET" and "/resolve/" in path}


def test_networks_alone_have_cards_of_ours(server, pushed, home):
    names = {"network": "DriftingGenerator", "saved-network": "DriftingGenerator"}
    names |= {"encoder": "MaskedAutoencoder", "saved-encoder": "MaskedAutoencoder"}
    for name, cls in names.items():
        card = pushed[f"tester/{name}"].files()["README.md"].decode()
        assert "library_name: drifting-diffusers" in card
        assert f'{cls}.from_pretrained("tester/{name}")' in card
    load = (f'{cls}.from_pretrained("tester/{name}").config.num_classes == 2' for name, cls in names.items())
    run("from drifting_diffusers import DriftingGenerator, MaskedAutoencoder\nassert " + " and ".join(load), home, server.url)
    assert pushed["tester/network"].private
    assert pushed["tester/saved-encoder"].private
    assert sum(path.endswith(".safetensors") for path in pushed["tester/encoder"].files()) > 1


def test_our_class_loads_from_the_hub_and_fetches_no_code(fetched):
    assert len(fetched) > 10
    assert not [path for path in fetched if path.endswith((".py", ".md")) or "checkpoint" in path]


def test_the_cache_needs_no_hub(fetched, home):
    """In a process of its own: offline is decided when the library is imported. Nobody listens at the endpoint."""
    run(
        """
from drifting_diffusers import DriftingPipeline
load = DriftingPipeline.from_pretrained
first, second, variant = (np.load(FOLDER / f"{name}.npy") for name in ("first", "second", "variant"))
assert same(draw(load("tester/fish")), second)
assert same(draw(load("tester/fish", variant="fp16")), variant)
assert same(draw(load("tester/fish", revision="v1", local_files_only=True)), first)
raises(OSError, "tester/unknown", lambda: load("tester/unknown"))
""",
        home,
        "http://127.0.0.1:9",
        HF_HUB_OFFLINE="1",
    )


def test_diffusers_itself_loads_folders_and_repositories(pushed, server, home):
    """In a process that never heard of us: the package is imported by the shims, and only when they are trusted."""
    run(
        """
load = DiffusionPipeline.from_pretrained
second, variant = np.load(FOLDER / "second.npy"), np.load(FOLDER / "variant.npy")
for place in ("tester/fish", FOLDER / "mixed"):
    raises(ValueError, "trust_remote_code", lambda: load(place))
assert not [name for name in sys.modules if name.startswith("drifting_diffusers")]
pipe = load("tester/fish", trust_remote_code=True)
assert type(pipe).__module__ == "drifting_diffusers.pipeline"
assert same(draw(pipe), second)
assert same(draw(load("tester/fish", trust_remote_code=True, variant="fp16")), variant)
assert same(draw(load(FOLDER / "mixed", trust_remote_code=True, variant="fp16")), variant)
assert pipe.labels == ["cat", "dog"]
for name in ("trainer", "objective", "bank", "data", "features", "losses", "fields"):
    assert f"drifting_diffusers.{name}" not in sys.modules, name
""",
        home,
        server.url,
    )


def test_a_network_that_fails_replaces_nobodys_readme(tmp_path):
    """Tests are offline, so it cannot be known what stands in the repository."""
    pipe = DriftingPipeline(
        DriftingGenerator(sample_size=8, in_channels=1, num_classes=2, num_layers=1, num_attention_heads=1, attention_head_dim=8)
    )
    with pytest.raises(LocalEntryNotFoundError):
        hub.settle_card(HfApi(), pipe, tmp_path, "user/repository")
    assert not (tmp_path / "README.md").exists()
