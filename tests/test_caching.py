"""How much memory cached features take is said before it is taken, and more than there is is refused; networks are laid out and compiled in place."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_encoded import encoder, samples
from test_options import distance, generator
from test_trainer import images, one_accelerator_per_test, trainer, weights
from torch.testing import assert_close

from drifting_diffusers import DriftingConfig, DriftingObjective, MultiScaleStatistics, Pixels, caching
from drifting_diffusers.caching import Packing, check_cache, free_memory
from drifting_diffusers.classifiers import SmallClassifier
from drifting_diffusers.encoders import MaskedAutoencoder

__all__ = ["images", "one_accelerator_per_test"]

CPU = torch.device("cpu")
QUICK = {"max_steps": 3, "eval_steps": 0, "preview_steps": 0, "save_steps": 2, "ema_decay": 0.0}


def told(numbers, free, monkeypatch, **changes):
    monkeypatch.setattr(caching, "free_memory", lambda device: free)
    said = []
    check_cache(DriftingConfig("unused", **changes), numbers, classes=1000, device=CPU, tell=said.append)
    return said[0]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"cache_features": "negatives"},
            "cache_features='negatives' keeps features of 1,000 samples, 1,511,424 numbers of float32 each: 6.05 GB on cpu, ",
        ),
        ({"cache_features": "negatives", "bank_dtype": "bfloat16"}, "1,511,424 numbers of bfloat16 each: 3.02 GB on cpu"),
        (
            {"cache_features": "all"},
            "cache_features=True keeps features of 129,000 samples, 1,511,424 numbers of float32 each: 780 GB on cpu",
        ),
    ],
)
def test_the_memory_is_that_of_the_banks(changes, what, monkeypatch):
    """The ablation recipe's: 1,000 classes of 128 samples and 1,000 of any class."""
    assert what in told(1_511_424, int(1e12), monkeypatch, **changes)


def test_more_than_there_is_is_refused_with_what_takes_less(monkeypatch, as_users_see_it):
    with pytest.raises(
        ValueError, match=r"would keep .*780 GB on cpu, 64 GB free: take cache_features='negatives' \(6.05 GB\), bank_dtype='bfloat16'"
    ):
        told(1_511_424, int(64e9), monkeypatch, cache_features=True)
    with pytest.raises(ValueError, match=r"3.02 GB on cpu, 1.00 GB free: take smaller banks, or leave it out"):
        told(1_511_424, int(1e9), monkeypatch, cache_features="negatives", bank_dtype="bfloat16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=r"6.05 GB on cpu in each of 8 processes, 40 GB free"):
        told(1_511_424, int(40e9), monkeypatch, cache_features="negatives")


def test_a_run_is_refused_before_its_banks_are_made(images, tmp_path, monkeypatch, as_users_see_it):
    monkeypatch.setattr(caching, "free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="cache_features=True would keep features of 34 samples, 64 numbers"):
        trainer(images, tmp_path / "run", cache_features="all")
    assert not (tmp_path / "run").exists()


def test_a_container_may_leave_less_than_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "CGROUP", tmp_path)
    machine = free_memory(CPU)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert free_memory(CPU) == 3000 < machine
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 3000


def test_a_pack_is_the_same_whatever_comes_with_it():
    pack = Packing(DriftingObjective([encoder().activations]), 4, CPU)
    x = samples(1, 7, 0)[0]
    assert_close(pack(x)[4:], pack(x[4:]), rtol=0, atol=0)
    assert len(pack(x)) == 7


@pytest.mark.parametrize("changes", [{"cache_features": "positives"}, {"cache_features": "negatives", "unconditional_per_label": 0}])
def test_caches_of_what_is_not_there_are_refused(changes, as_users_see_it):
    with pytest.raises(ValueError, match=r"must be true, false, 'negatives' or 'all', got 'positives'|unconditional_per_label=0 has none"):
        DriftingConfig("unused", **changes)


def test_all_is_true_and_files_say_so():
    assert DriftingConfig("unused", cache_features="all") == DriftingConfig("unused", cache_features=True)
    assert json.loads(DriftingConfig("unused", cache_features="negatives").to_json())["cache_features"] == "negatives"


# -- layout, compilation


def compared(images, folder, network, **changes):
    objective = DriftingObjective([Pixels(), network.activations])
    run = trainer(images, folder, generator=generator(), objective=objective, **(QUICK | changes))
    run.train()
    return run


def test_channels_last_is_how_maps_lie_in_memory_and_changes_nothing(images, tmp_path):
    plain = weights(compared(images, tmp_path / "a", encoder()))
    network, seen = encoder(), []
    network.stages[0][0].conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.stride()))
    assert distance(weights(compared(images, tmp_path / "b", network, channels_last=True)), plain) < 1e-3
    assert all(channels == 1 for _, channels, _, _ in seen)
    assert seen


@pytest.mark.parametrize("option", ["channels_last", "compile_features"])
def test_options_without_a_network_are_refused(option, images, tmp_path, as_users_see_it):
    with pytest.raises(
        ValueError, match=rf"{option} is of (convolutions|networks), and no feature map here has one with weights: leave it out"
    ):
        trainer(images, tmp_path / "run", objective=DriftingObjective([Pixels(), MultiScaleStatistics()]), **{option: True})


def test_what_is_compiled_is_what_is_called(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **kwargs: compiled.append(type(self).__name__))
    for feature_maps in ([encoder()], [SmallClassifier(1, 3).activations], [torch.nn.Conv2d(1, 1, 3)]):
        DriftingObjective(feature_maps).arrange(channels_last=False, compiled=True)
    assert compiled == ["ResidualBlock"] * 5 + ["Sequential"] * 4 + ["Conv2d"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("changes", [{}, {"labels_per_microbatch": 1, "cache_features": "negatives"}], ids=["plain", "two passes"])
def test_compiled_networks_make_the_same_update_and_their_names_stay(changes, images, tmp_path):
    plain = weights(compared(images, tmp_path / "a", encoder()))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = encoder()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        run = compared(images, tmp_path / "b", network, compile_features=True, torch_compile=True, channels_last=True, **changes)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
    assert distance(weights(run), plain) < 1e-3
    run.save_model()
    files = [*(tmp_path / "b").rglob("*.safetensors")]
    names = [*network.state_dict(), *weights(run), *run.generator.state_dict(), *(name for file in files for name in load_file(file))]
    assert len(files) > 1
    assert not [name for name in names if "_orig_mod" in name]


def test_what_the_page_computes_for_the_recipes_is_what_is_kept():
    """Maps grow with the encoder's width, so a narrow one tells; the latent itself is kept beside them."""
    page = (Path(__file__).parents[1] / "docs/imagenet.md").read_text()
    objective = DriftingObjective([MaskedAutoencoder(4, 32, num_classes=2).eval().requires_grad_(False).activations])
    latent = 4 * 32 * 32
    maps = objective.pack(torch.zeros(1, 4, 32, 32)).shape[1] - latent
    features = sum(values.numel() for values in objective.features(torch.zeros(1, 4, 32, 32)).values()) - latent - 4
    kept = {width: maps * width // 32 + latent for width in (256, 640)}
    distinct = 4096 + 4096 + 1000 * (1 - (1 - 16 / 1000) ** 64)  # generated, positive, and of 64 x 16 draws from 1,000
    assert f"{2 * kept[256] / 1e6:.0f} and {2 * kept[640] / 1e6:.1f} MB" in page
    assert f"{distinct * 2 * kept[256] / 1e9:.0f} GB | {4096 * 4 * (features * 8 + latent) / 1e9:.0f} GB" in page
    assert f"about {round(distinct - 4096, -1):,.0f} are distinct" in page
    assert f"{1000 * 2 * kept[256] / 1e9:.1f} GB for width 256, {1000 * 2 * kept[640] / 1e9:.1f} GB for width 640" in page
    assert f"it would take {(4096 + 5120) * 4 * (features * 8 + latent) / 1e9:.0f} GB" in page
    assert f"for few classes: {128_000 * 2 * kept[256] / 1e9:.0f} GB" in page
